"""One process, a world of one: every ZeRO stage and precision trains, and what the run decides stays the
run's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.engine import (
    deepspeed_config,
    loss_scale,
    set_learning_rate,
    set_loss_scale,
    start_engine,
)
from cluster.precision import resolve_precision

CPU = torch.device("cpu")
STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


def tiny_model():
    """A frozen convolution, a batch norm (buffers) and a trainable head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 5)
    )
    model[0].requires_grad_(False)
    return model


def tiny_engine(
    zero_stage,
    *,
    precision="fp32",
    clip_norm=None,
    global_batch=4,
    accumulation=1,
    optimizer=torch.optim.SGD,
    **kwargs,
):
    model = tiny_model()
    return start_engine(
        model,
        optimizer(model.parameters(), lr=0.1),
        zero_stage=zero_stage,
        global_batch=global_batch,
        accumulation=accumulation,
        precision=precision,
        clip_norm=clip_norm,
        device=CPU,
        **kwargs,
    )


def tiny_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 1, 6, 6, generator=generator), torch.randint(5, (4,), generator=generator)


def take_step(engine, batch, factor=1.0):
    clip, label = batch
    loss = factor * nn.functional.cross_entropy(engine(clip).float(), label)
    engine.backward(loss)
    engine.step()
    return loss.item()


def weights(engine):
    """Copies of the whole weights by name; a world of one has all of them even at ZeRO 3."""
    return {
        name: (p.ds_tensor.view(p.ds_shape) if hasattr(p, "ds_tensor") else p).detach().clone()
        for name, p in engine.module.named_parameters()
    }


def plain_torch_weights(steps, clip_norm=None):
    model = tiny_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        clip, label = tiny_batch(step)
        nn.functional.cross_entropy(model(clip), label).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@STAGES
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_fp32_trains_as_plain_torch_does(zero_stage, clip_norm):
    engine = tiny_engine(zero_stage, clip_norm=clip_norm)
    for step in range(3):
        take_step(engine, tiny_batch(step))
    torch.testing.assert_close(weights(engine), dict(plain_torch_weights(3, clip_norm)))


@STAGES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_low_precision_keeps_float32_weights_and_trains_nearly_as_fp32(zero_stage, precision, clip_norm):
    engine = tiny_engine(zero_stage, precision=precision, clip_norm=clip_norm)
    for step in range(3):
        take_step(engine, tiny_batch(step))
    assert {w.dtype for w in weights(engine).values()} == {torch.float32}
    step_size = 0.1 * (clip_norm or 1.0)
    torch.testing.assert_close(weights(engine), dict(plain_torch_weights(3, clip_norm)), rtol=0, atol=0.03 * step_size)
    assert (weights(engine)["5.weight"] - tiny_model().get_parameter("5.weight")).norm() > step_size / 2


@STAGES
def test_fp16_skips_a_step_whose_gradient_overflows_and_halves_the_loss_scale(zero_stage):
    engine = tiny_engine(zero_stage, precision="fp16", clip_norm=1.0)
    take_step(engine, tiny_batch())
    before = weights(engine)
    assert loss_scale(engine) == {"scale": 2.0**16, "clean_steps": 1}

    take_step(engine, tiny_batch(), factor=1e6)
    torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)
    assert loss_scale(engine) == {"scale": 2.0**15, "clean_steps": 0}

    take_step(engine, tiny_batch())
    assert not torch.equal(weights(engine)["5.weight"], before["5.weight"])


@STAGES
def test_the_loss_scale_can_be_put_back(zero_stage):
    engine = tiny_engine(zero_stage, precision="fp16")
    take_step(engine, tiny_batch())  # torch's GradScaler has no scale before its first loss
    set_loss_scale(engine, scale=2.0**10, clean_steps=7)
    assert loss_scale(engine) == {"scale": 2.0**10, "clean_steps": 7}
    take_step(engine, tiny_batch())
    assert loss_scale(engine) == {"scale": 2.0**10, "clean_steps": 8}


@STAGES
def test_an_fp32_engine_after_an_fp16_one_does_not_scale_its_loss(zero_stage):
    take_step(tiny_engine(zero_stage, precision="fp16"), tiny_batch())
    engine = tiny_engine(zero_stage, clip_norm=0.1)
    take_step(engine, tiny_batch())
    assert loss_scale(engine) is None
    torch.testing.assert_close(weights(engine), dict(plain_torch_weights(1, clip_norm=0.1)))


@STAGES
def test_the_learning_rate_set_is_the_one_the_next_step_uses(zero_stage):
    engine = tiny_engine(zero_stage)
    before = weights(engine)

    set_learning_rate(engine, 0.0)
    take_step(engine, tiny_batch())
    torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)

    set_learning_rate(engine, 0.1)
    take_step(engine, tiny_batch())
    assert not torch.equal(weights(engine)["5.weight"], before["5.weight"])
    assert torch.equal(weights(engine)["0.weight"], before["0.weight"])  # frozen


@STAGES
def test_two_accumulated_halves_make_the_step_of_the_whole(zero_stage):
    whole, halves = (tiny_engine(zero_stage, global_batch=4, accumulation=n) for n in (1, 2))
    for engine in (whole, halves):
        # Batch statistics would differ between the batch and its halves.
        next(module for module in engine.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    clip, label = tiny_batch()
    take_step(whole, (clip, label))
    for half in (slice(0, 2), slice(2, 4)):
        take_step(halves, (clip[half], label[half]))
    torch.testing.assert_close(weights(halves), weights(whole))
    assert halves.global_steps == 1


@STAGES
def test_a_parameter_group_that_is_frozen_as_a_whole_is_left_out(zero_stage):
    model = tiny_model()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[1:].parameters()}], lr=0.1)
    engine = start_engine(
        model,
        optimizer,
        zero_stage=zero_stage,
        global_batch=4,
        accumulation=1,
        precision="fp32",
        clip_norm=None,
        device=CPU,
    )
    take_step(engine, tiny_batch())
    torch.testing.assert_close(weights(engine), dict(plain_torch_weights(1)))


def test_auto_means_fp32_on_a_cpu_and_a_name_stands_for_itself():
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision = 'fp8' is not known; choose one of auto, fp32, bf16, fp16"):
        resolve_precision("fp8", CPU)


def config(zero_stage, **kwargs):
    return deepspeed_config(
        zero_stage, micro_batch=2, accumulation=3, world_size=4, precision="bf16", clip_norm=5.0, **kwargs
    )


def test_the_run_gives_batch_clipping_and_precision():
    found = config(1)
    assert found["train_batch_size"] == 24
    assert found["gradient_clipping"] == 5.0
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("gradient_clipping", 1.0, "1.0 in this file and 5.0 in the run"),
        ("train_batch_size", 8, "8 in this file and 24 in the run"),
        ("fp16", {"enabled": True}, "in this file and precision bf16 in the run"),
        ("optimizer", {"type": "Adam"}, "in this file and the run's torch optimizer in the run"),
    ],
)
def test_a_file_that_names_what_the_run_decides_is_refused_with_both_values(tmp_path, key, value, both):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: value}))
    with pytest.raises(ValueError, match=rf"mine\.json: {key} is .*{both}"):
        config(1, path=path)


def test_a_file_of_another_stage_is_refused(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ValueError, match="ZeRO stage 2 in this file and 1 in the run"):
        config(1, path=path)


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[]", "found a JSON list, expected an object")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, reason):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.json: {reason}"):
        config(1, path=tmp_path / "mine.json")
    with pytest.raises(ValueError, match=r"other\.json: no DeepSpeed configuration there"):
        config(1, path=tmp_path / "other.json")


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="zero_stage = 4 is not a ZeRO stage; choose one of 0, 1, 2, 3"):
        config(4)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"global_batch = 5 does not divide over 1 ranks x 2 .*use a multiple of 2"):
        tiny_engine(0, global_batch=5, accumulation=2)


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny_model().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter with requires_grad; unfreeze"):
        start_engine(
            model,
            optimizer,
            zero_stage=1,
            global_batch=4,
            accumulation=1,
            precision="fp32",
            clip_norm=None,
            device=CPU,
        )


def test_an_engine_starts_without_a_compiler_a_launcher_or_a_word(tmp_path):
    script = "from tests.cluster.test_engine import *; take_step(tiny_engine(2), tiny_batch())"
    environment = {
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path.cwd(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
    assert not (tmp_path / "extensions").exists()
