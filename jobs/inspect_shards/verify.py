"""jobs.inspect_shards verify: each fault of a data set as a line."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.progress import duration
from grurcn.data import VerifyJob, verify
from jobs.command import finish


@dataclass(frozen=True, kw_only=True)
class Verify(VerifyJob):
    __doc__ = VerifyJob.__doc__

    json: Path | None = None
    """Write the result as JSON to this file."""


def verify_and_print(job: Verify) -> int:
    """Verifies and prints; returns the exit status."""
    checked = verify(job)
    if checked.holds == "vectors":
        what = "all bytes, rows, JSON and vectors"
    else:
        what = f"all bytes, rows and JSON{', and every frame' if checked.decoded else '; nothing was decoded'}"
    faults = f"{checked.faults or 'no'} fault{'s' * (checked.faults != 1)}"
    counts = ", ".join(f"{split} {count:,}" for split, count in checked.videos.items())
    finish(
        f"{faults} in {sum(checked.videos.values()):,} videos ({counts}) of {checked.shards:,} shards, "
        f"{checked.bytes / 1e6:,.1f} MB, in {duration(checked.seconds)}: {what} ({job.url})",
        asdict(checked),
        job.json,
    )
    return 1 if checked.faults else 0
