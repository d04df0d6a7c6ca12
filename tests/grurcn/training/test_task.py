"""A task of one's own is trained like those of this project."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from small_runs import TINY

from cluster.checkpoints.run_folder import RunFolder
from grurcn.training import classification
from grurcn.training.recipes import Recipe
from grurcn.training.task import TASKS, find_task, register_task
from grurcn.training.train import TrainJob, train


@dataclass(frozen=True, kw_only=True)
class OwnRecipe(Recipe):
    task: ClassVar[str] = "own"


class OwnTask(classification.Classification):
    """Classification whose loss is doubled."""

    def loss(self, *args, **options):
        return 2 * super().loss(*args, **options)


def test_a_registered_task_trains_and_its_checkpoints_name_it(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("grurcn.training.task.TASKS", TASKS.copy())
    register_task("own", {"own-recipe": OwnRecipe}, classification.prepare, OwnTask)
    values = {field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)}
    recipe = OwnRecipe(**{**values, "num_steps": 2, "val_every": 2})
    result = train(TrainJob(recipe=recipe, shards=str(shards), storage=str(tmp_path), name="own", log_every=1))
    assert result.result.steps == 2
    assert not result.finished_before
    checkpoint = RunFolder(result.run).newest()
    assert checkpoint is not None
    assert checkpoint.state().training.task == "own"


def test_a_task_that_nobody_registered_is_refused():
    with pytest.raises(ValueError, match=r"task depth: expected one of classification, captioning; register others"):
        find_task("depth")
