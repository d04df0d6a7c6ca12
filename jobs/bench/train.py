"""Training with its loader against the same steps on one batch in memory; and from a slow store against a folder.

One run takes its batches from one reader for some steps, then from the other, and so on: other work on the machine slows both
alike. Each turn starts its reader anew, and the first step of a turn does not count.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grurcn.training.recipes import Recipe, changed, demo, gru_rcn
from jobs.bench.data import make_videos, pack
from jobs.bench.tables import Row, Tables
from shards.index import Index
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stream import ClipBatch, train_batches
from shards.store import Store
from shards.synthetic import SIZE, make_motion_videos
from shards.video import Packing

DEMO_VIDEOS = 12  # of each class
Batches = Iterator[tuple[tuple[int, int], ClipBatch]]
Reader = Callable[..., Batches]


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """Training against the same loop on one batch in memory; and from a slow store."""

    workers: int = 2
    """Ray Train workers; 0 trains in this process."""
    batch: int | None = None
    """Global batch of the paper's model. Default: one video a worker on a CPU, 64 on a GPU."""
    width: float | None = None
    """Width of the paper's trunk, as a fraction. Default: 0.5 on a CPU, 1 on a GPU."""
    size: int = 224
    """Height and width of its frames."""
    num_videos: int = 12
    """Synthetic videos for the paper's model."""
    seconds: int = 6
    """Length of each of them."""
    turns: int = 5
    """Turns of each reader; the median counts."""
    steps: int = 6
    """Steps of the paper's model in a turn."""
    demo_steps: int = 30
    """Steps of the demo's model in a turn."""
    delay_seconds: float = 0.1
    """Seconds that the slow store waits before each answer."""
    json: Path | None = None
    """Write the tables as JSON to this file."""

    def __post_init__(self) -> None:
        if (
            min(self.num_videos, self.seconds, self.turns, self.steps - 1, self.demo_steps - 1) < 1
            or self.workers < 0
            or self.delay_seconds < 0
        ):
            raise ValueError(
                "expected at least one video, second and turn, two steps, and no negative workers or delay"
            )


def bench_train(job: TrainBench) -> Tables:
    """Clips a second with each reader, their ratio, and the fraction of time that waits for data."""
    with tempfile.TemporaryDirectory(prefix="grurcn-bench-") as name:
        folder = Path(name)
        paper = paper_recipe(job)
        readers: dict[str, Reader] = {"loader": train_batches, "one batch in memory": one_batch}
        title = f"gru-rcn at {paper.clips.size} x {paper.clips.size}, batch {paper.global_batch}, {job.workers} workers"
        tables = {
            title: compare_readers(
                paper, paper_shards(folder / "paper", job), readers, job.steps, "0.97 or more", folder, job
            )
        }
        slow = partial(slow_batches, delay_seconds=job.delay_seconds)
        readers = {f"{job.delay_seconds * 1e3:.0f} ms an answer": slow, "folder": train_batches}
        shards = demo_shards(folder / "demo")
        title = f"the demo, batch {demo().global_batch}, {job.workers} workers"
        tables[title] = compare_readers(demo(), shards, readers, job.demo_steps, "0.9 or more", folder, job)
        return tables


def paper_recipe(job: TrainBench) -> Recipe:
    """The paper's model over a frozen trunk without pretrained weights."""
    gpu = torch.cuda.is_available()
    width = job.width or (1.0 if gpu else 0.5)
    batch = job.batch or max(1, job.workers) * (64 if gpu else 1)
    model = {"weights": None, "freeze": True, "width": width}
    return changed(gru_rcn(), model=model, clips={"size": job.size}, global_batch=batch)


# Readers


def one_batch(*args: Any, **options: Any) -> Batches:
    """The first batch of train_batches, again and again; nothing more is read."""
    with closing(train_batches(*args, **options)) as batches:
        first = next(batches)
    while True:
        yield first


def slow_batches(index: Index, *args: Any, delay_seconds: float, **options: Any) -> Batches:
    """train_batches from a slow store."""
    slow: Any = Index(index.url, index.split)
    slow.store, slow.shard_store = SlowStore(slow.store, delay_seconds), SlowStore(slow.shard_store, delay_seconds)
    yield from train_batches(slow, *args, **options)


class SlowStore:
    """A store whose every read takes longer."""

    def __init__(self, store: Store, delay_seconds: float):
        self.store, self.delay_seconds = store, delay_seconds

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        time.sleep(self.delay_seconds)
        return self.store.read(name, offset, size_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def in_turns(
    index: Index,
    clips: ClipConfig,
    order: Order,
    *,
    readers: dict[str, Reader],
    steps: int,
    record: str,
    rank: int,
    start: tuple[int, int],
    **options: Any,
) -> Generator[tuple[tuple[int, int], ClipBatch], None, None]:
    """Yields batches of one reader for some steps, then of the next.

    Rank 0 writes the file `record` as {reader: [turns of [seconds of a step, seconds of it that waited for the batch]]}. A step
    is from one request for a batch to the next.
    """
    turns: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in readers}
    try:
        while True:
            for name, reader in readers.items():
                turns[name].append([])
                with closing(reader(index, clips, order, rank=rank, start=start, **options)) as batches:  # pyright: ignore
                    for _ in range(steps):
                        started = time.perf_counter()
                        place, batch = next(batches)
                        waited = time.perf_counter() - started
                        yield place, batch
                        turns[name][-1].append((time.perf_counter() - started, waited))
    finally:
        if rank == 0:
            Path(record).write_text(json.dumps(turns))


# Runs


def compare_readers(
    recipe: Recipe,
    shards: str,
    readers: dict[str, Reader],
    steps: int,
    target: str,
    folder: Path,
    job: TrainBench,
) -> list[Row]:
    """Trains with the readers in turns, and compares the first one's speed with the others'."""
    from cluster.workers.options import Workers
    from grurcn.training.loop import train_worker
    from jobs import train

    num_steps = steps * len(readers) * job.turns + 1  # the end of the last step is not measured
    recipe = changed(recipe, num_steps=num_steps, val_every=num_steps, patience=0)
    record = folder / "record.json"
    training = train.Train(
        recipe=recipe,
        shards=shards,
        storage=str(folder / "runs"),
        name=Path(shards).parent.name,
        on=Workers(workers=job.workers),
        log_every=num_steps,
    )
    read = partial(in_turns, readers=readers, steps=steps, record=str(record))
    train.main("bench", training, partial(train_worker, read=read))
    return rows_of(json.loads(record.read_text()), recipe.global_batch, job.turns, target)


def rows_of(
    record: dict[str, list[list[tuple[float, float]]]], global_batch: int, num_turns: int, target: str
) -> list[Row]:
    """A row for each reader: the median over its turns of each turn's median step, without the first."""
    ours = next(iter(record))
    seconds = {
        name: [statistics.median(step for step, _ in turn[1:]) for turn in turns[:num_turns]]
        for name, turns in record.items()
    }
    waits = {
        name: sum(wait for turn in turns[:num_turns] for _, wait in turn[1:])
        / sum(step for turn in turns[:num_turns] for step, _ in turn[1:])
        for name, turns in record.items()
    }
    return [
        {
            "batches from": name,
            "clips a second": global_batch / statistics.median(seconds[name]),
            "waiting for data": f"{waits[name]:.2%}",
            "first / this": statistics.median(
                other / one for one, other in zip(seconds[ours], seconds[name], strict=True)
            ),
            "target": "" if name == ours else target,
        }
        for name in record
    ]


def paper_shards(folder: Path, job: TrainBench) -> str:
    """Shards of synthetic videos of the usual size."""
    videos = make_videos(folder / "videos", job.num_videos, job.seconds)
    return pack(videos, folder / "shards", Packing(), videos_per_shard=8, val_fraction=0.1).url


def demo_shards(folder: Path) -> str:
    """Shards of the demo's videos, but fewer."""
    make_motion_videos(folder / "videos", DEMO_VIDEOS)
    packing = Packing(width=SIZE, height=SIZE)
    return pack(folder / "videos", folder / "shards", packing, videos_per_shard=8, val_fraction=0.1).url
