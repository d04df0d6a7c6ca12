"""A run's driver -> MLflow: one run for the whole life of a training, restarts included.

    what workers tell ──> MlflowRun, a queue ──┬─> a thread for metrics ──┬─> MLflow
                                            ├─> a thread for files ────┘
                                            └─> a thread that keeps ─────> STORAGE/NAME/unsent.jsonl, until MLflow has it

The driver opens the run before any worker starts, so that a tracking server that is away then is found out at once. Later a
server may be away as long as it likes: training goes on, and what is to be told waits, in order, also beyond the end of the
process (`python -m jobs.sync_mlflow`). Nothing is told twice: an entry that is sent again has the time of its first sending,
by which MLflow knows it; and what steps have told that a restart repeats is left out.
"""

import base64
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cluster.checkpoints.run_folder import RunFolder
from cluster.progress import first_line
from cluster.tracking.sender import Entry, MlflowSender, Package, is_passing, now, plain
from cluster.tracking.server import NoTracking
from shards.store import BadShards, NoFile

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
    FILES: ("text", "table", "picture", "files", "checkpoint", "register"),
}  # of entries, a thread each


class MlflowRun:
    """What one process tells MLflow of a run. A `with` block sends what is left; nothing in it waits for the server."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        run: RunFolder | None = None,
        print_line: Callable[[str], None] = print,
        is_over: bool = False,
        package: Package = plain,
    ):
        """run: where entries wait that cannot be sent, and where checkpoints are; without it, both are refused.

        print_line: prints a line for people. is_over: the run has ended, so an end that an earlier process logged is sent too.
        package: makes what MLflow gets of the best model's folder. Raises NoTracking if the server does not answer.
        """
        self.client, self.run_id, self.run, self.print_line = MlflowClient(uri), run_id, run, print_line
        self.uri = uri
        self.kept = read_entries(run) if run else []  # what is in unsent.jsonl
        self.waiting = [entry for entry in self.kept if is_over or entry["kind"] != "end"]
        self.last_steps = self.known_steps() if run else {}
        self.sender = MlflowSender(self.client, uri, run_id, run, lambda line: self.print_line(line), package)
        self.changed = threading.Condition()  # of all that follows, and of what waits
        self.keep_now = self.is_closed = False
        self.away: set[str] = set()  # SMALL or FILES, where the last attempt had no answer
        self.taken_at = time.monotonic()  # when an entry was last sent
        self.keeper = threading.Thread(target=self.keep_all, name="report keeps", daemon=True)
        self.keeper.start()
        for what in KINDS:
            threading.Thread(target=self.send_all, args=(what,), name=f"report sends {what}", daemon=True).start()

    def __enter__(self) -> "MlflowRun":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.close() and self.run and self.kept:
            self.print_line(
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

    def log_metrics(self, step: int, values: Mapping[str, float], milliseconds: int | None = None) -> None:
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

    def log_event(self, step: int, text: str) -> None:
        """Something that happened to the run: a tag each, in order, and how many there were as a metric."""
        self.put(kind="event", step=step, milliseconds=now(), text=text)

    def log_text(self, name: str, content: str) -> None:
        self.put(kind="text", name=name, content=content)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that MLflow's pages show as one; of the same name, the last one stays. name: *.json."""
        self.put(kind="table", name=name, content=json.dumps({"columns": list(columns), "data": list(rows)}))

    def log_image(self, name: str, content: bytes) -> None:
        """An image file; of the same name the last one stays, and those that still wait are not sent any more. name: *.png."""
        with self.changed:
            same = {"kind": "picture", "name": name}
            self.waiting = [entry for entry in self.waiting if not same.items() <= entry.items()]
            self.put(**same, content=base64.b64encode(content).decode())

    def log_artifacts(self, folder: Path, name: str) -> None:
        """A folder's files as artifacts under `name`."""
        self.put(kind="files", folder=str(folder), name=name)

    def log_checkpoint(self, name: str, keep: int, new_best: bool) -> None:
        """A checkpoint and, if it is new, the best model as logged models; the newest `keep` checkpoints stay."""
        with self.changed:
            older = [entry for entry in self.waiting if entry["kind"] == "checkpoint"]
            for entry in older[1 : len(older) + 1 - keep]:  # the first is being sent; these would be deleted soon
                self.waiting.remove(entry)
                new_best = new_best or entry["new_best"]
            self.keep_now = True  # a restart goes on from here, and does not tell again what was before
            self.put(kind="checkpoint", name=name, keep=keep, new_best=new_best)

    def register(self, name: str) -> None:
        """The best model as the newest version of a registered one of this name."""
        self.put(kind="register", name=name)

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
                self.sender.send(entry)
            except Exception as error:
                if is_passing(error):
                    if away_since is None:
                        away_since = time.monotonic()
                        self.print_line(f"MLflow at {self.uri} does not answer ({first_line(error)}); {what} wait")
                    self.wait_away(what, pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                    continue
                self.print_line(f"warning: MLflow at {self.uri} refuses {entry['kind']}: {first_line(error)}")
            if away_since is not None:
                self.print_line(f"MLflow at {self.uri} takes {what} again, after {time.monotonic() - away_since:.0f} s")
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
            self.print_line(f"warning: what MLflow has not taken cannot be kept: {error}")
        else:
            self.kept = waiting


def read_entries(run: RunFolder) -> list[Entry]:
    """What an earlier process could not send."""
    try:
        return [json.loads(line) for line in run.store.read_file(UNSENT).splitlines()]
    except NoFile:
        return []
