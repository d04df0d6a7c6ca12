"""Sends the entries of an outbox to MLflow, in two threads. What is sent twice, as an answer was lost, is there once."""

import base64
import json
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import assert_never

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from cluster.checkpoints.files import FROZEN, STATE, Checkpoint
from cluster.checkpoints.run_folder import export_best, step_of
from cluster.checkpoints.state import CheckpointState
from cluster.tracking import entries
from cluster.tracking.models import BEST, CHECKPOINT, MODEL_FOLDER, LoggedModels
from cluster.tracking.outbox import FILES, SAVE_SECONDS, SMALL, Outbox
from shards.store import BadShards, error_line, has_file

CLOSE_SECONDS = 30.0  # at the end of a run, for a server that does not answer
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0  # between two attempts, doubled after each
LONGEST_TAG = 5000  # characters MLflow stores
SHARED = "checkpoints"  # of the run's artifacts: what its checkpoints share

Package = Callable[[Path, Path], None]  # moves a folder that export_best wrote into a new one, to be logged


class MlflowSender:
    """Sends the entries of one run from start() until its outbox is closed."""

    def __init__(self, client: MlflowClient, uri: str, run_id: str, outbox: Outbox, package: Package):
        """package: makes what is logged of the best model's folder."""
        self.client, self.uri, self.run_id, self.outbox, self.package = client, uri, run_id, outbox, package
        self.run, self.print_line = outbox.run, outbox.print_line  # where checkpoints are; for people
        self.models = LoggedModels(client, uri, run_id)
        self.away: set[str] = set()  # queues whose last attempt had no answer
        self.sent_at = time.monotonic()  # when an entry was last sent

    def start(self) -> None:
        for queue in (SMALL, FILES):
            threading.Thread(target=self.send_queue, args=(queue,), name=f"MLflow: {queue}", daemon=True).start()

    def send_queue(self, queue: str) -> None:
        away_since, pause = None, FIRST_PAUSE_SECONDS
        while (entry := self.outbox.next(queue)) is not None:
            try:
                self.send(entry)
            except Exception as error:
                if is_passing(error):
                    if away_since is None:
                        away_since = time.monotonic()
                        self.print_line(f"MLflow at {self.uri} does not answer ({error_line(error)}); {queue} wait")
                    self.away.add(queue)
                    self.outbox.save(SAVE_SECONDS)
                    self.outbox.closed.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                    continue
                self.print_line(f"warning: MLflow at {self.uri} refuses {entries.kind_of(entry)}: {error_line(error)}")
            if away_since is not None:
                self.print_line(
                    f"MLflow at {self.uri} takes {queue} again, after {time.monotonic() - away_since:.0f} s"
                )
                away_since, pause = None, FIRST_PAUSE_SECONDS
            self.away.discard(queue)
            self.sent_at = time.monotonic()
            self.outbox.done(queue)

    def is_silent(self, since: float) -> bool:
        """Whether the server has taken nothing since then, or for CLOSE_SECONDS. An upload may take longer, small entries not."""
        is_uploading = not self.away and self.outbox.first(SMALL) is None
        return not is_uploading and time.monotonic() > max(since, self.sent_at) + CLOSE_SECONDS

    def send(self, entry: entries.Entry) -> None:
        match entry:
            case entries.Metrics(step=step, values=values, milliseconds=milliseconds):
                metrics = [Metric(name, value, milliseconds, step) for name, value in values.items()]
                self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)
            case entries.RunEvent():
                self.send_event(entry)
            case entries.File():
                self.send_file(entry)
            case entries.Folder(folder=folder, name=name):
                self.client.log_artifacts(self.run_id, folder, name)
            case entries.SavedCheckpoint(name=name, keep=keep):
                self.send_checkpoint(name, keep)
            case entries.Register(name=name):
                self.models.register(name)
            case entries.RunEnd(status=status, milliseconds=milliseconds):
                self.client.set_terminated(self.run_id, status, milliseconds)
            case _:
                assert_never(entry)

    def send_event(self, event: entries.RunEvent) -> None:
        """A tag each, in order, and how many there were as a metric."""
        when = datetime.fromtimestamp(event.milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        text = f"{when}, step {event.step:,}: {event.text}"[:LONGEST_TAG]
        tags = self.client.get_run(self.run_id).data.tags
        events = [value for key, value in tags.items() if key.startswith("event.")]
        if text not in events:  # sent before, and the answer was lost
            self.client.log_batch(
                self.run_id,
                metrics=[Metric("run/events", len(events) + 1.0, event.milliseconds, event.step)],
                tags=[RunTag(f"event.{len(events) + 1:04}", text)],
                synchronous=True,
            )

    def send_file(self, file: entries.File) -> None:
        """A table as MlflowClient.log_table sends it, but without adding to what is there: what is sent twice is there once."""
        folder, _, name = file.name.rpartition("/")
        with TemporaryDirectory(prefix="grurcn-mlflow-") as place:
            (Path(place) / name).write_bytes(base64.b64decode(file.content))
            self.client.log_artifact(self.run_id, f"{place}/{name}", folder or None)
        if file.is_table:
            tags = self.client.get_run(self.run_id).data.tags
            known, about = json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]")), {"path": file.name, "type": "table"}
            if about not in known:
                self.client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, about]), synchronous=True)

    def send_checkpoint(self, name: str, keep: int) -> None:
        """The checkpoint, unless newer ones have taken its place; and the best model so far, unless MLflow has it."""
        assert self.run is not None
        checkpoint = Checkpoint(self.run.store, name)
        logged = {file.path for file in self.client.list_artifacts(self.run_id, SHARED)}
        best_sha256 = self.models.best_sha256()
        with TemporaryDirectory(prefix="grurcn-mlflow-") as temporary:
            folder = Path(temporary)
            try:
                state = checkpoint.state()
                checkpoint.copy_to(folder, with_shared=f"{SHARED}/{FROZEN}" not in logged)
                if new_best := state.best if state.best and state.best.sha256 != best_sha256 else None:
                    export_best(checkpoint, folder / "best")
            except BadShards:  # the store is away
                raise
            except ValueError as error:
                if has_file(checkpoint.store, checkpoint.place(STATE)):
                    self.print_line(f"warning: {checkpoint.url} was not sent to MLflow: {error}")
                return
            if (folder / FROZEN).exists():
                self.client.log_artifact(self.run_id, str(folder / FROZEN), SHARED)
            step = step_of(name)
            self.models.log(CHECKPOINT, name, folder / name, step, *self.scores_at(step, state))
            if new_best:
                self.package(folder / "best", folder / "packaged")
                scores = self.scores_at(new_best.step, state)
                best = self.models.log(BEST, f"best-{new_best.step:08}", folder / "packaged", new_best.step, *scores)
                self.models.set_best(best, new_best.sha256)
                self.delete([model for model in self.models.all(BEST) if model.model_id != best.model_id])
        self.delete(self.models.all(CHECKPOINT)[:-keep])

    def scores_at(self, step: int, state: CheckpointState) -> tuple[dict[str, float], int]:
        """(scores, milliseconds) of the run's validation of a step, as they were logged; nothing if there was none."""
        for metrics in state.training.metrics:
            if metrics.step == step and "val/loss" in metrics.values:
                return dict(metrics.values), metrics.milliseconds
        if state.best is None or state.best.step != step:
            return {}, 0
        known = self.client.get_metric_history(self.run_id, "val/loss")  # of an earlier checkpoint, which was missed
        at = [metric.timestamp for metric in known if metric.step == step]
        return {f"val/{name}": score for name, score in state.best.scores.items()}, at[0] if at else now()

    def delete(self, models: list[LoggedModel]) -> None:
        """What stays, for whatever reason, is deleted with the next one; nothing is sent again for it."""
        try:
            self.models.delete(models)
        except Exception as error:
            self.print_line(f"warning: older models stay in MLflow at {self.uri}: {error_line(error)}")


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return round(time.time() * 1000)


def plain(model: Path, target: Path) -> None:
    """The best model's folder as it is."""
    place = target / MODEL_FOLDER
    place.parent.mkdir(parents=True)
    shutil.move(model, place)


def is_passing(error: Exception) -> bool:
    """Whether the same may be taken later: by a server that is away or overloaded, a database that is locked, with a new
    token, or by the database that has the run, where a server was started on another one."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, OSError | BadShards):
        status = getattr(getattr(error, "response", None), "status_code", 500)  # of an artifact's upload
    else:
        return False
    return status >= 500 or status in (401, 404, 408, 409, 429)
