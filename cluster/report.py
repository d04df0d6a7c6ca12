"""A run's driver -> MLflow: one run for the whole life of a training, restarts included.

    what workers tell ──> Report, a queue ──> a thread ──> MLflow
                                                 └── does not answer ──> STORAGE/NAME/unsent.jsonl, until it does

The driver opens the run before any worker starts, so that a tracking server that is away then is found out at once. Later a
server may be away as long as it likes: training goes on, and what is to be told waits, in order, also beyond the end of the
process (`python -m jobs.sync_mlflow`). Nothing is told twice: an entry that is sent again has the time of its first sending,
by which MLflow knows it; and what steps have told that a restart repeats is left out. Without MLFLOW_TRACKING_URI the runs
are in an sqlite file in the storage folder.
"""

import json
import logging
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from cluster.checkpoint import FROZEN, Checkpoint
from cluster.runs import RunFolder, export_best
from shards.store import NoFile, absolute_url

# MLflow's own client would try for minutes; here what fails is sent again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
# A new database is told of line by line otherwise.
for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)

CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 30.0  # at the end of a run, for what is left to send
KEEP_SECONDS = 10.0  # between two writings of what waits
IDLE_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0  # between two attempts, doubled after each
UNSENT = "unsent.jsonl"  # in the run's folder
LONGEST_TAG = 5000  # characters MLflow stores
LONGEST_PARAMETER = 6000  # characters MLflow stores


class NoTracking(OSError):
    """The MLflow server cannot be reached."""


def tracking_uri(storage: str | Path) -> str:
    """MLFLOW_TRACKING_URI, or an sqlite file in the storage folder. Raises NoTracking for an object store without the former."""
    uri, place = os.environ.get("MLFLOW_TRACKING_URI"), absolute_url(storage)
    if not uri and "://" in place:
        raise NoTracking(
            f"{place}: MLflow's database cannot lie in an object store; start a server (mlflow server), and name it by "
            "MLFLOW_TRACKING_URI"
        )
    return uri or f"sqlite:///{place}/mlflow.db"


def ui_command(uri: str) -> str:
    """The line that shows the runs in a browser."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {uri}  (then http://127.0.0.1:5000)"
    return f"open {uri}"


def open_run(
    uri: str,
    storage: str | Path,
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
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
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
        place = (Path(absolute_url(storage)) / "mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
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


Entry = dict[str, Any]


class Report:
    """What one process tells MLflow of a run. A `with` block sends what is left; nothing in it waits for the server."""

    def __init__(self, uri: str, run_id: str, run: RunFolder | None = None, say: Callable[[str], None] = print):
        """run: where entries wait that cannot be sent, and where checkpoints are; without, both are refused. say: for people."""
        self.client, self.run_id, self.run, self.say = MlflowClient(uri), run_id, run, say
        self.uri = uri
        self.last_steps = self.known_steps()
        self.waiting: deque[Entry] = deque(read_entries(run) if run else [])
        self.kept = len(self.waiting) > 0  # in unsent.jsonl
        self.changed = threading.Condition()
        self.closing_at: float | None = None
        self.thread = threading.Thread(target=self.send_all, name="report", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def known_steps(self) -> dict[str, int]:
        """The last step of each kind of metrics that MLflow has."""
        steps = {}
        for kind in ("train", "val"):
            history = self.client.get_metric_history(self.run_id, f"{kind}/loss")
            steps[kind] = max((metric.step for metric in history), default=-1)
        return steps

    def last_step(self) -> int:
        """The last one of which there were metrics."""
        return max(0, *self.last_steps.values())

    def metrics(self, step: int, values: Mapping[str, float], milliseconds: int | None = None) -> None:
        """Metrics of a step. Those that a run has told already, and tells again after a restart, are left out.

        milliseconds: when they were measured, since 1970; default: now.
        """
        kind = next(iter(values)).split("/")[0]
        if self.run is not None and kind in self.last_steps:
            if step <= self.last_steps[kind]:
                return
            self.last_steps[kind] = step
        values = {key: float(value) for key, value in values.items()}
        self.put(kind="metrics", step=step, milliseconds=milliseconds or now(), values=values)

    def event(self, step: int, text: str) -> None:
        """Something that happened to the run: a tag each, in order, and how many there were as a metric."""
        self.put(kind="event", step=step, milliseconds=now(), text=text)

    def text(self, name: str, content: str) -> None:
        self.put(kind="text", name=name, content=content)

    def files(self, folder: Path, name: str) -> None:
        """A folder's files as artifacts under `name`."""
        self.put(kind="files", folder=str(folder), name=name)

    def checkpoint(self, name: str, keep: int, new_best: bool) -> None:
        """A checkpoint's files under checkpoints/, the newest `keep` of them, and the best model under best/."""
        self.put(kind="checkpoint", name=name, keep=keep, new_best=new_best)

    def end(self, status: str = "FINISHED") -> None:
        """status: FINISHED, FAILED or KILLED."""
        self.put(kind="end", status=status, milliseconds=now())

    def put(self, **entry: Any) -> None:
        with self.changed:
            self.waiting.append(entry)
            self.changed.notify()

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Sends what is left, for so long at most; whether that was all. What is left then is in unsent.jsonl."""
        with self.changed:
            self.closing_at = time.monotonic() + seconds
            self.changed.notify()
        self.thread.join()
        if self.waiting and self.run:
            self.say(
                f"MLflow at {self.uri} did not answer: {len(self.waiting)} entries are kept in {self.run.url}/{UNSENT}; "
                f"send them once it does: python -m jobs.sync_mlflow --run {self.run.url}"
            )
        return not self.waiting

    # In the thread

    def send_all(self) -> None:
        away_since, pause, kept_at = None, FIRST_PAUSE_SECONDS, 0.0
        while self.next_entry():
            try:
                self.send(self.waiting[0])
            except Exception as error:
                if not is_passing(error):
                    self.say(f"warning: MLflow at {self.uri} refuses {self.waiting[0]['kind']}: {first_line(error)}")
                    self.waiting.popleft()
                    continue
                if away_since is None:
                    away_since = time.monotonic()
                    self.say(f"MLflow at {self.uri} does not answer ({first_line(error)}); what is to be told waits")
                is_last_try = self.closing_at is not None and time.monotonic() + pause > self.closing_at
                if is_last_try or time.monotonic() - kept_at > KEEP_SECONDS:
                    self.keep()
                    kept_at = time.monotonic()
                if is_last_try:
                    return
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self.waiting.popleft()
                if away_since is not None:
                    self.say(f"MLflow at {self.uri} answers again, after {time.monotonic() - away_since:.0f} s")
                    away_since, pause = None, FIRST_PAUSE_SECONDS
        self.forget_kept()

    def next_entry(self) -> bool:
        """Waits for an entry; False when the report is closed and nothing is left."""
        with self.changed:
            while not self.waiting:
                if self.closing_at is not None:
                    return False
                self.changed.wait(IDLE_SECONDS)
                if not self.waiting:
                    self.forget_kept()
            return True

    def send(self, entry: Entry) -> None:
        match entry["kind"]:
            case "metrics":
                self.client.log_batch(
                    self.run_id,
                    metrics=[
                        Metric(key, value, entry["milliseconds"], entry["step"])
                        for key, value in entry["values"].items()
                    ],
                )
            case "event":
                self.send_event(entry)
            case "text":
                self.client.log_text(self.run_id, entry["content"], entry["name"])
            case "files":
                self.client.log_artifacts(self.run_id, entry["folder"], entry["name"])
            case "checkpoint":
                self.send_checkpoint(entry)
            case "end":
                self.client.set_terminated(self.run_id, entry["status"], entry["milliseconds"])

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
            )

    def send_checkpoint(self, entry: Entry) -> None:
        assert self.run is not None
        checkpoint = Checkpoint(self.run.store, entry["name"])
        logged = sorted(file.path for file in self.client.list_artifacts(self.run_id, "checkpoints"))
        with TemporaryDirectory(prefix="grurcn-report-") as name:
            folder = Path(name)
            try:
                checkpoint.copy_to(folder / "checkpoints", with_shared=f"checkpoints/{FROZEN}" not in logged)
                if entry["new_best"]:
                    export_best(checkpoint, folder / "best")
            except ValueError as error:  # damaged, or gone: a newer one has taken its place while MLflow was away
                self.say(f"warning: {checkpoint.url} was not sent to MLflow: {error}")
                return
            self.client.log_artifacts(self.run_id, str(folder))
        there = sorted({f"checkpoints/{entry['name']}", *(path for path in logged if not path.endswith(FROZEN))})
        place = self.client.get_run(self.run_id).info.artifact_uri
        assert place is not None
        repository = get_artifact_repository(place)
        for path in there[: -entry["keep"]]:
            repository.delete_artifacts(path)

    def keep(self) -> None:
        """Writes what waits into the run's folder, so that it outlives this process."""
        if self.run is not None:
            with self.run.store.written(UNSENT) as file:
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in list(self.waiting))
            self.kept = True

    def forget_kept(self) -> None:
        if self.kept and self.run is not None:
            self.run.store.delete([UNSENT])
            self.kept = False


def read_entries(run: RunFolder) -> list[Entry]:
    """What an earlier process could not send."""
    try:
        return [json.loads(line) for line in run.store.read_file(UNSENT).splitlines()]
    except NoFile:
        return []


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return round(time.time() * 1000)


def is_passing(error: Exception) -> bool:
    """Whether MLflow may take the same later: a server that is away or overloaded, a database that is locked."""
    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    return isinstance(error, OSError)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
