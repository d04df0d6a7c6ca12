"""The side of a Ray Train worker: it calls the worker function, and watches for the driver's request to stop."""

import os
import socket
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train.torch import get_device

from cluster.workers.context import WorkerContext
from cluster.workers.events import Event, WorkerStarted
from cluster.workers.system_monitor import SystemMonitor

SECONDS_BETWEEN_POLLS = 0.25


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What the driver sends to each worker."""

    function: Any  # a WorkerFunction
    job: Any
    queue: Any  # the actor of an EventQueue
    threads: int


def run_on_worker(setup: WorkerSetup) -> Any:
    """Calls the worker function in a Ray Train worker, where the process group exists already, and returns its result."""
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(setup.threads)

    def report(event: Event) -> None:
        setup.queue.put.remote(event)

    node_id = ray.get_runtime_context().get_node_id()
    report(WorkerStarted(rank=dist.get_rank(), node_id=node_id, host=own_address(), pid=os.getpid()))
    with StopWatcher(setup.queue) as stop, SystemMonitor(report) if is_first_on_host() else nullcontext():
        context = WorkerContext(
            device=device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            report=report,
            stop_requested=stop.is_requested,
        )
        return setup.function(setup.job, context)


def is_first_on_host() -> bool:
    """Whether this is the first of its machine's workers."""
    return ray.train.get_context().get_local_rank() == 0


def own_address() -> str:
    """This machine's name and address."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


class StopWatcher:
    """Asks the event queue now and then, in a thread of rank 0, whether the driver has requested a stop."""

    def __init__(self, queue: Any):
        self.queue = queue
        self.requested, self.closed = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.poll, name="stop-watcher", daemon=True)

    def __enter__(self) -> "StopWatcher":
        if dist.get_rank() == 0:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()

    def is_requested(self) -> bool:
        return self.requested.is_set()

    def poll(self) -> None:
        while not self.closed.wait(SECONDS_BETWEEN_POLLS):
            try:
                if ray.get(self.queue.stop_requested.remote(), timeout=30):
                    self.requested.set()
                    return
            except RayError:
                continue  # slow, or gone with the driver, and then Ray ends this worker too
