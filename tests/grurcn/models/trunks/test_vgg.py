"""VGG-16: torchvision's names and shapes, its numbers by plain convolutions, and weights that do not fit."""

import pytest
import torch
from torch.nn import functional

from grurcn.models.trunks.base import BadWeights, load_weights
from grurcn.models.trunks.vgg import VGG16, known_taps

# torchvision.models.vgg16().state_dict(), without classifier.6 (ImageNet's classes).
TORCHVISION = {
    "features.0.weight": (64, 3, 3, 3),
    "features.0.bias": (64,),
    "features.2.weight": (64, 64, 3, 3),
    "features.2.bias": (64,),
    "features.5.weight": (128, 64, 3, 3),
    "features.5.bias": (128,),
    "features.7.weight": (128, 128, 3, 3),
    "features.7.bias": (128,),
    "features.10.weight": (256, 128, 3, 3),
    "features.10.bias": (256,),
    "features.12.weight": (256, 256, 3, 3),
    "features.12.bias": (256,),
    "features.14.weight": (256, 256, 3, 3),
    "features.14.bias": (256,),
    "features.17.weight": (512, 256, 3, 3),
    "features.17.bias": (512,),
    "features.19.weight": (512, 512, 3, 3),
    "features.19.bias": (512,),
    "features.21.weight": (512, 512, 3, 3),
    "features.21.bias": (512,),
    "features.24.weight": (512, 512, 3, 3),
    "features.24.bias": (512,),
    "features.26.weight": (512, 512, 3, 3),
    "features.26.bias": (512,),
    "features.28.weight": (512, 512, 3, 3),
    "features.28.bias": (512,),
    "classifier.0.weight": (4096, 25088),
    "classifier.0.bias": (4096,),
    "classifier.3.weight": (4096, 4096),
    "classifier.3.bias": (4096,),
}
LAST_PARAMETER = {
    "pool1": "features.2.bias",
    "pool2": "features.7.bias",
    "pool3": "features.14.bias",
    "pool4": "features.21.bias",
    "pool5": "features.28.bias",
    "fc6": "classifier.0.bias",
    "fc7": "classifier.3.bias",
}
TAPS = tuple(LAST_PARAMETER)
NARROW = 1 / 32  # 2, 4, 8, 16 and 16 channels, fully connected layers of 128


def shapes(trunk):
    return {name: tuple(parameter.shape) for name, parameter in trunk.state_dict().items()}


def full_width(*taps):
    """VGG-16 as it is, without the memory for its 134 million weights."""
    with torch.device("meta"):
        return VGG16(taps)


def with_biases(trunk):
    """Biases start at zero, where an oracle cannot see them."""
    for name, parameter in trunk.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return trunk


# Names and shapes


def test_parameters_have_torchvisions_names_and_shapes_in_its_order():
    assert list(shapes(full_width(*TAPS)).items()) == list(TORCHVISION.items())


@pytest.mark.parametrize("tap", TAPS)
def test_only_the_layers_up_to_the_deepest_tap_are_built(tap):
    names = list(TORCHVISION)
    wanted = names[: names.index(LAST_PARAMETER[tap]) + 1]
    assert list(shapes(full_width(tap))) == wanted
    if tap != "pool1":
        assert list(shapes(full_width(tap, "pool1"))) == wanted


def test_width_multiplies_the_channels_of_every_layer_but_the_input():
    for name, shape in shapes(VGG16(TAPS, NARROW)).items():
        full = TORCHVISION[name]
        inputs = full[1:2] if name == "features.0.weight" else tuple(size // 32 for size in full[1:2])
        assert shape == (full[0] // 32, *inputs, *full[2:]), name


def test_a_trunk_may_see_other_channels_than_colour():
    colour, flow = shapes(VGG16(["pool2"], NARROW)), shapes(VGG16(["pool2"], NARROW, in_channels=20))
    assert flow == colour | {"features.0.weight": (2, 20, 3, 3)}
    assert VGG16(["pool2"], NARROW, in_channels=20)(torch.randn(2, 20, 8, 8))["pool2"].shape == (2, 4, 2, 2)


def test_no_layer_gets_narrower_than_one_channel():
    assert shapes(VGG16(["pool1"], 0.001)) == {
        "features.0.weight": (1, 3, 3, 3),
        "features.0.bias": (1,),
        "features.2.weight": (1, 1, 3, 3),
        "features.2.bias": (1,),
    }


def test_the_papers_taps_promise_its_channels_and_strides():
    taps = full_width("pool2", "pool3", "pool4", "pool5", "fc7").taps
    assert {name: (tap.channels, tap.stride) for name, tap in taps.items()} == {
        "pool2": (128, 4),
        "pool3": (256, 8),
        "pool4": (512, 16),
        "pool5": (512, 32),
        "fc7": (4096, None),
    }


@pytest.mark.parametrize("size", [64, 224])
def test_maps_have_the_channels_and_strides_that_were_promised(size):
    trunk = VGG16(TAPS, NARROW)
    maps = trunk(torch.randn(2, 3, size, size))
    assert list(maps) == list(TAPS)
    for name, tap in trunk.taps.items():
        cells = size // tap.stride if tap.stride else 1
        assert maps[name].shape == (2, tap.channels, cells, cells), name


def test_the_taps_are_known_without_a_trunk():
    assert tuple(known_taps(1.0)) == TAPS
    assert known_taps(NARROW) == VGG16(TAPS, NARROW).taps
    assert known_taps(1.0)["pool4"].size(112) == 7


def test_a_frame_that_is_no_multiple_of_the_stride_loses_its_rest():
    maps = VGG16(TAPS, NARROW)(torch.randn(1, 3, 75, 75))
    sizes = {name: tap.size(75) for name, tap in known_taps(NARROW).items()}
    assert sizes == {"pool1": 37, "pool2": 18, "pool3": 9, "pool4": 4, "pool5": 2, "fc6": 1, "fc7": 1}
    assert {name: x.shape[-1] for name, x in maps.items()} == sizes


def test_maps_come_in_the_order_of_the_taps():
    assert list(VGG16(["pool3", "pool1"], NARROW)(torch.randn(1, 3, 32, 32))) == ["pool3", "pool1"]


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["pool2", "pool6", "conv5_3"], r"taps pool6, conv5_3: VGG-16 has pool1, .*fc7"),
        ([], r"taps \(none\): VGG-16 has pool1"),
        (["pool2", "fc7", "pool2"], "taps pool2, fc7, pool2: expected each once"),
    ],
)
def test_taps_that_cannot_be_read_are_refused(taps, message):
    with pytest.raises(ValueError, match=message):
        VGG16(taps, NARROW)


# Numbers


def by_plain_convolutions(frames, p):
    """VGG-16 as its authors draw it, from parameters by torchvision's names: frames -> {tap: map}."""
    maps, x = {}, frames
    for i, block in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)], start=1):
        for number in block:
            x = functional.conv2d(x, p[f"features.{number}.weight"], p[f"features.{number}.bias"], padding=1).relu()
        x = maps[f"pool{i}"] = functional.max_pool2d(x, kernel_size=2, stride=2)
    x = functional.adaptive_avg_pool2d(x, (7, 7))
    x = torch.stack([cells.flatten() for cells in x])  # channel by channel, row by row
    for tap, number in (("fc6", 0), ("fc7", 3)):
        x = (x @ p[f"classifier.{number}.weight"].T + p[f"classifier.{number}.bias"]).relu()
        maps[tap] = x[:, :, None, None]
    return maps


@pytest.mark.parametrize("size", [224, 96])  # 7 x 7 cells before fc6, and 3 x 3 that are spread to 7 x 7
def test_maps_are_those_of_plain_convolutions(size):
    torch.manual_seed(0)
    trunk = with_biases(VGG16(TAPS, NARROW)).double()
    frames = torch.randn(2, 3, size, size, dtype=torch.float64)
    maps = trunk(frames)
    for name, expected in by_plain_convolutions(frames, trunk.state_dict()).items():
        assert expected.std() > 1e-3, f"{name} is constant: nothing is compared"
        torch.testing.assert_close(maps[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_dropped_between_fc6_and_fc7_reaches_fc7_alone():
    torch.manual_seed(0)
    trunk = with_biases(VGG16(["pool5", "fc6", "fc7"], NARROW))
    frames = torch.randn(2, 3, 64, 64)
    kept, dropped = trunk(frames), trunk(frames, drop=torch.zeros_like)
    for tap in ("pool5", "fc6"):
        torch.testing.assert_close(dropped[tap], kept[tap])
    expected = trunk.state_dict()["classifier.3.bias"].relu()
    torch.testing.assert_close(dropped["fc7"], expected[None, :, None, None].expand_as(dropped["fc7"]))


def test_a_new_trunk_neither_kills_nor_blows_up_what_runs_through_it():
    torch.manual_seed(0)
    maps = VGG16(TAPS, 1 / 8)(torch.randn(2, 3, 64, 64))
    assert all(0.05 < x.std() < 50 for x in maps.values())


# Weights


def weights_of(trunk):
    return {name: torch.randn_like(tensor) for name, tensor in trunk.state_dict().items()}


def test_weights_are_loaded_by_name_and_those_of_later_layers_ignored():
    trunk = VGG16(["pool3", "pool1"], NARROW)
    weights = weights_of(VGG16(TAPS, NARROW)) | {
        "classifier.6.weight": torch.randn(1000, 128),
        "classifier.6.bias": torch.randn(1000),
    }
    load_weights(trunk, weights, "vgg16.pth")
    assert "features.17.weight" not in trunk.state_dict()
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_missing_parameter_is_named_and_the_trunk_left_as_it_was():
    trunk = VGG16(["pool2"], NARROW)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    weights = weights_of(trunk)
    del weights["features.5.bias"]
    with pytest.raises(
        BadWeights, match=r"mine\.pth: no features\.5\.bias \(1 of the trunk's 8 parameters are missing"
    ):
        load_weights(trunk, weights, "mine.pth")
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_weights_of_another_width_are_refused_with_both_shapes():
    trunk = VGG16(["pool2"], NARROW)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    with pytest.raises(
        BadWeights, match=r"mine\.pth: features\.0\.weight is \(4, 3, 3, 3\), expected \(2, 3, 3, 3\).*width"
    ):
        load_weights(trunk, weights_of(VGG16(["pool2"], 1 / 16)), "mine.pth")
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ((0, 2, 5, 7, 10, 12, 15, 17, 20, 22), r"features\.14"),  # VGG-13
        ((0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34), r"features\.17"),  # VGG-19
        ((0, 1, 3, 4, 7, 8, 10, 11, 14, 15, 17, 18, 20, 21, 24), r"features\.2"),  # VGG-16 with batch norm
    ],
)
def test_weights_of_a_neighbour_in_torchvisions_list_are_refused(numbers, missing):
    trunk = full_width("pool5")
    weights = {f"features.{number}.{kind}": torch.empty(0) for number in numbers for kind in ("weight", "bias")}
    with pytest.raises(BadWeights, match=rf"vgg\.pth: no {missing}\.weight"):
        load_weights(trunk, weights, "vgg.pth")


def test_weights_of_another_kind_of_network_are_refused_with_what_was_found():
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}
    with pytest.raises(
        BadWeights, match=r"resnet\.pth: no features\.0\.weight .*found conv1\.weight, bn1\.weight.*torchvision's vgg16"
    ):
        load_weights(VGG16(["pool1"], NARROW), weights, "resnet.pth")
