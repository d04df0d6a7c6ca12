"""A long training in which processes are killed at random, against the same training undisturbed.

    python tests/helpers/soak.py --minutes 20

    undisturbed    two workers on a Ray cluster of three nodes on this machine; ended by SIGTERM after a third of the time
    disturbed      the same steps. Every 20 to 60 s a worker, a node, the driver or MLflow is killed or frozen, or the newest
                   checkpoint is damaged. When the command ends early it is run again, as a person would.

Losses and samples of the two are compared. `python tests/helpers/soak.py FILE` is the command that is run again and again:
one training, as FILE describes it.

--json FILE holds: bench, tables {title: rows}.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from mlflow_servers import Server

from grurcn.training.recipes import RECIPES, Recipe, changed
from jobs.bench.tables import Row, Tables, print_tables
from jobs.command import Command, finish

ROOT = Path(__file__).parents[2]
WORKERS, GLOBAL_BATCH = 2, 8
SAVE_EVERY = 25
START_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Options of the soak."""

    minutes: float = 20.0
    """Duration of both runs together."""
    seed: int = 0
    """Seed of the faults and their times."""
    seconds: tuple[float, float] = (20.0, 60.0)
    """Shortest and longest time between two faults."""
    folder: Path | None = None
    """Folder of all files. Default: a temporary one."""
    json: Path | None = None
    """Write the tables as JSON to this file."""

    def __post_init__(self) -> None:
        if self.minutes <= 0 or not 0 < self.seconds[0] <= self.seconds[1]:
            raise ValueError(
                f"minutes {self.minutes:g}, seconds {self.seconds}: expected more than 0, and the smaller first"
            )


def main(job: Soak) -> int:
    with tempfile.TemporaryDirectory(prefix="grurcn-soak-") as temporary:
        folder = (job.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tables = soak(job, folder)
    print_tables(tables)
    finish("every fault was survived", {"bench": "soak", "tables": tables}, job.json)
    return 0


def soak(job: Soak, folder: Path) -> Tables:
    """Trains undisturbed and disturbed; returns the faults, and what came of them."""
    from ray.cluster_utils import Cluster

    from cluster.tracking.outbox import UNSENT
    from jobs import sync_mlflow
    from jobs.bench.train import demo_shards

    shards = demo_shards(folder)
    server = Server(folder)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(WORKERS):
        nodes.add_node(num_cpus=1)
    try:
        server.ready()
        settings = {"folder": str(folder), "shards": shards, "address": nodes.address, "mlflow": server.url}
        with Trainings(folder, {**settings, "name": "undisturbed", "steps": 10**6}) as undisturbed:
            undisturbed.wait_for_step(1)
            time.sleep(60 * job.minutes / 3)
            undisturbed.end()
        steps = undisturbed.steps()
        print(f"undisturbed: {steps:,} steps", flush=True)
        with Trainings(folder, {**settings, "name": "disturbed", "steps": steps}) as disturbed:
            faults = Faults(random.Random(job.seed), job.seconds, disturbed, server, nodes, folder)
            faults.run(until=disturbed.over)
        server.wait()
        if (folder / "runs" / "disturbed" / UNSENT).exists():  # MLflow was away at the end
            sync_mlflow.main(sync_mlflow.SyncMlflow(run=f"{folder}/runs/disturbed"))
        return result_tables(folder, server.url, steps, faults)
    finally:
        server.kill()
        nodes.shutdown()


class Trainings:
    """One training, run again whenever it ends early. The end of a `with` block waits for it; an error ends it."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.name = folder, settings["name"]
        self.file = folder / f"{self.name}.json"
        self.file.write_text(json.dumps(settings))
        self.log_file = folder / f"{self.name}.log"
        self.starts = 0
        self.stopping = False
        self.thread = threading.Thread(target=self.keep_running)

    def __enter__(self) -> "Trainings":
        self.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.end()
        self.thread.join()

    def start(self) -> None:
        self.starts += 1
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log_file.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.file)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def keep_running(self) -> None:
        while self.process.wait() and not self.stopping:
            time.sleep(1)
            self.start()

    def over(self) -> bool:
        return not self.thread.is_alive()

    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for_step(self, step: int) -> None:
        until = time.monotonic() + START_SECONDS
        while f"step {step:>6,} of" not in self.log():
            if time.monotonic() > until:
                raise TimeoutError(f"no step {step} within {START_SECONDS:g} s:\n{self.log()}")
            time.sleep(0.5)

    def end(self) -> None:
        """Ends it by SIGTERM."""
        self.stopping = True
        self.process.terminate()
        self.thread.join()

    def steps(self) -> int:
        """The step of its newest checkpoint."""
        from cluster.checkpoints.run_folder import RunFolder

        return RunFolder(f"{self.folder}/runs/{self.name}").checkpoints()[-1].state().training.step


# Faults


class Faults:
    """Does something to a run every now and then."""

    def __init__(
        self,
        rng: random.Random,
        seconds: tuple[float, float],
        command: Trainings,
        server: Server,
        nodes: Any,
        folder: Path,
    ):
        self.rng, self.seconds, self.command, self.server, self.nodes = rng, seconds, command, server, nodes
        self.run_folder = folder / "runs" / command.name
        self.done: Counter[str] = Counter()
        self.memory: list[int] = []
        self.kinds: dict[str, Callable[[], None]] = {
            "a worker killed": self.kill_worker,
            "a worker frozen for 5 s": self.freeze_worker,
            "a node killed, another one added": self.kill_node,
            "the driver killed, the command run again": lambda: self.command.process.kill(),
            "the driver ended by SIGTERM, the command run again": lambda: self.command.process.terminate(),
            "MLflow killed, started again after 10 s": self.kill_server,
            "the newest checkpoint damaged, a worker killed": self.damage_checkpoint,
        }

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            at = time.monotonic() + self.rng.uniform(*self.seconds)
            while time.monotonic() < at and not until():
                self.memory.append(memory_bytes())
                time.sleep(1)
            if until():
                return
            fewest = min(self.done[name] for name in self.kinds)
            name = self.rng.choice(
                [name for name in self.kinds if self.done[name] == fewest]
            )  # all of them, in any order
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            self.kinds[name]()
            self.done[name] += 1

    def worker(self) -> psutil.Process | None:
        """One of the workers that train, if there are any now."""
        every = psutil.Process().children(recursive=True)
        found = [process for process in every if "RayTrainWorker" in title(process)]
        return self.rng.choice(found) if found else None

    def kill_worker(self) -> None:
        if worker := self.worker():
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def freeze_worker(self) -> None:
        if worker := self.worker():
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
                time.sleep(5)
                worker.resume()

    def kill_node(self) -> None:
        self.nodes.remove_node(self.rng.choice(sorted(self.nodes.worker_nodes, key=id)), allow_graceful=False)
        self.nodes.add_node(num_cpus=1)

    def kill_server(self) -> None:
        self.server.kill()
        time.sleep(10)
        self.server.start()

    def damage_checkpoint(self) -> None:
        models = sorted(self.run_folder.glob("checkpoint-*/model.safetensors"))
        if len(list(self.run_folder.glob("checkpoint-*/state.json"))) > 1:
            content = bytearray(models[-1].read_bytes())
            content[-1] ^= 1
            models[-1].write_bytes(content)
        self.kill_worker()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def memory_bytes() -> int:
    """Memory of the driver and the workers together."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in title(process) or Path(__file__).name in title(process):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


# The result


def result_tables(folder: Path, uri: str, steps: int, faults: Faults) -> Tables:
    logged = {name: losses(folder, uri, name) for name in ("undisturbed", "disturbed")}
    expected, found = (
        {step: loss for step, loss in logged[name] if step <= steps} for name in ("undisturbed", "disturbed")
    )
    differing = sum(expected[step] != found.get(step) for step in expected)
    read = {name: samples_read(folder / f"read-{name}", steps) for name in logged}
    repeated = read["disturbed"].steps_read - steps
    third = max(1, len(faults.memory) // 3)
    first, last = (statistics.median(part) / 2**20 for part in (faults.memory[:third], faults.memory[-third:]))
    rows = [
        ("steps", f"{steps:,}", ""),
        ("faults survived", str(sum(faults.done.values())), ""),
        ("times that the command was run", str(faults.command.starts), ""),
        ("steps done again", str(repeated), f"at most {SAVE_EVERY} a fault, twice that with a damaged checkpoint"),
        ("losses that differ from the undisturbed run's", str(differing), "0"),
        ("steps that MLflow logged twice, or not", str(len(logged["disturbed"]) - steps), "0"),
        ("samples lost", str(read["disturbed"].lost(read["undisturbed"])), "0"),
        ("samples doubled", str(read["undisturbed"].lost(read["disturbed"])), "0"),
        ("memory of driver and workers, first and last third (MiB)", f"{first:,.0f}, {last:,.0f}", "equal"),
        (
            "seconds from the loss of a worker to the next step, median and most",
            recovery(faults.command.log()),
            "under 45",
        ),
    ]
    return {
        "Faults": [Row(what=name, times=faults.done[name]) for name in faults.kinds],
        "What came of it": [{"what": what, "measured": value, "target": target} for what, value, target in rows],
    }


def losses(folder: Path, uri: str, name: str) -> list[tuple[int, float]]:
    """(step, training loss) as MLflow logged them."""
    from mlflow import MlflowClient

    from cluster.checkpoints.run_folder import RunFolder

    identity = RunFolder(f"{folder}/runs/{name}").identity()
    assert identity is not None
    history = MlflowClient(uri).get_metric_history(identity.mlflow_run_id, "train/loss")
    return [(metric.step, metric.value) for metric in history]


@dataclass(frozen=True)
class SamplesRead:
    """Samples whose steps are in the model: those of steps that were not repeated."""

    samples: Counter[tuple[int, int, int]]  # (epoch, step, sample)
    steps_read: int  # repeated ones count again

    def lost(self, other: "SamplesRead") -> int:
        """Samples, counted as often as they were used, that the other one has and this one lacks."""
        return sum((other.samples - self.samples).values())


def samples_read(folder: Path, steps: int) -> SamplesRead:
    """From the files of each worker: one file a start, named by rank and time, with a line a step."""
    samples: Counter[tuple[int, int, int]] = Counter()
    most = 0
    for rank in range(WORKERS):
        starts = [
            [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            for path in sorted(folder.glob(f"{rank}-*"), key=lambda path: int(path.name.split("-")[1]))
        ]
        starts = [lines for lines in starts if lines]
        firsts = [lines[0][2] for lines in starts] + [steps]
        for lines, first_of_next in zip(starts, firsts[1:], strict=True):
            for epoch, step, number, numbers in lines:
                if number < first_of_next:
                    samples.update((epoch, step, sample) for sample in numbers)
        most = max(most, sum(min(1, number < steps) for lines in starts for _, _, number, _ in lines))
    return SamplesRead(samples, most)


def recovery(log: str) -> str:
    seconds = [float(line.split("again ")[1].split(" s")[0]) for line in log.split("\n") if "training again" in line]
    return f"{statistics.median(seconds):.0f}, {max(seconds):.0f}" if seconds else "none"


# One training


def recipe(steps: int) -> Recipe:
    """The demo's, with a rate that does not depend on the number of steps."""
    small = {"clips": {"size": 24}, "optim": {"schedule": "constant", "warmup_steps": 0}}
    return changed(RECIPES["demo"](), global_batch=GLOBAL_BATCH, num_steps=steps, val_every=10**6, patience=0, **small)


def recorded(*args: Any, folder: Path, rank: int, start: tuple[int, int], **options: Any) -> Generator[Any, None, None]:
    """The batches, each written to a file when it is used."""
    from shards.reading.stream import train_batches

    steps_per_epoch = args[2].steps_per_epoch
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / f"{rank}-{time.time_ns()}").open("w") as notes,
        closing(train_batches(*args, rank=rank, start=start, **options)) as batches,
    ):
        for (epoch, step), batch in batches:
            notes.write(json.dumps([epoch, step, epoch * steps_per_epoch + step, batch.sample.tolist()]) + "\n")
            notes.flush()
            yield (epoch, step), batch


def train_once(file: Path) -> int:
    settings = json.loads(file.read_text())
    os.environ |= {"RAY_ADDRESS": settings["address"], "MLFLOW_TRACKING_URI": settings["mlflow"]}
    from cluster.workers.options import Workers
    from grurcn.training.loop import train_worker
    from jobs import train

    job = train.Train(
        recipe=recipe(settings["steps"]), shards=settings["shards"], storage=f"{settings['folder']}/runs",
        name=settings["name"], experiment="soak", on=Workers(workers=WORKERS), log_every=1, save_every=SAVE_EVERY, keep=3,
    )  # fmt: skip
    read = partial(recorded, folder=Path(settings["folder"]) / f"read-{settings['name']}")
    return train.main("soak", job, partial(train_worker, read=read))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].endswith(".json"):
        sys.exit(train_once(Path(sys.argv[1])))
    Command(Soak, main, __doc__).run()
