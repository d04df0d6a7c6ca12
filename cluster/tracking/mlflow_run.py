"""A run's driver -> MLflow: one run for the whole life of a training, restarts included.

    log_metrics(), log_text(), ... ──> Outbox ──> MlflowSender ──> MLflow
                                         └──> STORAGE/NAME/unsent.jsonl, until MLflow has it

The driver opens the run before any worker starts, so a tracking server that is away then is found at once. Later a server may
be away as long as it likes: training goes on, and entries wait in order, also beyond the end of the process. Nothing is logged
twice: an entry that is sent again has its first time stamp, by which MLflow knows it; and steps that a restart repeats are left
out.
"""

import base64
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cluster.checkpoints.run_folder import IDENTITY, RunFolder
from cluster.tracking import entries
from cluster.tracking.outbox import UNSENT, Outbox, read_unsent
from cluster.tracking.sender import MlflowSender, Package, now, plain
from cluster.tracking.server import NoTracking, check_reachable
from shards.store import absolute_url, error_line

BUSY_SECONDS = 300.0  # at the end of a run, for a server that answers, but has much to take
POLL_SECONDS = 0.05


class MlflowRun:
    """One run in MLflow, as this process logs to it. A `with` block sends what is left; nothing in it waits for the server."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        run: RunFolder | None = None,
        print_line: Callable[[str], None] = print,
        is_over: bool = False,
        package: Package = plain,
    ):
        """run: where unsent entries are kept, and where checkpoints are; without it, there are neither.

        print_line: prints a line for people. is_over: the run has ended, so an end that an earlier process logged is sent too.
        package: makes what MLflow gets of the best model's folder. Raises NoTracking if the server does not answer.
        """
        self.uri, self.print_line = uri, print_line
        self.outbox = Outbox(run, lambda line: self.print_line(line))
        waiting = read_unsent(run) if run else []
        client = MlflowClient(uri)
        self.last_steps = last_logged(client, uri, run_id, waiting) if run else {}
        self.outbox.num_saved = len(waiting)
        for entry in waiting:
            if is_over or not isinstance(entry, entries.RunEnd):
                self.outbox.append(entry)
        self.sender = MlflowSender(client, uri, run_id, self.outbox, package)
        self.sender.start()

    def __enter__(self) -> "MlflowRun":
        return self

    def __exit__(self, *_: object) -> None:
        run = self.outbox.run
        if not self.close() and run and self.outbox.num_saved:
            self.print_line(
                f"MLflow at {self.uri} did not take {self.outbox.num_saved} entries; they are kept in {run.url}/{UNSENT}; "
                f"send them once it answers: python -m jobs.sync_mlflow --run {run.url}"
            )

    def last_step(self) -> int:
        """The last step with metrics."""
        return max([0, *self.last_steps.values()])

    def log_metrics(self, step: int, values: Mapping[str, float], milliseconds: int | None = None) -> None:
        """Metrics of a step. Those that the run has already, and that a restart measures again, are left out.

        milliseconds: when they were measured, since 1970; default: now.
        """
        kind = next(iter(values)).split("/")[0]
        if kind in self.last_steps:
            if step <= self.last_steps[kind]:
                return
            self.last_steps[kind] = step
        values = {name: float(value) for name, value in values.items()}
        self.outbox.append(entries.Metrics(step=step, values=values, milliseconds=milliseconds or now()))

    def log_event(self, step: int, text: str) -> None:
        """Something that happened to the run: a tag each, in order, and how many there were as a metric."""
        self.outbox.append(entries.RunEvent(step=step, text=text, milliseconds=now()))

    def log_text(self, name: str, content: str) -> None:
        self.log_file(name, content.encode())

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that MLflow's pages show as one. name: *.json."""
        self.log_file(name, json.dumps({"columns": list(columns), "data": list(rows)}).encode(), is_table=True)

    def log_file(self, name: str, content: bytes, is_table: bool = False) -> None:
        """A file among the run's artifacts; of the same name, the last one stays."""
        self.outbox.append(entries.File(name=name, content=base64.b64encode(content).decode(), is_table=is_table))

    def log_folder(self, name: str, folder: Path) -> None:
        """A folder's files as artifacts under `name`."""
        self.outbox.append(entries.Folder(name=name, folder=str(folder)))

    def log_checkpoint(self, name: str, keep: int) -> None:
        """A checkpoint and, if it is new, the best model as logged models; the newest `keep` checkpoints stay."""
        self.outbox.append(entries.SavedCheckpoint(name=name, keep=keep))
        self.outbox.save()  # a restart goes on from this checkpoint, and does not log again what was before

    def register(self, name: str) -> None:
        """The best model as the newest version of a registered one of this name."""
        self.outbox.append(entries.Register(name=name))

    def end(self, status: str = "FINISHED") -> None:
        """status: FINISHED, FAILED or KILLED. Sent when all else is."""
        self.outbox.append(entries.RunEnd(status=status, milliseconds=now()))

    def close(self, seconds: float = BUSY_SECONDS) -> bool:
        """Sends what is left; whether that was all. What is left then is in unsent.jsonl.

        seconds: for a server that answers. One that does not answer has sender.CLOSE_SECONDS.
        """
        started = time.monotonic()
        try:
            while not self.outbox.is_empty() and time.monotonic() < started + seconds:
                if self.sender.is_silent(started):
                    break
                time.sleep(POLL_SECONDS)
        finally:  # also after Ctrl-C
            self.outbox.close()
        return self.outbox.is_empty()


def last_logged(client: MlflowClient, uri: str, run_id: str, waiting: Sequence[entries.Entry]) -> dict[str, int]:
    """The last step of each kind of metrics that MLflow has, or that waits for it. Raises NoTracking."""
    steps = {}
    try:
        client.get_run(run_id)
        for kind in ("train", "val"):
            name = f"{kind}/loss"
            known = [metric.step for metric in client.get_metric_history(run_id, name)]
            known += [each.step for each in waiting if isinstance(each, entries.Metrics) and name in each.values]
            steps[kind] = max([-1, *known])
    except MlflowException as error:
        raise NoTracking(
            f"MLflow at {uri} does not show run {run_id} ({error_line(error)}); start it on the database that has the run"
        ) from None
    return steps


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What send_unsent has sent. entries: how many."""

    run: str
    entries: int
    mlflow_run_id: str
    tracking_uri: str


def send_unsent(url: str, package: Package = plain) -> Sent:
    """Sends what the processes of a run could not send. url: the run's folder. package: see MlflowRun.

    Raises ValueError if there is no run, NoTracking if MLflow does not take all; what is left stays in the folder.
    """
    run = RunFolder(absolute_url(url.rstrip("/")))
    identity = run.identity()
    if identity is None:
        raise ValueError(f"{run.url}: no {IDENTITY} in it; expected a run's folder (STORAGE/NAME)")
    uri, run_id, count = identity.tracking_uri, identity.mlflow_run_id, len(read_unsent(run))
    left = count
    if count:
        try:
            check_reachable(uri, "start it, and run the same command again")
            mlflow_run = MlflowRun(uri, run_id, run, is_over=True, package=package)
            if not mlflow_run.close(math.inf):
                left = mlflow_run.outbox.num_saved
                raise NoTracking(
                    f"MLflow at {uri} took {count - left:,} of {count:,} entries and then answered no more; run the same command "
                    "again once it does"
                )
        except NoTracking as error:
            raise NoTracking(f"{error}; {left:,} entries are kept in {run.url}/{UNSENT}") from None
    return Sent(run=run.url, entries=count, mlflow_run_id=run_id, tracking_uri=uri)
