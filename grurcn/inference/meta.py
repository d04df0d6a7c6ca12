"""What a checkpoint says of its model: the task it was trained for, and how its training videos were stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from cluster.checkpoints.state import Training
from shards.video import Packing

Task = Literal["classification", "captioning"]


class OtherTask(ValueError):
    """A model of another task than the one that is requested."""


def check_task(training: Training, task: Task, source: str) -> None:
    """Raises OtherTask, naming the source, for a model of another task."""
    if training.task == task:
        return
    if task == "captioning":
        raise OtherTask(
            f"captions were requested, but {source} is a classification model; use a run of the recipe `caption`"
        )
    raise OtherTask(
        f"classes were requested, but {source} is a captioning model; use a run of a recipe such as `gru-rcn`"
    )


def packing_of(kept: Mapping[str, Any], needs_flow: bool = False) -> Packing:
    """How a model's training videos were stored, so that others can be stored alike; without flow unless it is needed.

    Raises ValueError for a checkpoint of an older version, which does not say so.
    """
    if "packing" not in kept:
        raise ValueError(
            "this model does not say how its videos were stored: an older version trained it; train it again"
        )
    packing = Packing(**kept["packing"])
    return packing if needs_flow else dataclasses.replace(packing, flow="none")
