"""Times of steps: how long they take, what fraction waits for data, and how long this worker's own part takes."""

import math
import time
from typing import Any

import torch


class Stopwatch:
    """Measures from its creation on; pauses do not count."""

    def __init__(self, clips_per_step: int, device: torch.device):
        self.clips_per_step, self.device = clips_per_step, device
        self.started = time.perf_counter()
        self.step_seconds: list[float] = []
        self.since, self.paused_before = self.started, 0.0  # the end of the last step, and the pauses until then
        self.waited = self.paused = self.computed = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def waiting(self) -> "Span":
        """A block that waits for data."""
        return Span(self, "waited")

    def pausing(self) -> "Span":
        """A block that is no part of a step: validation, or the copy of a checkpoint."""
        return Span(self, "paused")

    def computing(self) -> Any:
        """A forward pass: the part of a step in which no worker waits for another."""
        return EventSpan(self.events) if self.device.type == "cuda" else Span(self, "computed")

    def step_done(self) -> None:
        """Notes how long the step took. On a GPU its work may still wait, but over some steps the times are the GPU's."""
        now = time.perf_counter()
        self.step_seconds.append(now - self.since - (self.paused - self.paused_before))
        self.since, self.paused_before = now, self.paused

    @property
    def steps(self) -> int:
        return len(self.step_seconds)

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started - self.paused
        return {
            "clips_per_second": self.steps * self.clips_per_step / seconds,
            "data_wait_fraction": self.waited / seconds,
            "step_seconds_p50": quantile(self.step_seconds, 0.50),
            "step_seconds_p95": quantile(self.step_seconds, 0.95),
        }

    def own_seconds(self) -> float:
        """Seconds of a step that are this worker's own: waiting for data, and the forward pass."""
        for start, end in self.events:
            end.synchronize()
            self.computed += start.elapsed_time(end) / 1000
        self.events = []
        return (self.waited + self.computed) / max(1, self.steps)


def quantile(values: list[float], fraction: float) -> float:
    """The smallest of the values that at least this fraction of them does not exceed."""
    return sorted(values)[max(1, math.ceil(fraction * len(values))) - 1]


class Span:
    """Adds the seconds of a block to one of a stopwatch's sums."""

    def __init__(self, watch: Stopwatch, name: str):
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self.started
        setattr(self.watch, self.name, getattr(self.watch, self.name) + seconds)


class EventSpan:
    """Notes where a block begins and ends on the GPU, without waiting for it."""

    def __init__(self, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]):
        self.events = events
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __enter__(self) -> None:
        self.start.record()

    def __exit__(self, *error: object) -> None:
        self.end.record()
        self.events.append((self.start, self.end))
