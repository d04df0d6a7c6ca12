"""The same work for each shard: in this process, or as Ray tasks that yield results as they go."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayTaskError

from cluster.workers.connect import start_ray

T = TypeVar("T")


def has_gpus() -> bool:
    """Whether the Ray cluster has any."""
    start_ray()
    return ray.cluster_resources().get("GPU", 0) > 0


def run_tasks(
    function: Callable[..., Iterator[T]], arguments: Sequence[tuple[Any, ...]], workers: int | None, num_gpus: int = 0
) -> Iterator[T]:
    """Yields what function(*each of the arguments) yields, as it comes.

    workers: Ray tasks at the same time; None: one per core of the cluster, or one per GPU if each task has num_gpus of
    them; 0: one after the other in this process.

    Raises what a task raised; the others are cancelled then, as when the reader stops.
    """
    if workers == 0:
        for each in arguments:
            yield from function(*each)
        return
    start_ray()
    # A task whose machine is lost is done again on another one.
    task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(function)
    limit = workers or int(ray.cluster_resources().get("GPU" if num_gpus else "CPU", 1))
    waiting, running = list(reversed(arguments)), set[Any]()
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                running.add(task.remote(*waiting.pop()))
            ready: Any = ray.wait(list(running), num_returns=1, fetch_local=False)[0][0]
            try:
                yield cast(T, ray.get(next(ready)))
            except StopIteration:
                running.discard(ready)
            except RayTaskError as error:
                raise error.cause from None
    finally:
        for stream in running:
            ray.cancel(stream)
