"""Rank 0 -> MLflow: one run for the whole life of a training, restarts included.

The driver opens the run before any worker starts, so that a tracking server that is away is found out at once; rank 0 writes
to it by its id. Without MLFLOW_TRACKING_URI the runs are in an sqlite file in the storage folder.
"""

import logging
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

# A new database is told of line by line otherwise.
for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)

CONNECT_SECONDS = 5.0
LONGEST_PARAMETER = 6000  # characters MLflow stores


class NoTracking(OSError):
    """The MLflow server cannot be reached."""


def tracking_uri(storage: Path) -> str:
    """MLFLOW_TRACKING_URI, or an sqlite file in the storage folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute()}/mlflow.db"


def ui_command(uri: str) -> str:
    """The line that shows the runs in a browser."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {uri}  (then http://127.0.0.1:5000)"
    return f"open {uri}"


def open_run(
    uri: str,
    storage: Path,
    experiment: str,
    name: str,
    run_id: str | None,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """The id of the run: `run_id` set running again, or a new run with these parameters and tags.

    Raises NoTracking if the server does not answer, ValueError if `run_id` is not there.
    """
    check_reachable(uri)
    storage.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise ValueError(
                f"MLflow at {uri} has no run {run_id} ({error.message}); use the server that it began on"
            ) from None
        return run_id
    found = client.get_experiment_by_name(experiment)
    if found is None:
        # A local database would put artifacts into the working directory.
        place = (storage.absolute() / "mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
        experiment_id = client.create_experiment(experiment, artifact_location=place)
    else:
        experiment_id = found.experiment_id
    run = client.create_run(experiment_id, run_name=name)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in parameters.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    return run.info.run_id


def check_reachable(uri: str) -> None:
    """MLflow's own client tries for minutes; a server that is away is to be found out now."""
    if not uri.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answered, if only to ask who we are
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise NoTracking(
            f"no MLflow server at {uri} ({reason}); start it, or unset MLFLOW_TRACKING_URI to track in a file"
        ) from None


class Report:
    """Writes metrics and files to a run. On ranks other than 0 it does nothing."""

    def __init__(self, uri: str, run_id: str, rank: int = 0):
        self.run_id = run_id
        self.client = MlflowClient(uri) if rank == 0 else None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if self.client:
            now = round(time.time() * 1000)
            self.client.log_batch(
                self.run_id, metrics=[Metric(key, float(value), now, step) for key, value in values.items()]
            )

    def text(self, name: str, content: str) -> None:
        if self.client:
            self.client.log_text(self.run_id, content, name)

    def files(self, folder: Path, name: str) -> None:
        """A folder's files as artifacts under `name`."""
        if self.client:
            self.client.log_artifacts(self.run_id, str(folder), name)

    def checkpoint(self, checkpoint: Path, keep: int, new_best: bool) -> None:
        """A checkpoint's files under checkpoints/, the newest `keep` of them, and the best model under best/."""
        if not self.client:
            return
        self.files(checkpoint, f"checkpoints/{checkpoint.name}")
        if new_best:
            self.client.log_artifact(self.run_id, str(checkpoint / "best.safetensors"), "best")
            self.client.log_artifact(self.run_id, str(checkpoint / "best.json"), "best")
            self.client.log_artifact(self.run_id, str(checkpoint / "state.json"), "best")
        logged = sorted(file.path for file in self.client.list_artifacts(self.run_id, "checkpoints"))
        place = self.client.get_run(self.run_id).info.artifact_uri
        assert place is not None
        repository = get_artifact_repository(place)
        for old in logged[:-keep]:
            repository.delete_artifacts(old)

    def end(self, status: str = "FINISHED") -> None:
        """status: FINISHED, FAILED or KILLED."""
        if self.client:
            self.client.set_terminated(self.run_id, status)


def download_best(uri: str, run_id: str, folder: Path) -> Path:
    """Downloads a run's best model into `folder`, and gives back where it lies: a checkpoint as cluster.runs.load_best reads it.

    Raises NoTracking if the server does not answer, ValueError if there is no such run, or it has no best model yet.
    """
    check_reachable(uri)
    client = MlflowClient(uri)
    try:
        client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(
            f"MLflow at {uri} has no run {run_id} ({error.message}); set MLFLOW_TRACKING_URI to the server that has it"
        ) from None
    if not client.list_artifacts(run_id, "best"):
        raise ValueError(
            f"MLflow run {run_id} at {uri} has no best model: nothing was validated in it yet; wait, or name another run"
        )
    return Path(client.download_artifacts(run_id, "best", str(folder)))


def git_commit(folder: Path) -> str:
    """The commit of the code that runs, with "+changes" if it has any.

    Code that was uploaded by `ray job submit` is no clone: GRURCN_COMMIT tells its commit, else it is "unknown".
    """
    if "GRURCN_COMMIT" in os.environ:
        return os.environ["GRURCN_COMMIT"]
    try:
        commit = git(folder, "rev-parse", "HEAD")
        return f"{commit}+changes" if git(folder, "status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
