"""Pack videos into WebDataset shards.

    python -m jobs.make_shards --out data/mine folder --videos my-videos
    python -m jobs.make_shards --out data/ucf101 ucf101 --videos UCF-101 --lists ucfTrainTestlist --split 1
    python -m jobs.make_shards --out data/mine csv --table videos.csv
    python -m jobs.make_shards --out s3://bucket/msvd msvd --videos YouTubeClips --captions all.json --mapping mapping.txt
    python -m jobs.make_shards --out data/flow --flow tvl1 folder --videos my-videos

Videos are decoded to their last frame, resized and stored with a short key-frame interval, so that training reads random
clips cheaply; with --flow their optical flow is computed and stored beside them. A video that does not decode, or is listed
but missing, is left out and named in OUT/rejected.jsonl with the reason. An interrupted packing goes on where it was when
the same command is run again.

--json FILE holds: out, classes, videos {train, val, test}, captions, shards, rejected, rejected_list, bytes, seconds.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cluster.progress import Bar, duration
from cluster.workers.tasks import run_tasks
from jobs.command import Command, Flat, finish
from shards.dataset import REJECTED, DatasetInfo
from shards.packing.pack import finish_packing, open_target, pack_shard, plan_packing
from shards.packing.sources import Source
from shards.store import absolute_url
from shards.video import Limits, Packing


@dataclass(frozen=True, kw_only=True)
class MakeShards:
    """Options of packing."""

    source: Source
    """Where the videos and their labels come from."""
    out: str
    """Folder, or URL in an object store (s3://, gs://), that the shards go to."""
    packing: Annotated[Packing, Flat] = field(default_factory=Packing)
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)
    videos_per_shard: int = 100
    """Videos in a shard. Many small shards mix better, few large ones are kinder to object stores."""
    seed: int = 0
    """Of the order in which videos are spread over shards."""
    workers: int | None = None
    """Ray tasks that pack at the same time, one core each; 0 packs in this process. Default: all cores of the cluster."""
    strict: bool = False
    """End with status 1 if any video was refused."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: MakeShards) -> int:
    """Plans, packs and finishes; gives back the exit status."""
    started = time.monotonic()
    listing = job.source.entries()
    plan = plan_packing(job.out, listing, job.packing, job.videos_per_shard, job.seed, source=describe(job.source))
    waiting = open_target(plan)
    num_videos, num_waiting = (sum(len(shard.entries) for shard in shards) for shards in (plan.shards, waiting))
    if plan.missing:
        print(
            f"{len(plan.missing):,} of {len(listing.entries):,} listed videos are missing, the first: {plan.missing[0].path}"
        )
    if waiting:
        with Bar("packing", "videos", num_videos, done=num_videos - num_waiting) as bar:
            tasks = [(plan.url, shard, plan.classes, job.limits) for shard in waiting]
            for video in run_tasks(pack_shard, tasks, job.workers):
                if video.refused:
                    bar.print_line(f"left out {video.name}: {video.refused}")
                bar.advance()
    info = finish_packing(plan)
    report(job, info, time.monotonic() - started)
    return 1 if job.strict and info.rejected else 0


def describe(source: Source) -> dict[str, Any]:
    """The source's options, for dataset.json: where the data came from."""
    return {"kind": type(source).__name__.lower(), **{name: as_json(value) for name, value in asdict(source).items()}}


def as_json(value: Any) -> Any:
    """Paths, and tuples of them, as JSON can hold them."""
    if isinstance(value, tuple):
        return [as_json(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def report(job: MakeShards, info: DatasetInfo, seconds: float) -> None:
    videos = {split: sum(shard.samples for shard in shards) for split, shards in info.splits.items()}
    shards = [shard for split in info.splits.values() for shard in split]
    size = sum(shard.size_bytes for shard in shards)
    captions = sum(shard.captions for shard in shards)
    kinds = f"of {len(info.classes)} classes" if info.classes else f"with {captions:,} captions"
    refusals = f"{job.out.rstrip('/')}/{REJECTED}"
    left_out = f"{info.rejected} left out (reasons in {refusals})" if info.rejected else "none left out"
    finish(
        f"packed {sum(videos.values()):,} videos {kinds} "
        f"({', '.join(f'{split} {count:,}' for split, count in videos.items())}) into {len(shards)} shards, "
        f"{size / 1e6:,.1f} MB, in {duration(seconds)}; {left_out}: {job.out}",
        {
            "out": absolute_url(job.out),
            "classes": len(info.classes),
            "videos": videos,
            "captions": captions,
            "shards": len(shards),
            "rejected": info.rejected,
            "rejected_list": f"{absolute_url(job.out)}/{REJECTED}",
            "bytes": size,
            "seconds": seconds,
        },
        job.json,
    )


COMMAND = Command(MakeShards, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
