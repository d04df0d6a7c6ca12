"""What all workers must decide alike, each step: whether to stop. And what rank 0 wants to know of all: who is slow.

By a process group of its own on the CPUs, so that no GPU is waited for: about 0.2 ms a step.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Every rank makes one, at the same place, and makes the same calls."""

    def __init__(self, minutes: float = 5.0):
        """minutes: how long ranks wait for each other."""
        alone = dist.get_world_size() == 1
        self.group: Any = None if alone else dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def gather(self, value: float) -> list[float]:
        """The value of each rank, by rank."""
        if self.group is None:
            return [value]
        values = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(values, torch.tensor(value, dtype=torch.float64), group=self.group)
        return [each.item() for each in values]

    def of_rank_0(self, name: str | None) -> str | None:
        """Rank 0's text."""
        if self.group is None:
            return name
        names = [name]
        dist.broadcast_object_list(names, src=0, group=self.group)
        return names[0]


def all_rows(rows: list[Any]) -> list[Any]:
    """The rows of all ranks, rank by rank. Every rank calls it, and all get the same."""
    if dist.get_world_size() == 1:
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
