"""What all trunks share: which taps they have, weights of another trunk, and colour's kernels for optical flow."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grurcn.models.trunks.base import BadWeights, Tap, Trunk, for_channels, load_weights, scaled
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
    assert scaled(channels, width) >= 1
    assert abs(scaled(channels, width) - channels * width) <= 1
    assert scaled(channels, 1) == channels


@both
def test_the_first_convolution_is_the_one_that_sees_the_frames(build):
    trunk = build(in_channels=5)
    assert trunk.first == next(iter(trunk.state_dict()))
    assert trunk.state_dict()[trunk.first].shape[1] == 5


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
            r"features\.0\.1\.weight, features\.0\.1\.bias, \.\.\.\); wanted torchvision's vgg16 weights",
        ),
        (
            MOBILENET,
            VGG,
            r"mine\.pth: no features\.0\.0\.weight \((\d+) of the trunk's (\d+) parameters are missing; found "
            r"features\.0\.weight, features\.0\.bias, features\.2\.weight, \.\.\.\); wanted torchvision's mobilenet_v2 weights",
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
    red, green, blue = weights[trunk.first].unbind(dim=1)
    first = trunk.state_dict()[trunk.first]
    assert first.shape[1] == 20
    for channel in first.unbind(dim=1):
        torch.testing.assert_close(channel, (red + green + blue) / 3)
    for name, tensor in trunk.state_dict().items():
        assert name == trunk.first or torch.equal(tensor, weights[name].to(tensor.dtype)), name


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
    assert torch.equal(trunk.state_dict()[trunk.first], weights[trunk.first])
    for others in (3, 10):
        with pytest.raises(
            BadWeights, match=rf"flow\.pth: .* is \(\d+, 20, 3, 3\), the trunk wants \(\d+, {others}, 3, 3\)"
        ):
            load_weights(build(in_channels=others), weights, "flow.pth")


def test_weights_of_another_width_do_not_become_flows_kernels():
    with pytest.raises(
        BadWeights, match=r"wide\.pth: .* is \(8, 20, 3, 3\), the trunk wants \(4, 20, 3, 3\); .* same width"
    ):
        load_weights(VGG(in_channels=20), random_weights(VGG16(["pool2"], 1 / 8)), "wide.pth")
