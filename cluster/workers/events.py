"""The events that workers report to their driver: one closed set, taken apart by `match`.

Standard library only: the process of the event queue imports this file, and would need 5 seconds and 400 MB for PyTorch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class WorkerStarted:
    """A worker is about to call its function."""

    rank: int
    node_id: str
    host: str  # name and address
    pid: int


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """The first step since these workers started is done: after a loss, the restart has succeeded."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A training has done `step` steps. line: the same for people."""

    step: int
    line: str


@dataclass(frozen=True, kw_only=True)
class VideosDone:
    """An evaluation has done `count` more videos."""

    count: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Values at a step, by metric name. milliseconds: since 1970."""

    step: int
    values: Mapping[str, float]
    milliseconds: int


@dataclass(frozen=True, kw_only=True)
class SystemMetrics:
    """How busy a host is, by the names of MLflow's system metrics. milliseconds: since 1970."""

    host: str
    values: Mapping[str, float]
    milliseconds: int


@dataclass(frozen=True, kw_only=True)
class Validated:
    """A validation gave the best model so far. confusion: JSON of the per-class results, for pictures."""

    step: int
    confusion: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CaptionTable:
    """Captions of a validation, a row each. name: of the artifact."""

    name: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is complete. checkpoint: its folder's name. keep: how many of the newest stay."""

    step: int
    checkpoint: str
    keep: int


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A worker is much slower than the others. ratio: its seconds over the median of the others'."""

    step: int
    rank: int
    ratio: float
    description: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that happened to the run, as a line for people and a tag in MLflow: a lost worker, a restart, a warning."""

    text: str


Event = (
    WorkerStarted
    | FirstStep
    | Progress
    | VideosDone
    | Metrics
    | SystemMetrics
    | Validated
    | CaptionTable
    | Saved
    | Straggler
    | Notice
)
Report = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """What a worker function returns when it has saved and ended early because a stop was requested."""

    step: int
