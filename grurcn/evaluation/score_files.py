"""The files of an evaluation and of a fusion: FOLDER/scores.parquet, with a row per video, and FOLDER/result.json.

    key         the video's key in the shards
    label       number of its class
    class       name of its class
    predicted   name of the class with the highest score; the first of several
    scores      the probability of each class
    levels      the probabilities of each level of the model, whose mean is `scores`; not in the file of a fusion

The file's metadata holds the names of the classes as the JSON list "classes", and the names of the levels as "levels".
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.checkpoints.run_folder import write_json
from grurcn.evaluation.confusion import Confusion
from grurcn.training.losses import Tally
from shards.store import Store, error_line, open_store

SCORES_FILE, RESULT_FILE = "scores.parquet", "result.json"
EXPECTED = f"expected the {SCORES_FILE} of python -m jobs.evaluate; if an older version wrote it, evaluate again"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("predicted", pa.string(), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
    ]
)
LEVELS = pa.field("levels", pa.list_(pa.list_(pa.float64())), nullable=False)


class BadScores(ValueError):
    """A file of scores that cannot be read. The message names the file, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class VideoScores:
    """The scores of one video."""

    key: str
    label: int
    scores: list[float]  # (K,)
    levels: list[list[float]] | None = None  # (L, K), of an evaluation
    number: int = -1  # in its split; known during an evaluation only

    @property
    def predicted(self) -> int:
        """The number of the class with the highest score, the first of several."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)


@dataclass(frozen=True)
class Scores:
    """The scores of a split's videos, by one model or by several that were fused."""

    classes: tuple[str, ...]
    videos: list[VideoScores]
    levels: tuple[str, ...] = ()  # names of the levels, if videos have them

    def accuracy(self) -> dict[str, float]:
        """top1 and top5: the fractions of videos whose class has the highest score, or one of the five highest."""
        tally = Tally(torch.device("cpu"))
        probability = torch.tensor([video.scores for video in self.videos], dtype=torch.float64)  # (N, K)
        tally.add(probability.log(), torch.tensor([video.label for video in self.videos]))
        videos, _, top1, top5 = tally.sums.tolist()  # without a reduction: these are the videos of all ranks
        return {"top1": top1 / videos, "top5": top5 / videos}

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {videos, top1}}, for the classes that have videos."""
        return self.confusion().per_class()

    def confusion(self) -> Confusion:
        """Confusion and accuracy of each level. Videos without levels count as having one, "all"."""
        confusion = Confusion(self.classes, self.levels or ("all",))
        levels = torch.tensor(
            [[video.scores] if video.levels is None else video.levels for video in self.videos], dtype=torch.float64
        )  # (N, L, K)
        label = torch.tensor([video.label for video in self.videos])
        keys, numbers = [video.key for video in self.videos], [video.number for video in self.videos]
        confusion.add(levels, label, keys, numbers)
        return confusion


def write_folder(folder: Path, scores: Scores, result: dict[str, Any]) -> None:
    """Writes scores.parquet and result.json into a new folder, then renames it. An existing folder is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    table = pa.Table.from_pylist(
        [
            {**vars(video), "class": scores.classes[video.label], "predicted": scores.classes[video.predicted]}
            for video in sorted(scores.videos, key=lambda video: video.key)
        ],
        schema=schema_of(scores),
    )
    pq.write_table(table, partial / SCORES_FILE)
    write_json(open_store(partial), RESULT_FILE, result)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def schema_of(scores: Scores) -> pa.Schema:
    """The columns of a file of scores, with its metadata."""
    metadata = {"classes": json.dumps(scores.classes)}
    if not scores.levels:
        return SCHEMA.with_metadata(metadata)
    return SCHEMA.append(LEVELS).with_metadata({**metadata, "levels": json.dumps(scores.levels)})


def copy_into(store: Store, name: str, folder: Path, files: Sequence[str]) -> None:
    """Copies files from a local folder into a folder of a store, in order: result.json should be the last."""
    for file in files:
        with store.written(f"{name}/{file}") as target:
            target.write((folder / file).read_bytes())


def read_scores(path: Path) -> Scores:
    """The scores in a folder that write_folder wrote, or in its scores.parquet.

    Raises BadScores if there is no such file, it is not ours, or a video has not one probability per class.
    """
    file = scores_path(path)
    if not file.is_file():
        raise BadScores(
            f"{file}: no such file; expected the folder of an evaluation (RUN/evaluations/...) or its {SCORES_FILE}"
        )
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise BadScores(f"{file}: not a Parquet file ({error_line(error)}); {EXPECTED}") from None
    classes = (table.schema.metadata or {}).get(b"classes")
    lacking = [name for name in SCHEMA.names if name not in table.column_names]
    if classes is None or lacking:
        found = f"no {', '.join(lacking)} among the columns {', '.join(table.column_names)}"
        raise BadScores(f"{file}: {found if lacking else 'no list of classes in its metadata'}; {EXPECTED}")
    try:
        rows = table.select(SCHEMA.names).cast(SCHEMA).to_pylist()
        videos = [VideoScores(key=row["key"], label=row["label"], scores=row["scores"]) for row in rows]
        scores = Scores(tuple(json.loads(classes)), videos)
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise BadScores(f"{file}: {error_line(error)}; {EXPECTED}") from None
    validate_scores(file, scores)
    return scores


def scores_path(path: Path) -> Path:
    """The scores.parquet of a folder, or the file itself."""
    return path / SCORES_FILE if path.is_dir() else path


def validate_scores(file: Path, scores: Scores) -> None:
    """Raises BadScores if there are no videos, a video occurs twice, or one has not one probability per class."""
    if not scores.videos:
        raise BadScores(f"{file}: no videos; expected at least one")
    seen: set[str] = set()
    for video in scores.videos:
        if video.key in seen:
            raise BadScores(f"{file}: the video {video.key} occurs twice; expected each once")
        seen.add(video.key)
        if video.label not in range(len(scores.classes)):
            raise BadScores(
                f"{file}: the video {video.key} has label {video.label}; expected 0 to {len(scores.classes) - 1}"
            )
        valid = [score for score in video.scores if score is not None and 0 <= score < math.inf]
        if len(valid) < len(video.scores) or len(video.scores) != len(scores.classes):
            raise BadScores(
                f"{file}: the video {video.key} has {len(video.scores)} scores, {len(valid)} of them probabilities; expected "
                f"{len(scores.classes)}, one per class"
            )
