"""Examine this machine, or all of the Ray cluster, before a run: a line a check, and for what is wrong the line that mends it.

    python -m jobs.doctor                                                    this machine, in seconds; Ray is not started
    python -m jobs.doctor --shards data/mine --storage runs --workers 4
    ray job submit --working-dir . -- python -m jobs.doctor --shards s3://bucket/mine --storage s3://bucket/runs --workers 8

Where a Ray cluster is found as every job finds it (RAY_ADDRESS, or a `ray start` on this machine), each of its machines is
examined: packages and code, GPUs, DeepSpeed, disks, limits, shards, storage, the token; and then all together: whether they see
the same storage, form a process group as training does, and have the same time. Nothing is left behind, no MLflow run is made.

Exit status: 1 if anything is wrong, else 0, with warnings too.

--json FILE holds: cluster, machines [facts], together, tracking, findings [{check, level, text, mend}], wrong, warnings.
"""

import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.command import Command, finish
from jobs.doctor.access import judge_access
from jobs.doctor.findings import Finding, judge, ok, wrong
from jobs.doctor.machine import Facts, Order, absolute_order, gather
from jobs.doctor.tracking import Tracking, ask_tracking, judge_tracking

COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What is examined."""

    shards: str | None = None
    """Folder or URL of the shards that a run will read. Default: none are looked at."""
    storage: str = "runs"
    """Folder or URL of all runs, which every machine must see."""
    workers: int = 0
    """Workers that a run will have; 0: it runs in one process."""
    cpus_per_worker: int = 1
    """CPU cores of each."""
    json: Path | None = None
    """Write what was found as JSON to this file."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.cpus_per_worker < 1:
            raise ValueError(
                f"workers {self.workers}, cpus_per_worker {self.cpus_per_worker}: wanted at least 0, and at least 1"
            )


def main(job: Doctor) -> int:
    """Gathers, judges, shows; gives back the exit status."""
    order = absolute_order(job.storage, job.shards, secrets.token_hex(8))
    with told() as say, left_as_it_was(order):
        say("looking for a Ray cluster")
        address, findings = find_cluster()
        if address is None:
            say("looking at this machine: packages, GPUs, DeepSpeed, disks, shards")
            machines, together = [gather(order)], None
            findings += [*judge(machines), *judge_access(machines), *room_here(job, machines[0])]
        else:
            # Only now, as it costs seconds: Ray, and the cluster's part of the examination.
            from jobs.doctor.together import examine_cluster

            machines, together, more = examine_cluster(order, job.workers, job.cpus_per_worker, say)
            findings += more
        say("asking MLflow")
        tracking = ask_tracking(order.storage)
        findings += judge_tracking(tracking, machines)
    show(findings)
    return conclude(job, address, machines, together, tracking, findings)


def find_cluster() -> tuple[str | None, list[Finding]]:
    """The address of the cluster that jobs would use, and what is to be said of it; None: there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    from cluster.workers.connect import NoCluster, check_address

    named = os.environ.get("RAY_ADDRESS", "")
    try:
        check_address(named)
        address = canonicalize_bootstrap_address(None)  # pyright: ignore[reportArgumentType]
    except (NoCluster, ConnectionError, ValueError) as error:
        why, _, way = str(error).partition("; ")
        return None, [wrong("cluster", f"{why}; this machine alone is examined", way or "unset RAY_ADDRESS")]
    if address is None:
        return None, [ok("cluster", "no Ray cluster was found: this machine alone is examined")]
    try:
        check_address(address)
    except NoCluster:
        text = f"one was started here, and does not answer at {address}; this machine alone is examined"
        return None, [wrong("cluster", text, "ray stop  # then ray start --head again, if a cluster is wanted")]
    return address, []


def room_here(job: Doctor, machine: Facts) -> list[Finding]:
    """Whether the workers fit on this machine, of which Ray would take all."""
    if not job.workers:
        return []
    have = len(machine.devices.gpus) or machine.cores // job.cpus_per_worker
    kind = "GPUs" if machine.devices.gpus else "CPU cores"
    if job.workers > have:
        text = f"{job.workers} do not fit on this machine: {len(machine.devices.gpus) or machine.cores} {kind}"
        return [wrong("workers", text, f"--workers {max(have, 1)}, or more machines: ray start --address HEAD:6379")]
    return [ok("workers", f"{job.workers} fit on this machine")]


@contextmanager
def told() -> Iterator[Callable[[str], None]]:
    """Gives a function that tells what is done now: in one place on a terminal, in lines elsewhere."""
    if sys.stdout.isatty():
        with Console().status("") as status:
            yield status.update
    else:
        yield lambda line: print(f"{line} ...", flush=True)


@contextmanager
def left_as_it_was(order: Order) -> Iterator[None]:
    """Folders that were not there are not there afterwards, unless something was put into them."""
    folder = Path(order.storage)
    new = [] if "://" in order.storage else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


def show(findings: Sequence[Finding]) -> None:
    """One line a finding, below it what mends it. Lines are not broken, so that commands can be copied."""
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        head = Text.assemble((f"{finding.level:8}", COLOURS[finding.level]), f"{finding.check:{width}}  {finding.text}")
        console.print(head)
        if finding.mend:
            console.print(Text(f"{'':{width + 10}}-> {finding.mend}", style="bold"))


def conclude(
    job: Doctor,
    address: str | None,
    machines: Sequence[Facts],
    together: Any,
    tracking: Tracking,
    findings: list[Finding],
) -> int:
    count = {level: sum(finding.level == level for finding in findings) for level in COLOURS}
    finish(
        f"{len(machines)} machine{'s' * (len(machines) != 1)}: {count['ok']} ok, {count['warning']} to think of, "
        f"{count['wrong']} wrong",
        {
            "cluster": address,
            "machines": [facts_for_programs(each) for each in machines],
            "together": dataclasses.asdict(together) if together else None,
            "tracking": dataclasses.asdict(tracking),
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "wrong": count["wrong"],
            "warnings": count["warning"],
        },
        job.json,
    )
    return 1 if count["wrong"] else 0


def facts_for_programs(machine: Facts) -> dict[str, Any]:
    """Without the token's digest, and without ports that nobody asked for."""
    shown = replace(machine, token=replace(machine.token, digest=None), listening={})
    return dataclasses.asdict(shown)


COMMAND = Command(Doctor, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
