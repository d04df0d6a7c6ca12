"""Runs that were written before open as if they had been written now."""

import hashlib
import json
from pathlib import Path

from cluster.checkpoints.files import STATE, Checkpoint
from cluster.checkpoints.run_folder import IDENTITY, RunFolder
from cluster.checkpoints.state import Best, CheckpointState, Optimizer
from cluster.workers.events import Metrics
from grurcn.training.caption_recipes import CaptionRecipe
from grurcn.training.recipes import RECIPES, Recipe

METRICS = {"val/loss": 0.5}


def old_json(recipe: Recipe | CaptionRecipe) -> dict:
    """A recipe as it was written before."""
    return {key: value for key, value in json.loads(json.dumps(recipe.to_dict())).items() if key != "task"}


def test_a_checkpoint_without_a_task_and_with_metrics_under_their_old_name_is_read(tmp_path: Path):
    recipe = RECIPES["demo"]()
    meta = {
        "recipe": old_json(recipe),
        "told": [{"metrics": METRICS, "at": 4, "milliseconds": 9}],
        "step": 4,
        "stale": 1,
    }
    optimizer = {"optimizer": "SGD", "trainable": ["a"], "step_counts": {"a": 4.0}, "loss_scale": None}
    best = {"sha256": "b", "loss": 0.25, "step": 2}
    content = {"format": 2, **optimizer, "meta": {**meta, "classes": ["x"]}, "best": best, "weights": [], "sha256": {}}
    (tmp_path / STATE).write_text(json.dumps(content))
    state = Checkpoint.at(str(tmp_path)).state()
    training = state.training
    assert (training.step, training.validations_since, training.model) == (4, 1, {"classes": ["x"]})
    assert training.task == "classification"
    assert Recipe.from_dict(training.recipe) == recipe
    assert training.metrics == [Metrics(step=4, values=METRICS, milliseconds=9)]
    assert state.best == Best(step=2, sha256="b", scores={"loss": 0.25})
    assert state.optimizer == Optimizer(name="SGD", trainable=["a"], step_counts={"a": 4.0})
    assert CheckpointState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_run_keeps_the_digest_that_it_was_begun_with(tmp_path: Path):
    for recipe, task in ((RECIPES["demo"](), "classification"), (CaptionRecipe(), "captioning")):
        old = old_json(recipe)
        assert recipe.digest() == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
        identity = {"recipe_digest": recipe.digest(), "data_digest": "", "tracking_uri": "", "mlflow_run_id": ""}
        (tmp_path / IDENTITY).write_text(json.dumps({**identity, "recipe": old}))
        found = RunFolder(str(tmp_path)).identity()
        assert found is not None
        assert found.recipe == {"task": task, **old}
