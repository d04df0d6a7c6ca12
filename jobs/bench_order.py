"""The order of samples at the size of the largest data sets: time a step, memory, time to resume; and how it mixes classes."""

import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.order import Order, lanes_of

MIXES = (  # name, classes, videos a class, videos a shard, global batch
    ("as UCF-101", 101, 94, 100, 64),
    ("as Kinetics-400", 400, 600, 1000, 256),
)


@dataclass(frozen=True, kw_only=True)
class OrderBench:
    """Which samples a rank reads, for a data set that exists only as its shards' sizes."""

    samples: int = 10**8
    """Samples of the data set."""
    shards: int = 10**5
    """Shards that they lie in."""
    ranks: int = 4096
    """Ranks; one of them is measured, at random places."""
    loader_workers: int = 4
    """Loader workers of each rank, which share its lanes."""
    batch: int = 16
    """Samples of a rank in one step."""
    steps: int = 2000
    """Consecutive steps that are timed."""
    resumes: int = 20
    """Random places that are resumed at."""
    seed: int = 0
    """Of the order and of the places."""
    json: Path | None = None
    """Write the figures as JSON to this file."""

    def __post_init__(self) -> None:
        if min(self.samples, self.shards, self.ranks, self.loader_workers, self.batch, self.steps, self.resumes) < 1:
            raise ValueError("wanted at least one of everything that is counted")
        if self.batch % self.loader_workers:
            raise ValueError(f"a rank's batch of {self.batch} cannot be shared by {self.loader_workers} loader workers")


def bench_order(job: OrderBench) -> dict[str, list[dict[str, Any]]]:
    """{title: rows}: what the order costs, and how far its batches are from a perfect shuffle's."""
    title = (
        f"{job.samples:,} samples in {job.shards:,} shards, {job.ranks:,} ranks of {job.loader_workers} loader workers"
    )
    mixes = [
        row
        for name, classes, videos, videos_per_shard, batch in MIXES
        for row in mixing(name, classes, videos, videos_per_shard, batch, seed=job.seed)
    ]
    return {
        title: costs(job),
        "Class mix of consecutive batches, packed class after class: mean distance from the whole (0 to 1)": mixes,
    }


def costs(job: OrderBench) -> list[dict[str, Any]]:
    """Time and memory of one loader worker, beside what is wanted."""
    rng = np.random.default_rng(job.seed)
    sizes = np.diff(np.linspace(0, job.samples, job.shards + 1).astype(np.int64))
    lanes = lanes_of(
        int(rng.integers(job.ranks * job.loader_workers)), job.ranks * job.loader_workers, job.ranks * job.batch
    )

    def begin() -> Order:
        return Order(sizes, job.ranks * job.batch, job.seed)

    order = begin()
    start = int(rng.integers(order.steps_per_epoch))
    steps = [
        seconds(lambda n=n: order.samples(*divmod(start + n, order.steps_per_epoch), lanes)) for n in range(job.steps)
    ]
    places = rng.integers([10, order.steps_per_epoch], size=(job.resumes, 2)).tolist()
    memory = peak_memory(lambda: read_at(begin(), places, lanes))
    resumes = [seconds(lambda at=at: begin().samples(at[0], at[1], lanes)) for at in places]
    return [
        {"what": "a step, mean", "measured": f"{statistics.mean(steps) * 1e3:.3f} ms", "wanted": "under 1 ms"},
        {"what": "a step, longest", "measured": f"{max(steps) * 1e3:.1f} ms", "wanted": ""},
        {"what": "memory above the import", "measured": f"{memory / 2**20:.1f} MiB", "wanted": "under 50 MiB"},
        {"what": "resuming at a random step", "measured": f"{max(resumes) * 1e3:.0f} ms", "wanted": "under 1,000 ms"},
    ]


def read_at(order: Order, places: Sequence[tuple[int, int]], lanes: range) -> None:
    for epoch, step in places:
        order.samples(epoch, step, lanes)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at once while it ran, NumPy's arrays included."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def mixing(
    name: str, num_classes: int, videos: int, videos_per_shard: int, global_batch: int, *, seed: int, epochs: int = 3
) -> list[dict[str, Any]]:
    """How far the class mix of 1, 10 and 50 consecutive batches is from that of all samples, beside a perfect shuffle's."""
    classes = np.arange(num_classes * videos) // videos
    sizes = [min(videos_per_shard, len(classes) - start) for start in range(0, len(classes), videos_per_shard)]
    order = Order(sizes, global_batch, seed)
    rng = np.random.default_rng(seed)
    steps = range(order.steps_per_epoch)
    ours = [np.stack([order.samples(epoch, step, range(global_batch)) for step in steps]) for epoch in range(epochs)]
    perfect = [rng.permutation(len(classes))[: batches.size].reshape(batches.shape) for batches in ours]
    rows = []
    for together in (1, 10, 50):
        row: dict[str, Any] = {"data": name, "batches": together}
        for column, all_epochs in (("ours", ours), ("perfect shuffle", perfect)):
            row[column] = statistics.mean(mix_error(classes[batches], together) for batches in all_epochs)
        rows.append(row)
    return rows


def mix_error(labels: np.ndarray, together: int) -> float:
    """labels (steps, G) -> half the L1 distance of the class mix of so many consecutive steps from an even one, in the mean."""
    num_classes = labels.max() + 1
    stretches = [labels[step : step + together] for step in range(0, len(labels) - together + 1, together)]
    mixes = [np.bincount(stretch.ravel(), minlength=num_classes) / stretch.size for stretch in stretches]
    return float(np.mean([np.abs(mix - 1 / num_classes).sum() / 2 for mix in mixes]))
