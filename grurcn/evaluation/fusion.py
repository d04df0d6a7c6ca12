"""Fusing evaluations of the same videos: the weighted mean of their scores (paper section 5.1)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cluster.checkpoints.run_folder import read_json
from grurcn.evaluation.score_files import RESULT_FILE, SCORES_FILE, Scores, read_scores, scores_path, write_folder
from shards.store import open_store

PAPER_WEIGHTS = (1.0, 2.0)  # of RGB and flow


class OtherVideos(ValueError):
    """Evaluations that are not of the same videos, labels and classes."""


@dataclass(frozen=True, kw_only=True)
class FuseJob:
    """Which evaluations to fuse. Raises ValueError for weights that do not fit."""

    scores: tuple[Path, ...]
    """Two or more evaluations: their folders (RUN/evaluations/SPLIT-CLIPSxVIEWS) or their scores.parquet."""
    weights: tuple[float, ...] | None = None
    """A weight for each evaluation. Default for two evaluations: 1 and 2."""
    out: Path | None = None
    """Write the fused scores into this folder."""

    def __post_init__(self) -> None:
        self.fusion_weights()

    def fusion_weights(self) -> tuple[float, ...]:
        """A finite weight above 0 for each evaluation."""
        count = len(self.scores)
        if count < 2:
            raise ValueError(f"evaluations to fuse: {count}; expected at least two (--scores A B)")
        if self.weights is None and count > 2:
            raise ValueError(f"{count} evaluations without weights: expected one each (--weights 1 2 ...)")
        weights = PAPER_WEIGHTS if self.weights is None else self.weights
        listed = ", ".join(f"{weight:g}" for weight in weights) or "(none)"
        if len(weights) != count:
            raise ValueError(f"weights {listed} for {count} evaluations: expected one each")
        if min(weights) <= 0 or not math.isfinite(sum(weights)):
            raise ValueError(f"weights {listed}: expected finite numbers above 0")
        return tuple(float(weight) for weight in weights)


@dataclass(frozen=True)
class Input:
    """One of the fused evaluations."""

    scores: str  # its scores.parquet
    weight: float
    top1: float
    top5: float


@dataclass(frozen=True)
class Fusion:
    """The fused scores, and the accuracy of them and of each input."""

    inputs: tuple[Input, ...]
    scores: Scores
    top1: float
    top5: float
    file: Path | None  # where the fused scores were written

    def to_dict(self) -> dict[str, Any]:
        """As result.json and --json hold it."""
        return {
            "inputs": [dataclasses.asdict(one) for one in self.inputs],
            "top1": self.top1,
            "top5": self.top5,
            "videos": len(self.scores.videos),
            "per_class": self.scores.per_class(),
            "scores": None if self.file is None else str(self.file),
        }


def fuse(job: FuseJob) -> Fusion:
    """Fuses evaluations: sum(weight * scores) / sum(weight). Writes the result if job.out is given.

    Raises BadScores for a file that cannot be read, OtherVideos for evaluations of different videos, labels or classes, and
    ValueError if the folder holds anything but an earlier fusion.
    """
    weights = job.fusion_weights()
    if job.out is not None:
        check_out(job.out, job.scores)
    evaluations = [read_scores(path) for path in job.scores]
    first = evaluations[0]
    for path, other in zip(job.scores[1:], evaluations[1:], strict=True):
        check_same_videos(job.scores[0], first, path, other)
    by_key = [{video.key: video.scores for video in scores.videos} for scores in evaluations]
    fused = Scores(
        first.classes,
        [
            dataclasses.replace(video, scores=weighted_mean([scores[video.key] for scores in by_key], weights))
            for video in first.videos
        ],
    )
    inputs = tuple(
        Input(scores=str(scores_path(path).absolute()), weight=weight, **scores.accuracy())
        for path, weight, scores in zip(job.scores, weights, evaluations, strict=True)
    )
    file = None if job.out is None else job.out.absolute() / SCORES_FILE
    fusion = Fusion(inputs, fused, **fused.accuracy(), file=file)
    if file is not None:
        write_folder(file.parent, fused, fusion.to_dict())
    return fusion


def weighted_mean(scores: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """One video's scores by each evaluation (E, K), weights (E,) -> their weighted mean (K,)."""
    total = sum(weights)
    return [
        sum(weight * score for weight, score in zip(weights, class_scores, strict=True)) / total
        for class_scores in zip(*scores, strict=True)
    ]


def check_same_videos(first_path: Path, first: Scores, path: Path, other: Scores) -> None:
    """Raises OtherVideos unless both have the same classes, in the same order, and the same videos with the same labels."""
    for number, (one, two) in enumerate(zip_longest(first.classes, other.classes)):
        if one != two:
            raise OtherVideos(
                f"{path}: class {number} is {two or '(none)'}, but {one or '(none)'} in {first_path} ({len(other.classes)} and "
                f"{len(first.classes)} classes); expected evaluations with the same classes"
            )
    labels, others = ({video.key: video.label for video in scores.videos} for scores in (first, other))
    if labels.keys() != others.keys():
        raise OtherVideos(
            f"{path}: has {describe_keys(others.keys() - labels.keys())} that {first_path} lacks, and lacks "
            f"{describe_keys(labels.keys() - others.keys())} of it; expected evaluations of the same videos"
        )
    differing = sorted(key for key in labels if labels[key] != others[key])
    if differing:
        key = differing[0]
        raise OtherVideos(
            f"{path}: {len(differing)} of {len(labels)} videos have other labels than in {first_path}: {key} is "
            f"{first.classes[others[key]]} here, {first.classes[labels[key]]} there; expected evaluations of the same videos"
        )


def describe_keys(keys: set[str]) -> str:
    """The number of videos, and the first few keys."""
    few = sorted(keys)[:3]
    return f"{len(keys)} video{'s' * (len(keys) != 1)}" + (
        f" ({', '.join(few)}{', ...' * (len(keys) > len(few))})" if keys else ""
    )


def check_out(out: Path, paths: Sequence[Path]) -> None:
    """Raises ValueError if writing to `out` would replace an input, or anything but an earlier fusion."""
    if any(path.resolve().is_relative_to(out.resolve()) for path in paths):
        raise ValueError(f"{out}: holds scores to fuse; expected another folder for the result")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    is_fusion = found == sorted([SCORES_FILE, RESULT_FILE]) and "inputs" in read_json(open_store(out), RESULT_FILE)
    if found and not is_fusion:
        raise ValueError(
            f"{out}: holds {', '.join(found[:3])}{', ...' * (len(found) > 3)}; expected a new folder, or one from an earlier "
            "python -m jobs.fuse, which is replaced"
        )
