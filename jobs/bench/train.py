"""Training with the loader beside the same steps on one batch held in memory; and from a slow store beside a folder.

One run of grurcn.training.loop's own loop takes its batches from one reader for some steps, then from the other, and so on: what
disturbs the machine disturbs both. Each turn's reader starts anew, and the steps in which it gets under way do not count.
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
from jobs.bench.read import make_videos
from shards.index import Index
from shards.packing.sources import Folder
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stream import ClipBatch, train_batches
from shards.store import Store
from shards.video import Packing

DEMO_VIDEOS = 12  # of each motion
Batches = Iterator[tuple[tuple[int, int], ClipBatch]]
Reader = Callable[..., Batches]


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """The training loop with and without its loader, and with a store that takes its time."""

    workers: int = 2
    """Ray Train workers; 0 trains in this process."""
    batch: int | None = None
    """Videos in a step of the paper's model. Default: one a worker on a CPU, 64 a worker on a GPU."""
    width: float | None = None
    """Of the paper's model's trunk. Default: half on a CPU, whole on a GPU."""
    size: int = 224
    """Height and width of the frames that it sees."""
    num_videos: int = 12
    """Synthetic clips for the paper's model."""
    seconds: int = 6
    """Length of each of them."""
    turns: int = 5
    """Turns of each reader; the median counts."""
    steps: int = 6
    """Steps of the paper's model in a turn."""
    demo_steps: int = 30
    """Steps of the demo's model in a turn."""
    delay_seconds: float = 0.1
    """That the slow store waits before each answer."""
    json: Path | None = None
    """Write the tables as JSON to this file."""

    def __post_init__(self) -> None:
        if (
            min(self.num_videos, self.seconds, self.turns, self.steps - 1, self.demo_steps - 1) < 1
            or self.workers < 0
            or self.delay_seconds < 0
        ):
            raise ValueError("wanted at least one video, second and turn, two steps, and no negative workers or delay")


def bench_train(job: TrainBench) -> dict[str, list[dict[str, Any]]]:
    """{title: rows}: clips a second with each reader, their ratio, and the share of time that waits for data."""
    with tempfile.TemporaryDirectory(prefix="grurcn-bench-") as name:
        folder = Path(name)
        paper = paper_recipe(job)
        readers: dict[str, Reader] = {"loader": train_batches, "one batch in memory": one_batch}
        title = f"gru-rcn at {paper.clips.size} x {paper.clips.size}, batch {paper.global_batch}, {job.workers} workers"
        tables = {
            title: beside(paper, paper_shards(folder / "paper", job), readers, job.steps, "0.97 or more", folder, job)
        }
        slow = partial(slow_batches, delay_seconds=job.delay_seconds)
        readers = {f"{job.delay_seconds * 1e3:.0f} ms an answer": slow, "folder": train_batches}
        shards = demo_shards(folder / "demo")
        title = f"the demo, batch {demo().global_batch}, {job.workers} workers"
        tables[title] = beside(demo(), shards, readers, job.demo_steps, "0.9 or more", folder, job)
        return tables


def paper_recipe(job: TrainBench) -> Recipe:
    """The paper's model over a trunk without pretrained weights, which stays as it is."""
    gpu = torch.cuda.is_available()
    width = job.width or (1.0 if gpu else 0.5)
    batch = job.batch or max(1, job.workers) * (64 if gpu else 1)
    model = {"weights": None, "freeze": True, "width": width}
    return changed(gru_rcn(), model=model, clips={"size": job.size}, global_batch=batch)


# Readers


def one_batch(*args: Any, **options: Any) -> Batches:
    """The first batch that train_batches gives, again and again; nothing is read any more."""
    with closing(train_batches(*args, **options)) as batches:
        first = next(batches)
    while True:
        yield first


def slow_batches(index: Index, *args: Any, delay_seconds: float, **options: Any) -> Batches:
    """train_batches from a store that takes its time for each answer."""
    slow: Any = Index(index.url, index.split)
    slow.store, slow.shard_store = SlowStore(slow.store, delay_seconds), SlowStore(slow.shard_store, delay_seconds)
    yield from train_batches(slow, *args, **options)


class SlowStore:
    """A store whose every read takes so much longer."""

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
    """Batches of one reader for some steps, then of the next. Writes down what the steps of each turn took: {reader: [turns of
    [seconds of a step, seconds of it that waited for the batch]]}, from one request for a batch to the next.
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


def beside(
    recipe: Recipe,
    shards: str,
    readers: dict[str, Reader],
    steps: int,
    wanted: str,
    folder: Path,
    job: TrainBench,
) -> list[dict[str, Any]]:
    """The first reader's speed over the others', of whole turns."""
    from cluster.workers.options import Workers
    from grurcn.training.loop import train_worker
    from jobs import train

    num_steps = steps * len(readers) * job.turns + 1  # of the last step nobody sees the end
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
    return rows_of(json.loads(record.read_text()), recipe.global_batch, job.turns, wanted)


def rows_of(
    record: dict[str, list[list[tuple[float, float]]]], global_batch: int, num_turns: int, wanted: str
) -> list[dict[str, Any]]:
    """A row a reader: the median of its turns, of each the median step without the first."""
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
            "wanted": "" if name == ours else wanted,
        }
        for name in record
    ]


def paper_shards(folder: Path, job: TrainBench) -> str:
    """Synthetic clips, packed as any."""
    return packed(make_videos(folder / "videos", job.num_videos, job.seconds), folder / "shards", Packing())


def demo_shards(folder: Path) -> str:
    """The demo's videos, fewer of them."""
    from jobs.demo.__main__ import make_videos
    from jobs.demo.videos import SIZE

    make_videos(folder / "videos", DEMO_VIDEOS)
    return packed(folder / "videos", folder / "shards", Packing(width=SIZE, height=SIZE))


def packed(videos: Path, folder: Path, packing: Packing) -> str:
    from jobs import make_shards

    source = Folder(videos=videos, val_share=0.1, test_share=0)
    make_shards.main(
        make_shards.MakeShards(source=source, out=str(folder), packing=packing, videos_per_shard=8, workers=0)
    )
    return str(folder)
