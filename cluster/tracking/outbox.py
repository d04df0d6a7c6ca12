"""The outbox of one process: entries that wait for MLflow, in two queues, each a file and how far it has been sent.

    metrics and events    metrics | metrics | event | metrics       JSON lines in temporary files; what is small
                                    ^ sent up to here               does not wait for an upload that takes minutes
    files                 file | file | checkpoint | file
                                        ^

What is not sent is also written to STORAGE/NAME/unsent.jsonl, as a whole, because nothing can be appended in an object store.
The next process, or `python -m jobs.sync_mlflow`, sends it.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from tempfile import SpooledTemporaryFile

from cluster.checkpoints.run_folder import RunFolder
from cluster.tracking.entries import Entry, File, Metrics, RunEnd, RunEvent, from_line, to_line
from shards.store import BadShards, NoFile

UNSENT = "unsent.jsonl"  # in the run's folder
SAVE_SECONDS = 20.0  # between two writings of it while the server is away
SMALL, FILES = "metrics and events", "files"  # the queues
IN_MEMORY_BYTES = 16 * 2**20  # of a temporary file, which is on a disk beyond that


def read_unsent(run: RunFolder) -> list[Entry]:
    """The entries that an earlier process could not send."""
    try:
        return [from_line(line) for line in run.store.read_file(UNSENT).splitlines()]
    except NoFile:
        return []


class Queue:
    """An append-only file of entries, one JSON line each, and how far it has been sent."""

    def __init__(self) -> None:
        self.file = SpooledTemporaryFile(IN_MEMORY_BYTES, prefix="grurcn-outbox-")  # noqa: SIM115  # closed with this
        self.sent = 0  # bytes of it
        self.newest: dict[str, int] = {}  # where the last file of each name is

    def append(self, entry: Entry) -> None:
        position = self.file.seek(0, 2)
        self.file.write(to_line(entry))
        if isinstance(entry, File):
            self.newest[entry.name] = position

    def unsent(self) -> Iterator[tuple[int, bytes, Entry]]:
        """(position, line, entry) of what is not sent, without files that later ones replace."""
        position = self.sent
        while True:
            self.file.seek(position)
            line = self.file.readline()
            if not line:
                return
            entry = from_line(line)
            if not isinstance(entry, File) or self.newest[entry.name] == position:
                yield position, line, entry
            position += len(line)

    def first(self) -> Entry | None:
        for position, _, entry in self.unsent():
            self.sent = position
            return entry
        return None

    def done(self) -> None:
        """The first entry is sent."""
        self.file.seek(self.sent)
        self.sent += len(self.file.readline())
        if self.is_empty():
            self.sent = self.file.seek(0)
            self.file.truncate()

    def is_empty(self) -> bool:
        return self.sent == self.file.seek(0, 2)


class Outbox:
    """The entries of one process. Safe to use from several threads."""

    def __init__(self, run: RunFolder | None, print_line: Callable[[str], None]):
        """run: where save() writes; without it, save() does nothing. print_line: prints a line for people."""
        self.run, self.print_line = run, print_line
        self.queues = {SMALL: Queue(), FILES: Queue()}
        self.changed = threading.Condition()  # guards the queues
        self.closed = threading.Event()
        self.saving = threading.Lock()  # guards what follows
        self.num_saved = 0  # entries in unsent.jsonl
        self.saved_at = -math.inf

    def append(self, entry: Entry) -> None:
        with self.changed:
            queue = SMALL if isinstance(entry, Metrics | RunEvent | RunEnd) else FILES
            self.queues[queue].append(entry)
            self.changed.notify_all()

    def first(self, queue: str) -> Entry | None:
        """The first entry of a queue that can be sent: an end only when all else is."""
        with self.changed:
            entry = self.queues[queue].first()
            return None if isinstance(entry, RunEnd) and not self.queues[FILES].is_empty() else entry

    def next(self, queue: str) -> Entry | None:
        """Waits for the first entry of a queue; None when the outbox is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed.is_set() or self.first(queue) is not None)
            return None if self.closed.is_set() else self.first(queue)

    def done(self, queue: str) -> None:
        """The first entry of a queue is sent."""
        with self.changed:
            self.queues[queue].done()
            self.changed.notify_all()
        if self.num_saved and self.is_empty():
            self.save()

    def is_empty(self) -> bool:
        with self.changed:
            return all(queue.is_empty() for queue in self.queues.values())

    def close(self) -> None:
        """Nothing more is sent; what is left is saved."""
        with self.changed:
            self.closed.set()
            self.changed.notify_all()
        self.save()

    def save(self, pause: float = 0) -> None:
        """Writes what is not sent into the run's folder, so that it outlives this process. pause: seconds since the last
        time before which it does nothing."""
        with self.saving:
            if self.run is None or time.monotonic() < self.saved_at + pause:
                return
            with self.changed:
                lines = [line for queue in self.queues.values() for _, line, _ in queue.unsent()]
            try:
                if lines:
                    with self.run.store.written(UNSENT) as file:
                        file.writelines(lines)
                elif self.num_saved:
                    self.run.store.delete([UNSENT])
                self.num_saved = len(lines)
            except (OSError, BadShards) as error:
                self.print_line(f"warning: what MLflow has not taken cannot be kept: {error}")
            self.saved_at = time.monotonic()
