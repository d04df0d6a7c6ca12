"""What only several machines together can show: one actor on each machine of a Ray cluster, pinned there.

    gather      each tells its facts (doctor_machine.py), all at the same time
    clocks      each tells its time; the half of the way there and back is taken off
    storage     each writes a file, and each reads those of all others: a folder that only looks shared is found out
    group       one process a machine forms a process group as training does, and adds up a tensor over it

The actors take no CPU and no GPU of the cluster, so that they also run beside a training, and end with this command.
"""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray._private import worker as ray_worker
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.doctor.machine import MARK, Facts, Order, gather, impatient, words
from shards.store import BadShards, BadUrl, NoFile, open_store

START_SECONDS = 60.0  # for an actor on a machine that is alive
GATHER_SECONDS = 240.0
GROUP_SECONDS = 20.0  # until a group must have formed, and until a sum must be there
ANSWER_SECONDS = 60.0
GROUP_FLOATS = 2**22  # of the tensor that is added up for the bandwidth: 16 MiB, as a bucket of gradients
GROUP_SUMS = 4
FEW_FLOATS, FEW_SECONDS = 2**16, 0.2  # a smaller one before; if it takes longer than this, the larger one is left out


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a process saw of the group."""

    error: str | None = None
    bytes_per_second: float = 0.0  # of the tensor's, until its sum is everywhere


@dataclass(frozen=True, kw_only=True)
class Together:
    """What several machines showed. Keys are machines, by name."""

    silent: dict[str, str]  # alive for Ray, and no answer: why
    clocks: dict[str, float]  # seconds that a clock is ahead of this command's
    clocks_within: dict[str, float]  # seconds that this may be wrong by
    unseen: dict[str, tuple[str, ...]]  # whose files in the storage a machine does not see
    groups: dict[str, dict[str, Joined]]  # backend -> what each process saw
    dashboard: str | None = None  # HOST:PORT


class Examiner:
    """Runs on one machine, in a process of its own."""

    def __init__(self) -> None:
        self.address = ray.util.get_node_ip_address()

    def gather(self, order: Order) -> Facts:
        return gather(order, self.address, ray_folder())

    def time(self) -> float:
        return time.time()

    def write(self, order: Order, name: str) -> str | None:
        """Writes this machine's file; why it could not, or None."""
        try:
            with impatient(), open_store(order.storage).written(mark_of(order, name)) as file:
                file.write(name.encode())
        except (BadShards, BadUrl, OSError) as error:
            return words(error)
        return None

    def unseen(self, order: Order, names: Sequence[str]) -> list[str]:
        """Of which machines the file is not there, or another one."""
        missing = []
        for name in names:
            try:
                with impatient():
                    if open_store(order.storage).read_file(mark_of(order, name)) != name.encode():
                        missing.append(name)
            except NoFile:
                missing.append(name)
            except (BadShards, BadUrl, OSError):
                missing.append(name)
        return missing

    def clear(self, order: Order, names: Sequence[str]) -> None:
        with impatient():
            open_store(order.storage).delete([mark_of(order, name) for name in names])

    def free_address(self) -> str:
        """HOST:PORT where a group can meet, found as Ray Train does."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{self.address}:{probe.getsockname()[1]}"

    def join(self, backend: str, address: str, rank: int, world_size: int, seconds: float) -> Joined:
        """Forms the group and adds up, as a training's worker does in cluster/workers/worker.py."""
        return join(backend, address, rank, world_size, seconds)


def join(backend: str, address: str, rank: int, world_size: int, seconds: float) -> Joined:
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
                return Joined(error=f"the sum of {world_size} ranks came out as {ranks.item():g}")
            rate = bytes_per_second(FEW_FLOATS, 1, device)
            if rate > 4 * FEW_FLOATS / FEW_SECONDS:  # the same on all, as it is the slowest one's
                rate = bytes_per_second(GROUP_FLOATS, GROUP_SUMS, device)
        finally:
            dist.destroy_process_group()
    except Exception as error:  # gloo and NCCL raise many kinds
        return Joined(error=words(error))
    return Joined(bytes_per_second=rate)


def bytes_per_second(num_floats: int, times: int, device: torch.device) -> float:
    """Of a tensor that is added up over all processes; the slowest one's, on each of them."""
    tensor = torch.ones(num_floats, device=device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor)
    tensor[0].item()  # waits for a GPU
    taken = torch.tensor((time.perf_counter() - started) / times, device=device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return 4 * num_floats / taken.item()


def mark_of(order: Order, name: str) -> str:
    return f"{MARK}{order.mark}-{name}"


def ray_folder() -> str:
    """Where Ray keeps sockets, logs and what does not fit into memory."""
    node: Any = ray_worker._global_node
    return node.get_session_dir_path() if node else "/tmp/ray"


def examine(order: Order, say: Callable[[str], None]) -> tuple[list[Facts], Together]:
    """Asks every machine that is alive in the cluster that this process is connected to. say: what is done now."""
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    names = names_of(nodes)
    silent: dict[str, str] = {}
    say(f"starting a process on each of {len(nodes)} machines")
    actors: dict[str, Any] = {
        name: ray.remote(Examiner)
        .options(
            num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        )
        .remote()
        for name, node in zip(names, nodes, strict=True)
    }
    try:
        # The first answer to come is one that needs nothing, so that what is slow later is slow by itself.
        answers(actors, lambda _, actor: actor.time.remote(), START_SECONDS, silent)
        clocks, within = ask_clocks(actors, silent)
        say(f"looking at {len(actors)} machines: packages, token, GPUs, DeepSpeed, disks, shards")
        facts = answers(actors, lambda _, actor: actor.gather.remote(order), GATHER_SECONDS, silent)
        say("writing to the storage on each machine, and reading it on the others")
        unseen = exchange(order, actors, silent)
        groups = {}
        if len(actors) > 1:
            for backend in backends(list(facts.values())):
                say(f"forming a process group over {len(actors)} machines ({backend})")
                groups[backend] = form_group(backend, actors)
    finally:
        for actor in actors.values():
            ray.kill(actor)
    together = Together(
        silent=silent,
        clocks=clocks,
        clocks_within=within,
        unseen=unseen,
        groups=groups,
        dashboard=ray_worker.get_dashboard_url() or None,
    )
    return [renamed(facts[name], name) for name in names if name in facts], together


def names_of(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each machine: its host's, with its address, or the node's id where several are on one host."""
    names = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]
    return [
        name if names.count(name) == 1 else f"{name[:-1]}, node {node['NodeID'][:6]})"
        for name, node in zip(names, nodes, strict=True)
    ]


def renamed(facts: Facts, name: str) -> Facts:
    return Facts(**{**vars(facts), "name": name})


def backends(machines: Sequence[Facts]) -> list[str]:
    """What training would use: gloo always (DeepSpeed and Ray Train on CPUs), NCCL where every machine has a GPU."""
    return ["gloo", "nccl"] if machines and all(facts.devices.gpus for facts in machines) else ["gloo"]


def answers(
    actors: dict[str, Any], ask: Callable[[str, Any], Any], seconds: float, silent: dict[str, str]
) -> dict[str, Any]:
    """What each actor answers. Those that do not are taken out of `actors`, and why is noted in `silent`."""
    asked = {name: ask(name, actor) for name, actor in actors.items()}
    until, found = time.monotonic() + seconds, {}
    for name, reference in asked.items():
        try:
            found[name] = ray.get(reference, timeout=max(0.1, until - time.monotonic()))
        except GetTimeoutError:
            silent[name] = f"no answer within {seconds:g} s"
        except RayError as error:
            silent[name] = reason(error)
    for name in asked.keys() & silent.keys():
        ray.kill(actors.pop(name))
    return found


def reason(error: RayError) -> str:
    """Why an actor failed: the last line, where Ray puts what was raised there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def ask_clocks(actors: dict[str, Any], silent: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that each clock is ahead of this one, and by how much that may be wrong: half of the fastest way."""
    ahead, within = {}, {}
    for name in list(actors):
        tries = []
        for _ in range(3):
            before = time.time()
            there = answers({name: actors[name]}, lambda _, actor: actor.time.remote(), ANSWER_SECONDS, silent).get(
                name
            )
            after = time.time()
            if there is None:
                actors.pop(name)
                break
            tries.append(((after - before) / 2, there - (before + after) / 2))
        else:
            within[name], ahead[name] = min(tries)
    return ahead, within


def exchange(order: Order, actors: dict[str, Any], silent: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """For each machine, whose files it does not see in the storage. All files are deleted again."""
    files = {name: f"machine-{number}" for number, name in enumerate(actors)}
    names = {file: name for name, file in files.items()}
    written = answers(actors, lambda name, actor: actor.write.remote(order, files[name]), ANSWER_SECONDS, silent)
    there = [files[name] for name, error in written.items() if error is None]
    try:
        found = answers(actors, lambda _, actor: actor.unseen.remote(order, there), ANSWER_SECONDS, silent)
    finally:  # in a folder that is each machine's own, each must delete its own
        cleared = [actor.clear.remote(order, list(names)) for actor in actors.values()]
        ray.wait(cleared, num_returns=len(cleared), timeout=ANSWER_SECONDS)
    return {name: tuple(names[file] for file in missing) for name, missing in found.items() if missing}


def form_group(backend: str, actors: dict[str, Any]) -> dict[str, Joined]:
    """What each process saw. One that gives no answer waits for the others, which have failed."""
    address = ray.get(next(iter(actors.values())).free_address.remote(), timeout=ANSWER_SECONDS)
    ranks, silent = {name: rank for rank, name in enumerate(actors)}, {}
    joined = answers(
        dict(actors),
        lambda name, actor: actor.join.remote(backend, address, ranks[name], len(ranks), GROUP_SECONDS),
        3 * GROUP_SECONDS,
        silent,
    )
    return {**joined, **{name: Joined(error=why) for name, why in silent.items()}}
