"""Files of scores, as an evaluation and a fusion write them: FOLDER/scores.parquet, a row a video, and FOLDER/result.json.

    key         the video, by its name in the shards
    label       the number of its class, and
    class       its name
    predicted   name of the class with the highest score; of equal ones, that with the lowest number
    scores      the probability of each class
    levels      the same by each level of the model, whose mean it is; not in the file of a fusion

The names of all classes, in the order of their numbers, are the list "classes" (JSON) in the metadata of the file, those of the
levels the list "levels".
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.checkpoints.run_folder import write_json
from cluster.progress import first_line
from grurcn.evaluation.confusion import Judgement
from grurcn.training.losses import Tally
from shards.store import Store, open_store

FILE, RESULT = "scores.parquet", "result.json"
WANTED = f"the {FILE} of an evaluation by python -m jobs.evaluate; if an older version wrote it, evaluate again"
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
    """A file of scores that cannot be read. The message names the file, what was found and what was wanted."""


class Row(TypedDict):
    """The scores of one video."""

    key: str
    label: int
    scores: list[float]  # one a class
    levels: NotRequired[list[list[float]]]  # (L, K), of one model's evaluation
    number: NotRequired[int]  # in its split, as long as an evaluation goes on


@dataclass(frozen=True)
class Scores:
    """The scores of a split's videos, by one model or by several together."""

    classes: tuple[str, ...]
    rows: list[Row]
    levels: tuple[str, ...] = ()  # names of the levels, where rows have them

    def accuracy(self) -> dict[str, float]:
        """top1 and top5: the share of videos whose class has the highest score, and one of the five highest."""
        tally = Tally(torch.device("cpu"))
        probability = torch.tensor([row["scores"] for row in self.rows], dtype=torch.float64)  # (N, K)
        tally.add(probability.log(), torch.tensor([row["label"] for row in self.rows]))
        videos, _, top1, top5 = tally.sums.tolist()  # as they are: the rows are those of all ranks already
        return {"top1": top1 / videos, "top5": top5 / videos}

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {videos, top1}}, for the classes that have videos."""
        return self.judgement().per_class()

    def judgement(self) -> Judgement:
        """What is right and wrong. Rows without levels count as of one level, "all"."""
        judgement = Judgement(self.classes, self.levels or ("all",))
        levels = torch.tensor(
            [row["levels"] if "levels" in row else [row["scores"]] for row in self.rows], dtype=torch.float64
        )  # (N, L, K)
        label = torch.tensor([row["label"] for row in self.rows])
        keys, numbers = [row["key"] for row in self.rows], [row.get("number", -1) for row in self.rows]
        judgement.add(levels, label, keys, numbers)
        return judgement


def predicted(row: Row) -> int:
    """The number of the class with the highest score, the first of equal ones."""
    return max(range(len(row["scores"])), key=row["scores"].__getitem__)


def write_folder(folder: Path, scores: Scores, result: dict[str, Any]) -> None:
    """scores.parquet and result.json, together under their final name; a folder that was there before is replaced."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    table = pa.Table.from_pylist(
        [
            {**row, "class": scores.classes[row["label"]], "predicted": scores.classes[predicted(row)]}
            for row in sorted(scores.rows, key=lambda row: row["key"])
        ],
        schema=schema_of(scores),
    )
    pq.write_table(table, partial / FILE)
    write_json(open_store(partial), RESULT, result)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def schema_of(scores: Scores) -> pa.Schema:
    """The columns of a file of scores, and its metadata."""
    about = {"classes": json.dumps(scores.classes)}
    if not scores.levels:
        return SCHEMA.with_metadata(about)
    return SCHEMA.append(LEVELS).with_metadata({**about, "levels": json.dumps(scores.levels)})


def copy_into(store: Store, name: str, folder: Path, files: Sequence[str] = (FILE, RESULT)) -> None:
    """Copies files, those of write_folder or others, into a store's folder, in their order: result.json last."""
    for file in files:
        with store.written(f"{name}/{file}") as target:
            target.write((folder / file).read_bytes())


def read_scores(path: Path) -> Scores:
    """The scores in a folder that write_folder wrote, or in its scores.parquet.

    Raises BadScores if there is no such file, it is not ours, or a video's scores are not one probability a class.
    """
    file = scores_file(path)
    if not file.is_file():
        raise BadScores(f"{file}: no such file; wanted the folder of an evaluation (RUN/evaluations/...) or its {FILE}")
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise BadScores(f"{file}: not a Parquet file ({first_line(error)}); wanted {WANTED}") from None
    classes = (table.schema.metadata or {}).get(b"classes")
    lacking = [name for name in SCHEMA.names if name not in table.column_names]
    if classes is None or lacking:
        found = f"no {', '.join(lacking)} among the columns {', '.join(table.column_names)}"
        raise BadScores(f"{file}: {found if lacking else 'no list of classes in its metadata'}; wanted {WANTED}")
    try:
        scores = Scores(tuple(json.loads(classes)), rows_of(table.select(SCHEMA.names).cast(SCHEMA)))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise BadScores(f"{file}: {first_line(error)}; wanted {WANTED}") from None
    check(file, scores)
    return scores


def scores_file(path: Path) -> Path:
    """The scores.parquet of a folder, or the file itself."""
    return path / FILE if path.is_dir() else path


def rows_of(table: pa.Table) -> list[Row]:
    return [Row(key=row["key"], label=row["label"], scores=row["scores"]) for row in table.to_pylist()]


def check(file: Path, scores: Scores) -> None:
    """Raises BadScores for a file without videos, a video that is there twice, or one without a probability a class."""
    if not scores.rows:
        raise BadScores(f"{file}: no videos in it; wanted at least one")
    seen: set[str] = set()
    for row in scores.rows:
        if row["key"] in seen:
            raise BadScores(f"{file}: the video {row['key']} is there twice; wanted each once")
        seen.add(row["key"])
        if row["label"] not in range(len(scores.classes)):
            raise BadScores(
                f"{file}: the video {row['key']} has label {row['label']}; wanted 0 to {len(scores.classes) - 1}"
            )
        values = row["scores"]
        sound = [value for value in values if value is not None and 0 <= value < math.inf]
        if len(sound) < len(values) or len(values) != len(scores.classes):
            raise BadScores(
                f"{file}: the video {row['key']} has {len(values)} scores, {len(sound)} of them probabilities; wanted "
                f"{len(scores.classes)}, one for each class"
            )
