"""Whole data sets: pack videos, index external tars, verify. Ray tasks share the shards, or this process does them all.

    pack              videos and their labels or captions -> shards
    index_external    WebDataset tars that others wrote -> an index beside them
    verify            a data set -> what is wrong with it

An interrupted packing or indexing continues where it was when it is run again.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.progress import Bar
from cluster.workers.tasks import run_tasks
from shards.dataset import DESCRIPTION, REJECTED, DatasetInfo, read_dataset
from shards.index import Index
from shards.packing.annotation_files import read_lines
from shards.packing.external import finish_external, parse_rules, plan_external, tars_to_scan
from shards.packing.external_scan import scan_tar
from shards.packing.pack import finish_packing, pack_shard, plan_packing, shards_to_pack
from shards.packing.sources import SOURCES, Source, describe_source
from shards.printable import printable
from shards.store import BadShards, absolute_url, open_store
from shards.verify import Fault, check_description, check_index, verify_shard
from shards.video import Limits, Packing

FAULTS_LISTED = 10_000  # the first of a data set
Flat = tyro.conf.arg(name="")  # options of a group without a prefix
OpenBar = Callable[[str, str, int, int], Bar]  # name, unit, total, done -> what shows the progress


def source_type() -> Any:
    """The union of all registered sources, each a subcommand under its name."""
    return reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in SOURCES.items()))


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """Videos to be packed into shards."""

    source: Annotated[Source, tyro.conf.arg(constructor_factory=source_type)]
    """Where the videos and their labels come from."""
    out: str
    """Folder, or URL in an object store (s3://, gs://), that the shards go to."""
    packing: Annotated[Packing, Flat] = field(default_factory=Packing)
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)
    videos_per_shard: int = 100
    """Videos in a shard. Many small shards mix better, few large ones need fewer requests to an object store."""
    seed: int = 0
    """Decides how videos are spread over shards."""
    workers: int | None = None
    """Ray tasks that pack at the same time, one core each; 0 packs in this process. Default: all cores of the cluster."""


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """A finished data set."""

    out: str
    classes: int
    videos: dict[str, int]  # of each split
    captions: int
    shards: int
    rejected: int
    rejected_list: str  # file or URL with the reasons
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """Write an index for WebDataset tars that others wrote, so that they can be trained on as they are.

    A sample is a KEY.mp4 (.avi .webm .mkv .mov) with a KEY.cls (a number), KEY.json (label, class, group, captions) or
    KEY.txt (captions). Every video is decoded once, to count its frames; one that does not decode, or has neither label nor
    caption, is left out and named in rejected.jsonl. The tars are never changed.
    """

    url: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or bucket of the tars, or their names: 'http://host/data/train-{000000..000009}.tar'."""
    out: str | None = None
    """Folder or URL that the index goes to. Default: beside the tars."""
    split_of: tuple[str, ...] = ()
    """'PATTERN=SPLIT', for tars whose name or folder does not begin with their split: 'part-00*=val'; 'none' leaves them out."""
    val_shards: int = 0
    """The last N tars of train become val."""
    classes: Path | None = None
    """File with the classes' names, one a line, in label order. Default: the names in the JSON, or the numbers."""
    width: int = Packing.width
    """Width that frames are resized to when they are read, in pixels (even)."""
    height: int = Packing.height
    """Height that frames are resized to when they are read, in pixels (even)."""
    workers: int | None = None
    """Ray tasks that read tars at the same time, one core each; 0 reads in this process. Default: all cores of the cluster."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.url:
            raise ValueError("no URL; expected a folder or bucket of tars, or their names")


@dataclass(frozen=True, kw_only=True)
class IndexResult(PackResult):
    """A finished index of external tars."""

    tars_at: str
    packing: Packing
    frames_per_video: float  # mean


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """Read a whole data set and name everything that is not as it was packed; status 1 if there is anything.

    Every shard's length and SHA-256, every row of the index, the place, name and CRC-32 of every video and flow, the JSON
    beside it, and how many frames each decodes to. Of vectors (jobs.encode) their shape, and that all numbers are finite.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL (s3://, gs://, http://) of the data set."""
    splits: tuple[str, ...] = ()
    """The splits to check. Default: all."""
    quick: bool = False
    """Decode nothing. All bytes are still read and compared with their checksums."""
    workers: int | None = None
    """Ray tasks that check at the same time, one core each; 0 checks in this process. Default: all cores of the cluster."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was checked, and what is wrong."""

    url: str
    digest: str
    videos: dict[str, int]  # of each split
    shards: int
    bytes: int
    holds: str  # "videos" or "vectors"
    decoded: bool
    faults: int
    fault_list: list[Fault]  # the first 10,000
    seconds: float


def pack(job: PackJob, open_bar: OpenBar = Bar) -> PackResult:
    """Packs what is not packed yet. Raises BadSource, BadShards, ValueError or OSError for what cannot be packed."""
    started = time.monotonic()
    listing = job.source.entries()
    source = describe_source(job.source)
    plan = plan_packing(job.out, listing, job.packing, job.videos_per_shard, job.seed, source)
    waiting = shards_to_pack(plan)
    if waiting:
        total, left = (sum(len(shard.entries) for shard in shards) for shards in (plan.shards, waiting))
        with open_bar("packing", "videos", total, total - left) as bar:
            if plan.missing:
                counts = f"{len(plan.missing):,} of {len(listing.entries):,} listed videos"
                bar.print_line(f"{counts} are missing, the first: {plan.missing[0].path}")
            tasks = [(plan.url, shard, plan.classes, job.limits) for shard in waiting]
            for video in run_tasks(pack_shard, tasks, job.workers):
                if video.rejected:
                    bar.print_line(f"left out {video.name}: {video.rejected}")
                bar.advance()
    info = finish_packing(plan)
    return PackResult(**totals(plan.url, info), seconds=time.monotonic() - started)


def index_external(job: IndexJob, open_bar: OpenBar = Bar) -> IndexResult:
    """Reads the tars that are not read yet. Raises BadUrl, BadShards, ValueError or OSError for what cannot be indexed."""
    started = time.monotonic()
    packing = Packing(copy=True, width=job.width, height=job.height)
    classes = read_lines(job.classes) if job.classes else []
    if len(set(classes)) < len(classes):
        raise ValueError(f"{job.classes}: a class is listed twice; expected one name a line, in label order")
    plan = plan_external(job.url, job.out, packing, parse_rules(job.split_of), classes, job.val_shards)
    waiting = tars_to_scan(plan)
    if waiting:
        total, left = (sum(tar.size_bytes for tar in tars) for tars in (plan.tars, waiting))
        done = total - left
        with open_bar("indexing", "MB", round(total / 1e6), round(done / 1e6)) as bar:
            tasks = [(plan.tars_at, plan.out, tar, packing, job.limits) for tar in waiting]
            for sample in run_tasks(scan_tar, tasks, job.workers):
                if sample.rejected:
                    bar.print_line(f"left out {printable(sample.name)}: {sample.rejected}")
                done += sample.size_bytes
                if round(done / 1e6) != bar.done:
                    bar.move_to(round(done / 1e6))
    info = finish_external(plan)
    result = totals(plan.out, info)
    return IndexResult(
        **result,
        seconds=time.monotonic() - started,
        tars_at=plan.tars_at,
        packing=info.packing,
        frames_per_video=info.source["num_frames"] / sum(result["videos"].values()),
    )


def totals(out: str, info: DatasetInfo) -> dict[str, Any]:
    """The fields of PackResult that a data set's description decides."""
    shards = [shard for split in info.splits.values() for shard in split]
    return {
        "out": out,
        "classes": len(info.classes),
        "videos": videos_of(info),
        "captions": sum(shard.captions for shard in shards),
        "shards": len(shards),
        "rejected": info.rejected,
        "rejected_list": f"{out}/{REJECTED}",
        "bytes": sum(shard.size_bytes for shard in shards),
    }


def videos_of(info: DatasetInfo) -> dict[str, int]:
    """{split: its videos}"""
    return {split: sum(shard.samples for shard in shards) for split, shards in info.splits.items()}


def verify(job: VerifyJob, open_bar: OpenBar = Bar) -> VerifyResult:
    """Checks every shard and reports each fault as it is found. Raises BadShards if the data set cannot be read at all."""
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
    if faults := list(check_description(info)):
        raise BadShards(
            f"{url}/{DESCRIPTION}: {len(faults)} faults; the shards were not read: {'; '.join(map(str, faults))}"
        )
    videos = {split: count for split, count in videos_of(info).items() if split in splits}
    first: list[Fault] = []
    num_faults = size_bytes = 0
    with open_bar("verifying", "videos", sum(videos.values()), 0) as bar:

        def report(faults: Iterable[Fault]) -> None:
            nonlocal num_faults
            for fault in faults:
                num_faults += 1
                if len(first) < FAULTS_LISTED:
                    first.append(fault)
                bar.print_line(f"fault: {fault}")

        for split in splits:
            report(check_index(Index(url, split)))
        shards = [(split, number) for split in splits for number in range(len(splits[split]))]
        tasks = [(url, split, info.digest, number, job.quick, job.limits) for split, number in shards]
        for checked in run_tasks(verify_shard, tasks, job.workers):
            report(checked.faults)
            size_bytes += checked.size_bytes
            if checked.samples:
                bar.advance(checked.samples)
    return VerifyResult(
        url=url,
        digest=info.digest,
        videos=videos,
        shards=len(shards),
        bytes=size_bytes,
        holds="videos" if info.encoder is None else "vectors",
        decoded=not job.quick and info.encoder is None,
        faults=num_faults,
        fault_list=first,
        seconds=time.monotonic() - started,
    )
