"""Dropout that depends on a clip's bits alone: the published generator, its shares, and that nothing else is related."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grurcn.models.dropout import dropout, mix, uniform

DRAW = torch.tensor([11, 2**62 + 7])


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
