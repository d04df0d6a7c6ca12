"""A model's summary against the paper's table, and against what PyTorch counts while the model runs forward and backward."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.gru_rcn import GRURCN
from grurcn.models.summary import LevelSummary, PartCounts, summarize

MOBILE = {"trunk": "mobilenet_v2", "taps": ("stride4", "stride16", "pooled"), "hidden": (8, 16, 32)}
NARROW = {"width": 0.125, "hidden": (8, 12, 16, 16, 24)}
# Of the model; frames in a clip, their size.
VARIANTS = [
    ({**NARROW}, 3, 32),
    ({**NARROW, "freeze": True}, 3, 33),
    ({**NARROW, "freeze": True, "bidirectional": True, "stacked": True, "kernel_size": 5}, 2, 32),
    ({**NARROW, "stacked": True}, 1, 32),
    ({"width": 0.125, "taps": ("pool2", "fc6"), "hidden": (4, 6), "freeze": True}, 2, 45),
    ({"width": 0.125, "taps": ("pool3", "pool2"), "hidden": (4, 6)}, 4, 37),
    ({"width": 0.125, "kind": "frames"}, 3, 32),
    ({"width": 0.125, "kind": "frames", "taps": ("fc7",), "freeze": True}, 3, 32),
    ({**MOBILE}, 2, 75),
    ({**MOBILE, "freeze": True, "stacked": False, "width": 0.5}, 3, 64),
    ({**MOBILE, "kind": "frames", "taps": ("stride8",)}, 2, 51),
    ({"kind": "c3d", "width": 0.0625}, 16, 112),
]


def levels_of(config: ModelConfig) -> tuple[LevelSummary, ...]:
    return summarize(config, 101, num_frames=10, size=224).levels


# Levels


def test_the_papers_sizes_give_its_table():
    rows = levels_of(ModelConfig())
    assert [(row.tap, row.size, row.channels, row.hidden, row.parameters) for row in rows] == [
        ("pool2", 56, 128, 64, 331_776),
        ("pool3", 28, 256, 128, 1_327_104),
        ("pool4", 14, 512, 256, 5_308_416),
        ("pool5", 7, 512, 256, 5_308_416),
        ("fc7", 1, 4096, 512, 7_077_888),
    ]
    assert [f"{row.multiplications:.3e}" for row in rows] == ["1.040e+10"] * 3 + ["2.601e+09", "7.078e+07"]
    assert rows[0].fully_connected == 77_070_336


def test_stacking_adds_what_the_paper_says():
    plain, stacked = (levels_of(ModelConfig(stacked=flag)) for flag in (False, True))
    added = [above.parameters - below.parameters for below, above in zip(plain, stacked, strict=True)]
    assert added == [0, 147_456, 589_824, 1_179_648, 262_144]


def test_both_directions_count_in_each_level():
    for one, both in zip(levels_of(ModelConfig()), levels_of(ModelConfig(bidirectional=True)), strict=True):
        doubled = {name: 2 * getattr(one, name) for name in ("parameters", "multiplications", "fully_connected")}
        assert both == dataclasses.replace(one, **doubled)


@pytest.mark.parametrize("kind", ["frames", "c3d"])
def test_models_without_grus_have_no_levels(kind):
    assert summarize(ModelConfig(kind=kind), 101, 16, 112).levels == ()


# Parameters


@pytest.mark.parametrize(("variant", "num_frames", "size"), VARIANTS)
def test_parameters_are_those_that_the_model_has_and_trains(variant, num_frames, size):
    config = ModelConfig(**variant)
    found = summarize(config, 7, num_frames, size)
    parameters = list(build_model(config, num_classes=7, seed=0).parameters())
    assert found.parameters.total == sum(parameter.numel() for parameter in parameters)
    assert found.trainable == sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    assert found.trainable == found.parameters.total - (found.parameters.trunk if config.frozen else 0)
    assert found.parameters.grus == sum(level.parameters for level in found.levels)


# Multiplications


def counted(config: ModelConfig, num_frames: int, size: int, channels: int, backward: bool) -> int:
    """FLOPs of a clip, as PyTorch counts what runs."""
    model = build_model(config, num_classes=7, seed=0, in_channels=channels).eval()
    clips, draw = torch.zeros(1, num_frames, channels, size, size), torch.zeros(1, dtype=torch.int64)
    formulas = {torch.ops.aten.convolution_backward: convolution_backward} if config.trunk == "mobilenet_v2" else None
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, torch.set_grad_enabled(backward):
        votes: Tensor = model(clips, draw)
        if backward:
            votes.sum().backward()
    return counter.get_total_flops()


def convolution_backward(d_out: Sequence[int], _x: object, kernel: Sequence[int], *rest: Any, **_: object) -> int:
    """Shapes -> FLOPs. PyTorch 2.13's own formula ignores groups in the kernel's gradient."""
    output_mask = rest[-1]
    return 2 * math.prod(d_out) * math.prod(kernel[1:]) * sum(output_mask[:2])


@pytest.mark.parametrize(("variant", "num_frames", "size"), VARIANTS)
def test_multiplications_are_those_that_run(variant, num_frames, size):
    config, channels = ModelConfig(**variant), 20 if "freeze" in variant else 3
    found = summarize(config, 7, num_frames, size, channels)
    assert counted(config, num_frames, size, channels, backward=False) == 2 * found.forward.total
    assert counted(config, num_frames, size, channels, backward=True) == found.training_flops


@pytest.mark.parametrize(
    ("config", "num_frames", "size"),
    [
        (ModelConfig(weights="imagenet"), 10, 224),
        (ModelConfig(kind="c3d"), 16, 112),
        (ModelConfig(kind="frames", taps=("fc7",), weights="imagenet", freeze=False), 1, 224),
    ],
)
def test_so_they_are_at_the_papers_sizes(config, num_frames, size):
    flops = summarize(config, 7, num_frames, size).training_flops
    with FakeTensorMode():  # tensors with shapes and without numbers: all runs, and nothing is computed
        assert counted(config, num_frames, size, 3, backward=True) == flops


def test_the_parts_are_those_that_run_each_by_itself():
    config = ModelConfig(**NARROW)
    model = build_model(config, num_classes=7, seed=0).eval()
    assert isinstance(model, GRURCN)
    clips, draw = torch.zeros(1, 3, 3, 64, 64), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as trunk, torch.no_grad():
        maps = model.maps(clips, draw)
    with FlopCounterMode(display=False) as grus, torch.no_grad():
        states = model.last_states(maps)
    with FlopCounterMode(display=False) as heads, torch.no_grad():
        for state, head in zip(states, model.heads, strict=True):
            head(state.mean(dim=(-2, -1)))
    found = [part.get_total_flops() // 2 for part in (trunk, grus, heads)]
    assert summarize(config, 7, 3, 64).forward == PartCounts(trunk=found[0], grus=found[1], heads=found[2])


def test_a_frame_of_224_costs_what_is_published():
    # By hand: 3x3 convolutions of 224, 112, 56, 28 and 14 cells a side, then fc6 and fc7.
    by_hand = 9 * 224**2 * (3 * 64 + 64 * 64) + 9 * 112**2 * (64 * 128 + 128 * 128)
    by_hand += 9 * 56**2 * (128 * 256 + 2 * 256 * 256) + 9 * 28**2 * (256 * 512 + 2 * 512 * 512)
    by_hand += 9 * 14**2 * 3 * 512 * 512 + 49 * 512 * 4096 + 4096 * 4096
    assert summarize(ModelConfig(), 101, num_frames=1, size=224).forward.trunk == by_hand
    assert f"{by_hand:.2e}" == "1.55e+10"
    mobile = ModelConfig(trunk="mobilenet_v2", taps=("pooled",), hidden=(8,))
    assert summarize(mobile, 101, 1, 224).forward.trunk == pytest.approx(300e6, rel=0.01)  # Sandler et al.: 300e6


def test_the_grus_multiply_what_the_paper_counts_but_for_the_first_recurrent_products():
    config = ModelConfig()
    found = summarize(config, 101, 10, 224)
    windows, sizes = (9, 9, 9, 9, 1), (56, 28, 14, 7, 1)
    first = sum(3 * w * h * h * s * s for w, h, s in zip(windows, config.hidden, sizes, strict=True))
    assert found.forward.grus == sum(level.multiplications for level in found.levels) - first


def test_a_frozen_trunk_counts_once_and_a_trainable_one_almost_three_times():
    frozen, trained = (summarize(ModelConfig(weights="imagenet", freeze=f), 101, 10, 224) for f in (True, False))
    assert frozen.training.trunk == frozen.forward.trunk
    assert 2.97 < trained.training.trunk / trained.forward.trunk < 3


def test_a_summary_leaves_the_random_generator_alone():
    state = torch.get_rng_state()
    summarize(ModelConfig(**NARROW), 7, 3, 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_size_that_the_model_cannot_take_is_refused():
    with pytest.raises(ValueError, match="size 16: too small for the tap pool5"):
        summarize(ModelConfig(), 101, 10, 16)
