"""Checks of a cluster's machines together. They ask nothing of any machine."""

from collections.abc import Mapping, Sequence

from jobs.doctor.access_checks import interface_fix, is_loopback
from jobs.doctor.facts import ClusterFacts, GroupResult, MachineFacts
from jobs.doctor.findings import Finding, error, megabytes, names, ok, warning

SLOW_NETWORK_BYTES = 12 * 2**20  # a second, of a sum over all machines: 100 Mbit/s
CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 2.0, 300.0  # stores refuse requests signed 15 minutes off
UNSHARED_FIX = "choose a network folder that is mounted on all machines, by its absolute path, or a URL: --storage s3://BUCKET/runs"
FIREWALL_FIX = "open all TCP ports between the machines, in their firewall and the cloud's"


def check_answers(machines: Sequence[MachineFacts], cluster: ClusterFacts) -> list[Finding]:
    """Every machine of the cluster has answered."""
    found = [
        error("cluster", f"{name} is alive for Ray and did not answer: {reason}", answer_fix(reason))
        for name, reason in cluster.unanswered.items()
    ]
    return [*found, ok("cluster", f"{len(machines)} machines: {names(machines)}")]


def answer_fix(reason: str) -> str:
    if "ModuleNotFoundError" in reason:
        return (
            "ray job submit --working-dir . -- python -m jobs.doctor  # brings the code; packages come by pip install"
        )
    return "look into /tmp/ray/session_latest/logs there, or: ray stop && ray start --address HEAD:6379"


def check_shared_storage(cluster: ClusterFacts, storage: str) -> list[Finding]:
    """Each machine sees what the others write."""
    if not cluster.unseen_files:
        return []
    machine, writers = next(iter(cluster.unseen_files.items()))
    text = f"{storage} is not shared: {machine} does not see what {', '.join(writers)} wrote"
    return [error("storage", text, UNSHARED_FIX)]


def check_groups(machines: Sequence[MachineFacts], cluster: ClusterFacts) -> list[Finding]:
    """Processes on all machines find each other, and exchange fast enough."""
    found = []
    for backend, results in cluster.groups.items():
        failed = {name: result for name, result in results.items() if result.error}
        if failed or len(results) < len(machines):
            found.append(broken_group(backend, machines, failed))
            continue
        slowest = min(result.bytes_per_second for result in results.values())
        text = f"{backend} adds up tensors over {len(results)} machines at {megabytes(slowest)}/s"
        if slowest < SLOW_NETWORK_BYTES:
            fix = "use a faster network, or exchange less often: --accumulation; or one machine with several GPUs"
            found.append(warning("process group", text, fix))
        else:
            found.append(ok("process group", text))
    return found


def broken_group(backend: str, machines: Sequence[MachineFacts], failed: Mapping[str, GroupResult]) -> Finding:
    name, result = next(iter(failed.items()), ("some machines", GroupResult(error="no answer")))
    variable = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
    unnamed = [
        each for each in machines
        if variable not in each.named_interfaces and is_loopback(each.host_address or "127.0.0.1")
    ]  # fmt: skip
    text = f"{backend} cannot form one over {len(machines)} machines ({name}: {result.error})"
    return error("process group", text, interface_fix(unnamed[0]) if unnamed else FIREWALL_FIX)


def check_clocks(cluster: ClusterFacts) -> list[Finding]:
    """Each clock against this machine's, less the possible error of measuring it."""
    off = {
        name: max(0.0, abs(ahead) - cluster.clock_errors.get(name, 0.0))
        for name, ahead in cluster.clock_offsets.items()
    }
    if not off:
        return []
    name = max(off, key=lambda name: off[name])
    fix = "timedatectl set-ntp true  # on each machine"
    text = f"{name} is {cluster.clock_offsets[name]:+.1f} s off this machine's"
    if off[name] > CLOCK_ERROR_SECONDS:
        return [error("clocks", f"{text}; stores refuse requests that are 15 minutes off", fix)]
    if off[name] > CLOCK_WARNING_SECONDS:
        return [warning("clocks", text, fix)]
    return [ok("clocks", f"within {off[name] + cluster.clock_errors.get(name, 0.0):.3f} s of each other")]


# Room for workers


def check_room(workers: int, room: int, needs: str, impossible: str | None) -> list[Finding]:
    """The cluster has room for the workers. room: for so many now. needs: of one worker. impossible: why they never fit."""
    if not workers:
        return []
    if impossible:
        return [error("workers", impossible, "ray start --address HEAD:6379  # on more machines")]
    if room < workers:
        text = f"{workers} requested, room for {room} now: other jobs run, or free cores are scattered over machines"
        return [warning("workers", text, "ray status  # a run waits for room for --wait-minutes")]
    return [ok("workers", f"{workers} requested, room for {room} of {needs}")]


def check_room_here(workers: int, cpus_per_worker: int, machine: MachineFacts) -> list[Finding]:
    """This machine has room for the workers."""
    if not workers:
        return []
    gpus = len(machine.devices.gpus)
    room = gpus or machine.cores // cpus_per_worker
    if workers > room:
        text = f"{workers} do not fit on this machine: {f'{gpus} GPUs' if gpus else f'{machine.cores} CPU cores'}"
        return [error("workers", text, f"--workers {max(room, 1)}, or more machines: ray start --address HEAD:6379")]
    return [ok("workers", f"{workers} fit on this machine")]
