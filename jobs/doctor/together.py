"""What a cluster's machines showed together -> findings. Pure, but for examine_cluster, which asks them."""

from collections.abc import Callable, Sequence

import ray

from cluster.workers.connect import NoCluster, start_ray
from cluster.workers.nodes import Nodes, needs
from jobs.doctor.access import authentication, dashboard, is_loopback, judge_access, name_interface
from jobs.doctor.cluster import Joined, Together, examine
from jobs.doctor.findings import (
    CLOCK_WARNING_SECONDS,
    CLOCK_WRONG_SECONDS,
    SLOW_NETWORK_BYTES,
    Finding,
    judge,
    megabytes,
    ok,
    warning,
    wrong,
)
from jobs.doctor.machine import Facts, Order


def examine_cluster(
    order: Order, workers: int, cpus_per_worker: int, say: Callable[[str], None]
) -> tuple[list[Facts], Together, list[Finding]]:
    """Connects to the cluster, asks its machines, and judges. Raises NoCluster if none of them answers."""
    start_ray()
    machines, together = examine(order, say)
    if not machines:
        raise NoCluster(
            f"no machine of the cluster answers: {'; '.join(f'{name}: {why}' for name, why in together.silent.items())}"
        )
    return machines, together, [
        *judge_members(machines, together),
        *judge(machines),
        *judge_access(machines),
        *authentication(machines),
        *dashboard(machines, together.dashboard),
        *judge_storage(together, order.storage),
        *judge_groups(machines, together),
        *judge_clocks(together),
        *room(workers, cpus_per_worker),
    ]  # fmt: skip


def room(workers: int, cpus_per_worker: int) -> list[Finding]:
    """Whether the cluster has room for the workers: ever, and now."""
    if not workers:
        return []
    nodes = Nodes(needs(cpus_per_worker, ray.cluster_resources().get("GPU", 0) > 0))
    try:
        nodes.check_possible(workers)
    except NoCluster as error:
        return [wrong("workers", str(error).partition("; ")[0], "ray start --address HEAD:6379  # on more machines")]
    now = nodes.room()
    if now < workers:
        text = f"{workers} are asked for, and there is room for {now} now: other jobs run, or cores are scattered"
        return [warning("workers", text, "ray status  # a run waits for room for --wait-minutes")]
    return [ok("workers", f"room for {now} of {nodes.wanted()}, {workers} are asked for")]


def judge_members(machines: Sequence[Facts], together: Together) -> list[Finding]:
    found = [
        wrong("cluster", f"{name} is alive for Ray and did not answer: {why}", way_to_answer(why))
        for name, why in together.silent.items()
    ]
    return [*found, ok("cluster", f"{len(machines)} machines: {', '.join(each.name for each in machines)}")]


def way_to_answer(why: str) -> str:
    if "ModuleNotFoundError" in why:
        return (
            "ray job submit --working-dir . -- python -m jobs.doctor  # brings the code; packages come by pip install"
        )
    return "look into /tmp/ray/session_latest/logs there, or: ray stop && ray start --address HEAD:6379"


def judge_storage(together: Together, storage: str) -> list[Finding]:
    """Whether each machine sees what the others write."""
    if not together.unseen:
        return []
    machine, missing = next(iter(together.unseen.items()))
    text = f"{storage} is not shared: {machine} does not see what {', '.join(missing)} wrote"
    way = "name a network folder that is mounted on all machines, by its absolute path, or a URL: --storage s3://BUCKET/runs"
    return [wrong("storage", text, way)]


def judge_groups(machines: Sequence[Facts], together: Together) -> list[Finding]:
    """Whether processes on all machines found each other, and how fast they exchange."""
    found = []
    for backend, joined in together.groups.items():
        failed = {name: each for name, each in joined.items() if each.error}
        if failed or len(joined) < len(machines):
            found.append(broken_group(backend, machines, failed))
            continue
        slowest = min(each.bytes_per_second for each in joined.values())
        text = f"{backend} adds up tensors over {len(joined)} machines at {megabytes(slowest)}/s"
        if slowest < SLOW_NETWORK_BYTES:
            way = "a faster network, or fewer steps that exchange: --accumulation; on one machine with several GPUs there is none"
            found.append(warning("process group", text, way))
        else:
            found.append(ok("process group", text))
    return found


def broken_group(backend: str, machines: Sequence[Facts], failed: dict[str, Joined]) -> Finding:
    name, joined = next(iter(failed.items()), ("some machines", Joined(error="no answer")))
    variable = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
    trapped = [
        each for each in machines
        if variable not in each.named_interfaces and is_loopback(each.host_address or "127.0.0.1")
    ]  # fmt: skip
    text = f"{backend} forms none over {len(machines)} machines ({name}: {joined.error})"
    if trapped:
        return wrong("process group", text, name_interface(trapped[0]))
    return wrong("process group", text, "open all TCP ports between the machines, in their firewall and the cloud's")


def judge_clocks(together: Together) -> list[Finding]:
    """Each clock against this command's, less what the way there may account for."""
    off = {
        name: max(0.0, abs(ahead) - together.clocks_within.get(name, 0.0)) for name, ahead in together.clocks.items()
    }
    if not off:
        return []
    name = max(off, key=lambda name: off[name])
    way = "timedatectl set-ntp true  # on each machine"
    text = f"{name} is {together.clocks[name]:+.1f} s off this machine's"
    if off[name] > CLOCK_WRONG_SECONDS:
        return [wrong("clocks", f"{text}; stores refuse requests that are 15 minutes off", way)]
    if off[name] > CLOCK_WARNING_SECONDS:
        return [warning("clocks", text, way)]
    return [ok("clocks", f"within {off[name] + together.clocks_within.get(name, 0.0):.3f} s of each other")]
