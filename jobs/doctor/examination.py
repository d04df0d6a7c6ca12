"""A whole examination: of this machine, or of all machines of the Ray cluster that jobs would use."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.doctor.access_checks import check_access, check_authentication, check_dashboard
from jobs.doctor.cluster_checks import (
    check_answers,
    check_clocks,
    check_groups,
    check_room,
    check_room_here,
    check_shared_storage,
)
from jobs.doctor.facts import ClusterFacts, MachineFacts, Request, TrackingFacts
from jobs.doctor.findings import Finding, error, ok
from jobs.doctor.machine import absolute_request, gather_machine
from jobs.doctor.machine_checks import check_machines
from jobs.doctor.tracking import gather_tracking
from jobs.doctor.tracking_checks import check_tracking


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was found out."""

    address: str | None  # of the cluster; None: this machine alone
    machines: list[MachineFacts]
    cluster: ClusterFacts | None
    tracking: TrackingFacts
    findings: list[Finding]

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the tokens' digests and the open ports."""
        shown = [replace(each, token=replace(each.token, digest=None), listening={}) for each in self.machines]
        return {
            "address": self.address,
            "machines": [asdict(each) for each in shown],
            "cluster": asdict(self.cluster) if self.cluster else None,
            "tracking": asdict(self.tracking),
            "findings": [asdict(finding) for finding in self.findings],
            "errors": self.count("error"),
            "warnings": self.count("warning"),
        }


def examine(
    storage: str, shards: str | None, workers: int, cpus_per_worker: int, report: Callable[[str], None]
) -> Examination:
    """Gathers facts and checks them. report: gets what is done now."""
    request = absolute_request(storage, shards, secrets.token_hex(8))
    with new_folders_removed(request.storage):
        report("looking for a Ray cluster")
        address, findings = find_cluster()
        if address is None:
            report("examining this machine: packages, GPUs, DeepSpeed, disks, shards")
            machines, cluster = [gather_machine(request)], None
            findings += [*check_machines(machines), *check_access(machines)]
            findings += check_room_here(workers, cpus_per_worker, machines[0])
        else:
            machines, cluster, found = examine_cluster(request, workers, cpus_per_worker, report)
            findings += found
        report("asking MLflow")
        tracking = gather_tracking(request.storage)
        findings += check_tracking(tracking, machines)
    return Examination(address=address, machines=machines, cluster=cluster, tracking=tracking, findings=findings)


def examine_cluster(
    request: Request, workers: int, cpus_per_worker: int, report: Callable[[str], None]
) -> tuple[list[MachineFacts], ClusterFacts, list[Finding]]:
    """Raises NoCluster if no machine of it answers."""
    import ray  # not before, as it costs seconds

    from cluster.workers.connect import NoCluster, start_ray
    from cluster.workers.nodes import Nodes, needs
    from jobs.doctor.cluster import gather_cluster

    start_ray()
    machines, cluster = gather_cluster(request, report)
    if not machines:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in cluster.unanswered.items())
        raise NoCluster(f"no machine of the cluster answers: {reasons}")
    nodes, impossible = Nodes(needs(cpus_per_worker, ray.cluster_resources().get("GPU", 0) > 0)), None
    try:
        nodes.check_possible(workers)
    except NoCluster as reason:
        impossible = str(reason).partition("; ")[0]
    return machines, cluster, [
        *check_answers(machines, cluster),
        *check_machines(machines),
        *check_access(machines),
        *check_authentication(machines),
        *check_dashboard(machines, cluster.dashboard),
        *check_shared_storage(cluster, request.storage),
        *check_groups(machines, cluster),
        *check_clocks(cluster),
        *check_room(workers, nodes.room(), nodes.needs_text(), impossible),
    ]  # fmt: skip


def find_cluster() -> tuple[str | None, list[Finding]]:
    """(the address of the cluster that jobs would use, or None; findings about it)"""
    from ray._private.services import canonicalize_bootstrap_address

    from cluster.workers.connect import NoCluster, check_address

    try:
        check_address(os.environ.get("RAY_ADDRESS", ""))
        address = canonicalize_bootstrap_address(None)  # pyright: ignore[reportArgumentType]
    except (NoCluster, ConnectionError, ValueError) as reason:
        text, _, fix = str(reason).partition("; ")
        return None, [error("cluster", f"{text}; only this machine is examined", fix or "unset RAY_ADDRESS")]
    if address is None:
        return None, [ok("cluster", "no Ray cluster found: only this machine is examined")]
    try:
        check_address(address)
    except NoCluster:
        text = f"one was started here, and does not answer at {address}; only this machine is examined"
        return None, [error("cluster", text, "ray stop  # then ray start --head again, for a cluster")]
    return address, []


@contextmanager
def new_folders_removed(storage: str) -> Iterator[None]:
    """Removes folders of the storage that did not exist before, unless files were put into them."""
    folder = Path(storage)
    new = [] if "://" in storage else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()
