"""Which sample is read when: (seed, epoch, step, lane) -> sample number, as pure arithmetic.

An epoch is one sequence of all N samples: shards in a permuted order, dealt into windows of WINDOW shards, samples permuted
within each window. A global batch has G lanes; each lane reads its own stretch of S consecutive positions, one a step.

    N = 11, G = 3, S = 3        position  0 1 2   3 4 5   6 7 8   9 10
                                lane      0 0 0   1 1 1   2 2 2   left over this epoch (others the next)
                                step      0 1 2   0 1 2   0 1 2

Rank r of W owns the lanes [r * G / W, (r + 1) * G / W). So the global batch of a step is the same for every W, a place in
training is (epoch, step), and every rank reads few shards at a time. Windows mix shards that hold one class each, as tars
that were packed in the order of their classes do; data of one window is shuffled perfectly. Evaluation keeps the samples'
own order, and pads instead of leaving samples out. Nothing here grows with N: memory is O(shards).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

PADDING = -1  # stands where evaluation has no sample left for a lane
WINDOW = 8  # shards whose samples are mixed with each other
# Purposes of random bits; each has a stream of its own.
SHARDS_OF_EPOCH, SAMPLES_OF_WINDOW, CLIP_OF_SAMPLE, CAPTION_OF_PAIR = range(4)


class BadBatch(ValueError):
    """A global batch that the data or the workers cannot make."""


class Order:
    """The order of a split's samples in every epoch, for a global batch of a given size."""

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, global_batch: int, seed: int | None):
        """shard_sizes: samples in each shard. seed None: the samples' own order, padded, for evaluation.

        Raises BadBatch if a shuffled epoch has not one full batch.
        """
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])  # of each shard, as sample numbers
        self.num_samples = int(self.sizes.sum())
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = (
            self.num_samples // global_batch if seed is not None else -(-self.num_samples // global_batch)
        )
        if not self.steps_per_epoch:
            raise BadBatch(
                f"{self.num_samples} samples are fewer than one global batch of {global_batch}; "
                "lower the global batch or pack more videos"
            )
        self.windows_of = lru_cache(maxsize=2)(self.windows_of)
        self.known: dict[tuple[int, int], np.ndarray] = {}  # (epoch, window): its samples, for those of the last step

    def samples(self, epoch: int, step: int, lanes: range) -> np.ndarray:
        """The sample numbers (len(lanes),) int64 that some lanes read at a step of an epoch. PADDING where none is left."""
        positions = np.arange(lanes.start, lanes.stop, dtype=np.int64) * self.steps_per_epoch + step
        if self.seed is None:
            return np.where(positions < self.num_samples, positions, PADDING)
        _, ends = self.windows_of(epoch)
        windows = np.searchsorted(ends, positions, side="right")
        numbers = np.empty(len(positions), np.int64)
        known, self.known = self.known, {}
        for lane, (window, position) in enumerate(zip(windows.tolist(), positions.tolist(), strict=True)):
            place = (epoch, window)
            if place not in self.known:
                self.known[place] = known[place] if place in known else self.samples_of(epoch, window)
            numbers[lane] = self.known[place][position - int(ends[window])]  # counted from the window's end
        return numbers

    def windows_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the shards in this epoch's order, the position after the last sample of each window of them)"""
        assert self.seed is not None
        shards = permutation(len(self.sizes), self.seed, epoch, SHARDS_OF_EPOCH, 0)
        return shards, np.cumsum(np.add.reduceat(self.sizes[shards], range(0, len(shards), WINDOW)))

    def samples_of(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window in this epoch's order."""
        assert self.seed is not None
        shards = self.windows_of(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        ranges = zip(self.starts[shards].tolist(), self.sizes[shards].tolist(), strict=True)
        samples = np.concatenate([np.arange(start, start + size, dtype=np.int64) for start, size in ranges])
        return samples[permutation(len(samples), self.seed, epoch, SAMPLES_OF_WINDOW, window)]


def lanes_of(rank: int, world_size: int, global_batch: int) -> range:
    """The lanes of the global batch that a rank owns. Raises BadBatch if the workers do not divide the batch."""
    if global_batch % world_size:
        divisors = [workers for workers in range(1, global_batch + 1) if global_batch % workers == 0]
        raise BadBatch(
            f"a global batch of {global_batch} cannot be shared evenly by {world_size} workers; "
            f"workers that divide it: {', '.join(map(str, divisors))}"
        )
    lanes = global_batch // world_size
    return range(rank * lanes, (rank + 1) * lanes)


def permutation(size: int, seed: int, epoch: int, purpose: int, index: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on the arguments alone: the same with every version of NumPy."""
    return np.argsort(random_bits(size, seed, epoch, purpose, index), kind="stable")


def random_bits(count: int, seed: int, epoch: int, purpose: int, index: int) -> np.ndarray:
    """(count,) uint64 from a counter-based generator (Philox): the same wherever and whenever they are drawn."""
    return random_rows(count, seed, epoch, purpose, [index])[0]


def random_rows(count: int, seed: int, epoch: int, purpose: int, indices: Sequence[int]) -> np.ndarray:
    """(len(indices), count) uint64: the random bits of each index. One generator draws all, as making one takes longer."""
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    start: Any = generator.state  # a copy, from before the first draw
    counter = start["state"]["counter"]
    counter[2] = purpose
    rows = np.empty((len(indices), count), np.uint64)
    for row, index in enumerate(indices):
        counter[3] = index
        generator.state = start
        rows[row] = generator.random_raw(count)
    return rows
