"""Ray tasks that read and decode an evaluation's videos, so that GPUs wait less and machines without GPUs have work.

    a worker's pipeline ── sample ──> a task on any machine: bytes from the shards -> planes ──> object store ──> clip batch

Ray prefers machines without GPUs for such tasks (its scheduler_avoid_gpu_nodes). A task that is lost with its machine runs
again on another one. The decoded bytes do not depend on the machine.
"""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import ray
import torch.distributed as dist
from ray.exceptions import RayTaskError

from cluster.workers.collectives import all_rows
from cluster.workers.connect import NoCluster, start_ray
from cluster.workers.options import Workers
from shards.index import Index
from shards.reading.stages import Request

R = TypeVar("R", bound=Request)
T = TypeVar("T")
RETRIES = 3  # of a task whose machine is lost


class Decoders:
    """Tasks that serve one worker: shards.reading.stages.RemoteDecoder."""

    def __init__(self, index: Index, at_once: int):
        self.at_once = at_once
        self.url, self.split = index.url, index.split
        # The default strategy has to be named: else tasks stay within the cores that Ray Train reserves for its workers.
        self.task = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="DEFAULT")(decode)
        self.places: list[str] = []  # the address at which each video was decoded

    def __call__(self, function: Callable[[Index, R], T], request: R) -> T:
        try:
            decoded, place = ray.get(self.task.remote(function, self.url, self.split, request))
        except RayTaskError as error:
            raise error.cause from None
        if request.weight:  # not padding
            self.places.append(place)
        return decoded


def decode(function: Callable[[Index, R], T], url: str, split: str, request: R) -> tuple[T, str]:
    """The task: function(index, request) and the address of this machine."""
    return function(cached_index(url, split), request), ray.util.get_node_ip_address()


@lru_cache(maxsize=4)
def cached_index(url: str, split: str) -> Index:
    """The index of a split, the same for all tasks of a process."""
    return Index(url, split)


def decoders_of(total: int, index: Index) -> Decoders | None:
    """This rank's part of all decoders, at least one; None without decoders."""
    if not total:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Decoders(index, max(1, total // world_size + (rank < total % world_size)))


def check_decoders(total: int, workers: Workers) -> None:
    """Raises ValueError for a negative number, NoCluster if the workers leave no core to decode with."""
    if total < 0:
        raise ValueError(f"decoders {total}: expected at least 0 (0: the workers decode)")
    if not total:
        return
    start_ray()
    cores, taken = ray.cluster_resources().get("CPU", 0), workers.most * (workers.cpus_per_worker or 1)
    if cores < taken + 1:
        raise NoCluster(
            f"{total} decoders beside {workers.most} workers: the Ray cluster has {cores:g} cores, of which the workers take "
            f"{taken}; expected at least one more: use fewer workers, add machines, or leave --decoders out"
        )


def count_places(decoders: Decoders | None) -> dict[str, int] | None:
    """{address: number of videos decoded there}, over all ranks; None without decoders. Every rank must call it."""
    return None if decoders is None else dict(sorted(Counter(all_rows(decoders.places)).items()))


def format_places(places: dict[str, int] | None) -> str:
    """For an evaluation's last line: on which machines its videos were decoded, if tasks did it."""
    counts = ", ".join(f"{videos:,} on {address}" for address, videos in (places or {}).items())
    return f" (decoded {counts})" if counts else ""
