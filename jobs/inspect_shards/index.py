"""jobs.inspect_shards index: an index of tars that others wrote, by which everything here reads them."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cluster.progress import Bar, duration
from cluster.workers.tasks import run_tasks
from jobs.command import Flat, finish
from shards.dataset import REJECTED, DatasetInfo
from shards.packing.annotation_files import read_lines
from shards.packing.external import IndexPlan, finish_index, open_target, parse_rules, plan_index
from shards.packing.external_scan import scan_tar
from shards.printable import printable
from shards.reading.clips import ClipConfig
from shards.video import Limits, Packing


@dataclass(frozen=True, kw_only=True)
class MakeIndex:
    """Write an index for WebDataset tars that others wrote, so that they can be trained on as they are.

    A sample is a KEY.mp4 (.avi .webm .mkv .mov) with a KEY.cls (a number), KEY.json (label, class, group, captions) or
    KEY.txt (captions). Every video is decoded once, to count its frames; one that does not decode, or has neither label nor
    caption, is left out and named in rejected.jsonl. The tars are never changed. An interrupted indexing goes on where it was.
    """

    url: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or bucket of the tars, or their names: 'http://host/data/train-{000000..000009}.tar'."""
    out: str | None = None
    """Folder or URL that the index goes to. Default: beside the tars."""
    split_of: tuple[str, ...] = ()
    """'PATTERN=SPLIT', for tars whose name or folder does not begin with their split: 'part-00*=val'; 'none' leaves them out."""
    val_shards: int = 0
    """The last so many tars of train become val."""
    classes: Path | None = None
    """File with the classes' names, one a line, in label order. Default: the names in the JSON, or the numbers."""
    width: int = Packing.width
    """Width that frames are resized to when they are read, in pixels (even)."""
    height: int = Packing.height
    """Height that frames are resized to, in pixels (even)."""
    workers: int | None = None
    """Ray tasks that read tars at the same time, one core each; 0 reads in this process. Default: all cores of the cluster."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)
    strict: bool = False
    """End with status 1 if any sample was left out."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if not self.url:
            raise ValueError("no URL: wanted a folder or bucket of tars, or their names")


def make_index(job: MakeIndex) -> int:
    """Plans, reads the tars, finishes; gives back the exit status."""
    started = time.monotonic()
    packing = Packing(copy=True, width=job.width, height=job.height)
    classes = read_lines(job.classes) if job.classes else []
    if len(set(classes)) < len(classes):
        raise ValueError(f"{job.classes}: a class is listed twice; wanted one name a line, in label order")
    plan = plan_index(job.url, job.out, packing, parse_rules(job.split_of), classes, job.val_shards)
    waiting = open_target(plan)
    if waiting:
        total, left = (sum(tar.size_bytes for tar in tars) for tars in (plan.tars, waiting))
        with Bar("indexing", "MB", round(total / 1e6), done=round((total - left) / 1e6)) as bar:
            done = total - left
            tasks = [(plan.tars_at, plan.out, tar, packing, job.limits) for tar in waiting]
            for sample in run_tasks(scan_tar, tasks, job.workers):
                if sample.refused:
                    bar.print_line(f"left out {printable(sample.name)}: {sample.refused}")
                done += sample.size_bytes
                if round(done / 1e6) != bar.done:
                    bar.move_to(round(done / 1e6))
    info = finish_index(plan)
    report(job, plan, info, time.monotonic() - started)
    return 1 if job.strict and info.rejected else 0


def report(job: MakeIndex, plan: IndexPlan, info: DatasetInfo, seconds: float) -> None:
    videos = {split: sum(shard.samples for shard in shards) for split, shards in info.splits.items()}
    shards = [shard for split in info.splits.values() for shard in split]
    captions = sum(shard.captions for shard in shards)
    of = " and ".join(
        [
            *([f"{len(info.classes):,} classes"] if info.classes else []),
            *([f"{captions:,} captions"] if captions else []),
        ]
    )
    left_out = f"{info.rejected:,} left out (reasons in {plan.out}/{REJECTED})" if info.rejected else "none left out"
    no_val = "" if videos["val"] else "no tar is of val, which jobs.train needs: say --val-shards N or --split-of; "
    finish(
        f"indexed {sum(videos.values()):,} videos with {of} "
        f"({', '.join(f'{split} {count:,}' for split, count in videos.items())}) in {len(shards):,} tars, "
        f"{sum(shard.size_bytes for shard in shards) / 1e6:,.1f} MB, in {duration(seconds)}; {left_out}; {no_val}"
        f"{cost_of_reading(info.source['num_frames'] / sum(videos.values()))}: {plan.out}",
        {
            "out": plan.out,
            "tars_at": plan.tars_at,
            "classes": len(info.classes),
            "captions": captions,
            "videos": videos,
            "shards": len(shards),
            "rejected": info.rejected,
            "rejected_list": f"{plan.out}/{REJECTED}",
            "bytes": sum(shard.size_bytes for shard in shards),
            "packing": asdict(info.packing),
            "seconds": seconds,
        },
        job.json,
    )


def cost_of_reading(frames: float) -> str:
    """What it costs to read videos as they come, whose clips are decoded from the first frame on.

    Half of the frames before the last clip, in the mean, and the clip's own; packed anew, half of those between key frames.
    """
    clip = ClipConfig.num_frames
    here, packed = max(0.0, frames - clip) / 2 + min(frames, clip), (Packing.gop - 1) / 2 + clip
    return (
        f"a random clip of {clip} frames decodes {here:.0f} frames of these videos, about {packed:.0f} where "
        "jobs.make_shards has packed them"
    )
