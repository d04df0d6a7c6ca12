"""MobileNetV2: torchvision's names and shapes, its numbers by plain convolutions, stored statistics, and real pictures."""

import av
import pytest
import torch
from torch.nn import functional
from videos import DATA, needs_data

from grurcn.models.pixels import MEAN, STD
from grurcn.models.trunks.base import load_weights
from grurcn.models.trunks.mobilenet import MobileNetV2, known_taps

# torchvision.models.mobilenet_v2().features: of each block the channels that come in, those inside it, those that go out.
BLOCKS = {
    1: (32, 32, 16),
    2: (16, 96, 24),
    3: (24, 144, 24),
    4: (24, 144, 32),
    5: (32, 192, 32),
    6: (32, 192, 32),
    7: (32, 192, 64),
    8: (64, 384, 64),
    9: (64, 384, 64),
    10: (64, 384, 64),
    11: (64, 384, 96),
    12: (96, 576, 96),
    13: (96, 576, 96),
    14: (96, 576, 160),
    15: (160, 960, 160),
    16: (160, 960, 160),
    17: (160, 960, 320),
}
HALVING = (2, 4, 7, 14)  # blocks of stride 2
ADDING = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)  # blocks that add what came in
# The last layer of each tap, and its channels.
LAYER = {"stride4": (3, 24), "stride8": (6, 32), "stride16": (13, 96), "stride32": (17, 320), "pooled": (18, 1280)}
TAPS = tuple(LAYER)
NARROW = 1 / 8


def of_norm(name, channels):
    shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (channels,)) | {"num_batches_tracked": ()}
    return {f"{name}.{kind}": shape for kind, shape in shapes.items()}


def of_block(number):
    into, inside, out = BLOCKS[number]
    shapes, conv = {}, f"features.{number}.conv"
    if number > 1:
        shapes |= {f"{conv}.0.0.weight": (inside, into, 1, 1), **of_norm(f"{conv}.0.1", inside)}
    each, last = (0, 1) if number == 1 else (1, 2)
    shapes |= {f"{conv}.{each}.0.weight": (inside, 1, 3, 3), **of_norm(f"{conv}.{each}.1", inside)}
    return shapes | {f"{conv}.{last}.weight": (out, inside, 1, 1), **of_norm(f"{conv}.{last + 1}", out)}


# torchvision.models.mobilenet_v2().state_dict(), without classifier.1 (ImageNet's classes).
TORCHVISION = {
    "features.0.0.weight": (32, 3, 3, 3),
    **of_norm("features.0.1", 32),
    **{name: shape for number in BLOCKS for name, shape in of_block(number).items()},
    "features.18.0.weight": (1280, 320, 1, 1),
    **of_norm("features.18.1", 1280),
}


def shapes(trunk):
    return {name: tuple(tensor.shape) for name, tensor in trunk.state_dict().items()}


def full_width(*taps):
    with torch.device("meta"):
        return MobileNetV2(taps)


def trained(taps=TAPS, width=NARROW):
    """A trunk whose batch norms do something, as after a training: new ones only pass on."""
    torch.manual_seed(0)
    trunk = MobileNetV2(taps, width)
    for name, tensor in trunk.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
            torch.nn.init.normal_(module.bias, std=0.3)
    return trunk


# Names and shapes


def test_parameters_and_buffers_have_torchvisions_names_and_shapes_in_its_order():
    assert list(shapes(full_width(*TAPS)).items()) == list(TORCHVISION.items())


def test_there_are_as_many_parameters_as_torchvision_says():
    parameters = sum(parameter.numel() for parameter in full_width("pooled").parameters())
    assert parameters == 2_223_872
    assert parameters + 1280 * 1000 + 1000 == 3_504_872  # with the layer of ImageNet's classes


@needs_data
def test_torchvisions_file_has_those_names_and_shapes():
    file = torch.load(DATA / "weights/mobilenet_v2_imagenet.pth", weights_only=True)
    found = [(name, tuple(tensor.shape)) for name, tensor in file.items()]
    assert found == [*TORCHVISION.items(), ("classifier.1.weight", (1000, 1280)), ("classifier.1.bias", (1000,))]


@pytest.mark.parametrize("tap", TAPS)
def test_only_the_layers_up_to_the_deepest_tap_are_built(tap):
    wanted = [name for name in TORCHVISION if int(name.split(".")[1]) <= LAYER[tap][0]]
    assert list(shapes(full_width(tap))) == wanted
    assert list(shapes(full_width(tap, "stride4"))) == wanted if tap != "stride4" else True


def test_width_multiplies_the_channels_of_every_layer_but_the_input():
    for name, shape in shapes(MobileNetV2(TAPS, NARROW)).items():
        full = TORCHVISION[name]
        inputs = full[1:2] if full[1:2] in ((), (1,)) or name == "features.0.0.weight" else (full[1] // 8,)
        assert shape == (*(size // 8 for size in full[:1]), *inputs, *full[2:]), name


def test_a_trunk_may_see_other_channels_than_colour():
    colour = shapes(MobileNetV2(["stride4"], NARROW))
    trunk = MobileNetV2(["stride4"], NARROW, in_channels=20)
    assert shapes(trunk) == colour | {"features.0.0.weight": (4, 20, 3, 3)}
    assert trunk(torch.randn(2, 20, 16, 16))["stride4"].shape == (2, 3, 4, 4)


def test_blocks_of_any_width_add_where_those_of_full_width_do():
    for width in (1.0, 0.001):  # where all layers have one channel
        blocks = list(MobileNetV2(TAPS, width).features)[1:18]
        assert tuple(number for number, block in enumerate(blocks, start=1) if block.adds) == ADDING


def test_the_taps_are_known_without_a_trunk():
    assert {name: tap.channels for name, tap in known_taps(1.0).items()} == {
        name: channels for name, (_, channels) in LAYER.items()
    }
    assert list(known_taps(1.0)) == list(TAPS)
    assert known_taps(NARROW) == MobileNetV2(TAPS, NARROW).taps
    assert [tap.size(112) for tap in known_taps(1.0).values()] == [28, 14, 7, 4, 1]


@pytest.mark.parametrize("size", [64, 75, 112, 97, 33, 1])
def test_maps_have_the_channels_and_sizes_that_were_promised(size):
    maps = MobileNetV2(TAPS, NARROW)(torch.randn(2, 3, size, size))
    assert list(maps) == list(TAPS)
    for name, tap in known_taps(NARROW).items():
        assert maps[name].shape == (2, tap.channels, tap.size(size), tap.size(size)), name


def test_maps_come_in_the_order_of_the_taps():
    maps = MobileNetV2(["pooled", "stride16", "stride4"], NARROW)(torch.randn(1, 3, 32, 32))
    assert list(maps) == ["pooled", "stride16", "stride4"]


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["stride4", "stride2", "fc7"], r"taps stride2, fc7: MobileNetV2 has stride4, .*pooled"),
        ([], r"taps \(none\): MobileNetV2 has stride4"),
        (["stride4", "stride4"], "taps stride4, stride4: expected each once"),
    ],
)
def test_taps_that_cannot_be_read_are_refused(taps, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2(taps, NARROW)


# Numbers


def by_plain_convolutions(frames, p):
    """MobileNetV2 as its authors' Table 2 has it, from parameters by torchvision's names: frames -> {tap: map}."""

    def norm(x, name):
        mean, variance, scale, shift = (
            p[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def layer(x, name, stride=1, groups=1):
        x = functional.conv2d(
            x, p[f"{name}.0.weight"], stride=stride, padding=p[f"{name}.0.weight"].shape[-1] // 2, groups=groups
        )
        return norm(x, f"{name}.1").clamp(0, 6)

    maps, x = {}, layer(frames, "features.0", stride=2)
    for number in range(1, 18):
        block, came = f"features.{number}.conv", x
        if number > 1:
            x = layer(x, f"{block}.0")
        x = layer(x, f"{block}.{min(number - 1, 1)}", stride=2 if number in HALVING else 1, groups=x.shape[1])
        last = 1 if number == 1 else 2
        x = norm(functional.conv2d(x, p[f"{block}.{last}.weight"]), f"{block}.{last + 1}")
        if number in ADDING:
            x = came + x
        for tap, (deepest, _) in LAYER.items():
            if deepest == number:
                maps[tap] = x
    x = layer(x, "features.18")
    maps["pooled"] = (x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3]))[:, :, None, None]
    return maps


@pytest.mark.parametrize("size", [(64, 64), (75, 75), (33, 50)])
def test_maps_are_those_of_plain_convolutions(size):
    trunk = trained().double()
    frames = torch.randn(2, 3, *size, dtype=torch.float64)
    before = frames.clone()
    maps = trunk(frames)
    for name, expected in by_plain_convolutions(frames, trunk.state_dict()).items():
        assert expected.std() > 1e-3, f"{name} is constant: nothing is compared"
        torch.testing.assert_close(maps[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(frames, before)


def test_the_first_layer_cuts_off_above_six():
    trunk = trained(["stride4"])
    first = trunk.features[0]
    x = first(100 * torch.randn(2, 3, 32, 32))
    assert x.min() == 0
    assert x.max() == 6


def test_no_tap_changes_while_later_layers_run():
    frames = torch.randn(2, 3, 64, 64)
    maps = trained()(frames)
    for tap in TAPS:
        alone = MobileNetV2([tap], NARROW)  # nothing runs after its tap
        alone.load_state_dict(trained().state_dict(), strict=False)
        torch.testing.assert_close(alone(frames)[tap], maps[tap])


def test_what_is_to_be_dropped_is_nothing():
    trunk, frames = trained(), torch.randn(2, 3, 64, 64)
    kept, dropped = trunk(frames), trunk(frames, drop=torch.zeros_like)
    for tap in TAPS:
        assert torch.equal(kept[tap], dropped[tap])


@pytest.mark.parametrize("width", [1.0, NARROW])
def test_a_new_trunk_neither_kills_nor_blows_up_what_runs_through_it(width):
    torch.manual_seed(0)
    maps = MobileNetV2(TAPS, width)(torch.randn(4, 3, 64, 64))
    assert all(0.02 < x.std() < 5 for x in maps.values()), {name: x.std().item() for name, x in maps.items()}


# Batch norm


class Model(torch.nn.Module):
    """Something around a trunk, whose mode a training loop sets."""

    def __init__(self):
        super().__init__()
        self.trunk = trained()


def test_in_training_too_a_frame_has_the_same_maps_whatever_else_is_in_the_batch():
    # float64, as convolution kernels sum in another order for another batch size, and small maps cancel in float32.
    model, frames = Model().double(), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = model.eval().trunk(frames)
    model.train()
    assert model.trunk.training
    for part in (frames[:1], frames[:2], frames):
        maps = model.trunk(part)
        for tap in TAPS:
            torch.testing.assert_close(maps[tap], expected[tap][: len(part)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "prepare", [lambda trunk: trunk, lambda trunk: trunk.train(), lambda trunk: trunk.eval().train()]
)
def test_training_leaves_the_stored_statistics_alone(prepare):
    trunk = prepare(MobileNetV2(TAPS, NARROW))
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    trunk(5 + torch.randn(4, 3, 64, 64))
    for name, buffer in trunk.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_every_weight_learns_the_scales_and_shifts_of_batch_norm_among_them():
    trunk = MobileNetV2(TAPS, NARROW)
    maps = trunk(torch.randn(4, 3, 64, 64)).values()
    torch.stack([x.square().mean() for x in maps]).sum().backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# Real pictures


def read_picture(path):
    """A picture -> (1, 3, 224, 224) as ImageNet's networks want it: the shorter side to 256 pixels, the centre, normalised."""
    with av.open(str(path)) as container:
        rgb = next(container.decode(video=0)).to_ndarray(format="rgb24")
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255
    size = [round(side * 256 / min(x.shape[2:])) for side in x.shape[2:]]
    x = functional.interpolate(x, size, mode="bilinear", antialias=True)
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    x = x[:, :, top : top + 224, left : left + 224]
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@needs_data
@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("cat_720p.jpg", "Egyptian cat"),
        ("dragonfly.bmp", "dragonfly"),
        ("hot_dog.jpg", "hotdog"),
        ("parrot.jpg", "macaw"),
        ("sunflower.bmp", "daisy"),  # ImageNet has no sunflower
    ],
)
def test_pictures_are_classified_with_imagenets_weights(picture, label):
    folder = DATA / "weights"
    weights = torch.load(folder / "mobilenet_v2_imagenet.pth", weights_only=True)
    labels = (
        (folder / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines()[1:]
    )  # the first is the background
    trunk = MobileNetV2(["stride16", "pooled"])
    load_weights(trunk, weights, "mobilenet_v2_imagenet.pth")

    with torch.no_grad():
        pooled = trunk(read_picture(folder / "check_images" / picture))["pooled"].flatten(1)  # (1, 1280)
    scores = functional.linear(pooled, weights["classifier.1.weight"], weights["classifier.1.bias"])

    assert len(labels) == 1000
    assert labels[int(scores.argmax())].split(", ")[0] == label
    assert scores.softmax(dim=1).max() > 0.5
