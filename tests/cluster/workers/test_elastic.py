"""A training on Ray that loses workers goes on by itself, and ends with the losses of a run that nobody disturbed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from small_runs import ROOT, losses

from cluster.checkpoints.run_folder import RunFolder

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long(minutes=2, of="cluster/workers grurcn/training/loop.py"),
    pytest.mark.timeout(900),
]
LIMIT_SECONDS = 300.0
NUM_STEPS = 120


class Training:
    """python -m jobs.train in a process of its own, with a Ray of its own."""

    def __init__(self, shards: Path, storage: Path, name: str, *options: str, log_every: int = 5):
        self.json = storage / f"{name}.json"
        command = [
            sys.executable, "-m", "jobs.train", "demo", "--shards", str(shards), "--storage", str(storage), "--name", name,
            "--clips.size", "20", "--num-steps", str(NUM_STEPS), "--global-batch", "8", "--val-every", "60",
            "--log-every", str(log_every), "--save-every", "20", "--json", str(self.json), *options,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """The number of the first line from `after` on in which the pattern is found."""
        until = time.monotonic() + LIMIT_SECONDS
        while True:
            for number, line in enumerate(self.lines[after:], after):
                if re.search(pattern, line):
                    return number
            assert time.monotonic() < until, f"{pattern!r} not in:\n" + "".join(self.lines)
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """The processes of its Ray Train workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]

    def end(self) -> int:
        status = self.process.wait(timeout=LIMIT_SECONDS)
        self.thread.join(timeout=10)
        return status


@pytest.fixture(scope="module")
def undisturbed(shards: Path, storage: Path) -> Callable[..., dict[int, float]]:
    """The losses of a run on so many workers: of each step, or the means over so many."""

    @cache
    def run(workers: str) -> dict[int, float]:
        options = ("--workers", workers, "--cpus-per-worker", "1")
        training = Training(shards, storage, f"undisturbed-{workers}", *options, log_every=1)
        assert training.end() == 0, "".join(training.lines)
        return losses(json.loads(training.json.read_text()))

    def logged(workers: str, log_every: int) -> dict[int, float]:
        each = run(workers)
        return {
            step: sum(each[step - before] for before in range(log_every)) / log_every
            for step in range(log_every, NUM_STEPS + 1, log_every)
        }

    return logged


def slow_down(process: psutil.Process, over: threading.Event) -> None:
    """Lets a process compute for a tenth of the time."""
    while not over.is_set():
        process.suspend()
        time.sleep(0.09)
        process.resume()
        time.sleep(0.01)


@contextmanager
def slowed(process: psutil.Process) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=slow_down, args=(process, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_slow_worker_is_named_and_one_that_is_killed_is_replaced(shards, storage, undisturbed):
    training = Training(shards, storage, "killed-on-ray", "--workers", "1:2")
    training.wait_for(r"^step +20 ")
    with slowed(training.workers()[1]):
        training.wait_for(r"warning: worker \d on .*, process \d+ is slow: its part of a step takes")
    killed = training.workers()[0]
    killed.kill()
    lost = training.wait_for(rf"lost worker \d on .*, process {killed.pid}: .*going on from the newest checkpoint")
    training.wait_for(r"training again \d+ s after the loss was noted", lost)
    assert training.end() == 0, "".join(training.lines)
    result = json.loads(training.json.read_text())
    assert result["steps"] == NUM_STEPS
    assert losses(result) == pytest.approx(undisturbed("2", log_every=5), rel=1e-6)

    client = MlflowClient(result["tracking_uri"])
    run = client.get_run(result["mlflow_run_id"])
    events = [value for key, value in sorted(run.data.tags.items()) if key.startswith("event.")]
    assert run.data.metrics["run/events"] == len(events)
    assert "is slow" in events[0]
    assert f"process {killed.pid}" in events[1]
    assert "perf/slowest_ratio" in run.data.metrics
    history = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert history == sorted(set(history))  # steps that were done again are not told again
    assert len(client.search_runs([run.info.experiment_id], "attributes.run_name = 'killed-on-ray'")) == 1


@pytest.mark.parametrize(("workers", "number", "status"), [("0", signal.SIGTERM, 143), ("2", signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end_saves_its_last_step_and_the_same_command_goes_on(
    workers, number, status, shards, storage, undisturbed
):
    name = f"terminated-{workers}"
    options = ("--workers", workers, "--save-every", "1000", "--val-every", "1000", "--cpus-per-worker", "1")
    training = Training(shards, storage, name, *options, log_every=1)
    training.wait_for(r"^step +20 ")
    training.process.send_signal(number)
    assert training.end() == status, "".join(training.lines)
    assert "interrupted; run the same command again to go on" in training.lines[-1]
    assert "Traceback" not in "".join(training.lines)
    run = RunFolder(str(storage / name))
    [checkpoint] = run.checkpoints()
    identity = run.identity()
    assert identity is not None
    assert MlflowClient(identity.tracking_uri).get_run(identity.mlflow_run_id).info.status == "KILLED"
    step = checkpoint.state().training.step
    assert step >= 20
    again = Training(shards, storage, name, *options, log_every=1)
    again.wait_for(rf"going on after step {step} from")
    assert again.end() == 0
    assert losses(json.loads(again.json.read_text())) == undisturbed(workers, log_every=1)


def test_a_worker_that_hangs_is_waited_for_so_long_and_then_replaced(shards, storage, undisturbed, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "15")  # instead of a minute
    training = Training(shards, storage, "hanging", "--workers", "2")
    training.wait_for(r"^step +20 ")
    hanging = training.workers()[1]
    hanging.suspend()
    lost = training.wait_for(rf"lost worker \d on .*, process {hanging.pid}: .* has been hanging for 15\.")
    training.wait_for(r"training again \d+ s after the loss was noted", lost)
    assert training.end() == 0, "".join(training.lines)
    assert not hanging.is_running()
    assert losses(json.loads(training.json.read_text())) == pytest.approx(undisturbed("2", log_every=5), rel=1e-6)


def test_a_worker_that_dies_each_time_ends_the_run_with_one_error(shards, storage):
    training = Training(shards, storage, "dying", "--workers", "1", "--max-failures", "1", "--save-every", "1000")
    for count in (1, 2):
        training.wait_for(r"^step +5 ") if count == 1 else training.wait_for(r"training again")
        training.workers()[0].kill()
        if count == 1:
            training.wait_for("lost worker 0")
    assert training.end() == 1
    assert re.search(
        r"error: workers were lost 2 times in a row without a new checkpoint between, the last time: worker 0 on .*; run the "
        r"same command again to go on, or allow more \(--max-failures\)",
        training.lines[-1],
    )
    assert "Traceback" not in "".join(training.lines)
