"""Runs a function on Ray Train workers, whatever dies on the way, or in this process; hands its news to the terminal that waits.

    run_workers ──> as many workers as there are and may be ──> fit() ──> what rank 0 gave back
         ^                                                        │
         └── a worker or a node is lost, a node is to go, one has come ──┘

A worker function takes one dictionary (the job), to which this file adds "device", "tell" (news for the terminal) and
"stop_wanted" (whether it should save, and give back {"stopped": ...}); it finds its rank in torch.distributed and gives back a
dictionary, of which rank 0's reaches the caller. What it raises reaches the caller as it was raised. It must go on by itself
from what it has saved: it is called again after each loss.

Ray Train itself would start again with any number of workers that it finds. Here that number must divide the global batch; a
node that is about to go is left in time; and only failures in a row count, as a run of days on machines that come and go has
many in all.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster.engine import start_world_of_one
from cluster.workers.connect import NoCluster, start_ray
from cluster.workers.messages import News, new_mailbox
from cluster.workers.nodes import Nodes, needs
from cluster.workers.system_monitor import SystemMonitor

Function = Callable[[dict[str, Any]], dict[str, Any]]
SECONDS_BETWEEN_LOOKS = 0.25
SETTLE_SECONDS = 3.0  # after a loss: so long until the cluster knows what is left
GROW_SECONDS = 15.0  # a machine that came must have stayed so long
STOP_SECONDS = 120.0  # for saving, after a signal
SECONDS_BETWEEN_COUNTS = 2.0  # of the cluster's machines
# What gloo, NCCL and CUDA say, as RuntimeErrors, of a peer or a device that is gone.
BROKEN = re.compile(r"gloo|NCCL|CUDA error|connection|socket|timed? ?out|broken pipe", re.IGNORECASE)


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal, with all saved that was done."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class TooManyFailures(OSError):
    """Workers were lost again and again, and no new checkpoint came."""


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
    def here(self) -> bool:
        """In this process, without Ray."""
        return self.most == 0

    def sizes(self, is_allowed: Callable[[int], bool]) -> list[int]:
        """The numbers of workers that a job may have, the largest first."""
        return [size for size in range(max(1, self.most), max(1, self.least) - 1, -1) if is_allowed(size)]


def run_workers(
    function: Function,
    job: dict[str, Any],
    options: Workers,
    listen: Callable[[News], None],
    is_allowed: Callable[[int], bool] = lambda _: True,
) -> dict[str, Any]:
    """function(job) on every worker; gives back what rank 0 gave back. `listen` gets what workers tell, as it comes, and
    {"event": ...} for each loss and each restart.

    is_allowed: whether a job may have so many workers. Raises what a worker raised; NoCluster if the cluster lacks the CPUs
    or GPUs that are asked for; TooManyFailures; Interrupted after a SIGINT or SIGTERM, once the workers have saved. A second
    signal does not wait for them: KeyboardInterrupt.
    """
    if not options.here:
        start_ray()  # which takes SIGTERM for itself
    with Signals() as signals:
        if options.here:
            result = run_here(function, {**job, "tell": listen, "stop_wanted": lambda: signals.number > 0}, options)
        else:
            result = Driver(function, job, options, listen, is_allowed, signals).run()
    if "stopped" in result:
        raise Interrupted(signals.number)
    return result


def run_here(function: Function, job: dict[str, Any], options: Workers) -> dict[str, Any]:
    """In this process, as a world of one."""
    gpus = torch.cuda.is_available() if options.gpus is None else options.gpus
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    if options.cpus_per_worker:
        torch.set_num_threads(options.cpus_per_worker)
    if not dist.is_initialized():
        start_world_of_one(device)  # for the life of the process: DeepSpeed remembers the first one that it saw
    with SystemMonitor(job["tell"]):
        return function({**job, "device": device})


class Signals:
    """While the block runs, a first SIGINT or SIGTERM is only noted, so that work can end well; a second one interrupts."""

    def __init__(self) -> None:
        self.number = 0
        self.at = 0.0

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in a shell's background
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number, self.at = number, time.monotonic()


# The driver's side


class Driver:
    """Starts workers, and starts them again, until they have done their work."""

    def __init__(
        self,
        function: Function,
        job: dict[str, Any],
        options: Workers,
        listen: Callable[[News], None],
        is_allowed: Callable[[int], bool],
        signals: Signals,
    ):
        self.function, self.job, self.options, self.listen, self.signals = function, job, options, listen, signals
        self.sizes = options.sizes(is_allowed)
        self.use_gpus = options.gpus if options.gpus is not None else ray.cluster_resources().get("GPU", 0) > 0
        self.nodes = Nodes(needs(options.cpus_per_worker or 1, self.use_gpus))
        self.failures = 0  # since the last new checkpoint
        self.lost_at: float | None = None
        self.where: dict[int, News] = {}  # rank -> host, node, process
        self.count_at = 0.0  # when the cluster's machines are to be counted again

    def run(self) -> dict[str, Any]:
        self.nodes.check_possible(self.sizes[-1])
        while True:
            size = self.wait_for_workers()
            try:
                result = self.attempt(size)
            except (TrainingFailedError, RayError) as error:
                self.count(error)
                self.nodes.settle(SETTLE_SECONDS)
            else:
                if "stopped" not in result or self.signals.number:
                    return result

    def wait_for_workers(self) -> int:
        """How many workers to start now: the most that there are. Waits for the least number; raises NoCluster at last."""
        until = time.monotonic() + 60 * self.options.wait_minutes
        said = False
        while (size := self.nodes.largest(self.sizes)) is None:
            self.stop_if_wanted()
            if time.monotonic() > until:
                raise NoCluster(
                    f"waited {self.options.wait_minutes:g} minutes for {self.sizes[-1]} workers of {self.nodes.wanted()}; the "
                    f"Ray cluster has room for {self.nodes.room()}; add machines, ask for fewer workers, or wait longer "
                    "(--wait-minutes)"
                )
            if not said:
                said = True
                self.tell_event(
                    f"waiting for machines: {self.sizes[-1]} workers of {self.nodes.wanted()} are needed, the Ray cluster has "
                    f"room for {self.nodes.room()}"
                )
            time.sleep(1.0)
        return size

    def stop_if_wanted(self) -> None:
        if self.signals.number:
            raise Interrupted(self.signals.number)

    def attempt(self, size: int) -> dict[str, Any]:
        """Runs `size` workers until they are done, have been asked to stop, or one is lost."""
        with TemporaryDirectory(prefix="grurcn-ray-") as folder:
            mailbox = new_mailbox()
            fit = Fit(self.trainer(size, mailbox, folder))
            self.where, asked_at = {}, None
            grown = Patience(GROW_SECONDS)
            while not fit.over.wait(SECONDS_BETWEEN_LOOKS):
                self.hear(mailbox)
                if asked_at is None and (why := self.why_stop(size, grown)):
                    if why != "signal":
                        self.tell_event(why)
                    mailbox.ask.remote()
                    asked_at = time.monotonic()
                if self.signals.number and time.monotonic() > max(self.signals.at, asked_at or 0) + STOP_SECONDS:
                    raise Interrupted(self.signals.number)
            self.hear(mailbox)
            ray.kill(mailbox)
        return fit.result()

    def why_stop(self, size: int, grown: "Patience") -> str | None:
        """Why the workers should save and stop now: a signal, a node that is about to go, or one that has come."""
        if self.signals.number:
            return "signal"
        if not self.where or time.monotonic() < self.count_at:
            return None
        self.count_at = time.monotonic() + SECONDS_BETWEEN_COUNTS
        leaving = self.nodes.leaving({about["node"] for about in self.where.values()})
        if leaving:
            return f"{leaving} is about to be taken away: saving, then going on without it"
        larger = self.nodes.largest(self.sizes, ours=size) if len(self.sizes) > 1 else None
        if grown.over(larger is not None and larger > size):
            return f"machines for {larger} workers have come: saving, then going on with them"
        return None

    def trainer(self, size: int, mailbox: Any, folder: str) -> TorchTrainer:
        return TorchTrainer(
            run_on_worker,
            train_loop_config={
                "function": self.function,
                "job": self.job,
                "mailbox": mailbox,
                "threads": self.options.cpus_per_worker or 1,
            },
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=self.use_gpus, resources_per_worker=self.nodes.needs
            ),
            torch_config=TorchConfig(timeout_s=round(60 * self.options.timeout_minutes)),
            run_config=RunConfig(
                storage_path=folder,  # for Ray's own notes, of no use afterwards: checkpoints are the run's folder's
                name="run",
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="CRITICAL"),  # what fails is raised, in one piece
            ),
        )

    def hear(self, mailbox: Any) -> None:
        """Hands on what the workers have told."""
        try:
            news = ray.get(mailbox.take.remote(), timeout=30)
        except RayError:
            return  # the cluster is going down; fit() says why
        for each in news:
            if "worker" in each:
                self.where[each["worker"]] = each
            elif "saved" in each:
                self.failures = 0
            elif "slow" in each:
                self.tell_event(f"warning: {self.worker(each['slow'])} is slow: {each['about']}")
            if "done" in each and self.lost_at is not None:
                self.tell_event(f"training again {time.monotonic() - self.lost_at:.0f} s after the loss was noted")
                self.lost_at = None
            self.listen(each)

    def count(self, error: TrainingFailedError | RayError) -> None:
        """Tells of a loss, or raises what is no loss: a worker's own error, or one loss too many."""
        cause = first_cause(error)
        if not is_loss(cause):
            raise cause from None
        self.failures += 1
        self.lost_at = time.monotonic()
        told = self.name_of(error)
        self.stop_if_wanted()
        if self.failures > self.options.max_failures:
            raise TooManyFailures(
                f"workers were lost {self.failures} times in a row without a new checkpoint between, the last time: {told}; "
                "run the same command again to go on, or allow more (--max-failures)"
            ) from None
        self.tell_event(f"lost {told}; going on from the newest checkpoint")

    def name_of(self, error: TrainingFailedError | RayError) -> str:
        """Who was lost, and what is known of why: the worker that died, not those that only lost touch with it."""
        failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        told = first_line(first_cause(error))
        dead = [rank for rank, failure in failures.items() if isinstance(failure, RayError | RayTrainError)]
        if dead:
            told = first_line(failures[dead[0]])
        lost = dead or self.missed(failures, told) or list(failures)
        return f"{', '.join(map(self.worker, sorted(lost)))}: {told}" if lost else f"the workers ({told})"

    def missed(self, failures: dict[int, Exception], told: str) -> list[int]:
        """The workers at the addresses of which others tell that a connection broke, as gloo writes them: [10.0.0.2]:4711.

        When a machine dies, its workers' neighbours note it before Ray does.
        """
        peers = re.findall(r"\[([\da-f.:]+)\]:\d+", told)
        silent = {rank: about["host"] for rank, about in self.where.items() if rank not in failures}
        return [rank for rank, host in silent.items() if any(f"({peer})" in host for peer in peers)]

    def worker(self, rank: int) -> str:
        """A worker in words."""
        about = self.where.get(rank)
        return f"worker {rank} on {about['host']}, process {about['pid']}" if about else f"worker {rank}"

    def tell_event(self, text: str) -> None:
        self.listen({"event": text, "line": text})


class Fit:
    """trainer.fit() in a thread, so that this one can look after it; and Ray Train takes no signal for itself there."""

    def __init__(self, trainer: TorchTrainer):
        self.over = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        threading.Thread(target=self.run, args=(trainer,), name="fit", daemon=True).start()

    def run(self, trainer: TorchTrainer) -> None:
        try:
            self.value = trainer.fit().return_value
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    def result(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


class Patience:
    """Whether something has been so for some seconds, without a break."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.since: float | None = None

    def over(self, is_so: bool) -> bool:
        if not is_so:
            self.since = None
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since >= self.seconds


def first_cause(error: BaseException) -> BaseException:
    """What a worker raised that says why; the others may have failed only because it was gone."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    if not isinstance(error, WorkerGroupError):
        return error
    failures = list(error.worker_failures.values())
    own = [failure for failure in failures if not is_loss(failure)]
    return next((failure for failure in own if isinstance(failure, ValueError | OSError)), (own or failures)[0])


def is_loss(error: BaseException) -> bool:
    """Whether starting again may help: a process or machine that is gone, a connection that broke or timed out."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, RayError | RayTrainError | torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(BROKEN.search(str(error)))  # others are faults of ours


def first_line(error: BaseException) -> str:
    """An error in words: what Ray says of how a process ended, or the first line of any other."""
    error = getattr(error, "health_check_failure", error)  # what Ray wraps says more
    told = re.search(r"because its (node has died)|Worker exit detail: ([^\n.]+)", str(error))
    if told:
        return told[1] or told[2]
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # gloo begins with the place in its source, and ends with a guess
    said = re.sub(r"^\[\S+:\d+\] ", "", lines[0]).partition(". This is typically ")[0]
    return f"{type(error).__name__}: {said}"


# The workers' side


def run_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """On a Ray Train worker, in whose thread the process group is there already."""
    mailbox = config["mailbox"]
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    tell = lambda news: mailbox.put.remote(news)  # noqa: E731
    context = ray.get_runtime_context()
    tell({"worker": dist.get_rank(), "node": context.get_node_id(), "host": own_address(), "pid": os.getpid()})
    with Ear(mailbox) as ear, SystemMonitor(tell) if is_first_here() else nullcontext():
        return config["function"]({**config["job"], "device": device, "tell": tell, "stop_wanted": ear.stop_wanted})


def is_first_here() -> bool:
    """Whether this is the first of its machine's workers."""
    return ray.train.get_context().get_local_rank() == 0


def own_address() -> str:
    """This machine's name and address, as its owner knows it."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


class Ear:
    """Asks the mailbox now and then, in a thread, whether the driver wants the worker to stop; rank 0 has one that listens."""

    def __init__(self, mailbox: Any):
        self.mailbox = mailbox
        self.heard, self.over = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.listen, name="ear", daemon=True)

    def __enter__(self) -> "Ear":
        if dist.get_rank() == 0:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def stop_wanted(self) -> bool:
        return self.heard.is_set()

    def listen(self) -> None:
        while not self.over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                if ray.get(self.mailbox.asked.remote(), timeout=30):
                    self.heard.set()
                    return
            except RayError:
                continue  # slow, or gone with the driver, and then Ray ends this worker too
