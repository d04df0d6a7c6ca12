"""Trains as Ray Train's workers do, in processes of this machine without Ray: started in a moment, and killed for real.

A rank writes what it read and reported into files of the folder, so that it is there when the rank is killed.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Generator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cluster.workers.events import Event, Progress
from grurcn.training.result import RunResult
from grurcn.training.task import WorkerJob

LIMIT_SECONDS = 300.0
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["grurcn.training.loop", "torch._dynamo"])  # imported once, not in each process


def train_on(world_size: int, folder: Path, job: WorkerJob, kill_after: int | None = None) -> list[dict[str, Any]]:
    """Runs so many ranks to their end, or, after a number of events, kills all of them. Gives back their results."""
    (folder / "store").unlink(missing_ok=True)
    (folder / "events").touch()
    before = len(events(folder))
    ranks = [CONTEXT.Process(target=rank_main, args=(rank, world_size, folder, job)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + LIMIT_SECONDS
    while any(rank.is_alive() for rank in ranks):
        is_time = kill_after is not None and len(events(folder)) - before >= kill_after
        if is_time or time.monotonic() > until:
            for rank in ranks:
                rank.kill()
        time.sleep(0.002)
    for rank in ranks:
        rank.join()
    assert time.monotonic() < until
    if any(rank.exitcode for rank in ranks):
        assert kill_after is not None, [rank.exitcode for rank in ranks]
        return []
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(world_size)]


def events(folder: Path) -> list[dict[str, Any]]:
    """What rank 0 reported, in order, each with its class as "kind"; a last line that was cut off is left out."""
    lines = (folder / "events").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def losses(folder: Path) -> dict[int, list[float]]:
    """step -> the training loss each time that it was reported."""
    found: dict[int, list[float]] = {}
    for event in events(folder):
        if event["kind"] == "Metrics" and "train/loss" in event["values"]:
            found.setdefault(event["step"], []).append(event["values"]["train/loss"])
    return found


def batches_read(folder: Path) -> dict[tuple[int, int], set[tuple[str, ...]]]:
    """(epoch, step) -> each different global batch that was read there: the digests of its samples, pixels and all, by lane."""
    lanes: dict[tuple[int, int, int], dict[int, str]] = {}
    for path in folder.glob("read-*"):
        for line in path.read_text().split("\n")[:-1]:
            attempt, epoch, step, lane, digest = json.loads(line)
            lanes.setdefault((attempt, epoch, step), {})[lane] = digest
    most = max(len(batch) for batch in lanes.values())
    found: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for (_, epoch, step), batch in lanes.items():
        if len(batch) == most:  # else some rank was killed before it read its part
            found.setdefault((epoch, step), set()).add(tuple(batch[lane] for lane in sorted(batch)))
    return found


def rank_main(rank: int, world_size: int, folder: Path, job: WorkerJob) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    from cluster.workers.context import WorkerContext
    from grurcn.training.loop import train_worker
    from grurcn.training.recipes import Recipe
    from shards.reading.stream import train_batches

    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    dist.init_process_group(
        "gloo", store=FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size
    )
    attempt = time.time_ns()
    attempts = [attempt]
    dist.broadcast_object_list(attempts, src=0)
    with (folder / "events").open("a") as log, (folder / f"read-{rank}-{attempt}").open("a") as seen:

        def report(event: Event) -> None:
            if not isinstance(event, Progress):  # lines for people, beside the same metrics
                log.write(json.dumps({"kind": type(event).__name__, **dataclasses.asdict(event)}) + "\n")
                log.flush()

        def read(*args: Any, rank: int, **options: Any) -> Generator[Any, None, None]:
            for (epoch, step), batch in train_batches(*args, rank=rank, **options):
                for place in range(len(batch)):
                    one = batch.map(lambda tensor, at=place: tensor[at : at + 1])
                    parts = [getattr(one, name) for name in ("frames", "box", "mirror", "label", "draw", "sample")]
                    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
                    seen.write(json.dumps([attempts[0], epoch, step, rank * len(batch) + place, digest]) + "\n")
                seen.flush()
                yield (epoch, step), batch

        context = WorkerContext(
            device=torch.device("cpu"), rank=rank, world_size=world_size, report=report, stop_requested=lambda: False
        )
        result = train_worker(job, context, read if isinstance(job.recipe, Recipe) else None)
    assert isinstance(result, RunResult)
    (folder / f"result-{rank}").write_text(json.dumps(result.to_dict()))
    dist.destroy_process_group()
