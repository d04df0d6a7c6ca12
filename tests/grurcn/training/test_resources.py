"""What a training needs: the arithmetic by hand."""

from dataclasses import replace

import pytest

from grurcn.models.summary import ModelSummary, PartCounts
from grurcn.training.recipes import changed, gru_rcn
from grurcn.training.resources import Resources, SizingJob, clip_bytes, decode_rate, required_resources, ring_bytes

JOB = SizingJob(
    recipe=gru_rcn(), gpus=8, gpu="a100", mfu=0.5, price=2.0, videos=6400, decode_rate=100, video_kilobytes=500
)
# 156e12 FLOP/s a GPU, and 1.56e12 FLOPs a clip: a hundred clips a second.
CLIP = PartCounts(trunk=int(0.5e12), grus=int(0.2e12), heads=int(0.08e12))
PARAMETERS = PartCounts(trunk=3_000_000, grus=900_000, heads=100_000)
MODEL = ModelSummary(parameters=PARAMETERS, trainable=1_000_000, forward=CLIP, training=CLIP, levels=())


def needs(**changes) -> Resources:
    return required_resources(replace(JOB, **changes), MODEL)


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
def test_a_ring_sends_each_part_once_around_to_add_and_once_to_distribute(ranks):
    parts = [100] * ranks
    sent = [0] * ranks
    for _ in ("add", "distribute"):
        for step in range(ranks - 1):
            for rank in range(ranks):
                sent[rank] += parts[(rank - step) % ranks]
    assert set(sent) == {ring_bytes(sum(parts), ranks)}


def test_longer_clips_take_longer_to_decode_and_what_was_measured_is_believed():
    assert decode_rate(SizingJob(recipe=gru_rcn())) == 140
    wide = decode_rate(SizingJob(recipe=changed(gru_rcn(), clips={"stride": 3})))
    assert wide == pytest.approx(140 * 17.5 / 35.5)
    assert decode_rate(SizingJob(recipe=gru_rcn(), decode_rate=77)) == 77


def test_a_clip_of_flow_is_all_the_fields_that_its_steps_share():
    assert clip_bytes(changed(gru_rcn(), clips={"stream": "flow"})) == 19 * 2 * 340 * 256
