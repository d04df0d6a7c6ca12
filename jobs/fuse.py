"""Fuse evaluations of the same videos: the weighted sum of their scores, 1 for RGB and 2 for flow in the paper (section 5.1).

    python -m jobs.fuse --scores runs/rgb/evaluations/test-25x10 runs/flow/evaluations/test-25x10
    python -m jobs.fuse --scores A B C --weights 1 2 1 --out runs/fusions/abc

The sum is divided by the weights' sum, so that it is a probability again. With --out, the fused scores lie in that folder as an
evaluation's do (scores.parquet, result.json), and can be fused again.

--json FILE holds: inputs [{scores, weight, top1, top5}], top1, top5, videos, per_class {class: {videos, top1}}, scores (the fused
file, null without --out).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from cluster.checkpoints.run_folder import read_json
from grurcn.evaluation.score_files import FILE, RESULT, Row, Scores, read_scores, scores_file, write_folder
from jobs.command import Command, finish
from shards.store import open_store


class OtherVideos(ValueError):
    """Evaluations that are not of the same videos, labels and classes."""


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Options of a fusion."""

    scores: tuple[Path, ...]
    """Two evaluations or more: their folders (RUN/evaluations/SPLIT-CLIPSxVIEWS) or their scores.parquet."""
    weights: tuple[float, ...] | None = None
    """One for each evaluation. Default: 1 and 2, where there are two."""
    out: Path | None = None
    """Write the fused scores into this folder."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        checked_weights(len(self.scores), self.weights)


@dataclass(frozen=True)
class Input:
    """One of the evaluations that were fused."""

    scores: str  # its scores.parquet
    weight: float
    top1: float
    top5: float


@dataclass(frozen=True)
class Fusion:
    """The fused scores, and how good they and each input are."""

    inputs: tuple[Input, ...]
    scores: Scores
    top1: float
    top5: float


def main(job: Fuse) -> int:
    """Fuses, writes and says what came out; gives back the exit status."""
    if job.out is not None:
        check_out(job.out, job.scores)
    fusion = fuse(job.scores, job.weights)
    result = {
        "inputs": [dataclasses.asdict(one) for one in fusion.inputs],
        "top1": fusion.top1,
        "top5": fusion.top5,
        "videos": len(fusion.scores.rows),
        "per_class": fusion.scores.per_class(),
        "scores": None if job.out is None else str(job.out.absolute() / FILE),
    }
    if job.out is not None:
        write_folder(job.out.absolute(), fusion.scores, result)
    parts = "; ".join(
        f"{path} x {one.weight:g}: top-1 {one.top1:.4f}, top-5 {one.top5:.4f}"
        for path, one in zip(job.scores, fusion.inputs, strict=True)
    )
    where = "" if job.out is None else f"; scores and per-class accuracy in {job.out}"
    finish(
        f"fused {len(fusion.inputs)} evaluations of {result['videos']:,} videos: top-1 {fusion.top1:.4f}, top-5 "
        f"{fusion.top5:.4f} ({parts}){where}",
        result,
        job.json,
    )
    return 0


def fuse(paths: Sequence[Path], weights: Sequence[float] | None = None) -> Fusion:
    """Evaluations, as folders or files, and a weight for each (default 1 and 2) -> sum(weight * scores) / sum(weight).

    Raises BadScores for a file that cannot be read, OtherVideos for evaluations of different videos, labels or classes,
    ValueError for weights that do not fit.
    """
    weights = checked_weights(len(paths), weights)
    all_scores = [read_scores(path) for path in paths]
    first = all_scores[0]
    for path, other in zip(paths[1:], all_scores[1:], strict=True):
        check_same(paths[0], first, path, other)
    by_key = [{row["key"]: row["scores"] for row in scores.rows} for scores in all_scores]
    fused = Scores(
        first.classes,
        [Row({**row, "scores": weighted_mean([of[row["key"]] for of in by_key], weights)}) for row in first.rows],
    )
    inputs = tuple(
        Input(scores=str(scores_file(path).absolute()), weight=weight, **scores.accuracy())
        for path, weight, scores in zip(paths, weights, all_scores, strict=True)
    )
    return Fusion(inputs, fused, **fused.accuracy())


def weighted_mean(scores: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """One video's scores of each evaluation (E, K), and the weights (E,) -> their weighted mean (K,)."""
    total = sum(weights)
    return [
        sum(weight * score for weight, score in zip(weights, of_class, strict=True)) / total
        for of_class in zip(*scores, strict=True)
    ]


def checked_weights(num_scores: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """The weights, or the paper's for two evaluations. Raises ValueError if they are not one positive number each."""
    if num_scores < 2:
        raise ValueError(f"evaluations to fuse: {num_scores}; wanted at least two (--scores A B)")
    if weights is None and num_scores == 2:
        return 1.0, 2.0
    if weights is None:
        raise ValueError(f"{num_scores} evaluations without weights: wanted one each (--weights 1 2 ...)")
    listed = ", ".join(f"{weight:g}" for weight in weights) or "(none)"
    if len(weights) != num_scores:
        raise ValueError(f"weights {listed} for {num_scores} evaluations: wanted one each")
    if min(weights) <= 0 or not math.isfinite(sum(weights)):
        raise ValueError(f"weights {listed}: wanted finite numbers above 0")
    return tuple(float(weight) for weight in weights)


def check_same(first_path: Path, first: Scores, path: Path, other: Scores) -> None:
    """Raises OtherVideos unless both have the same classes, in the same order, and the same videos with the same labels."""
    for number, (one, two) in enumerate(zip_longest(first.classes, other.classes)):
        if one != two:
            raise OtherVideos(
                f"{path}: class {number} is {two or '(none)'}, but {one or '(none)'} in {first_path} ({len(other.classes)} and "
                f"{len(first.classes)} classes); wanted evaluations of models for the same classes"
            )
    labels, others = ({row["key"]: row["label"] for row in scores.rows} for scores in (first, other))
    if labels.keys() != others.keys():
        raise OtherVideos(
            f"{path}: {some(others.keys() - labels.keys())} that {first_path} has not, and lacks "
            f"{some(labels.keys() - others.keys())} that it has; wanted evaluations of the same videos"
        )
    differing = sorted(key for key in labels if labels[key] != others[key])
    if differing:
        key = differing[0]
        raise OtherVideos(
            f"{path}: {len(differing)} of {len(labels)} videos have other labels than in {first_path}: {key} is "
            f"{first.classes[others[key]]}, there {first.classes[labels[key]]}; wanted evaluations of the same videos"
        )


def some(keys: set[str]) -> str:
    """How many they are, and the first of them."""
    few = sorted(keys)[:3]
    return f"{len(keys)} video{'s' * (len(keys) != 1)}" + (
        f" ({', '.join(few)}{', ...' * (len(keys) > len(few))})" if keys else ""
    )


def check_out(out: Path, paths: Sequence[Path]) -> None:
    """Raises ValueError if writing there would replace anything but an earlier fusion, or one of the inputs."""
    if any(path.resolve().is_relative_to(out.resolve()) for path in paths):
        raise ValueError(f"{out}: holds scores that are to be fused; wanted another folder for what comes out")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if found and (found != sorted([FILE, RESULT]) or "inputs" not in read_json(open_store(out), RESULT)):
        raise ValueError(
            f"{out}: holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}; wanted a new folder, or one that "
            "python -m jobs.fuse wrote, which it replaces"
        )


COMMAND = Command(Fuse, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
