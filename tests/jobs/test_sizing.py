"""jobs.sizing: every recipe can be planned, and docs/sizing.md shows what it prints."""

import json
import re
import shlex
from pathlib import Path

import pytest

from grurcn.models.summary import summarize
from grurcn.training.gpu_specs import peak_flops
from grurcn.training.recipes import RECIPES, vgg16_frames
from jobs.sizing import COMMAND

DOCUMENT = Path(__file__).parents[2] / "docs" / "sizing.md"


def printed(command: str, capsys) -> str:
    assert COMMAND.main(COMMAND.parse(shlex.split(command), "sizing")) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe, tmp_path, capsys):
    out = printed(f"{recipe} --gpus 4 --mfu 0.2 --json {tmp_path / 'sizing.json'}", capsys)
    found = json.loads((tmp_path / "sizing.json").read_text())
    made = RECIPES[recipe]()
    model = summarize(made.model, 101, made.clips.num_frames, made.clips.size, made.clips.channels)
    flops = 2 * sum(found["multiplications"]["training"].values())
    assert flops == model.training_flops
    rate = 4 * 0.2 * peak_flops("h100") / flops
    assert found["gpu_hours"] == pytest.approx(4 * made.num_steps * made.global_batch / rate / 3600)
    assert f"{found['steps']:,} steps of {made.global_batch}" in out.splitlines()[-1]
    assert (found["frozen_bytes"] > 0) == (made.model.frozen and recipe != "c3d")


def test_a_trainable_trunk_is_in_gradients_and_checkpoints(tmp_path, capsys):
    assert not vgg16_frames().model.frozen
    printed(f"vgg16-frames --json {tmp_path / 'sizing.json'}", capsys)
    found = json.loads((tmp_path / "sizing.json").read_text())
    trainable = found["parameters"]["trainable"]
    assert trainable == found["parameters"]["trunk"] + found["parameters"]["heads"]
    assert found["gradient_bytes_per_step"] == 2 * 4 * trainable * 7 / 8
    assert found["checkpoint_bytes"] == 8 * trainable, "weights and the momentum of sgd"


def examples() -> list[tuple[str, str]]:
    """(command, what stands below it) of the document's blocks."""
    blocks = re.findall(
        r"^    \$ python -m jobs\.sizing (.*)\n((?:    .*\n)+)", DOCUMENT.read_text(), flags=re.MULTILINE
    )
    return [(command, re.sub("^    ", "", shown, flags=re.MULTILINE)) for command, shown in blocks]


def test_the_document_has_both_data_sets_on_8_and_64_gpus():
    commands = [command for command, _ in examples()]
    assert len(commands) == 4
    for gpus in (8, 64):
        assert sum(f"--gpus {gpus} " in command for command in commands) == 2
    assert sum("--videos 240000" in command for command in commands) == 2


@pytest.mark.parametrize(("command", "shown"), examples())
def test_the_document_shows_what_its_commands_print(command, shown, capsys):
    out = printed(command, capsys)
    assert [line.rstrip() for line in out.splitlines()] == [line.rstrip() for line in shown.splitlines()]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gru-rcn --gpus 7", "gpus 7: expected a number that divides the global batch of 64"),
        ("gru-rcn --mfu 30", "mfu 30: expected above 0 and at most 1"),
        ("gru-rcn --videos 0", "videos 0"),
        ("gru-rcn --epochs -1", "epochs above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_what_was_expected(command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        COMMAND.parse(shlex.split(command), "sizing")
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
