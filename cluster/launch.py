"""Runs a function on N Ray Train workers, or in this process, and hands its news to the terminal that waits.

A worker function takes one dictionary (the job), to which this file adds "device", "tell" (news for the terminal) and
"report_checkpoint"; it finds its rank in torch.distributed and gives back a dictionary, of which rank 0's reaches the
caller. What it raises reaches the caller as it was raised.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connect import NoCluster, start_ray
from cluster.engine import start_world_of_one

News = dict[str, Any]
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, kw_only=True)
class Workers:
    """On what a job runs."""

    workers: int = 0
    """Ray Train workers; 0 runs in this process, without Ray."""
    cpus_per_worker: int | None = None
    """CPU cores that each worker computes with. Default: 1, or all of them in this process. With 1, a resumed run on
    CPUs repeats every bit; several threads add up some gradients in the order in which they finish."""
    gpus: bool | None = None
    """One GPU for each worker. Default: if there are any."""

    def __post_init__(self) -> None:
        if self.workers < 0 or (self.cpus_per_worker is not None and self.cpus_per_worker < 1):
            raise ValueError(
                f"workers {self.workers}, cpus_per_worker {self.cpus_per_worker}: wanted at least 0 and at least 1"
            )

    @property
    def world_size(self) -> int:
        return max(1, self.workers)


def run_workers(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    job: dict[str, Any],
    options: Workers,
    storage: Path,
    name: str,
    listen: Callable[[News], None],
) -> dict[str, Any]:
    """function(job) on every worker; gives back what rank 0 gave back. `listen` gets what workers tell, as it comes.

    Raises what a worker raised, or NoCluster if the cluster lacks the CPUs or GPUs that are asked for.
    """
    if options.workers == 0:
        return run_here(function, {**job, "tell": listen}, options)
    start_ray()
    gpus = options.gpus if options.gpus is not None else ray.cluster_resources().get("GPU", 0) > 0
    check_resources(options, gpus)
    mailbox = new_mailbox()
    trainer = TorchTrainer(
        run_on_worker,
        train_loop_config={
            "function": function,
            "job": job,
            "mailbox": mailbox,
            "threads": options.cpus_per_worker or 1,
        },
        scaling_config=ScalingConfig(
            num_workers=options.workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": options.cpus_per_worker or 1, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            storage_path=str(storage.absolute()),
            name=name,
            logging_config=LoggingConfig(log_level="CRITICAL"),  # what fails is raised, in one piece
        ),
    )
    with Listener(mailbox, listen), same_ctrl_c_after():
        try:
            result = trainer.fit().return_value
        except WorkerGroupError as error:
            raise first_cause(error) from None
        except SystemExit:  # Ray's own answer to Ctrl-C, once it has stopped the workers
            raise KeyboardInterrupt from None
    assert result is not None
    return result


@contextmanager
def same_ctrl_c_after() -> Iterator[None]:
    """Ray Train answers Ctrl-C for good: after its run the handler would call for a controller that is no more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_here(
    function: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any], options: Workers
) -> dict[str, Any]:
    """In this process, as a world of one."""
    gpus = torch.cuda.is_available() if options.gpus is None else options.gpus
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    if options.cpus_per_worker:
        torch.set_num_threads(options.cpus_per_worker)
    if not dist.is_initialized():
        start_world_of_one(device)  # for the life of the process: DeepSpeed remembers the first one that it saw
    return function({**job, "device": device, "report_checkpoint": lambda *_: None})


def run_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """On a Ray Train worker, in whose thread the process group is there already."""
    mailbox = config["mailbox"]
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    tell = lambda news: mailbox.put.remote(news)  # noqa: E731
    return config["function"]({**config["job"], "device": device, "tell": tell, "report_checkpoint": report_checkpoint})


def report_checkpoint(folder: Path, metrics: dict[str, Any]) -> None:
    """Registers a checkpoint that lies in the run's folder already with Ray Train. Every rank calls it."""
    checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if dist.get_rank() == 0 else None
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_fn=lambda checkpoint, _: checkpoint)


def check_resources(options: Workers, gpus: bool) -> None:
    """Ray would wait for ever for a machine that may never come."""
    found = ray.cluster_resources()
    wanted = {"CPU": options.workers * (options.cpus_per_worker or 1), "GPU": options.workers if gpus else 0}
    for kind, count in wanted.items():
        if found.get(kind, 0) < count:
            raise NoCluster(
                f"{options.workers} workers want {count} {kind}s, the Ray cluster has {found.get(kind, 0):g}; "
                "ask for fewer workers or add machines"
            )


def first_cause(error: WorkerGroupError) -> BaseException:
    """What a worker raised that says why; the others may have failed only because it was gone."""
    failures = list(error.worker_failures.values())
    return next((failure for failure in failures if isinstance(failure, ValueError | OSError)), failures[0])


class Mailbox:
    """An actor that keeps what workers tell until the driver asks. Workers do not wait for it, nor fail without it."""

    def __init__(self) -> None:
        self.news: list[News] = []

    def put(self, news: News) -> None:
        self.news.append(news)

    def take(self) -> list[News]:
        taken, self.news = self.news, []
        return taken


def new_mailbox() -> Any:
    """On the driver's own machine, so that losing another one does not silence the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()


class Listener:
    """A thread that hands the mailbox's news to `listen` until the block ends, the last of it included."""

    def __init__(self, mailbox: Any, listen: Callable[[News], None]):
        self.mailbox, self.listen = mailbox, listen
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, name="listener", daemon=True)

    def __enter__(self) -> "Listener":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join(timeout=10)

    def look(self) -> None:
        while True:
            last_look = self.over.wait(SECONDS_BETWEEN_LOOKS)
            try:
                for news in ray.get(self.mailbox.take.remote()):
                    self.listen(news)
            except RayError:
                return  # the cluster is going down; fit() says why
            if last_look:
                return
