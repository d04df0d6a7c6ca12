"""Check this machine, or all machines of a Ray cluster, before a run: one line a check, and how to fix what is wrong.

    python -m jobs.doctor                                                    this machine, in seconds, without Ray
    python -m jobs.doctor --shards data/mine --storage runs --workers 4
    ray job submit --working-dir . -- python -m jobs.doctor --shards s3://bucket/mine --storage s3://bucket/runs --workers 8

Where commands would use a Ray cluster (RAY_ADDRESS, or a `ray start` on this machine), each of its machines is examined:
packages and code, GPUs, DeepSpeed, disks, limits, shards, storage, the token. Then all together: whether they see the same
storage, form a process group as training does, and have the same time. Nothing is left behind, and no MLflow run is made.

The exit status is 1 if there are errors, else 0, with warnings too.

--json FILE holds: address (of the cluster), machines [facts], cluster {facts of all machines together}, tracking,
findings [{check, level, text, fix}], errors, warnings.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jobs.command import Command, finish
from jobs.doctor.examination import examine
from jobs.doctor.findings import Finding

COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Options of the examination."""

    shards: str | None = None
    """Folder or URL of the shards that a run will read. Default: none are read."""
    storage: str = "runs"
    """Folder or URL of all runs, which every machine must see."""
    workers: int = 0
    """Workers that a run will have; 0: it runs in one process."""
    cpus_per_worker: int = 1
    """CPU cores of each worker."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.cpus_per_worker < 1:
            raise ValueError(
                f"workers {self.workers}, cpus_per_worker {self.cpus_per_worker}: expected at least 0, and at least 1"
            )


def main(job: Doctor) -> int:
    with progress() as report:
        found = examine(job.storage, job.shards, job.workers, job.cpus_per_worker, report)
    print_findings(found.findings)
    machines, warnings, errors = len(found.machines), found.count("warning"), found.count("error")
    finish(
        f"{machines} machine{'s' * (machines != 1)}: {found.count('ok')} ok, {warnings} warning{'s' * (warnings != 1)}, "
        f"{errors} error{'s' * (errors != 1)}",
        found.to_dict(),
        job.json,
    )
    return 1 if errors else 0


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what is done now: in one place on a terminal, as lines elsewhere."""
    if sys.stdout.isatty():
        with Console().status("") as status:
            yield status.update
    else:
        yield lambda line: print(f"{line} ...", flush=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """One line for each, and below it how to fix it. Lines are not wrapped, so that commands can be copied."""
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        level = (f"{finding.level:8}", COLOURS[finding.level])
        console.print(Text.assemble(level, f"{finding.check:{width}}  {finding.text}"))
        if finding.fix:
            console.print(Text(f"{'':{width + 10}}-> {finding.fix}", style="bold"))


COMMAND = Command(Doctor, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
