"""The driver: starts Ray Train workers, and starts them again after a loss, until they have done their work.

    run ──> as many workers as there are and may be ──> fit() ──> the result of rank 0
     ^                                                    │
     └── a worker or a node is lost, a node is about to leave, a node has joined

Ray Train itself would start again with any number of workers that it finds. Here that number must divide the global batch; a
node that is about to leave is left in time; and only failures in a row count, as a run of days on machines that come and go has
many in all.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Generic

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.workers.connect import NoCluster
from cluster.workers.context import Job, Result, WorkerFunction
from cluster.workers.event_queue import start_event_queue
from cluster.workers.events import FirstStep, Notice, Report, Saved, Stopped, Straggler, WorkerStarted
from cluster.workers.failures import TooManyFailures, describe_loss, first_cause, is_loss, name_worker
from cluster.workers.nodes import Nodes, needs
from cluster.workers.options import Workers
from cluster.workers.signals import Interrupted, Signals
from cluster.workers.worker import SECONDS_BETWEEN_POLLS, WorkerSetup, run_on_worker

SETTLE_SECONDS = 3.0  # after a loss: at most so long until the cluster knows what is left
GROW_SECONDS = 15.0  # a machine that joined must have stayed so long
STOP_SECONDS = 120.0  # for saving, after a signal
SECONDS_BETWEEN_COUNTS = 2.0  # of the cluster's machines


class Driver(Generic[Job, Result]):
    """Runs one job to its end."""

    def __init__(
        self,
        function: WorkerFunction[Job, Result],
        job: Job,
        options: Workers,
        listener: Report,
        is_allowed: Callable[[int], bool],
        signals: Signals,
    ):
        self.function, self.job, self.options, self.listener, self.signals = function, job, options, listener, signals
        self.sizes = options.sizes(is_allowed)
        self.use_gpus = options.gpus if options.gpus is not None else ray.cluster_resources().get("GPU", 0) > 0
        self.nodes = Nodes(needs(options.cpus_per_worker or 1, self.use_gpus))
        self.failures = 0  # since the last new checkpoint
        self.lost_at: float | None = None
        self.started: dict[int, WorkerStarted] = {}  # by rank
        self.count_at = 0.0  # when the cluster's machines are to be counted again

    def run(self) -> Result | Stopped:
        self.nodes.check_possible(self.sizes[-1])
        while True:
            size = self.wait_for_workers()
            try:
                result = self.attempt(size)
            except (TrainingFailedError, RayError) as error:
                self.count_failure(error)
                self.nodes.settle(SETTLE_SECONDS)
            else:
                if not isinstance(result, Stopped) or self.signals.number:
                    return result

    def wait_for_workers(self) -> int:
        """The number of workers to start now: the largest possible. Waits for the least number; raises NoCluster at last."""
        until = time.monotonic() + 60 * self.options.wait_minutes
        is_first = True
        while (size := self.nodes.largest(self.sizes)) is None:
            self.raise_if_interrupted()
            if time.monotonic() > until:
                raise NoCluster(
                    f"waited {self.options.wait_minutes:g} minutes for {self.sizes[-1]} workers of {self.nodes.needs_text()}; "
                    f"the Ray cluster has room for {self.nodes.room()}; add machines, ask for fewer workers, or wait longer "
                    "(--wait-minutes)"
                )
            if is_first:
                is_first = False
                self.notify(
                    f"waiting for machines: {self.sizes[-1]} workers of {self.nodes.needs_text()} are needed, the Ray cluster "
                    f"has room for {self.nodes.room()}"
                )
            time.sleep(1.0)
        return size

    def raise_if_interrupted(self) -> None:
        if self.signals.number:
            raise Interrupted(self.signals.number)

    def attempt(self, size: int) -> Result | Stopped:
        """Runs `size` workers until they are done, have stopped on request, or one is lost."""
        with TemporaryDirectory(prefix="grurcn-ray-") as folder:
            queue = start_event_queue()
            fit = FitThread(self.trainer(size, queue, folder))
            self.started, requested_at = {}, None
            grown = Persistence(GROW_SECONDS)
            while not fit.over.wait(SECONDS_BETWEEN_POLLS):
                self.handle_events(queue)
                if requested_at is None and (self.signals.number or self.is_resize_due(size, grown)):
                    queue.request_stop.remote()
                    requested_at = time.monotonic()
                if self.signals.number and time.monotonic() > max(self.signals.at, requested_at or 0) + STOP_SECONDS:
                    raise Interrupted(self.signals.number)
            self.handle_events(queue)
            ray.kill(queue)
        return fit.result()

    def is_resize_due(self, size: int, grown: "Persistence") -> bool:
        """Whether the workers should stop and start anew, as a node is about to leave or has joined; if so it is noted."""
        if not self.started or time.monotonic() < self.count_at:
            return False
        self.count_at = time.monotonic() + SECONDS_BETWEEN_COUNTS
        leaving = self.nodes.leaving({worker.node_id for worker in self.started.values()})
        if leaving:
            self.notify(f"{leaving} is about to be taken away: saving, then going on without it")
            return True
        larger = self.nodes.largest(self.sizes, ours=size) if len(self.sizes) > 1 else None
        if grown.reached(larger is not None and larger > size):
            self.notify(f"machines for {larger} workers have come: saving, then going on with them")
            return True
        return False

    def trainer(self, size: int, queue: Any, folder: str) -> TorchTrainer:
        threads = self.options.cpus_per_worker or 1
        setup = WorkerSetup(function=self.function, job=self.job, queue=queue, threads=threads)
        return TorchTrainer(
            # Not as Ray's train_loop_config, which its controller would unpickle, importing what the job is made of.
            partial(run_on_worker, setup),
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

    def handle_events(self, queue: Any) -> None:
        """Hands the workers' events on to the listener."""
        try:
            events = ray.get(queue.take.remote(), timeout=30)
        except RayError:
            return  # the cluster is going down; fit() says why
        for event in events:
            match event:
                case WorkerStarted(rank=rank):
                    self.started[rank] = event
                case Saved():
                    self.failures = 0
                case Straggler(rank=rank, description=description):
                    self.notify(f"warning: {name_worker(rank, self.started)} is slow: {description}")
                case FirstStep() if self.lost_at is not None:
                    self.notify(f"training again {time.monotonic() - self.lost_at:.0f} s after the loss was noted")
                    self.lost_at = None
                case _:
                    pass
            self.listener(event)

    def count_failure(self, error: TrainingFailedError | RayError) -> None:
        """Notes a loss. Raises what is no loss: a worker's own error, or one loss too many."""
        cause = first_cause(error)
        if not is_loss(cause):
            raise cause from None
        self.failures += 1
        self.lost_at = time.monotonic()
        lost = describe_loss(error, self.started)
        self.raise_if_interrupted()
        if self.failures > self.options.max_failures:
            raise TooManyFailures(
                f"workers were lost {self.failures} times in a row without a new checkpoint between, the last time: {lost}; "
                "run the same command again to go on, or allow more (--max-failures)"
            ) from None
        self.notify(f"lost {lost}; going on from the newest checkpoint")

    def notify(self, text: str) -> None:
        self.listener(Notice(text=text))


class FitThread:
    """trainer.fit() in a thread, so that this one can look after it; there Ray Train installs no signal handlers."""

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

    def result(self) -> Any:
        """What rank 0 returned. Raises what fit() raised."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


class Persistence:
    """Whether something has been true for some seconds without a break."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.since: float | None = None

    def reached(self, is_true: bool) -> bool:
        if not is_true:
            self.since = None
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since >= self.seconds
