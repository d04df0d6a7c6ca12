"""What all trunks share: which taps they have, weights of another trunk, and colour's kernels for optical flow."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.summary import summarize
from grurcn.models.trunks import base
from grurcn.models.trunks.base import (
    BadWeights,
    Tap,
    Trunk,
    TrunkSpec,
    for_channels,
    load_weights,
    register_trunk,
    scale_channels,
    select_taps,
    trunk_spec,
)
from grurcn.models.trunks.mobilenet import MobileNetV2
from grurcn.models.trunks.vgg import VGG16

NARROW = 1 / 16
VGG = partial(VGG16, ["pool1", "pool2"], NARROW)
MOBILENET = partial(MobileNetV2, ["stride4"], NARROW)
both = pytest.mark.parametrize("build", [VGG, MOBILENET], ids=["vgg16", "mobilenet_v2"])


def random_weights(trunk: Trunk) -> dict[str, torch.Tensor]:
    return {name: torch.rand(tensor.shape) for name, tensor in trunk.state_dict().items()}


def kept(trunk: Trunk) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trunk.state_dict().items()}


# Taps


@pytest.mark.parametrize(
    ("tap", "sizes"),
    [
        (Tap(8, 4), {1: 0, 4: 1, 7: 1, 8: 2, 112: 28, 113: 28}),
        (Tap(8, 4, rounds_up=True), {1: 1, 4: 1, 5: 2, 8: 2, 112: 28, 113: 29}),
        (Tap(8, None), {1: 1, 112: 1}),
    ],
)
def test_the_size_of_a_map_is_known_from_the_frames(tap, sizes):
    assert {size: tap.size(size) for size in sizes} == sizes


@given(channels=st.integers(1, 4096), width=st.floats(0.001, 4))
def test_a_layer_is_width_times_as_wide_and_never_gone(channels, width):
    assert scale_channels(channels, width) >= 1
    assert abs(scale_channels(channels, width) - channels * width) <= 1
    assert scale_channels(channels, 1) == channels


@both
def test_the_first_convolution_is_the_one_that_sees_the_frames(build):
    trunk = build(in_channels=5)
    assert trunk.first_weight == next(iter(trunk.state_dict()))
    assert trunk.state_dict()[trunk.first_weight].shape[1] == 5


# Trunks by name


class OneLayer(Trunk):
    """A trunk of one's own."""

    name, first_weight = "mine", "layer.weight"

    def __init__(self, taps, width=1.0, in_channels=3):
        super().__init__()
        self.taps = select_taps(taps, one_layer_taps(width), "mine")
        self.layer = torch.nn.Conv2d(in_channels, scale_channels(8, width), 4, stride=4)

    def forward(self, frames, drop=None):
        return {"only": self.layer(frames)}


def one_layer_taps(width: float) -> dict[str, Tap]:
    return {"only": Tap(scale_channels(8, width), stride=4)}


@pytest.fixture
def own_trunk(monkeypatch):
    monkeypatch.setattr(base, "TRUNKS", dict(base.TRUNKS))
    register_trunk("mine", TrunkSpec(title="Mine", build=OneLayer, taps=one_layer_taps, levels={"only": 16}))


@pytest.mark.usefixtures("own_trunk")
def test_a_trunk_of_ones_own_is_built_and_counted_by_its_name():
    config = ModelConfig(trunk="mine", taps=("only",), hidden=(4,))
    model = build_model(config, 5, seed=0)
    assert model(torch.zeros(2, 3, 3, 32, 32), torch.zeros(2, dtype=torch.int64)).shape == (2, 1, 5)
    assert summarize(config, 5, num_frames=3, size=32).forward.trunk == 3 * 8 * 8 * (8 * 3 * 4 * 4)


def test_a_trunk_that_is_not_registered_is_refused_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"trunk resnet18: not registered; expected one of mobilenet_v2, vgg16, or .*GRURCN_PLUGINS"
    ):
        ModelConfig(trunk="resnet18")


def test_modules_of_the_environment_register_trunks(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "TRUNKS", dict(base.TRUNKS))
    (tmp_path / "my_trunks.py").write_text(
        "from grurcn.models.trunks import register_trunk, vgg\nregister_trunk('resnet18', vgg.SPEC)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GRURCN_PLUGINS", "my_trunks")
    assert ModelConfig(trunk="resnet18").tap_maps == ModelConfig().tap_maps
    monkeypatch.setenv("GRURCN_PLUGINS", "my_trunks, no_such_module")
    with pytest.raises(ValueError, match="GRURCN_PLUGINS: no_such_module cannot be imported"):
        ModelConfig(trunk="resnet34")


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v2"])
def test_the_default_levels_of_a_trunk_are_taps_that_it_has(name):
    spec = trunk_spec(name)
    assert spec.levels.keys() <= spec.taps(1.0).keys()
    assert spec.last_tap == list(spec.taps(1.0))[-1]


# Weights


@both
def test_weights_come_back_by_name(build):
    trunk = build()
    weights = random_weights(trunk)
    load_weights(trunk, weights | {"classifier.6.bias": torch.zeros(1000)}, "mine.pth")
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("build", "other", "message"),
    [
        (
            VGG,
            MOBILENET,
            r"mine\.pth: no features\.0\.weight \(8 of the trunk's 8 parameters are missing; found features\.0\.0\.weight, "
            r"features\.0\.1\.weight, features\.0\.1\.bias, \.\.\.\); expected torchvision's vgg16 weights",
        ),
        (
            MOBILENET,
            VGG,
            r"mine\.pth: no features\.0\.0\.weight \((\d+) of the trunk's (\d+) parameters are missing; found "
            r"features\.0\.weight, features\.0\.bias, features\.2\.weight, \.\.\.\); expected torchvision's mobilenet_v2 weights",
        ),
    ],
)
def test_weights_of_the_other_trunk_are_refused_by_name(build, other, message):
    trunk = build()
    before = kept(trunk)
    with pytest.raises(BadWeights, match=message):
        load_weights(trunk, random_weights(other()), "mine.pth")
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_file_that_only_lacks_the_counts_of_batches_fits():
    trunk = MOBILENET()
    weights = random_weights(trunk)
    counts = [name for name in weights if name.endswith("num_batches_tracked")]
    assert counts
    load_weights(trunk, {name: tensor for name, tensor in weights.items() if name not in counts}, "old.pth")
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, torch.tensor(0) if name in counts else weights[name]), name


def test_a_file_without_the_statistics_of_a_batch_norm_is_refused():
    trunk = MOBILENET()
    weights = random_weights(trunk)
    del weights["features.0.1.running_var"], weights["features.0.1.num_batches_tracked"]
    with pytest.raises(BadWeights, match=r"old\.pth: no features\.0\.1\.running_var \(1 of the trunk's"):
        load_weights(trunk, weights, "old.pth")


# Optical flow


@both
def test_a_trunk_over_flow_starts_from_the_mean_over_colour_for_every_channel(build):
    trunk = build(in_channels=20)
    weights = random_weights(build())
    load_weights(trunk, weights, "imagenet.pth")
    red, green, blue = weights[trunk.first_weight].unbind(dim=1)
    first = trunk.state_dict()[trunk.first_weight]
    assert first.shape[1] == 20
    for channel in first.unbind(dim=1):
        torch.testing.assert_close(channel, (red + green + blue) / 3)
    for name, tensor in trunk.state_dict().items():
        assert name == trunk.first_weight or torch.equal(tensor, weights[name].to(tensor.dtype)), name


@given(st.integers(1, 30).filter(lambda number: number != 3))
@settings(deadline=None)
def test_one_moving_channel_is_seen_as_a_grey_picture_a_third_as_bright(in_channels):
    kernels = torch.randn(4, 3, 3, 3)
    grey, one = torch.zeros(1, 3, 8, 8), torch.zeros(1, in_channels, 8, 8)
    grey[:] = one[:, in_channels // 2] = torch.randn(8, 8)
    seen = torch.nn.functional.conv2d(one, for_channels(kernels, in_channels))
    torch.testing.assert_close(seen, torch.nn.functional.conv2d(grey, kernels) / 3, rtol=1e-4, atol=1e-5)


@both
def test_weights_of_flow_fit_a_trunk_over_as_many_channels_alone(build):
    weights = random_weights(build(in_channels=20))
    trunk = build(in_channels=20)
    load_weights(trunk, weights, "flow.pth")
    assert torch.equal(trunk.state_dict()[trunk.first_weight], weights[trunk.first_weight])
    for others in (3, 10):
        with pytest.raises(BadWeights, match=rf"flow\.pth: .* is \(\d+, 20, 3, 3\), expected \(\d+, {others}, 3, 3\)"):
            load_weights(build(in_channels=others), weights, "flow.pth")


def test_weights_of_another_width_do_not_become_flows_kernels():
    with pytest.raises(BadWeights, match=r"wide\.pth: .* is \(8, 20, 3, 3\), expected \(4, 20, 3, 3\); .* same width"):
        load_weights(VGG(in_channels=20), random_weights(VGG16(["pool2"], 1 / 8)), "wide.pth")
