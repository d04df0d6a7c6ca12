"""The order of samples: each once an epoch, the same whatever the number of workers, and the same for ever."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards.reading.order import (
    CLIP_OF_SAMPLE,
    PADDING,
    SAMPLES_OF_WINDOW,
    SHARDS_OF_EPOCH,
    WINDOW,
    BadBatch,
    Order,
    lanes_of,
    permutation,
    random_bits,
    random_rows,
)

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=3 * WINDOW)
BATCHES = st.integers(1, 16)
SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**32)


def epoch_of(order, epoch):
    """Every global batch of an epoch (steps, lanes)."""
    lanes = range(order.global_batch)
    return np.stack([order.samples(epoch, step, lanes) for step in range(order.steps_per_epoch)])


def slow_epoch(sizes, global_batch, seed, epoch):
    """The same by the definition: write the whole sequence down, cut it into lanes, read it step by step."""
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    shards = permutation(len(sizes), seed, epoch, SHARDS_OF_EPOCH, 0)
    sequence = []
    for window, first in enumerate(range(0, len(shards), WINDOW)):
        samples = [starts[shard] + n for shard in shards[first : first + WINDOW] for n in range(sizes[shard])]
        sequence += [samples[n] for n in permutation(len(samples), seed, epoch, SAMPLES_OF_WINDOW, window)]
    steps = len(sequence) // global_batch
    return [[sequence[lane * steps + step] for lane in range(global_batch)] for step in range(steps)]


def shuffled(sizes, global_batch, seed):
    assume(sum(sizes) >= global_batch)
    return Order(sizes, global_batch, seed)


@settings(deadline=None)
@given(sizes=SIZES, global_batch=BATCHES, seed=SEEDS, epoch=EPOCHS)
def test_the_order_is_the_one_that_is_written_down(sizes, global_batch, seed, epoch):
    order = shuffled(sizes, global_batch, seed)
    assert epoch_of(order, epoch).tolist() == slow_epoch(sizes, global_batch, seed, epoch)


@settings(deadline=None)
@given(sizes=SIZES, global_batch=BATCHES, seed=SEEDS, epoch=EPOCHS)
def test_an_epoch_shows_each_sample_once_but_for_the_remainder(sizes, global_batch, seed, epoch):
    samples = epoch_of(shuffled(sizes, global_batch, seed), epoch).ravel()
    assert len(set(samples)) == len(samples) == sum(sizes) - sum(sizes) % global_batch
    assert set(samples) <= set(range(sum(sizes)))


@settings(deadline=None)
@given(sizes=SIZES, workers=st.integers(1, 8), share=st.integers(1, 4), seed=st.none() | SEEDS, epoch=st.integers(0, 5))
def test_every_number_of_workers_sees_the_same_global_batches(sizes, workers, share, seed, epoch):
    global_batch = workers * share
    assume(sum(sizes) >= global_batch)
    order = Order(sizes, global_batch, seed)
    parts = [lanes_of(rank, workers, global_batch) for rank in range(workers)]
    for step in range(order.steps_per_epoch):
        joined = np.concatenate([Order(sizes, global_batch, seed).samples(epoch, step, lanes) for lanes in parts])
        np.testing.assert_array_equal(joined, order.samples(epoch, step, range(global_batch)))


@settings(deadline=None)
@given(sizes=SIZES, global_batch=BATCHES, seed=SEEDS, steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99))))
def test_a_place_gives_the_same_samples_whatever_was_read_before(sizes, global_batch, seed, steps):
    order = shuffled(sizes, global_batch, seed)
    lanes = range(global_batch)
    for epoch, step in steps:
        place = epoch, step % order.steps_per_epoch
        fresh = Order(sizes, global_batch, seed)
        np.testing.assert_array_equal(order.samples(*place, lanes), fresh.samples(*place, lanes))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_other_samples_are_left_over_in_other_epochs(seed):
    """23 samples in batches of 5: three are left over; in 60 epochs every sample is at least once among them."""
    order = Order([6, 6, 6, 5], 5, seed)
    left_over = [frozenset(range(23)) - set(epoch_of(order, epoch).ravel()) for epoch in range(60)]
    assert {len(samples) for samples in left_over} == {3}
    assert len(set(left_over)) > 10
    assert len(frozenset.union(*left_over)) > 20


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 2**32))
def test_two_epochs_and_two_seeds_have_different_orders(seed, epoch):
    sizes = [20, 20, 20]
    first = epoch_of(Order(sizes, 4, seed), epoch).tolist()
    assert first != epoch_of(Order(sizes, 4, seed), epoch + 1).tolist()
    assert first != epoch_of(Order(sizes, 4, seed + 1), epoch).tolist()


def test_each_lane_reads_a_window_of_shards_to_its_end_before_the_next():
    """Three lanes over six windows of shards of equal size: each lane reads two windows, one after the other."""
    order = Order([10] * (6 * WINDOW), 3, seed=3)
    shards_of_window = []
    for lane in epoch_of(order, epoch=0).T:
        for part in (lane[: 10 * WINDOW], lane[10 * WINDOW :]):
            shards_of_window.append({sample // 10 for sample in part})
            assert len(set(part)) == len(part) == 10 * WINDOW
            assert len(shards_of_window[-1]) == WINDOW
            assert len({sample // 10 for sample in part[:WINDOW]}) > WINDOW // 3  # mixed, not one shard after the other
    assert set.union(*shards_of_window) == set(range(6 * WINDOW))


def class_mix_error(batches, classes, together):
    """Half the L1 distance between the class mix of so many consecutive batches and that of all samples, in the mean."""
    whole = np.bincount(classes) / len(classes)
    stretches = [batches[step : step + together].ravel() for step in range(0, len(batches) - together + 1, together)]
    mixes = [np.bincount(classes[samples], minlength=len(whole)) / len(samples) for samples in stretches]
    return np.mean([np.abs(mix - whole).sum() / 2 for mix in mixes])


@pytest.mark.parametrize("together", [1, 10, 50])
def test_data_packed_in_class_order_is_mixed_almost_as_by_a_perfect_shuffle(together):
    """As many videos as UCF-101 has, 100 a shard, class after class; without windows ten batches are off by 1.7 times."""
    classes = np.arange(101 * 94) // 94
    order = Order([100] * 94 + [94], 64, seed=0)
    ours = np.concatenate([epoch_of(order, epoch) for epoch in range(3)])
    rng = np.random.default_rng(0)
    perfect = np.concatenate([rng.permutation(len(classes))[: ours.size // 3].reshape(-1, 64) for _ in range(3)])
    error, least = (class_mix_error(batches, classes, together) for batches in (ours, perfect))
    assert 0.9 * least < error < 1.1 * least


@settings(deadline=None)
@given(sizes=SIZES, workers=st.integers(1, 6), share=st.integers(1, 4))
def test_evaluation_counts_each_sample_once_and_pads(sizes, workers, share):
    assume(sum(sizes) > 0)
    global_batch = workers * share
    order = Order(sizes, global_batch, seed=None)
    assert order.steps_per_epoch == -(-sum(sizes) // global_batch)
    seen = Counter()
    for rank in range(workers):
        for step in range(order.steps_per_epoch):
            samples = order.samples(0, step, lanes_of(rank, workers, global_batch))
            assert len(samples) == share  # shapes stay equal
            seen.update(samples.tolist())
    padding = order.steps_per_epoch * global_batch - sum(sizes)
    assert seen.pop(PADDING, 0) == padding
    assert seen == dict.fromkeys(range(sum(sizes)), 1)


def test_evaluation_keeps_the_samples_order_as_worked_by_hand():
    """N = 5, G = 2, so S = 3: lane 0 reads 0 1 2, lane 1 reads 3 4 and padding."""
    assert epoch_of(Order([2, 3], 2, seed=None), 0).tolist() == [[0, 3], [1, 4], [2, PADDING]]


@pytest.mark.parametrize("seed", [0, None])
def test_too_few_samples_for_one_batch_are_refused_only_where_none_may_be_shown_twice(seed):
    if seed is None:
        assert epoch_of(Order([3, 2], 8, seed), 0).tolist() == [[0, 1, 2, 3, 4, *[PADDING] * 3]]
        with pytest.raises(BadBatch, match="0 samples are fewer than one global batch of 8"):
            Order([], 8, seed)
        return
    with pytest.raises(BadBatch, match=r"5 samples are fewer than one global batch of 8; lower the global batch or"):
        Order([3, 2], 8, seed)


def test_lanes_are_shared_evenly_as_worked_by_hand():
    assert [lanes_of(rank, 3, 12) for rank in range(3)] == [range(4), range(4, 8), range(8, 12)]


@pytest.mark.parametrize(("workers", "global_batch"), [(5, 12), (24, 12)])
def test_workers_that_do_not_divide_the_batch_are_refused_with_those_that_do(workers, global_batch):
    message = rf"batch of {global_batch} cannot be shared evenly by {workers} workers; .*: 1, 2, 3, 4, 6, 12$"
    with pytest.raises(BadBatch, match=message):
        lanes_of(0, workers, global_batch)


def test_memory_does_not_grow_with_the_number_of_samples():
    """2 * 10**8 samples written down would be 1.6 GB."""
    tracemalloc.start()
    try:
        order = Order([1000] * 200_000, 8, seed=1)
        samples = order.samples(3, order.steps_per_epoch - 1, range(8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(samples)) == 8
    assert samples.max() < 2 * 10**8
    assert peak < 40e6


def test_memory_does_not_grow_with_the_steps_that_were_read():
    order = Order([1000] * 2000, 1000, seed=1)
    lanes = range(4)
    order.samples(0, 0, lanes)
    tracemalloc.start()
    try:
        for epoch in range(60):
            for step in (0, 1000, 1999):
                order.samples(epoch, step, lanes)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 2 * len(lanes) * WINDOW * 1000 * 8


# The random numbers: pinned, so that no version of NumPy, and no change of ours, can change a resumed run in silence


def philox(seed, epoch, purpose, index, count):
    """Philox 4 x 64 with 10 rounds (Salmon et al. 2011), by the book."""
    mask = 2**64 - 1
    words = []
    counter = [0, 0, purpose, index]
    while len(words) < count:
        counter[0] += 1
        a, b, c, d = counter
        key_a, key_b = seed, epoch
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = second >> 64 ^ b ^ key_a, second & mask, first >> 64 ^ d ^ key_b, first & mask
            key_a, key_b = key_a + 0x9E3779B97F4A7C15 & mask, key_b + 0xBB67AE8584CAA73B & mask
        words += [a, b, c, d]
    return words[:count]


@settings(deadline=None)
@given(seed=SEEDS, epoch=EPOCHS, purpose=st.integers(0, 2), index=EPOCHS, count=st.integers(0, 11))
def test_random_bits_are_philox(seed, epoch, purpose, index, count):
    assert random_bits(count, seed, epoch, purpose, index).tolist() == philox(seed, epoch, purpose, index, count)


@settings(deadline=None)
@given(
    seed=SEEDS, epoch=EPOCHS, purpose=st.integers(0, 2), indices=st.lists(EPOCHS, max_size=6), count=st.integers(0, 11)
)
def test_random_rows_are_each_indexs_random_bits(seed, epoch, purpose, indices, count):
    rows = random_rows(count, seed, epoch, purpose, indices)
    assert rows.shape == (len(indices), count)
    assert rows.tolist() == [philox(seed, epoch, purpose, index, count) for index in indices]


@settings(deadline=None)
@given(size=st.integers(0, 50), seed=SEEDS, epoch=EPOCHS, purpose=st.integers(0, 2), index=EPOCHS)
def test_a_permutation_sorts_by_the_random_bits(size, seed, epoch, purpose, index):
    bits = philox(seed, epoch, purpose, index, size)
    assert permutation(size, seed, epoch, purpose, index).tolist() == sorted(range(size), key=bits.__getitem__)


def test_the_orders_first_values_never_change():
    assert (SHARDS_OF_EPOCH, SAMPLES_OF_WINDOW, CLIP_OF_SAMPLE, PADDING) == (0, 1, 2, -1)
    assert random_bits(3, 0, 0, SHARDS_OF_EPOCH, 0).tolist() == [
        213000021201967259,
        4455796210202625458,
        2055444239878205049,
    ]
    assert permutation(10, 7, 3, SAMPLES_OF_WINDOW, 5).tolist() == [2, 6, 7, 0, 8, 4, 1, 5, 3, 9]
    order = Order([1, 2, 1] * 4, 4, seed=0)  # two windows
    assert epoch_of(order, 0).tolist() == [[3, 12, 7, 13], [6, 2, 11, 8], [15, 0, 4, 10], [5, 1, 9, 14]]
    assert epoch_of(order, 1).tolist() == [[11, 15, 6, 0], [10, 1, 5, 12], [7, 3, 2, 8], [4, 9, 13, 14]]


@pytest.mark.parametrize("other", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_random_bits_depend_on_every_argument(other):
    assert not set(random_bits(1000, 0, 0, 0, 0)) & set(random_bits(1000, *other))


def test_every_permutation_is_about_equally_frequent():
    """24 permutations of 4, 2,400 draws: 100 of each, five standard deviations are 49."""
    counts = Counter(tuple(permutation(4, 1, 2, SAMPLES_OF_WINDOW, index)) for index in range(2400))
    assert len(counts) == 24
    assert all(51 <= count <= 149 for count in counts.values())
