"""GRU-RCN: what each level sees, how votes are averaged, what is frozen, and dropout that depends on a clip's bits alone."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grurcn.model import GRURCN, ModelConfig, build_model, dropout, log_mean_vote, mix, uniform
from grurcn.vgg import VGG16, BadWeights

CLASSES = 5
TINY = ModelConfig(taps=("pool1", "pool3", "fc7"), hidden=(3, 4, 6), width=1 / 32)
DRAW = torch.tensor([11, 2**62 + 7])


def clips(num=2, frames=3, size=32):
    return torch.randn(num, frames, 3, size, size, generator=torch.Generator().manual_seed(num))


def tiny(seed=0, **changes):
    return build_model(dataclasses.replace(TINY, **changes), CLASSES, seed)


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
    assert model.grus is not None
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
        read = {f"grus.{other}.{w}.weight" for w in ("w", "u_gates", "u")} | {f"heads.{other}.weight"}
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
    assert forward.grus is not None
    backward = tiny(taps=TINY.taps[::-1], hidden=TINY.hidden[::-1]).eval()
    assert backward.grus is not None
    backward.trunk.load_state_dict(forward.trunk.state_dict())
    for level in range(3):
        backward.grus[2 - level].load_state_dict(forward.grus[level].state_dict())
        backward.heads[2 - level].load_state_dict(forward.heads[level].state_dict())
    torch.testing.assert_close(backward(clips(), DRAW), forward(clips(), DRAW).flip(1))


# The paper's size


def test_the_papers_grus_have_19_353_600_parameters():
    with torch.device("meta"):
        model = GRURCN(ModelConfig(), num_classes=101)
    assert model.grus is not None
    counts = [sum(p.numel() for p in gru.parameters()) for gru in model.grus]
    assert counts == [331_776, 1_327_104, 5_308_416, 5_308_416, 7_077_888]
    assert sum(counts) == 19_353_600
    assert [tuple(model.get_parameter(f"heads.{level}.weight").shape) for level in range(5)] == [
        (101, channels) for channels in (64, 128, 256, 256, 512)
    ]


def test_a_level_of_one_cell_has_the_centre_taps_of_the_papers_kernels():
    # Over a 1 x 1 map a zero-padded 3 x 3 kernel only ever uses its centre: section 3's fc7 level.
    model = tiny(taps=("pool5", "fc6"), hidden=(4, 4))
    assert model.get_parameter("grus.0.u.weight").shape == (4, 4, 3, 3)
    assert model.get_parameter("grus.1.u.weight").shape == (4, 4, 1, 1)


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


def splitmix64(number):
    """The published generator's output after its state `number`, with Python's own numbers."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def signed(number):
    return (number + 2**63) % 2**64 - 2**63


def test_splitmix64_gives_its_published_first_number():
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert mix(torch.tensor([0])).tolist() == [signed(0xE220A8397B1DCDAF)]


@given(st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_uniform_is_the_upper_53_bits_of_splitmix64(number):
    bits = torch.tensor([number])
    assert mix(bits).tolist() == [signed(splitmix64(number % 2**64))]
    assert uniform(bits).tolist() == [(splitmix64(number % 2**64) >> 11) / 2**53]


@pytest.mark.parametrize("start", [0, -5000, 2**62, 2**63 - 10_001])
def test_uniform_numbers_of_neighbours_fill_the_unit_interval_evenly_and_are_unrelated(start):
    u = uniform(torch.arange(start, start + 10_000))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_squared = ((counts - 500) ** 2 / 500).sum().item()
    assert 5 < chi_squared < 45  # of 19 degrees of freedom: all but 1 in 1000 on either side
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.04


def mask(draw, share=0.7, level=0, channels=1000):
    return dropout(torch.ones(len(draw), channels), share, torch.as_tensor(draw), level) != 0


@pytest.mark.parametrize("share", [0.7, 0.5, 0.1])
def test_the_share_is_dropped_and_the_rest_scaled_up_so_that_the_mean_stays(share):
    draw = mix(torch.arange(100))
    x = dropout(torch.full((100, 1000), 2.0), share, draw, level=1)
    assert (x == 0).double().mean().item() == pytest.approx(share, abs=0.01)
    torch.testing.assert_close(x[x != 0], torch.full_like(x[x != 0], 2 / (1 - share)))
    assert x.mean().item() == pytest.approx(2, rel=0.03)


def test_a_share_of_nothing_drops_nothing():
    assert torch.equal(dropout(torch.ones(3, 8), 0.0, torch.arange(3), 0), torch.ones(3, 8))


def test_which_channels_are_dropped_is_written_down():
    # A change here changes what every resumed run drops.
    draw, level = 0x0123456789ABCDEF, 3
    kept = [splitmix64(draw ^ splitmix64(channel + (level << 32))) / 2**64 >= 0.7 for channel in range(64)]
    assert mask([draw], level=level, channels=64)[0].tolist() == kept


def test_a_clip_drops_the_same_whichever_row_of_whichever_batch_it_is():
    draw = mix(torch.arange(6))
    together = mask(draw)
    assert torch.equal(mask(draw.flip(0)), together.flip(0))
    assert torch.equal(torch.cat([mask(draw[i : i + 1]) for i in range(6)]), together)


@pytest.mark.parametrize(("other_draw", "other_level"), [(1, 0), (0, 1), (2**62, 0), (1, 1)])
def test_other_draws_and_other_levels_drop_other_channels(other_draw, other_level):
    both = mask([0]) & mask([other_draw], level=other_level)
    assert both.double().mean().item() == pytest.approx(0.3 * 0.3, abs=0.03)  # unrelated: kept by both by chance


def test_all_frames_of_a_clip_lose_the_same_channels():
    x = dropout(torch.ones(2, 4, 50), 0.7, DRAW, level=2)
    assert x.shape == (2, 4, 50)
    for t in range(4):
        assert torch.equal(x[:, t], dropout(torch.ones(2, 50), 0.7, DRAW, level=2))


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
    assert model.grus is not None
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
    assert torch.equal(dropped[:3], dropped[:1].expand(3, -1))  # one clip
    assert not torch.equal(dropped[2], dropped[3])  # two clips
    assert torch.equal(dropped[::3] != 0, mask(DRAW, 0.5, level=3, channels=1024))  # no head's
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


def test_one_hidden_size_per_tap_is_wanted():
    with pytest.raises(ValueError, match="one hidden size per tap wanted: taps pool2, pool3; hidden 4, 5, 6"):
        ModelConfig(taps=("pool2", "pool3"), hidden=(4, 5, 6))
    ModelConfig(kind="frames", taps=("pool2", "pool3"))  # has no states


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_dropout_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=rf"dropout {share:g}: wanted at least 0 and below 1"):
        ModelConfig(dropout=share)


def test_taps_that_vgg_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"taps pool9: VGG-16 has pool1, pool2, .*fc7"):
        tiny(taps=("pool2", "pool9"), hidden=(3, 4))
