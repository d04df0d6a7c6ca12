"""What a worker function gets besides its job, and what it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from cluster.workers.events import Report, Stopped

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Where a worker runs, how it reports to its driver, and whether the driver has requested a stop."""

    device: torch.device
    rank: int
    world_size: int
    report: Report  # does not block and does not fail
    stop_requested: Callable[[], bool]


WorkerFunction = Callable[[Job, WorkerContext], Result | Stopped]  # Ray pickles job and result
