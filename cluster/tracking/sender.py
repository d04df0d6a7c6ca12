"""Entries of a report -> MLflow. What is sent twice, as an answer was lost, is there once."""

import base64
import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from cluster.checkpoints.files import FROZEN, Checkpoint
from cluster.checkpoints.run_folder import RunFolder, export_best, step_of
from cluster.progress import first_line
from cluster.tracking.models import BEST, CHECKPOINT, MODEL_FOLDER, LoggedModels
from shards.store import BadShards

LONGEST_TAG = 5000  # characters MLflow stores
SHARED = "checkpoints"  # of the run's artifacts: what its checkpoints share

Entry = dict[str, Any]
Package = Callable[[Path, Path], None]  # moves a folder that export_best wrote into a new one, to be logged


class MlflowSender:
    """Sends the entries of one run."""

    def __init__(
        self,
        client: MlflowClient,
        uri: str,
        run_id: str,
        run: RunFolder | None,
        print_line: Callable[[str], None],
        package: Package,
    ):
        """package: makes what is logged of the best model's folder."""
        self.client, self.uri, self.run_id, self.run, self.print_line = client, uri, run_id, run, print_line
        self.models, self.package = LoggedModels(client, uri, run_id), package
        self.best_missed = False  # the best model's checkpoint could not be sent, and has no successor that was

    def send(self, entry: Entry) -> None:
        match entry["kind"]:
            case "metrics":
                self.client.log_batch(
                    self.run_id,
                    metrics=[
                        Metric(key, value, entry["milliseconds"], entry["step"])
                        for key, value in entry["values"].items()
                    ],
                    synchronous=True,
                )
            case "event":
                self.send_event(entry)
            case "text":
                self.client.log_text(self.run_id, entry["content"], entry["name"])
            case "table":
                self.send_table(entry)
            case "picture":
                self.send_picture(entry)
            case "files":
                self.client.log_artifacts(self.run_id, entry["folder"], entry["name"])
            case "checkpoint":
                self.send_checkpoint(entry)
            case "register":
                self.models.register(entry["name"])
            case "end":
                self.client.set_terminated(self.run_id, entry["status"], entry["milliseconds"])

    def send_table(self, entry: Entry) -> None:
        """As MlflowClient.log_table does it, but for adding to what is there: what is sent twice must not be there twice."""
        self.client.log_text(self.run_id, entry["content"], entry["name"])
        tags = self.client.get_run(self.run_id).data.tags
        known = json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        about = {"path": entry["name"], "type": "table"}
        if about not in known:
            self.client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, about]), synchronous=True)

    def send_picture(self, entry: Entry) -> None:
        folder, _, name = entry["name"].rpartition("/")
        with TemporaryDirectory(prefix="grurcn-report-") as place:
            (Path(place) / name).write_bytes(base64.b64decode(entry["content"]))
            self.client.log_artifact(self.run_id, f"{place}/{name}", folder or None)

    def send_event(self, entry: Entry) -> None:
        when = datetime.fromtimestamp(entry["milliseconds"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        text = f"{when}, step {entry['step']:,}: {entry['text']}"[:LONGEST_TAG]
        tags = self.client.get_run(self.run_id).data.tags
        events = [value for key, value in tags.items() if key.startswith("event.")]
        if text not in events:  # sent before, and the answer was lost
            self.client.log_batch(
                self.run_id,
                metrics=[Metric("run/events", len(events) + 1.0, entry["milliseconds"], entry["step"])],
                tags=[RunTag(f"event.{len(events) + 1:04}", text)],
                synchronous=True,
            )

    def send_checkpoint(self, entry: Entry) -> None:
        assert self.run is not None
        checkpoint = Checkpoint(self.run.store, entry["name"])
        logged = {file.path for file in self.client.list_artifacts(self.run_id, SHARED)}
        new_best = entry["new_best"] or self.best_missed
        with TemporaryDirectory(prefix="grurcn-report-") as name:
            folder = Path(name)
            try:
                state = checkpoint.state()
                checkpoint.copy_to(folder, with_shared=f"{SHARED}/{FROZEN}" not in logged)
                if new_best:
                    export_best(checkpoint, folder / "best")
            except BadShards:  # the store is away
                raise
            except ValueError as error:  # damaged, or gone: a newer one has taken its place while MLflow was away
                self.best_missed = new_best
                self.print_line(f"warning: {checkpoint.url} was not sent to MLflow: {error}")
                return
            if (folder / FROZEN).exists():
                self.client.log_artifact(self.run_id, str(folder / FROZEN), SHARED)
            step = step_of(checkpoint.name)
            told = self.told_at(step, state)
            self.models.log(CHECKPOINT, checkpoint.name, folder / checkpoint.name, step, *told)
            if new_best:
                self.send_best(folder, state)
        self.best_missed = False
        self.drop_old(CHECKPOINT, entry["keep"])

    def send_best(self, folder: Path, state: dict[str, Any]) -> None:
        self.package(folder / "best", folder / "packaged")
        step = state["best"]["step"]
        told = self.told_at(step, state)
        self.models.set_best(self.models.log(BEST, f"best-{step:08}", folder / "packaged", step, *told))
        self.drop_old(BEST, 1)

    def told_at(self, step: int, state: dict[str, Any]) -> tuple[dict[str, float], int]:
        """What the run's validation of a step gave, and when, as it was told; nothing if there was none."""
        for metrics in state["meta"].get("told", ()):
            if metrics["at"] == step and "val/loss" in metrics["metrics"]:
                return metrics["metrics"], metrics["milliseconds"]
        best = state["best"] or {}
        if best.get("step") != step:
            return {}, 0
        known = self.client.get_metric_history(self.run_id, "val/loss")  # of an earlier checkpoint, which was missed
        at = [metric.timestamp for metric in known if metric.step == step]
        return {f"val/{key}": best[key] for key in best if key not in ("step", "sha256")}, at[0] if at else now()

    def drop_old(self, kind: str, keep: int) -> None:
        """What stays, for whatever reason, goes with the next one; nothing is sent again for it."""
        try:
            self.models.drop_old(kind, keep)
        except Exception as error:
            self.print_line(f"warning: older models stay in MLflow at {self.uri}: {first_line(error)}")


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
