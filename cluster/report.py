"""A run's driver -> MLflow: one run for the whole life of a training, restarts included.

    what workers tell ──> Report, a queue ──┬─> a thread for metrics ──┬─> MLflow
                                            ├─> a thread for files ────┘
                                            └─> a thread that keeps ─────> STORAGE/NAME/unsent.jsonl, until MLflow has it

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
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from cluster.checkpoint import FROZEN, Checkpoint
from cluster.runs import RunFolder, export_best
from shards.store import BadShards, NoFile, absolute_url

# MLflow's own client would try for minutes; here what fails is sent again. A server may take long over a large file, once
# it has it, to put it into its own store.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # at each end of a run
# A new database is told of line by line otherwise, and so is each attempt at a server that is away.
for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 30.0  # at the end of a run, for a server that does not answer
BUSY_SECONDS = 300.0  # and for one that does, but has much to take
STORE_SECONDS = 120.0  # and for the run's folder
KEEP_SECONDS = 10.0  # between two writings of what waits
IDLE_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0  # between two attempts, doubled after each
UNSENT = "unsent.jsonl"  # in the run's folder
SMALL, FILES = "metrics and events", "files"
KINDS = {
    SMALL: ("metrics", "event", "end"),
    FILES: ("text", "table", "files", "checkpoint"),
}  # of entries, a thread each
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
    run = client.create_run(experiment_of(uri, storage, experiment), run_name=name)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in parameters.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    return run.info.run_id


def experiment_of(uri: str, storage: str | Path, name: str) -> str:
    """The id of an experiment, which is begun if there is none of that name; not to be begun by several processes at once."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A local database would put artifacts into the working directory.
    place = (Path(absolute_url(storage)) / "mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=place)


def check_reachable(uri: str, way_out: str = "start it, or unset MLFLOW_TRACKING_URI to track in a file") -> None:
    """MLflow's own client tries for minutes; a server that is away is to be found out now. Raises NoTracking."""
    if not uri.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answered, if only to ask who we are
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise NoTracking(f"no MLflow server at {uri} ({reason}); {way_out}") from None


Entry = dict[str, Any]


class Report:
    """What one process tells MLflow of a run. A `with` block sends what is left; nothing in it waits for the server."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        run: RunFolder | None = None,
        say: Callable[[str], None] = print,
        is_over: bool = False,
    ):
        """run: where entries wait that cannot be sent, and where checkpoints are; without, both are refused. say: for people.

        is_over: the run has ended, so that an end that an earlier process told is sent too. Raises NoTracking if the server
        does not answer.
        """
        self.client, self.run_id, self.run, self.say = MlflowClient(uri), run_id, run, say
        self.uri = uri
        self.kept = read_entries(run) if run else []  # what is in unsent.jsonl
        self.waiting = [entry for entry in self.kept if is_over or entry["kind"] != "end"]
        self.last_steps = self.known_steps() if run else {}
        self.best_missed = False  # the best model's checkpoint could not be sent, and has no successor that was
        self.changed = threading.Condition()  # of all that follows, and of what waits
        self.keep_now = self.is_closed = False
        self.away: set[str] = set()  # SMALL or FILES, where the last attempt had no answer
        self.taken_at = time.monotonic()  # when an entry was last sent
        self.keeper = threading.Thread(target=self.keep_all, name="report keeps", daemon=True)
        self.keeper.start()
        for what in KINDS:
            threading.Thread(target=self.send_all, args=(what,), name=f"report sends {what}", daemon=True).start()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.close() and self.run and self.kept:
            self.say(
                f"MLflow at {self.uri} did not take {len(self.kept)} entries; they are kept in {self.run.url}/{UNSENT}; "
                f"send them once it answers: python -m jobs.sync_mlflow --run {self.run.url}"
            )

    def known_steps(self) -> dict[str, int]:
        """The last step of each kind of metrics that MLflow has, or that waits for it."""
        steps = {}
        for kind in ("train", "val"):
            name = f"{kind}/loss"
            try:
                history = self.client.get_metric_history(self.run_id, name)
            except MlflowException as error:
                raise NoTracking(f"MLflow at {self.uri} does not tell of {self.run_id}: {first_line(error)}") from None
            waiting = [entry["step"] for entry in self.waiting if name in entry.get("values", ())]
            steps[kind] = max([-1, *waiting, *(metric.step for metric in history)])
        return steps

    def last_step(self) -> int:
        """The last one of which there were metrics."""
        return max([0, *self.last_steps.values()])

    def metrics(self, step: int, values: Mapping[str, float], milliseconds: int | None = None) -> None:
        """Metrics of a step. Those that a run has told already, and tells again after a restart, are left out.

        milliseconds: when they were measured, since 1970; default: now.
        """
        kind = next(iter(values)).split("/")[0]
        if kind in self.last_steps:
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

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that MLflow's pages show as one; of the same name, the last one stays. name: *.json."""
        self.put(kind="table", name=name, content=json.dumps({"columns": list(columns), "data": list(rows)}))

    def files(self, folder: Path, name: str) -> None:
        """A folder's files as artifacts under `name`."""
        self.put(kind="files", folder=str(folder), name=name)

    def checkpoint(self, name: str, keep: int, new_best: bool) -> None:
        """A checkpoint's files under checkpoints/, the newest `keep` of them, and the best model under best/."""
        with self.changed:
            older = [entry for entry in self.waiting if entry["kind"] == "checkpoint"]
            for entry in older[1 : len(older) + 1 - keep]:  # the first is being sent; these would be deleted soon
                self.waiting.remove(entry)
                new_best = new_best or entry["new_best"]
            self.keep_now = True  # a restart goes on from here, and does not tell again what was before
            self.put(kind="checkpoint", name=name, keep=keep, new_best=new_best)

    def end(self, status: str = "FINISHED") -> None:
        """status: FINISHED, FAILED or KILLED. Sent when all else is."""
        self.put(kind="end", status=status, milliseconds=now())

    def put(self, **entry: Any) -> None:
        with self.changed:
            self.waiting.append(entry)
            self.changed.notify_all()

    def close(self, seconds: float | None = None) -> bool:
        """Sends what is left; whether that was all. What is left then is in unsent.jsonl.

        seconds: for a server that answers; default: BUSY_SECONDS. One that does not answer has CLOSE_SECONDS.
        """
        until = time.monotonic() + (BUSY_SECONDS if seconds is None else seconds)
        try:
            with self.changed:
                self.taken_at = time.monotonic()
                while self.waiting and time.monotonic() < until and not self.is_silent():
                    self.changed.wait(IDLE_SECONDS)
        finally:  # also after Ctrl-C
            with self.changed:
                self.is_closed = True
                self.changed.notify_all()
            self.keeper.join(STORE_SECONDS)
        return not self.waiting

    def is_silent(self) -> bool:
        """Whether the server seems to be away: a file may be long on its way, small entries not."""
        may_take_long = not self.away and self.next_of(SMALL) is None
        return not may_take_long and time.monotonic() > self.taken_at + CLOSE_SECONDS

    # In the threads that send

    def send_all(self, what: str) -> None:
        away_since, pause = None, FIRST_PAUSE_SECONDS
        while (entry := self.next_entry(what)) is not None:
            try:
                self.send(entry)
            except Exception as error:
                if is_passing(error):
                    if away_since is None:
                        away_since = time.monotonic()
                        self.say(f"MLflow at {self.uri} does not answer ({first_line(error)}); {what} wait")
                    self.wait_away(what, pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                    continue
                self.say(f"warning: MLflow at {self.uri} refuses {entry['kind']}: {first_line(error)}")
            if away_since is not None:
                self.say(f"MLflow at {self.uri} takes {what} again, after {time.monotonic() - away_since:.0f} s")
                away_since, pause = None, FIRST_PAUSE_SECONDS
            self.done(what, entry)

    def next_entry(self, what: str) -> Entry | None:
        """Waits for an entry; None when the report is closed."""
        with self.changed:
            while not self.is_closed:
                entry = self.next_of(what)
                if entry is not None:
                    return entry
                self.changed.wait(IDLE_SECONDS)
        return None

    def next_of(self, what: str) -> Entry | None:
        """The first entry of SMALL or FILES; an end only once nothing is before it."""
        entry = next((entry for entry in self.waiting if entry["kind"] in KINDS[what]), None)
        return None if entry and entry["kind"] == "end" and entry is not self.waiting[0] else entry

    def wait_away(self, what: str, seconds: float) -> None:
        with self.changed:
            self.keep_now = self.keep_now or what not in self.away
            self.away.add(what)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.is_closed, seconds)

    def done(self, what: str, entry: Entry) -> None:
        with self.changed:
            if entry in self.waiting:  # a checkpoint may have been left out by now
                self.waiting.remove(entry)
            self.away.discard(what)
            self.taken_at = time.monotonic()
            self.changed.notify_all()

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
            case "files":
                self.client.log_artifacts(self.run_id, entry["folder"], entry["name"])
            case "checkpoint":
                self.send_checkpoint(entry)
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
        logged = sorted(file.path for file in self.client.list_artifacts(self.run_id, "checkpoints"))
        new_best = entry["new_best"] or self.best_missed
        with TemporaryDirectory(prefix="grurcn-report-") as name:
            folder = Path(name)
            try:
                checkpoint.copy_to(folder / "checkpoints", with_shared=f"checkpoints/{FROZEN}" not in logged)
                if new_best:
                    export_best(checkpoint, folder / "best")
            except BadShards:  # the store is away
                raise
            except ValueError as error:  # damaged, or gone: a newer one has taken its place while MLflow was away
                self.best_missed = new_best
                self.say(f"warning: {checkpoint.url} was not sent to MLflow: {error}")
                return
            self.client.log_artifacts(self.run_id, str(folder))
        self.best_missed = False
        there = sorted({f"checkpoints/{entry['name']}", *(path for path in logged if not path.endswith(FROZEN))})
        self.delete_artifacts(there[: -entry["keep"]])

    def delete_artifacts(self, paths: Sequence[str]) -> None:
        """What stays, for whatever reason, goes with the next checkpoint; nothing is sent again for it."""
        try:
            place = self.client.get_run(self.run_id).info.artifact_uri
            assert place is not None
            repository = get_artifact_repository(place, tracking_uri=self.uri)
            for path in paths:
                repository.delete_artifacts(path)
        except Exception as error:
            self.say(f"warning: older checkpoints stay in MLflow at {self.uri}: {first_line(error)}")

    # In the thread that keeps

    def keep_all(self) -> None:
        is_last = False
        while not is_last:
            with self.changed:
                self.changed.wait_for(lambda: self.keep_now or self.is_closed, KEEP_SECONDS)
                self.keep_now, is_last = False, self.is_closed
                waiting = list(self.waiting)
            if self.run is not None and waiting != self.kept:
                self.keep(self.run, waiting)

    def keep(self, run: RunFolder, waiting: list[Entry]) -> None:
        """Writes what waits into the run's folder, so that it outlives this process."""
        try:
            if waiting:
                with run.store.written(UNSENT) as file:
                    file.writelines(json.dumps(entry).encode() + b"\n" for entry in waiting)
            else:
                run.store.delete([UNSENT])
        except (OSError, BadShards) as error:
            self.say(f"warning: what MLflow has not taken cannot be kept: {error}")
        else:
            self.kept = waiting


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
    """Whether the same may be taken later: by a server that is away or overloaded, a database that is locked, with a new
    token, or by the database that has the run, where a server was started on another one."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, OSError | BadShards):
        status = getattr(getattr(error, "response", None), "status_code", 500)  # of an artifact's upload
    else:
        return False
    return status >= 500 or status in (401, 404, 408, 409, 429)


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
