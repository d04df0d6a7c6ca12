"""jobs.inspect_shards verify: everything that shards/verify.py checks, of all shards, and each fault as a line."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cluster.progress import Bar, duration
from cluster.workers.tasks import run_tasks
from jobs.command import Flat, finish
from shards.dataset import read_dataset
from shards.index import Index
from shards.store import BadShards, absolute_url, open_store
from shards.verify import Fault, check_description, check_index, verify_shard
from shards.video import Limits

FAULTS_IN_JSON = 10_000


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a whole data set and name everything that is not as it was packed; status 1 if there is anything.

    Every shard's length and SHA-256, every row of the index, the place, name and CRC-32 of every video and flow, the JSON
    beside it, and how many frames each decodes to. Of vectors (jobs.encode) their shape, and that all numbers are finite.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL (s3://, gs://, http://) of the data set."""
    splits: tuple[str, ...] = ()
    """The splits that are checked. Default: all."""
    quick: bool = False
    """Decode nothing. All bytes are read and compared with their checksums all the same."""
    workers: int | None = None
    """Ray tasks that check at the same time, one core each; 0 checks in this process. Default: all cores of the cluster."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)
    json: Path | None = None
    """Write the result as JSON to this file."""


class Tally:
    """What has been checked, and what was found."""

    def __init__(self, bar: Bar):
        self.bar = bar
        self.num_faults = self.size_bytes = 0
        self.first: list[Fault] = []

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.num_faults += 1
            if len(self.first) < FAULTS_IN_JSON:
                self.first.append(fault)
            self.bar.print_line(f"fault: {fault}")


def verify(job: Verify) -> int:
    """Checks, says what was checked, and gives back the exit status."""
    started = time.monotonic()
    url = absolute_url(job.url)
    info = read_dataset(open_store(url))
    splits = {split: shards for split, shards in info.splits.items() if shards and split in (job.splits or info.splits)}
    unknown = [split for split in job.splits if split not in splits]
    if unknown or not splits:
        found = ", ".join(split for split, shards in info.splits.items() if shards)
        raise BadShards(
            f"{url}: no samples in {', '.join(unknown) or 'any split'} (splits with samples: {found or 'none'})"
        )
    videos = {split: sum(shard.samples for shard in shards) for split, shards in splits.items()}
    with Bar("verifying", "videos", sum(videos.values())) as bar:
        tally = Tally(bar)
        tally.add(check_description(info))
        if tally.num_faults:
            raise BadShards(f"{url}/dataset.json: {tally.num_faults} faults in it; the shards were not read")
        for split in splits:
            tally.add(check_index(Index(url, split)))
        shards = [(split, number) for split in splits for number in range(len(splits[split]))]
        tasks = [(url, split, info.digest, number, job.quick, job.limits) for split, number in shards]
        for checked in run_tasks(verify_shard, tasks, job.workers):
            tally.add(checked.faults)
            tally.size_bytes += checked.size_bytes
            if checked.samples:
                bar.advance(checked.samples)
    is_decoded = not job.quick and info.encoder is None
    what = (
        "all bytes, rows and JSON, and every frame" if is_decoded else "all bytes, rows and JSON; nothing was decoded"
    )
    if info.encoder is not None:
        what = "all bytes, rows, JSON and vectors"
    seconds = time.monotonic() - started
    finish(
        f"{f'{tally.num_faults:,}' if tally.num_faults else 'no'} fault{'s' * (tally.num_faults != 1)} in "
        f"{sum(videos.values()):,} videos ({', '.join(f'{split} {count:,}' for split, count in videos.items())}) of "
        f"{len(shards):,} shards, {tally.size_bytes / 1e6:,.1f} MB, in {duration(seconds)}: {what} ({job.url})",
        {
            "url": url,
            "digest": info.digest,
            "videos": videos,
            "shards": len(shards),
            "bytes": tally.size_bytes,
            "decoded": is_decoded,
            "faults": tally.num_faults,
            "fault_list": [asdict(fault) for fault in tally.first],
            "seconds": seconds,
        },
        job.json,
    )
    return 1 if tally.num_faults else 0
