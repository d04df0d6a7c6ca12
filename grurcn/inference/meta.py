"""What a checkpoint says of its model: the task it was trained for, and how its training videos were stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from shards.video import Packing

Task = Literal["classification", "captioning"]
Meta = Mapping[str, Any]  # the JSON object beside the weights (cluster.checkpoints.run_folder.Model.meta)


class OtherTask(ValueError):
    """A model of another task than the one that is requested."""


def task_of(meta: Meta) -> Task:
    """The task that a checkpoint's model was trained for."""
    return meta["recipe"]["task"]


def check_task(meta: Meta, task: Task, source: str) -> None:
    """Raises OtherTask, naming the source, for a model of another task."""
    if task_of(meta) == task:
        return
    if task == "captioning":
        raise OtherTask(
            f"captions were requested, but {source} is a classification model; use a run of the recipe `caption`"
        )
    raise OtherTask(
        f"classes were requested, but {source} is a captioning model; use a run of a recipe such as `gru-rcn`"
    )


def packing_of(meta: Meta, needs_flow: bool = False) -> Packing:
    """How a model's training videos were stored, so that others can be stored alike; without flow unless it is needed.

    Raises ValueError for a checkpoint of an older version, which does not say so.
    """
    if "packing" not in meta:
        raise ValueError(
            "this model does not say how its videos were stored: an older version trained it; train it again"
        )
    packing = Packing(**meta["packing"])
    return packing if needs_flow else dataclasses.replace(packing, flow="none")
