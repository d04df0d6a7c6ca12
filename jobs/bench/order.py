"""The order of samples for very large data sets: seconds a step, memory, seconds to resume, and how well classes mix."""

import statistics
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.bench.tables import Row, Tables
from shards.dataset import Shard
from shards.reading.order import Order, lanes_of
from shards.reading.stages import shards_held
from shards.rows import SCHEMA

MIXES = (  # name, classes, videos a class, videos a shard, global batch
    ("as UCF-101", 101, 94, 100, 64),
    ("as Kinetics-400", 400, 600, 1000, 256),
)


@dataclass(frozen=True, kw_only=True)
class OrderBench:
    """The order of 10^8 samples on 4,096 ranks, and how well it mixes. No data is read."""

    samples: int = 10**8
    """Samples of the data set."""
    shards: int = 10**5
    """Shards of the data set."""
    ranks: int = 4096
    """Ranks; one of them is measured, at random steps."""
    loader_workers: int = 4
    """Loader workers of each rank; each has an equal part of its lanes."""
    batch: int = 16
    """Samples of a rank in one step."""
    steps: int = 2000
    """Consecutive steps to time."""
    resumes: int = 20
    """Random steps to resume at."""
    sample_bytes: int = 100_000
    """Bytes of a stored video; a 10 s video of 340 x 256 has about 500,000. For the fraction of bytes that are not video."""
    readers: int = 8
    """Random ranks whose bytes of a whole epoch are counted."""
    seed: int = 0
    """Seed of the order and of the random steps."""
    json: Path | None = None
    """Write the figures as JSON to this file."""

    def __post_init__(self) -> None:
        if min(self.samples, self.shards, self.ranks, self.loader_workers, self.batch, self.steps, self.resumes) < 1:
            raise ValueError("all counts must be at least 1")
        if self.batch % self.loader_workers:
            raise ValueError(
                f"a rank's batch of {self.batch} cannot be divided among {self.loader_workers} loader workers"
            )


def bench_order(job: OrderBench) -> Tables:
    """What the order costs, and how far its batches are from a perfect shuffle's."""
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


def costs(job: OrderBench) -> list[Row]:
    """Time and memory of one loader worker, with targets."""
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
    described = peak_memory(lambda: list_of_shards(sizes.tolist()))
    resumes = [seconds(lambda at=at: begin().samples(at[0], at[1], lanes)) for at in places]
    return [
        {"what": "a step, mean", "measured": f"{statistics.mean(steps) * 1e3:.3f} ms", "target": "under 1 ms"},
        {"what": "a step, longest", "measured": f"{max(steps) * 1e3:.1f} ms", "target": ""},
        {
            "what": "memory above the import: the order + the list of shards",
            "measured": f"{memory / 2**20:.1f} + {described / 2**20:.1f} MiB",
            "target": "under 50 MiB",
        },
        {"what": "resuming at a random step", "measured": f"{max(resumes) * 1e3:.0f} ms", "target": "under 1,000 ms"},
        {
            "what": "bytes fetched / bytes of the data",
            "measured": f"{fetched(job, order, rng):.4f}",
            "target": "at most 1.1",
        },
    ]


def fetched(job: OrderBench, order: Order, rng: np.random.Generator) -> float:
    """Bytes that a rank fetches in an epoch (each video once, and rows of the index) over the bytes of its videos.

    Rows are kept for as many shards as shards.reading.stream keeps them.
    """
    rows_bytes = bytes_of_rows(job.samples // job.shards)
    ratios = []
    for rank in rng.choice(job.ranks, min(job.readers, job.ranks), replace=False).tolist():
        lanes = lanes_of(rank, job.ranks, job.ranks * job.batch)
        held: OrderedDict[int, None] = OrderedDict()
        rows_read = 0
        for step in range(order.steps_per_epoch):
            for shard in (np.searchsorted(order.starts, order.samples(0, step, lanes), side="right") - 1).tolist():
                rows_read += shard not in held
                held[shard] = None
                held.move_to_end(shard)
                if len(held) > shards_held(len(lanes)):
                    held.popitem(last=False)
        videos = order.steps_per_epoch * len(lanes) * job.sample_bytes
        ratios.append((videos + rows_read * rows_bytes) / videos)
    return statistics.mean(ratios)


def bytes_of_rows(samples: int) -> int:
    """Size of a shard's rows in the index, with keys and groups as long as those of UCF-101."""
    row = dict.fromkeys(SCHEMA.names, 0) | {
        "key": "ApplyEyeMakeup-v_ApplyEyeMakeup_g01_c01",
        "group": "ApplyEyeMakeup_g01",
    }
    batch = pa.RecordBatch.from_pylist([row | {"fps": 25.0, "flow_bound": None}] * samples, schema=SCHEMA)
    return batch.serialize().size


def list_of_shards(sizes: Sequence[int]) -> tuple[Shard, ...]:
    """The shards of dataset.json, as each process holds them."""
    return tuple(
        Shard(
            name=f"train-{number:06}.tar", samples=size, captions=0, size_bytes=10**8 + number, rows_offset=10**5 * number,
            sha256=f"{number:064x}", rows_size=10**5 + number, rows_crc32=2**31 + number,
        )
        for number, size in enumerate(sizes)
    )  # fmt: skip


def read_at(order: Order, places: Sequence[tuple[int, int]], lanes: range) -> None:
    for epoch, step in places:
        order.samples(epoch, step, lanes)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes allocated at once during a call, NumPy's arrays included."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def mixing(
    name: str, num_classes: int, videos: int, videos_per_shard: int, global_batch: int, *, seed: int, epochs: int = 3
) -> list[Row]:
    """Distance of the class mix of 1, 10 and 50 consecutive batches from that of all samples; the same for a perfect shuffle."""
    classes = np.arange(num_classes * videos) // videos
    sizes = [min(videos_per_shard, len(classes) - start) for start in range(0, len(classes), videos_per_shard)]
    order = Order(sizes, global_batch, seed)
    rng = np.random.default_rng(seed)
    steps = range(order.steps_per_epoch)
    ours = [np.stack([order.samples(epoch, step, range(global_batch)) for step in steps]) for epoch in range(epochs)]
    perfect = [rng.permutation(len(classes))[: batches.size].reshape(batches.shape) for batches in ours]
    rows: list[Row] = []
    for together in (1, 10, 50):
        row: Row = {"data": name, "batches": together}
        for column, all_epochs in (("ours", ours), ("perfect shuffle", perfect)):
            row[column] = statistics.mean(mix_error(classes[batches], together) for batches in all_epochs)
        rows.append(row)
    return rows


def mix_error(labels: np.ndarray, together: int) -> float:
    """labels (steps, G) -> half the L1 distance of the class mix of so many steps in a row from an even mix, on average."""
    num_classes = labels.max() + 1
    stretches = [labels[step : step + together] for step in range(0, len(labels) - together + 1, together)]
    mixes = [np.bincount(stretch.ravel(), minlength=num_classes) / stretch.size for stretch in stretches]
    return float(np.mean([np.abs(mix - 1 / num_classes).sum() / 2 for mix in mixes]))
