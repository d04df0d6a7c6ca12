"""C3D: its published size, its numbers by plain convolutions, dropout by a clip's bits alone, weights that do not fit."""

import pytest
import torch
from torch.nn import functional

from grurcn.models.c3d import C3D
from grurcn.models.config import C3D_FRAMES, C3D_SIZE
from grurcn.models.dropout import dropout
from grurcn.models.trunks.base import BadWeights
from grurcn.training.losses import mean_loss

# The shapes of the Sports-1M weights converted for PyTorch, without fc8 (487 sports).
CONVERTED = {
    "conv1": (64, 3, 3, 3, 3),
    "conv2": (128, 64, 3, 3, 3),
    "conv3a": (256, 128, 3, 3, 3),
    "conv3b": (256, 256, 3, 3, 3),
    "conv4a": (512, 256, 3, 3, 3),
    "conv4b": (512, 512, 3, 3, 3),
    "conv5a": (512, 512, 3, 3, 3),
    "conv5b": (512, 512, 3, 3, 3),
    "fc6": (4096, 8192),
    "fc7": (4096, 4096),
}
CLASSES = 5
NARROW = 1 / 32  # 2, 4, 8, 16 and 16 channels, large layers of 128
DRAW = torch.tensor([11, 2**62 + 7])


def narrow(seed=0, **options):
    """Random biases too: they start at zero, where an oracle cannot see them."""
    torch.manual_seed(seed)
    model = C3D(CLASSES, width=NARROW, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def clips(num=2, channels=3):
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, C3D_FRAMES, channels, C3D_SIZE, C3D_SIZE, generator=generator)


def by_plain_convolutions(x, p, drop=lambda x, level: x):
    """C3D as its authors' table has it, from parameters by name: clips (B, 16, I, 112, 112) -> probabilities (B, K)."""
    x = torch.stack([clip.permute(1, 0, 2, 3) for clip in x])
    for names, pool, padding, after in (
        (["conv1"], (1, 2, 2), 0, (16, 56, 56)),
        (["conv2"], (2, 2, 2), 0, (8, 28, 28)),
        (["conv3a", "conv3b"], (2, 2, 2), 0, (4, 14, 14)),
        (["conv4a", "conv4b"], (2, 2, 2), 0, (2, 7, 7)),
        (["conv5a", "conv5b"], (2, 2, 2), (0, 1, 1), (1, 4, 4)),
    ):
        for name in names:
            x = functional.conv3d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1).clamp(min=0)
        x = functional.max_pool3d(x, kernel_size=pool, stride=pool, padding=padding)
        assert x.shape[2:] == after, names
    x = torch.stack([cells.flatten() for cells in x])  # channel by channel, frame by frame, row by row
    for level, name in enumerate(("fc6", "fc7")):
        x = drop((x @ p[f"{name}.weight"].T + p[f"{name}.bias"]).clamp(min=0), level)
    return (x @ p["head.weight"].T + p["head.bias"]).softmax(dim=1)


# Names and numbers


def test_on_ucf_101_it_has_its_published_78_409_573_parameters_by_their_converted_names():
    with torch.device("meta"):
        model = C3D(num_classes=101)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = {f"{name}.weight": shape for name, shape in CONVERTED.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in CONVERTED.items()}
    assert shapes == wanted | {"head.weight": (101, 4096), "head.bias": (101,)}
    by_hand = [
        5_184 + 64,  # 27 * 3 * 64
        221_184 + 128,  # 27 * 64 * 128
        884_736 + 256,  # 27 * 128 * 256
        1_769_472 + 256,  # 27 * 256 * 256
        3_538_944 + 512,  # 27 * 256 * 512
        3 * (7_077_888 + 512),  # 27 * 512 * 512
        33_554_432 + 4_096,  # 512 * 1 * 4 * 4 * 4096
        16_777_216 + 4_096,  # 4096 * 4096
        413_696 + 101,  # 4096 * 101
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(by_hand) == 78_409_573
    assert model.num_classes == 101


def test_width_multiplies_the_channels_of_every_layer_but_the_input_and_the_head():
    model = C3D(CLASSES, in_channels=2, width=NARROW)
    for name, (out, inputs, *kernel) in CONVERTED.items():
        wanted = (out // 32, 2 if name == "conv1" else inputs // 32, *kernel)
        assert tuple(model.get_parameter(f"{name}.weight").shape) == wanted, name
    assert tuple(model.head.weight.shape) == (CLASSES, 128)


@pytest.mark.parametrize("channels", [3, 2])
def test_scores_are_those_of_plain_convolutions(channels):
    model, x = narrow(in_channels=channels).double().eval(), clips(channels=channels).double()
    found = model(x, DRAW)
    wanted = by_plain_convolutions(x, model.state_dict())
    assert found.shape == (2, 1, CLASSES)
    assert found.dtype == torch.float32
    assert wanted.std(dim=0).min() > 1e-4, "both clips score alike: nothing is compared"
    torch.testing.assert_close(found[:, 0].double().exp(), wanted, rtol=1e-6, atol=1e-7)


def test_scores_are_float32_in_a_network_of_lower_precision():
    model = narrow().bfloat16().eval()
    found = model(clips(1).bfloat16(), DRAW[:1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)


def test_the_order_of_frames_matters():
    model, x = narrow().eval(), clips()
    assert not torch.allclose(model(x, DRAW), model(x.flip(1), DRAW), atol=1e-4)


def test_every_parameter_learns():
    model = narrow()
    mean_loss(model(clips(), DRAW), torch.tensor([0, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_new_network_neither_kills_nor_blows_up_what_runs_through_it():
    torch.manual_seed(0)
    model = C3D(CLASSES, width=1 / 8).eval()
    outputs = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        if name != "head":
            assert not model.get_parameter(f"{name}.bias").any(), name
    model(clips(), DRAW)
    assert list(outputs) == [*CONVERTED, "head"]
    for name in CONVERTED:
        assert 0.3 < outputs[name].relu().square().mean().sqrt() < 10, name
    assert outputs["head"].std() < 3


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 10, 3, 112, 112), "10 frames of 112 x 112 with 3 channels"),
        ((2, 16, 3, 112, 128), "16 frames of 112 x 128 with 3 channels"),
        ((2, 16, 3, 96, 112), "16 frames of 96 x 112 with 3 channels"),
        ((2, 16, 2, 112, 112), "16 frames of 112 x 112 with 2 channels"),
    ],
)
def test_clips_of_another_size_are_refused(shape, found):
    with pytest.raises(
        ValueError, match=f"clips of {found}: C3D takes 16 frames of 112 x 112 with 3 .*--clips.size 112"
    ):
        narrow()(torch.zeros(shape), DRAW)


# Dropout


def test_in_evaluation_nothing_is_dropped():
    model, x = narrow().eval(), clips()
    first = model(x, DRAW)
    assert torch.equal(model(x, DRAW), first)
    assert torch.equal(model(x, DRAW + 1), first)
    torch.testing.assert_close(narrow(dropout=0.0)(x, DRAW), first)


def test_in_training_scores_are_a_function_of_the_draw_and_of_no_generator():
    model, x = narrow(), clips()
    first = model(x, DRAW)
    state = torch.random.get_rng_state()
    assert torch.equal(model(x, DRAW), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = model(x, torch.stack([DRAW[0], DRAW[1] + 1]))
    torch.testing.assert_close(other[0], first[0])
    assert not torch.allclose(other[1], first[1], atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_in_training_the_share_of_fc6_and_of_fc7_is_dropped_each_by_its_own_mask(share):
    model, x = narrow(dropout=share).double(), clips().double()
    wanted = by_plain_convolutions(x, model.state_dict(), lambda x, level: dropout(x, share, DRAW, level))
    torch.testing.assert_close(model(x, DRAW)[:, 0].double().exp(), wanted, rtol=1e-6, atol=1e-7)


def test_half_is_dropped_unless_told_otherwise():
    model, x = narrow(), clips()
    torch.testing.assert_close(model(x, DRAW), narrow(dropout=0.5)(x, DRAW))


def test_a_clip_scores_the_same_whatever_else_is_in_its_batch():
    model, x = narrow(), clips(3)
    draw = torch.tensor([5, 6, 7])
    alone = torch.cat([model(x[i : i + 1], draw[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, draw), alone, rtol=1e-4, atol=1e-5)


# Weights


def converted(model):
    """Random weights for all but the head, in a file's order, with an fc8 behind."""
    weights = {name: torch.randn_like(x) for name, x in model.state_dict().items() if not name.startswith("head")}
    return weights | {"fc8.weight": torch.randn(487, 128), "fc8.bias": torch.randn(487)}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_are_loaded_by_name_and_the_head_stays_as_it_is():
    model = narrow()
    before, weights = copy_of(model), converted(model)
    model.load(weights, "c3d.pickle")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.") else weights[name]), name


def test_a_missing_parameter_is_named_and_the_network_left_as_it_was():
    model = narrow()
    before, weights = copy_of(model), converted(model)
    del weights["conv4b.bias"], weights["fc6.weight"]
    with pytest.raises(
        BadWeights,
        match=r"mine\.pth: no conv4b\.bias \(2 of C3D's 20 parameters are missing; found conv1\.weight, conv1\.",
    ):
        model.load(weights, "mine.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_network_are_refused_with_what_was_found():
    weights = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    with pytest.raises(
        BadWeights,
        match=r"vgg16\.pth: no conv1\.weight \(20 of .*features\.0\.weight.*expected Sports-1M weights of C3D",
    ):
        narrow().load(weights, "vgg16.pth")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 1 / 16}, r"conv1\.weight is \(4, 3, 3, 3, 3\), expected \(2, 3, 3, 3, 3\).*--model\.width 1"),
        ({"width": NARROW, "in_channels": 2}, r"conv1\.weight is \(2, 2, 3, 3, 3\), expected .*input channels"),
    ],
)
def test_weights_of_another_width_or_input_are_refused_with_both_shapes(other, message):
    model = narrow()
    before = copy_of(model)
    with pytest.raises(BadWeights, match=rf"mine\.pth: {message}"):
        model.load(converted(C3D(CLASSES, **other)), "mine.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
