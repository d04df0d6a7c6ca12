"""Trainings on the cluster: the command, what it writes, and what MLflow has of it."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hosts import BUCKET, FOLDER, Cluster
from mlflow import MlflowClient
from mlflow.entities import Run

SHARDS = f"s3://{BUCKET}/shards"
STORAGE = f"s3://{BUCKET}/runs"
RECIPE = ["demo", "--clips.size", "20", "--global-batch", "4"]
SHORT = ["--num-steps", "12", "--val-every", "6", "--log-every", "2"]


def train_command(name: str, *options: str, module: str = "jobs.train") -> list[str]:
    return [
        "python", "-m", module, *RECIPE, "--shards", SHARDS, "--storage", STORAGE, "--name", name,
        "--json", str(json_of(name)), *options,
    ]  # fmt: skip


def json_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def tracked(cluster: Cluster, name: str) -> Run:
    """The one MLflow run of a training that has ended."""
    result = json.loads(json_of(name).read_text())
    client = MlflowClient(cluster.tracking_file)
    run = client.get_run(result["mlflow_run_id"])
    same_name = client.search_runs([run.info.experiment_id], f"attributes.run_name = '{name}'")
    assert [each.info.run_id for each in same_name] == [run.info.run_id]
    return run


def losses(cluster: Cluster, name: str) -> dict[int, float]:
    """step -> training loss, as MLflow has it. No step was told twice."""
    return losses_in(cluster.tracking_file, json_of(name))


def losses_in(tracking_uri: str, result: Path) -> dict[int, float]:
    run_id = json.loads(result.read_text())["mlflow_run_id"]
    history = MlflowClient(tracking_uri).get_metric_history(run_id, "train/loss")
    steps = [metric.step for metric in history]
    assert len(set(steps)) == len(steps), steps
    return {metric.step: metric.value for metric in history}


def events(cluster: Cluster, name: str) -> list[str]:
    """What happened to a training, as its run's tags tell it; how fast workers are is no matter here."""
    tags = tracked(cluster, name).data.tags
    return [value for key, value in sorted(tags.items()) if key.startswith("event.") and "is slow" not in value]


class Training:
    """A run at paced.py's pace, which logs each step; submitted again, it goes on."""

    def __init__(self, cluster: Cluster, name: str, *options: str):
        self.cluster, self.name, self.options = cluster, name, options
        self.job = ""

    def submit(self, env: dict[str, str] | None = None) -> None:
        command = train_command(self.name, *self.options, "--log-every", "1", module="tests.helpers.paced")
        self.job = self.cluster.submit(command, env)

    @property
    def log(self) -> str:
        return self.cluster.logs(self.job)

    @property
    def step(self) -> int:
        """The last step that was told; 0 before the first."""
        return max(map(int, re.findall(r"^step +(\d+) of", self.log, re.MULTILINE)), default=0)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def wait_for(self, words: str, times: int = 1) -> None:
        """Waits until these words are in the log so many times."""
        self.wait_until(lambda: self.log.count(words) >= times, f"{words!r}, {times} times")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        self.cluster.wait_in(self.job, condition, 180, what)

    def wait_till_again(self, since: float, times: int, record: Callable[[str, Any], None], what: str) -> None:
        """Waits for the first step after a loss, the so manieth of this job; records how long that took."""
        self.wait_for("training again", times)
        noted = re.findall(r"training again (\d+) s after the loss was noted", self.log)[-1]
        record(what, f"{time.monotonic() - since:.0f} s until the next step, {noted} s of it after it was noted")

    def end(self) -> None:
        assert self.cluster.wait(self.job, 240) == "SUCCEEDED", self.log
