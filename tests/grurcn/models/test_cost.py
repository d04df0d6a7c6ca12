"""The table of levels against the paper's and against the parameters that a model really has."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grurcn.models.cost import level_costs
from grurcn.models.gru import ConvGRU
from grurcn.models.gru_rcn import GRURCN, ModelConfig

VARIANTS = [
    {},
    {"bidirectional": True},
    {"stacked": True},
    {"stacked": True, "bidirectional": True, "kernel_size": 5},
    {"trunk": "mobilenet_v2", "taps": ("stride4", "stride16", "pooled"), "hidden": (8, 16, 32), "stacked": True},
    {"taps": ("fc7",), "hidden": (512,)},
]


def test_the_papers_sizes_give_its_table():
    rows = level_costs(ModelConfig(), num_frames=10, size=224)
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
    plain, stacked = (level_costs(ModelConfig(stacked=flag), 10, 224) for flag in (False, True))
    added = [above.parameters - below.parameters for below, above in zip(plain, stacked, strict=True)]
    assert added == [0, 147_456, 589_824, 1_179_648, 262_144]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_that_the_model_has(variant):
    config = ModelConfig(**variant)
    with torch.device("meta"):
        model = GRURCN(config, num_classes=3)
    for level, row in enumerate(level_costs(config, 10, 224)):
        grus = [model.grus[level], *model.reverse_grus[level : level + 1]]
        assert row.parameters == sum(p.numel() for gru in grus for p in gru.parameters()), row.tap


def test_multiplications_are_those_that_run_but_for_the_recurrent_ones_of_the_first_step():
    config = ModelConfig(taps=("pool3",), hidden=(8,))
    [row] = level_costs(config, num_frames=4, size=48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ConvGRU(row.channels, row.hidden)(torch.zeros(1, 4, row.channels, row.size, row.size))
    first_step = 9 * 3 * row.hidden**2 * row.size**2
    assert counter.get_total_flops() == 2 * (row.multiplications - first_step)


@pytest.mark.parametrize("kind", ["frames", "c3d"])
def test_models_without_grus_have_no_levels(kind):
    assert level_costs(ModelConfig(kind=kind), 16, 112) == []


def test_a_size_that_the_model_cannot_take_is_refused():
    with pytest.raises(ValueError, match="size 16: too small for the tap pool5"):
        level_costs(dataclasses.replace(ModelConfig(), stacked=True), 10, 16)
