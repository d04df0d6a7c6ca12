"""On how many workers a job runs, and what it does when some are lost."""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workers:
    """On what a job runs."""

    workers: int | str = 0
    """Ray Train workers; 0 runs in this process, without Ray. 1:4 takes what there is, at least 1 and at most 4: a run goes
    on with fewer when machines are lost, and with more when they come back."""
    cpus_per_worker: int | None = None
    """CPU cores that each worker computes with. Default: 1, or all of them in this process. With 1, a resumed run on
    CPUs repeats every bit; several threads add up some gradients in the order in which they finish."""
    gpus: bool | None = None
    """One GPU for each worker. Default: if there are any."""
    max_failures: int = 5
    """Losses of workers in a row, without a new checkpoint between them, after which a job gives up."""
    wait_minutes: float = 10.0
    """How long a job waits for the workers that it needs at least."""
    timeout_minutes: float = 5.0
    """How long workers wait for each other in one step before they are started again."""

    def __post_init__(self) -> None:
        is_range = re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(self.workers))
        if not (is_range and self.least <= self.most) and not re.fullmatch(r"\d+", str(self.workers)):
            raise ValueError(f"workers {self.workers}: wanted a number, or a range such as 1:4")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ValueError(f"cpus_per_worker {self.cpus_per_worker}: wanted at least 1")
        if self.max_failures < 0 or min(self.wait_minutes, self.timeout_minutes) <= 0:
            raise ValueError(
                f"max_failures {self.max_failures}, wait_minutes {self.wait_minutes:g}, timeout_minutes "
                f"{self.timeout_minutes:g}: wanted at least 0, and more than 0 minutes"
            )

    @property
    def least(self) -> int:
        return int(str(self.workers).partition(":")[0])

    @property
    def most(self) -> int:
        return int(str(self.workers).rpartition(":")[2])

    @property
    def in_process(self) -> bool:
        """In this process, without Ray."""
        return self.most == 0

    def sizes(self, is_allowed: Callable[[int], bool]) -> list[int]:
        """The numbers of workers that a job may have, the largest first."""
        return [size for size in range(max(1, self.most), max(1, self.least) - 1, -1) if is_allowed(size)]
