"""Facts about the machines of a Ray cluster, gathered by one actor on each machine.

    machines    each gathers its own facts (machine.py), all at the same time
    clocks      each sends its time; half of the time for request and answer is subtracted
    storage     each writes a file, and reads those of all others: a folder may look shared and not be
    groups      one process a machine forms a process group as training does, and adds up a tensor

The actors take no CPU and no GPU of the cluster, so that they run beside a training too. They end with this command.
"""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray._private import worker as ray_worker
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.doctor.facts import ClusterFacts, GroupResult, MachineFacts, Request
from jobs.doctor.machine import PREFIX, gather_machine, impatient
from shards.store import BadShards, BadUrl, error_line, open_store

START_SECONDS = 60.0  # for an actor to start
GATHER_SECONDS = 240.0
GROUP_SECONDS = 20.0  # for a group to form, and for each sum
ANSWER_SECONDS = 60.0
GROUP_FLOATS = 2**22  # of the tensor that measures the bandwidth: 16 MiB, as a bucket of gradients
GROUP_SUMS = 4
FEW_FLOATS, FEW_SECONDS = 2**16, 0.2  # of a smaller one before; if that takes longer, the larger one is left out


class Examiner:
    """An actor on one machine."""

    def __init__(self) -> None:
        self.address = ray.util.get_node_ip_address()

    def gather(self, request: Request) -> MachineFacts:
        return gather_machine(request, self.address, ray_folder())

    def time(self) -> float:
        return time.time()

    def write(self, request: Request, name: str) -> bool:
        """Writes this machine's file to the storage, if it can."""
        with suppress(BadShards, BadUrl, OSError), impatient():
            with open_store(request.storage).written(file_name(request, name)) as file:
                file.write(name.encode())
            return True
        return False

    def unseen(self, request: Request, names: Sequence[str]) -> list[str]:
        """Those of the files that cannot be read here, or are different here."""
        return [name for name in names if not self.sees(request, name)]

    def sees(self, request: Request, name: str) -> bool:
        with suppress(BadShards, BadUrl, OSError), impatient():
            return open_store(request.storage).read_file(file_name(request, name)) == name.encode()
        return False

    def clear(self, request: Request, names: Sequence[str]) -> None:
        with impatient():
            open_store(request.storage).delete([file_name(request, name) for name in names])

    def free_address(self) -> str:
        """HOST:PORT for a group to meet at, chosen as Ray Train does."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{self.address}:{probe.getsockname()[1]}"

    def join(self, backend: str, address: str, rank: int, world_size: int, seconds: float) -> GroupResult:
        """Forms a process group as a worker of a training does, and adds up tensors over it."""
        return join_group(backend, address, rank, world_size, seconds)


def join_group(backend: str, address: str, rank: int, world_size: int, seconds: float) -> GroupResult:
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        try:
            ranks = torch.tensor(float(rank), device=device)
            dist.all_reduce(ranks)
            if ranks.item() != world_size * (world_size - 1) / 2:
                return GroupResult(error=f"the sum of {world_size} ranks is {ranks.item():g}, which is wrong")
            rate = bytes_per_second(FEW_FLOATS, 1, device)
            if rate > 4 * FEW_FLOATS / FEW_SECONDS:  # the same on all ranks: the slowest one's
                rate = bytes_per_second(GROUP_FLOATS, GROUP_SUMS, device)
        finally:
            dist.destroy_process_group()
    except Exception as error:  # gloo and NCCL raise many kinds
        return GroupResult(error=error_line(error))
    return GroupResult(bytes_per_second=rate)


def bytes_per_second(num_floats: int, times: int, device: torch.device) -> float:
    """Bandwidth of adding up a tensor over all processes: the slowest one's, on each of them."""
    tensor = torch.ones(num_floats, device=device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor)
    tensor[0].item()  # waits for a GPU
    taken = torch.tensor((time.perf_counter() - started) / times, device=device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return 4 * num_floats / taken.item()


def file_name(request: Request, name: str) -> str:
    return f"{PREFIX}{request.marker}-{name}"


def ray_folder() -> str:
    """The folder of Ray's sockets, logs and objects beyond memory."""
    node: Any = ray_worker._global_node
    return node.get_session_dir_path() if node else "/tmp/ray"


def gather_cluster(request: Request, report: Callable[[str], None]) -> tuple[list[MachineFacts], ClusterFacts]:
    """Asks every living machine of the cluster that this process is connected to. report: gets what is done now."""
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    names = names_of_nodes(nodes)
    unanswered: dict[str, str] = {}
    report(f"starting a process on each of {len(nodes)} machines")
    actors: dict[str, Any] = {
        name: ray.remote(Examiner)
        .options(
            num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        )
        .remote()
        for name, node in zip(names, nodes, strict=True)
    }
    try:
        # A first answer that needs nothing, so that the start of an actor does not count in what follows.
        answers(actors, lambda _, actor: actor.time.remote(), START_SECONDS, unanswered)
        offsets, errors = compare_clocks(actors, unanswered)
        report(f"examining {len(actors)} machines: packages, token, GPUs, DeepSpeed, disks, shards")
        facts = answers(actors, lambda _, actor: actor.gather.remote(request), GATHER_SECONDS, unanswered)
        report("writing to the storage on each machine, and reading it on the others")
        unseen = exchange_files(request, actors, unanswered)
        groups = {}
        if len(actors) > 1:
            for backend in backends(list(facts.values())):
                report(f"forming a process group over {len(actors)} machines ({backend})")
                groups[backend] = form_group(backend, actors)
    finally:
        for actor in actors.values():
            ray.kill(actor)
    cluster = ClusterFacts(
        unanswered=unanswered,
        clock_offsets=offsets,
        clock_errors=errors,
        unseen_files=unseen,
        groups=groups,
        dashboard=ray_worker.get_dashboard_url() or None,
    )
    return [replace(facts[name], name=name) for name in names if name in facts], cluster


def names_of_nodes(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each machine: its host name and address, and the node's id where several are on one host."""
    names = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    return [
        name if names.count(name) == 1 else f"{name[:-1]}, node {node['NodeID'][:6]})"
        for name, node in zip(names, nodes, strict=True)
    ]


def backends(machines: Sequence[MachineFacts]) -> list[str]:
    """The backends of a training: always gloo (DeepSpeed and Ray Train on CPUs), and NCCL if every machine has a GPU."""
    return ["gloo", "nccl"] if machines and all(facts.devices.gpus for facts in machines) else ["gloo"]


def answers(
    actors: dict[str, Any], ask: Callable[[str, Any], Any], seconds: float, unanswered: dict[str, str]
) -> dict[str, Any]:
    """Each actor's answer. Actors without one move from `actors` to `unanswered`, with the reason."""
    asked = {name: ask(name, actor) for name, actor in actors.items()}
    until, found = time.monotonic() + seconds, {}
    for name, reference in asked.items():
        try:
            found[name] = ray.get(reference, timeout=max(0.1, until - time.monotonic()))
        except GetTimeoutError:
            unanswered[name] = f"no answer within {seconds:g} s"
        except RayError as error:
            unanswered[name] = last_line(error)
    for name in asked.keys() & unanswered.keys():
        ray.kill(actors.pop(name))
    return found


def last_line(error: RayError) -> str:
    """The last line of an error, where Ray puts what an actor raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def compare_clocks(actors: dict[str, Any], unanswered: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds that each clock is ahead of this one, the possible error: half of the fastest request and answer)"""
    offsets, errors = {}, {}
    for name in list(actors):
        tries = []
        for _ in range(3):
            before = time.time()
            there = answers({name: actors[name]}, lambda _, actor: actor.time.remote(), ANSWER_SECONDS, unanswered).get(
                name
            )
            after = time.time()
            if there is None:
                actors.pop(name)
                break
            tries.append(((after - before) / 2, there - (before + after) / 2))
        else:
            errors[name], offsets[name] = min(tries)
    return offsets, errors


def exchange_files(request: Request, actors: dict[str, Any], unanswered: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """{machine: machines whose files in the storage it does not see}. All files are deleted again."""
    files = {name: f"machine-{number}" for number, name in enumerate(actors)}
    names = {file: name for name, file in files.items()}
    written = answers(actors, lambda name, actor: actor.write.remote(request, files[name]), ANSWER_SECONDS, unanswered)
    there = [files[name] for name, is_written in written.items() if is_written]
    try:
        found = answers(actors, lambda _, actor: actor.unseen.remote(request, there), ANSWER_SECONDS, unanswered)
    finally:  # on each machine, as the folder may not be shared
        cleared = [actor.clear.remote(request, list(names)) for actor in actors.values()]
        ray.wait(cleared, num_returns=len(cleared), timeout=ANSWER_SECONDS)
    return {name: tuple(names[file] for file in missing) for name, missing in found.items() if missing}


def form_group(backend: str, actors: dict[str, Any]) -> dict[str, GroupResult]:
    """Each process's result. A process that does not answer waits for others that have failed."""
    address = ray.get(next(iter(actors.values())).free_address.remote(), timeout=ANSWER_SECONDS)
    ranks, unanswered = {name: rank for rank, name in enumerate(actors)}, {}
    joined = answers(
        dict(actors),
        lambda name, actor: actor.join.remote(backend, address, ranks[name], len(ranks), GROUP_SECONDS),
        3 * GROUP_SECONDS,
        unanswered,
    )
    return {**joined, **{name: GroupResult(error=why) for name, why in unanswered.items()}}
