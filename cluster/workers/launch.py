"""Runs a function on Ray Train workers, or in this process, and hands the events that they report to a listener.

    run_workers ──> Driver ──> worker processes ──> function(job, context) ──> the result of rank 0
                      ^                                     │
                      └────────── events (events.py) <──────┘

A worker function takes a job, which is the same on every worker, and a WorkerContext. What it raises reaches the caller as it
was raised. It is called again after each loss of a worker, so it must go on by itself from what it has saved. When a stop is
requested it saves, and returns Stopped.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from cluster.engine import start_world_of_one
from cluster.workers.connect import start_ray
from cluster.workers.context import Job, Result, WorkerContext, WorkerFunction
from cluster.workers.driver import Driver
from cluster.workers.events import Report, Stopped
from cluster.workers.options import Workers
from cluster.workers.signals import Interrupted, Signals
from cluster.workers.system_monitor import SystemMonitor


def run_workers(
    function: WorkerFunction[Job, Result],
    job: Job,
    options: Workers,
    listener: Report,
    is_allowed: Callable[[int], bool] = lambda _: True,
) -> Result:
    """Calls function(job, context) on every worker, and returns what rank 0 returned.

    listener: gets each event that a worker reports, and a Notice for each loss and each restart.
    is_allowed: whether a job may have this number of workers.

    Raises what a worker raised; NoCluster if the cluster lacks the CPUs or GPUs that are asked for; TooManyFailures; Interrupted
    after a SIGINT or SIGTERM, once the workers have saved. A second signal does not wait for them: KeyboardInterrupt.
    """
    if not options.in_process:
        start_ray()  # which takes SIGTERM for itself
    with Signals() as signals:
        if options.in_process:
            result = run_in_process(function, job, options, listener, signals)
        else:
            result = Driver(function, job, options, listener, is_allowed, signals).run()
    if isinstance(result, Stopped):
        raise Interrupted(signals.number)
    return result


def run_in_process(
    function: WorkerFunction[Job, Result], job: Job, options: Workers, listener: Report, signals: Signals
) -> Result | Stopped:
    """As the only worker, without Ray."""
    gpus = torch.cuda.is_available() if options.gpus is None else options.gpus
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    if options.cpus_per_worker:
        torch.set_num_threads(options.cpus_per_worker)
    if not dist.is_initialized():
        start_world_of_one(device)  # for the life of the process: DeepSpeed remembers the first one that it saw
    context = WorkerContext(
        device=device, rank=0, world_size=1, report=listener, stop_requested=lambda: signals.number > 0
    )
    with SystemMonitor(listener):
        return function(job, context)
