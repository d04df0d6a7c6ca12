"""On how many workers a job runs, and what it does when some are lost."""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers of a job."""

    workers: int | str = 0
    """Number of Ray Train workers; 0 runs in this process, without Ray. 1:4 uses between 1 and 4 workers, as many as the cluster
    has room for: fewer when machines are lost, more when machines come back."""
    cpus_per_worker: int | None = None
    """CPU cores of each worker. Default: 1, or all cores in this process. With 1, a resumed run on CPUs repeats every bit;
    several threads add up some gradients in the order in which they finish."""
    gpus: bool | None = None
    """Give each worker one GPU. Default: if there are GPUs."""
    max_failures: int = 5
    """Give up after more than N losses of workers in a row without a new checkpoint."""
    wait_minutes: float = 10.0
    """Wait at most this long until the cluster has room for the smallest number of workers."""
    timeout_minutes: float = 5.0
    """Restart the workers if they wait longer than this for each other in one step."""

    def __post_init__(self) -> None:
        is_range = re.fullmatch(r"[1-9]\d*:[1-9]\d*", str(self.workers))
        if not (is_range and self.least <= self.most) and not re.fullmatch(r"\d+", str(self.workers)):
            raise ValueError(f"workers {self.workers}: expected a number, or a range such as 1:4")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise ValueError(f"cpus_per_worker {self.cpus_per_worker}: expected at least 1")
        if self.max_failures < 0 or min(self.wait_minutes, self.timeout_minutes) <= 0:
            raise ValueError(
                f"max_failures {self.max_failures}, wait_minutes {self.wait_minutes:g}, timeout_minutes "
                f"{self.timeout_minutes:g}: expected at least 0 failures and more than 0 minutes"
            )

    @property
    def least(self) -> int:
        return int(str(self.workers).partition(":")[0])

    @property
    def most(self) -> int:
        return int(str(self.workers).rpartition(":")[2])

    @property
    def in_process(self) -> bool:
        """Whether the job runs in this process, without Ray."""
        return self.most == 0

    def sizes(self, is_allowed: Callable[[int], bool]) -> list[int]:
        """The possible numbers of workers, largest first. is_allowed: whether the job can have this number."""
        return [size for size in range(max(1, self.most), max(1, self.least) - 1, -1) if is_allowed(size)]
