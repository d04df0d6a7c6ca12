"""GRU-RCN: what each level sees, how votes are averaged, what is frozen, and dropout that depends on a clip's bits alone."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.dropout import dropout
from grurcn.models.gru_rcn import GRURCN
from grurcn.models.trunks.base import BadWeights
from grurcn.models.trunks.vgg import VGG16
from grurcn.models.votes import log_mean_vote

CLASSES = 5
TINY = ModelConfig(taps=("pool1", "pool3", "fc7"), hidden=(3, 4, 6), width=1 / 32)
DRAW = torch.tensor([11, 2**62 + 7])


def clips(num=2, frames=3, size=32):
    return torch.randn(num, frames, 3, size, size, generator=torch.Generator().manual_seed(num))


def tiny(seed=0, **changes):
    model = build_model(dataclasses.replace(TINY, **changes), CLASSES, seed)
    assert isinstance(model, GRURCN)
    return model


# Votes


def test_probabilities_and_not_logits_are_averaged():
    votes = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()  # logits would give 0.75
    torch.testing.assert_close(log_mean_vote(votes).exp(), torch.tensor([[0.7, 0.3]]))


def test_votes_far_below_what_float32_can_exponentiate_are_averaged():
    votes = torch.tensor([[[-200.0], [-201.0]]])
    expected = -200 + math.log((1 + math.exp(-1)) / 2)
    assert log_mean_vote(votes).item() == pytest.approx(expected)


def test_each_level_gives_log_probabilities():
    levels = tiny()(clips(), DRAW)
    assert levels.shape == (2, 3, CLASSES)
    torch.testing.assert_close(levels.exp().sum(dim=-1), torch.ones(2, 3))


def test_a_level_votes_by_its_last_state_averaged_over_the_map():
    model, x = tiny().eval(), clips()
    maps = model.trunk(x.flatten(0, 1))
    for level, tap in enumerate(TINY.taps):
        states = model.grus[level](maps[tap].unflatten(0, (2, 3)))  # (B, T, C, H, W)
        pooled = states[:, 2].sum(dim=(2, 3)) / states[0, 0, 0].numel()
        expected = model.heads[level](pooled).softmax(dim=-1).log()
        torch.testing.assert_close(model(x, DRAW)[:, level], expected)


@pytest.mark.parametrize("level", range(3))
def test_each_head_sees_only_its_level(level):
    model = tiny().eval()
    model(clips(), DRAW)[:, level].square().sum().backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    for other in range(3):
        read = {f"grus.{other}.{w}" for w in ("w_gates", "w", "u_gates", "u")} | {f"heads.{other}.weight"}
        assert read <= moved if other == level else not read & moved, f"level {other}"


def test_the_frames_kind_does_not_depend_on_the_order_of_frames_and_gru_rcn_does():
    x, order = clips(frames=4), [2, 0, 3, 1]
    for kind, the_same in (("frames", True), ("gru-rcn", False)):
        model = tiny(kind=kind).eval()
        assert torch.allclose(model(x, DRAW), model(x[:, order], DRAW), atol=1e-6) == the_same, kind


def test_the_frames_kind_averages_the_probabilities_of_single_frames():
    model, x = tiny(kind="frames").eval(), clips(frames=4)
    singly = torch.stack([model(x[:, t : t + 1], DRAW).exp() for t in range(4)])
    torch.testing.assert_close(model(x, DRAW).exp(), singly.mean(dim=0))


def test_a_clip_scores_the_same_whatever_else_is_in_its_batch():
    model, x = tiny(), clips(num=4)
    draw = torch.tensor([5, 6, 7, 8])
    for training in (True, False):
        model.train(training)
        alone = torch.cat([model(x[i : i + 1], draw[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(model(x, draw), alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_taps_is_the_order_of_levels():
    forward = tiny().eval()
    backward = tiny(taps=TINY.taps[::-1], hidden=TINY.hidden[::-1]).eval()
    backward.trunk.load_state_dict(forward.trunk.state_dict())
    for level in range(3):
        backward.grus[2 - level].load_state_dict(forward.grus[level].state_dict())
        backward.heads[2 - level].load_state_dict(forward.heads[level].state_dict())
    torch.testing.assert_close(backward(clips(), DRAW), forward(clips(), DRAW).flip(1))


# The paper's size


def test_the_papers_grus_have_19_353_600_parameters():
    with torch.device("meta"):
        model = GRURCN(ModelConfig(), num_classes=101)
    counts = [sum(p.numel() for p in gru.parameters()) for gru in model.grus]
    assert counts == [331_776, 1_327_104, 5_308_416, 5_308_416, 7_077_888]
    assert sum(counts) == 19_353_600
    assert [tuple(model.get_parameter(f"heads.{level}.weight").shape) for level in range(5)] == [
        (101, channels) for channels in (64, 128, 256, 256, 512)
    ]


def test_a_level_of_one_cell_has_the_centre_taps_of_the_papers_kernels():
    # Over a 1 x 1 map a zero-padded 3 x 3 kernel only ever uses its centre: section 3's fc7 level.
    model = tiny(taps=("pool5", "fc6"), hidden=(4, 4))
    assert model.get_parameter("grus.0.u").shape == (4, 4, 3, 3)
    assert model.get_parameter("grus.1.u").shape == (4, 4, 1, 1)


# Variants


@pytest.mark.parametrize("kind", ["plain", "stacked"])
def test_both_directions_have_their_last_states_side_by_side(kind):
    model, x = (
        tiny(bidirectional=True, stacked=kind == "stacked", taps=("pool1", "pool2"), hidden=(4, 6)).eval(),
        clips(),
    )
    maps = model.maps(x, DRAW)
    there = [states[:, 2] for states in model.states(model.grus, maps, reverse=False)]
    back = [states[:, 0] for states in model.states(model.reverse_grus, maps, reverse=True)]
    for level in range(2):
        pooled = torch.cat([there[level], back[level]], dim=1).mean(dim=(2, 3))
        expected = model.heads[level](pooled).log_softmax(dim=-1)
        torch.testing.assert_close(model(x, DRAW)[:, level], expected)


def test_directions_have_weights_of_their_own():
    model = tiny(bidirectional=True)
    for gru, reverse in zip(model.grus, model.reverse_grus, strict=True):
        assert not torch.allclose(gru.get_parameter("u"), reverse.get_parameter("u"))


def test_a_stacked_level_sees_the_state_below_max_pooled_to_its_size():
    model, x = tiny(stacked=True, taps=("pool1", "pool2", "fc7"), hidden=(4, 6, 5)).eval(), clips()
    maps = model.maps(x, DRAW)
    below = None
    for gru, x_level, found in zip(model.grus, maps, model.states(model.grus, maps, reverse=False), strict=True):
        if below is not None:
            cells = below.shape[-1] // x_level.shape[-1]
            below = functional.max_pool2d(below.flatten(0, 1), cells).unflatten(0, (2, 3))
        expected = gru(x_level, below)
        torch.testing.assert_close(found, expected)
        below = expected


def test_only_a_stacked_model_carries_gradients_from_a_level_to_those_below():
    for stacked in (False, True):
        model = tiny(stacked=stacked, taps=("pool1", "pool2"), hidden=(4, 6), freeze=True)
        model(clips(), DRAW)[:, 1].sum().backward()
        grad = model.get_parameter("grus.0.u").grad
        assert (grad is not None and bool(grad.any())) == stacked


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ({}, 19_353_600),
        ({"bidirectional": True}, 2 * 19_353_600),
        ({"stacked": True}, 19_353_600 + 147_456 + 589_824 + 1_179_648 + 262_144),
        ({"taps": ("fc7",), "hidden": (512,)}, 7_077_888),
    ],
)
def test_variants_have_the_papers_numbers_of_parameters(variant, count):
    with torch.device("meta"):
        model = GRURCN(ModelConfig(**variant), num_classes=101)
    grus = [*model.grus, *model.reverse_grus]
    assert sum(p.numel() for gru in grus for p in gru.parameters()) == count


def test_over_fc7_alone_it_is_a_fully_connected_gru():
    # The paper's VGG-16 RNN, by matrices.
    model, x = tiny(taps=("fc7",), hidden=(5,)).double().eval(), clips().double()
    [maps] = model.maps(x, DRAW)
    w_gates, w, u_gates, u = (kernel.flatten(1) for kernel in model.grus.parameters())
    (w_z, w_r), (u_z, u_r) = w_gates.chunk(2), u_gates.chunk(2)
    h = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(3):
        row = maps[:, t, :, 0, 0]
        z, r = torch.sigmoid(row @ w_z.T + h @ u_z.T), torch.sigmoid(row @ w_r.T + h @ u_r.T)
        h = (1 - z) * h + z * torch.tanh(row @ w.T + (r * h) @ u.T)
    expected = model.heads[0](h).log_softmax(dim=-1).float()
    torch.testing.assert_close(model(x, DRAW)[:, 0], expected)


@pytest.mark.parametrize("variant", [{}, {"stacked": True, "bidirectional": True}])
def test_recomputing_changes_neither_scores_nor_gradients(variant):
    config = dataclasses.replace(TINY, taps=("pool1", "pool2"), hidden=(4, 6), **variant)
    found = []
    for recompute in (False, True):
        model = build_model(config, CLASSES, 0, recompute=recompute)
        model(clips(), DRAW).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_recomputing_keeps_only_the_maps_for_the_backward_pass():
    config, kept = dataclasses.replace(TINY, freeze=True), []
    for recompute in (False, True):
        model, sizes = GRURCN(config, CLASSES, recompute=recompute), []
        maps = model.maps(clips(), DRAW)

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            for _ in model.states(model.grus, maps, reverse=False):
                pass
        kept.append(sum(sizes))
    assert kept[1] == sum(x.numel() for x in maps) < kept[0]


def test_a_trunk_of_the_other_kind_gives_the_maps_it_promises():
    model = tiny(trunk="mobilenet_v2", taps=("stride4", "stride16", "pooled"), hidden=(4, 4, 4))
    maps = model.maps(clips(size=32), DRAW)
    taps = model.config.tap_maps
    assert [tuple(x.shape) for x in maps] == [(2, 3, tap.channels, tap.size(32), tap.size(32)) for tap in taps.values()]
    assert model(clips(size=32), DRAW).shape == (2, 3, CLASSES)


def test_a_model_for_flow_takes_its_channels():
    model = build_model(TINY, CLASSES, 0, in_channels=20)
    x = torch.randn(2, 3, 20, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(x, DRAW).shape == (2, 3, CLASSES)


def test_c3d_is_a_kind_of_model():
    model = build_model(ModelConfig(kind="c3d", width=1 / 64, dropout=0.5), CLASSES, 0).eval()
    assert model(torch.randn(1, 16, 3, 112, 112), DRAW[:1]).shape == (1, 1, CLASSES)


# Frozen or not


def gradients(model):
    model(clips(), DRAW).sum().backward()
    return {name: parameter.grad is not None for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["gru-rcn", "frames"])
def test_a_frozen_trunk_gets_no_gradient_and_the_rest_does(kind):
    got = gradients(tiny(kind=kind, freeze=True))
    assert got == {name: not name.startswith("trunk.") for name in got}


def test_a_trunk_without_weights_learns():
    got = gradients(tiny())
    assert got == dict.fromkeys(got, True)


@pytest.mark.parametrize(
    ("weights", "freeze", "frozen"),
    [(None, None, False), ("vgg16.pth", None, True), ("vgg16.pth", False, False), (None, True, True)],
)
def test_a_trunk_with_weights_is_frozen_unless_told_otherwise(weights, freeze, frozen):
    config = dataclasses.replace(TINY, weights=weights, freeze=freeze)
    assert config.frozen == frozen
    model = GRURCN(config, CLASSES)
    assert [p.requires_grad for p in model.trunk.parameters()] == [not frozen] * 30


def test_a_frozen_trunk_stays_in_evaluation_mode_from_the_start_and_when_training_goes_on():
    model = tiny(freeze=True)
    for _ in range(2):
        assert model.training
        assert not any(module.training for module in model.trunk.modules())
        torch.testing.assert_close(
            model.trunk(clips().flatten(0, 1))["fc7"], model.eval().trunk(clips().flatten(0, 1))["fc7"]
        )
        model.train()
    assert all(module.training for module in tiny().trunk.modules())


# Dropout


@pytest.mark.parametrize("kind", ["gru-rcn", "frames"])
@pytest.mark.parametrize("freeze", [True, False])
def test_in_training_scores_are_a_function_of_the_draw_and_of_no_generator(kind, freeze):
    model, x = tiny(kind=kind, freeze=freeze), clips()
    first = model(x, DRAW)
    state = torch.random.get_rng_state()
    assert torch.equal(model(x, DRAW), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.allclose(model(x, DRAW + 1), first)


def test_in_training_each_level_drops_channels_of_its_own():
    model, x = tiny(hidden=(16, 16, 16), freeze=True), clips()
    maps = model.trunk(x.flatten(0, 1))
    for level, tap in enumerate(TINY.taps):
        pooled = model.grus[level](maps[tap].unflatten(0, (2, 3)))[:, 2].mean(dim=(2, 3))
        expected = model.heads[level](dropout(pooled, 0.7, DRAW, level)).log_softmax(dim=-1)
        torch.testing.assert_close(model(x, DRAW)[:, level], expected)


def test_in_evaluation_nothing_is_dropped():
    model, x = tiny().eval(), clips()
    expected = tiny(dropout=0.0, freeze=True)(x, DRAW)  # frozen: fc6 is not dropped either
    torch.testing.assert_close(model(x, DRAW), expected)
    torch.testing.assert_close(model(x, DRAW + 1), expected)


def test_a_trunk_that_learns_drops_half_of_fc6_before_fc7():
    model = tiny(width=1 / 4)
    fc6 = torch.ones(2 * 3, 1024)
    dropped = model.drop_fc(DRAW, fc6)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert dropped.max() == 2
    first, second = dropped.unflatten(0, (3, 2)).unbind(dim=1)  # frame by frame, two clips
    assert torch.equal(first, first[:1].expand(3, -1))
    assert not torch.equal(first, second)
    assert torch.equal(dropped[:2] != 0, dropout(torch.ones(2, 1024), 0.5, DRAW, level=3) != 0)  # no head's
    assert torch.equal(model.eval().drop_fc(DRAW, fc6), fc6)

    model = tiny(dropout=0.0)
    first, second = model(clips(), DRAW), model(clips(), DRAW + 1)
    assert torch.equal(first[:, :2], second[:, :2])  # pool1 and pool3
    assert not torch.allclose(first[:, 2], second[:, 2])  # fc7


# First weights


def test_the_seed_alone_decides_the_first_weights():
    state = torch.random.get_rng_state()
    first = tiny(seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was moved"
    torch.randn(3)
    again, other = tiny(seed=1).state_dict(), tiny(seed=2).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(first["heads.0.weight"], other["heads.0.weight"])
    assert not torch.equal(first["trunk.features.0.weight"], other["trunk.features.0.weight"])


def test_given_weights_fill_the_trunk_and_leave_the_rest_as_the_seed_says():
    plain = tiny(seed=3)
    weights = {name: torch.randn_like(tensor) for name, tensor in plain.trunk.state_dict().items()}
    model = build_model(dataclasses.replace(TINY, weights="mine.pth"), CLASSES, 3, weights)
    for name, tensor in model.state_dict().items():
        expected = weights[name.removeprefix("trunk.")] if name.startswith("trunk.") else plain.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_weights_that_do_not_fit_are_refused_by_the_name_of_their_file():
    weights = VGG16(TINY.taps, 1 / 16).state_dict()
    with pytest.raises(BadWeights, match=r"mine\.pth: features\.0\.weight is \(4, 3, 3, 3\)"):
        build_model(dataclasses.replace(TINY, weights="mine.pth"), CLASSES, 0, weights)


# Bad settings


def test_one_hidden_size_per_tap_is_expected():
    with pytest.raises(ValueError, match="taps pool2, pool3; hidden 4, 5, 6: expected one hidden size per tap"):
        ModelConfig(taps=("pool2", "pool3"), hidden=(4, 5, 6))
    ModelConfig(kind="frames", taps=("pool2", "pool3"))  # has no states


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_a_dropout_that_is_no_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"dropout {fraction:g}: expected at least 0 and below 1"):
        ModelConfig(dropout=fraction)


def test_taps_that_vgg_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"taps pool9: vgg16 has pool1, pool2, .*fc7"):
        tiny(taps=("pool2", "pool9"), hidden=(3, 4))


def test_taps_of_another_trunk_are_refused():
    with pytest.raises(ValueError, match=r"taps pool2, .*fc7: mobilenet_v2 has stride4, .*pooled"):
        ModelConfig(trunk="mobilenet_v2")


@pytest.mark.parametrize("kernel_size", [0, 2, -1])
def test_a_kernel_without_a_centre_is_refused(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size {kernel_size}: expected an odd number"):
        ModelConfig(kernel_size=kernel_size)


@pytest.mark.parametrize("kind", ["frames", "c3d"])
def test_variants_of_gru_rcn_are_refused_for_models_without_grus(kind):
    with pytest.raises(ValueError, match=f"bidirectional and stacked are variants of gru-rcn; .* kind {kind}"):
        ModelConfig(kind=kind, stacked=True)


def test_stacked_maps_whose_sizes_do_not_divide_are_refused():
    config = ModelConfig(stacked=True)
    config.check_size(10, 224)
    config.check_size(10, 112 - 16)
    with pytest.raises(
        ValueError, match=r"stacked taps pool4 \(7 x 7 cells\) and pool5 \(3 x 3\), for frames of 112 pixels"
    ):
        config.check_size(10, 112)
    ModelConfig().check_size(10, 112)  # only stacking needs it


def test_c3d_wants_its_own_size_of_clips():
    config = ModelConfig(kind="c3d")
    config.check_size(16, 112)
    for num_frames, size in ((10, 112), (16, 224)):
        with pytest.raises(
            ValueError, match=f"clips of {num_frames} frames of {size} x {size}: C3D takes 16 frames of 112"
        ):
            config.check_size(num_frames, size)
