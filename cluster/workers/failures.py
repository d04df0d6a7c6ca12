"""Errors of workers: which is the cause, whether another attempt may help, and how they are named."""

import re
from collections.abc import Mapping

import torch
import torch.distributed
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster.workers.events import WorkerStarted

# What gloo, NCCL and CUDA say, as RuntimeErrors, of a peer or a device that is gone.
LOST_CONNECTION = re.compile(r"gloo|NCCL|CUDA error|connection|socket|timed? ?out|broken pipe", re.IGNORECASE)


class TooManyFailures(OSError):
    """Workers were lost again and again, and no new checkpoint came."""


def first_cause(error: BaseException) -> BaseException:
    """The worker's error that says why; the others may have failed only because that worker was gone."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    if not isinstance(error, WorkerGroupError):
        return error
    failures = list(error.worker_failures.values())
    own = [failure for failure in failures if not is_loss(failure)]
    return next((failure for failure in own if isinstance(failure, ValueError | OSError)), (own or failures)[0])


def is_loss(error: BaseException) -> bool:
    """Whether another attempt may help: a process or machine is gone, or a connection broke or timed out."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, RayError | RayTrainError | torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(LOST_CONNECTION.search(str(error)))  # others are faults of ours


def describe_loss(error: TrainingFailedError | RayError, started: Mapping[int, WorkerStarted]) -> str:
    """Which workers were lost, and why: those that died, not those that only lost the connection to them."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    reason = describe_error(first_cause(error))
    dead = [rank for rank, failure in failures.items() if isinstance(failure, RayError | RayTrainError)]
    if dead:
        reason = describe_error(failures[dead[0]])
    lost = dead or silent_peers(failures, reason, started) or list(failures)
    return (
        f"{', '.join(name_worker(rank, started) for rank in sorted(lost))}: {reason}"
        if lost
        else f"the workers ({reason})"
    )


def silent_peers(failures: Mapping[int, Exception], reason: str, started: Mapping[int, WorkerStarted]) -> list[int]:
    """The workers at the addresses to which others lost their connection, as gloo writes them: [10.0.0.2]:4711.

    When a machine dies, its workers' neighbours notice it before Ray does.
    """
    peers = re.findall(r"\[([\da-f.:]+)\]:\d+", reason)
    silent = {rank: worker.host for rank, worker in started.items() if rank not in failures}
    return [rank for rank, host in silent.items() if any(f"({peer})" in host for peer in peers)]


def name_worker(rank: int, started: Mapping[int, WorkerStarted]) -> str:
    """worker 3 on node7 (10.0.0.7), process 4711"""
    worker = started.get(rank)
    return f"worker {rank} on {worker.host}, process {worker.pid}" if worker else f"worker {rank}"


def describe_error(error: BaseException) -> str:
    """A worker's error in a line: what Ray says of how the process ended, or the first line of any other error."""
    error = getattr(error, "health_check_failure", error)  # what Ray wraps says more
    ended = re.search(r"because its (node has died)|Worker exit detail: ([^\n.]+)", str(error))
    if ended:
        return ended[1] or ended[2]
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # gloo begins with the place in its source, and ends with a guess
    line = re.sub(r"^\[\S+:\d+\] ", "", lines[0]).partition(". This is typically ")[0]
    return f"{type(error).__name__}: {line}"
