"""Runs that were written before open as if they had been written now."""

import hashlib
import json
from pathlib import Path

from cluster.checkpoints.files import STATE, Checkpoint
from cluster.checkpoints.run_folder import IDENTITY, RunFolder
from grurcn.training.caption_recipes import CaptionRecipe
from grurcn.training.recipes import RECIPES, Recipe

METRICS = {"val/loss": 0.5}


def old_json(recipe: Recipe | CaptionRecipe) -> dict:
    """A recipe as it was written before."""
    return {key: value for key, value in json.loads(json.dumps(recipe.to_dict())).items() if key != "task"}


def test_a_checkpoint_without_a_task_and_with_metrics_under_their_old_name_is_read(tmp_path: Path):
    recipe = RECIPES["demo"]()
    meta = {"recipe": old_json(recipe), "told": [{"metrics": METRICS, "at": 4, "milliseconds": 9}], "step": 4}
    (tmp_path / STATE).write_text(json.dumps({"format": 2, "meta": meta}))
    found = Checkpoint.at(str(tmp_path)).state()["meta"]
    assert found["recipe"]["task"] == "classification"
    assert Recipe.from_dict(found["recipe"]) == recipe
    assert found["metrics"] == [{"step": 4, "values": METRICS, "milliseconds": 9}]
    assert "told" not in found


def test_a_run_keeps_the_digest_that_it_was_begun_with(tmp_path: Path):
    for recipe, task in ((RECIPES["demo"](), "classification"), (CaptionRecipe(), "captioning")):
        old = old_json(recipe)
        assert recipe.digest() == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
        identity = {"recipe_digest": recipe.digest(), "data_digest": "", "tracking_uri": "", "mlflow_run_id": ""}
        (tmp_path / IDENTITY).write_text(json.dumps({**identity, "recipe": old}))
        found = RunFolder(str(tmp_path)).identity()
        assert found is not None
        assert found.recipe == {"task": task, **old}
