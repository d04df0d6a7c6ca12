"""jobs.sizing: its arithmetic by hand, and docs/sizing.md, which shows what it prints."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from grurcn.models.flops import Multiplications, training_multiplications
from grurcn.training.gpu_specs import peak_flops
from grurcn.training.recipes import RECIPES, changed, gru_rcn, vgg16_frames
from jobs.sizing import Needs, Sizing, clip_bytes, decode_rate, main, parse, plan, ring_bytes

DOCUMENT = Path(__file__).parents[2] / "docs" / "sizing.md"
JOB = Sizing(
    recipe=gru_rcn(), gpus=8, gpu="a100", mfu=0.5, price=2.0, videos=6400, decode_rate=100, video_kilobytes=500
)
# 156e12 FLOP/s a GPU, and 1.56e12 FLOPs a clip: a hundred clips a second.
CLIP = Multiplications(trunk=int(0.5e12), grus=int(0.2e12), heads=int(0.08e12))


def needs(**changes) -> Needs:
    return plan(replace(JOB, **changes), CLIP, learned=1_000_000, frozen=3_000_000)


def test_a_plan_by_hand():
    found = needs()
    assert found.steps == 20_000
    assert found.clips == 1_280_000
    assert found.epochs == 200
    assert found.clips_per_second == pytest.approx(800)
    assert found.step_seconds == pytest.approx(0.08)
    assert found.wall_hours == pytest.approx(1600 / 3600)
    assert found.gpu_hours == pytest.approx(8 * 1600 / 3600)
    assert found.cost == pytest.approx(2 * 8 * 1600 / 3600)
    assert found.cores_per_gpu == pytest.approx(1)
    assert found.cores == pytest.approx(8)
    assert found.storage_bytes_per_second == pytest.approx(400e6)
    assert found.gradient_bytes_per_step == 2 * 4e6 * 7 / 8
    assert found.network_bits_per_second == 0, "all GPUs are in one machine"
    assert found.clip_memory_bytes == 3 * 8 * 10 * 340 * 256 * 3 // 2
    assert found.shared_memory_bytes == 8 * 2**30
    assert found.checkpoint_bytes == 3 * 4e6
    assert found.frozen_bytes == 12e6


def test_machines_carry_the_gradients_in_the_time_of_a_step():
    found = needs(gpus=16, gpus_per_node=8)
    assert found.network_bits_per_second == pytest.approx(8 * (2 * 4e6 * 15 / 16) / 0.04)
    assert found.shared_memory_bytes == 8 * 2**30
    assert found.gpu_hours == pytest.approx(needs().gpu_hours)
    assert found.wall_hours == pytest.approx(needs().wall_hours / 2)


def test_epochs_stand_for_steps():
    assert needs(epochs=1).steps == 100
    assert needs(epochs=2.5).clips == 16_000


@pytest.mark.parametrize(("optimizer", "numbers"), [("adam", 3), ("sgd", 2), ("adadelta", 3)])
def test_a_checkpoint_holds_weights_and_the_optimizers_state(optimizer, numbers):
    assert needs(recipe=changed(gru_rcn(), optim={"optimizer": optimizer})).checkpoint_bytes == numbers * 4e6


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_ring_sends_each_part_once_around_to_add_and_once_to_tell(ranks):
    parts = [100] * ranks
    sent = [0] * ranks
    for _ in ("add", "tell"):
        for step in range(ranks - 1):
            for rank in range(ranks):
                sent[rank] += parts[(rank - step) % ranks]
    assert set(sent) == {ring_bytes(sum(parts), ranks)}


def test_longer_clips_take_longer_to_decode_and_what_was_measured_is_believed():
    assert decode_rate(Sizing(recipe=gru_rcn())) == 140
    wide = decode_rate(Sizing(recipe=changed(gru_rcn(), clips={"stride": 3})))
    assert wide == pytest.approx(140 * 17.5 / 35.5)
    assert decode_rate(Sizing(recipe=gru_rcn(), decode_rate=77)) == 77


def test_a_clip_of_flow_is_all_the_fields_that_its_steps_share():
    assert clip_bytes(changed(gru_rcn(), clips={"stream": "flow"})) == 19 * 2 * 340 * 256


def printed(command: str, capsys) -> str:
    assert main(*parse(shlex.split(command))) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe, tmp_path, capsys):
    out = printed(f"{recipe} --gpus 4 --mfu 0.2 --json {tmp_path / 'sizing.json'}", capsys)
    found = json.loads((tmp_path / "sizing.json").read_text())
    made = RECIPES[recipe]()
    training = training_multiplications(made.model, made.clips.num_frames, made.clips.size, 101, made.clips.channels)
    flops = 2 * sum(found["multiplications"]["training"].values())
    assert flops == training.flops
    rate = 4 * 0.2 * peak_flops("h100") / flops
    assert found["gpu_hours"] == pytest.approx(4 * made.num_steps * made.global_batch / rate / 3600)
    assert f"{found['steps']:,} steps of {made.global_batch}" in out.splitlines()[-1]
    assert (found["frozen_bytes"] > 0) == (made.model.frozen and recipe != "c3d")


def test_a_trunk_that_learns_is_in_gradients_and_checkpoints(tmp_path, capsys):
    assert not vgg16_frames().model.frozen
    printed(f"vgg16-frames --json {tmp_path / 'sizing.json'}", capsys)
    found = json.loads((tmp_path / "sizing.json").read_text())
    learned = found["parameters"]["learned"]
    assert learned == found["parameters"]["trunk"] + found["parameters"]["heads"]
    assert found["gradient_bytes_per_step"] == 2 * 4 * learned * 7 / 8
    assert found["checkpoint_bytes"] == 8 * learned, "weights and the momentum of sgd"


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
        ("gru-rcn --gpus 7", "gpus 7: wanted a number that divides the global batch of 64"),
        ("gru-rcn --mfu 30", "mfu 30: wanted above 0 and at most 1"),
        ("gru-rcn --videos 0", "videos 0"),
        ("gru-rcn --epochs -1", "epochs above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_what_was_wanted(command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(shlex.split(command))
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
