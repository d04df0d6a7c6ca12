"""What a person sees while a job runs: a bar with rate and time left on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cluster.workers.events import Event, Notice, VideosDone

SECONDS_BETWEEN_LINES = 10.0


class RateColumn(TextColumn):
    """Units a second."""

    def __init__(self, unit: str):
        super().__init__("")
        self.unit = unit

    def render(self, task) -> Text:
        return Text(f"{task.speed or 0:.1f} {self.unit}/s")


class Bar:
    """Counts `total` units of work. On a terminal a bar; elsewhere a line every ten seconds, if `lines` is on."""

    def __init__(self, name: str, unit: str, total: int, done: int = 0, lines: bool = True):
        self.name, self.unit, self.total, self.done, self.lines = name, unit, total, done, lines
        self.first = done  # what was done before does not count for the rate
        self.started = self.last_line = time.monotonic()
        self.terminal = sys.stdout.isatty()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(unit),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=Console(soft_wrap=True), disable=not self.terminal)
        self.task = self.progress.add_task(name, total=total, completed=done)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def advance(self, units: int = 1) -> None:
        self.move_to(self.done + units)

    def move_to(self, done: int) -> None:
        self.done = done
        self.progress.update(self.task, completed=done)
        now = time.monotonic()
        if self.lines and not self.terminal and (now - self.last_line > SECONDS_BETWEEN_LINES or done == self.total):
            self.last_line = now
            print(self.as_line(now), flush=True)

    def listen(self, event: Event) -> None:
        """Shows the events of workers (run_workers) that go through a split."""
        match event:
            case VideosDone(count=count):
                self.move_to(min(self.total, self.done + count))
            case Notice(text=text):
                self.print_line(text)
            case _:
                pass

    def print_line(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.progress.console.print(line, markup=False, highlight=False) if self.terminal else print(line, flush=True)

    def as_line(self, now: float) -> str:
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        left = f", {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        return f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {rate:.1f} {self.unit}/s{left}"


def duration(seconds: float) -> str:
    """59 -> 59s, 150 -> 2m30s, 7320 -> 2h02m"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
