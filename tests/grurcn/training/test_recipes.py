"""Recipes: each can be built, survives JSON, and names what it costs and gave."""

import dataclasses
import json

import pytest

from grurcn.models.config import ModelConfig
from grurcn.training.recipes import RECIPES, Recipe, flat, over_trunk
from shards.reading.clips import ClipConfig


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_states_its_command_cost_and_figures(name):
    said = RECIPES[name].__doc__ or ""
    assert "Cost:" in said
    assert "Paper:" in said
    assert "Ours:" in said
    assert f"jobs.train {name} " in said or "make demo" in said


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json_as_it_was(name):
    recipe = RECIPES[name]()
    back = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert back == recipe
    assert back.digest() == recipe.digest()


def test_any_changed_value_changes_the_digest():
    recipe = Recipe()
    changed = dataclasses.replace(recipe, clips=dataclasses.replace(recipe.clips, stride=2))
    assert changed.digest() != recipe.digest()
    assert flat(changed.to_dict())["clips.stride"] == 2


def test_frames_too_small_for_a_tap_are_refused():
    with pytest.raises(ValueError, match=r"size 24: too small for the tap pool5, whose cells are 32 pixels wide"):
        Recipe(clips=ClipConfig(size=24))
    Recipe(clips=ClipConfig(size=24), model=ModelConfig(taps=("pool4",), hidden=(8,)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_taken_over_mobilenet(name):
    recipe = RECIPES[name]()
    other = over_trunk(recipe, "mobilenet_v2")
    assert other.model.kind == recipe.model.kind
    assert other.clips == recipe.clips
    if recipe.model.kind != "c3d":
        assert other.model.trunk == "mobilenet_v2"
        assert len(other.model.taps) == (1 if recipe.model.taps == ("fc7",) else 5)


def test_the_papers_models_are_variants_of_each_other():
    plain = RECIPES["gru-rcn"]().model
    assert RECIPES["gru-rcn-stacked"]().model == dataclasses.replace(plain, stacked=True)
    assert RECIPES["gru-rcn-bidirectional"]().model == dataclasses.replace(plain, bidirectional=True)
    assert RECIPES["gru-rcn-flow"]().model == plain
    assert RECIPES["gru-rcn-flow"]().clips.channels == 20
    assert RECIPES["vgg16-rnn"]().model == dataclasses.replace(plain, taps=("fc7",), hidden=(512,))


def test_numbers_that_make_no_run_are_refused():
    with pytest.raises(ValueError, match="num_steps 0: expected at least 1"):
        Recipe(num_steps=0)
