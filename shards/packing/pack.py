"""Entries -> WebDataset shards, their index and dataset.json.

    plan_packing      listing + settings -> which entries go into which shard (shuffled with a seed)
    shards_to_pack    the plan's shards that are not finished
    pack_shard        one shard's entries -> tar + record; runs anywhere, as often as needed
    finish_packing    all records -> index, rejected.jsonl, dataset.json (records.py)

Packing the same plan again gives the same bytes.
"""

import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.dataset import DatasetInfo
from shards.packing.entries import SPLITS, Entry, Listing
from shards.packing.flow import flow_between
from shards.packing.records import IndexRow, OpenShard, Rejected, finish_dataset, unfinished, written_shard
from shards.packing.sandbox import Sandbox
from shards.sample_json import SampleJson
from shards.store import absolute_url, open_store
from shards.video import BadVideo, Limits, Packing

DEFAULT_LIMITS = Limits()
NO_FILE = "listed, but there is no such file"


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What goes into one shard."""

    name: str
    entries: tuple[Entry, ...]
    packing: Packing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole packing, before any video has been opened."""

    url: str  # of the folder or store that the shards go to
    classes: tuple[str, ...]
    packing: Packing
    shards: tuple[ShardPlan, ...]
    missing: tuple[Entry, ...]  # listed, but not on disk
    source: dict[str, Any]  # as JSON
    digest: str


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One video is done: stored, or rejected with a reason."""

    name: str
    rejected: str | None = None


def plan_packing(
    url: str | Path, listing: Listing, packing: Packing, videos_per_shard: int, seed: int, source: dict[str, Any]
) -> Plan:
    """Shuffles each split's videos with the seed, so that shards mix classes, and cuts them into shards.

    Listed videos that are not on disk take no place in a shard. Raises ValueError for shards of no videos, NoOpenCV if
    optical flow cannot be computed here.
    """
    if videos_per_shard < 1:
        raise ValueError(f"{videos_per_shard} videos per shard; expected at least 1")
    if packing.flow != "none":
        flow_between(packing.flow)
    shards, missing = [], []
    for split in SPLITS:
        listed = sorted((entry for entry in listing.entries if entry.split == split), key=lambda entry: entry.key)
        missing += [entry for entry in listed if not entry.path.is_file()]
        entries = [entry for entry in listed if entry.path.is_file()]
        random.Random(f"{seed}/{split}").shuffle(entries)
        for start in range(0, len(entries), videos_per_shard):
            chosen = sorted(entries[start : start + videos_per_shard], key=lambda entry: entry.key)
            name = f"{split}-{start // videos_per_shard:06}.tar"
            shards.append(ShardPlan(name=name, entries=tuple(chosen), packing=packing))
    return Plan(
        url=absolute_url(url),
        classes=listing.classes,
        packing=packing,
        shards=tuple(shards),
        missing=tuple(missing),
        source=source,
        digest=plan_digest(listing, packing, shards, missing),
    )


def plan_digest(listing: Listing, packing: Packing, shards: Sequence[ShardPlan], missing: Sequence[Entry]) -> str:
    """SHA-256 of what decides a packing's bytes: two packings with the same digest give the same shards."""
    about = [listing.classes, asdict(packing), [entry.name for entry in missing]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for shard in shards:
        digest.update(shard.name.encode())
        for entry in shard.entries:
            about = {**asdict(entry), "path": None, "size_bytes": entry.path.stat().st_size}
            digest.update(json.dumps(about).encode())
    return digest.hexdigest()


def shards_to_pack(plan: Plan) -> list[ShardPlan]:
    """Prepares the place for the plan and returns the shards that are still to be packed.

    Raises BadShards if it holds another packing or cannot be written, OSError for a folder that cannot be made.
    """
    other = (
        f"{plan.url}: holds shards of other videos or other settings than these; "
        "choose another folder, or delete this one to pack it anew"
    )
    return unfinished(open_store(plan.url), plan.shards, plan.digest, other)


def pack_shard(url: str, shard: ShardPlan, classes: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> Iterator[Packed]:
    """Writes one shard and its record, yielding after each video.

    A video that is missing, exceeds the limits or does not decode to its last frame is left out; the record names it with
    the reason. Raises OSError if the disk is full or a folder cannot be written; nothing half-written stays under a final
    name.
    """
    with Sandbox(limits) as sandbox, written_shard(open_store(url), shard.name) as target:
        for entry in shard.entries:
            try:
                target.samples.append(add_sample(target, entry, sandbox, shard.packing, classes))
                yield Packed(name=entry.name)
            except BadVideo as error:
                target.rejected.append(Rejected(path=entry.name, reason=str(error)))
                yield Packed(name=entry.name, rejected=str(error))


def add_sample(target: OpenShard, entry: Entry, sandbox: Sandbox, packing: Packing, classes: Sequence[str]) -> IndexRow:
    """Appends KEY.mp4, KEY.flow.mp4 if there is flow, and KEY.json, and returns the sample's row of the index."""
    if not entry.path.is_file():
        raise BadVideo(NO_FILE)
    try:
        video = sandbox.store(entry.path, packing, entry.start_seconds, entry.end_seconds)
    except PermissionError as error:
        raise BadVideo(f"cannot be read ({error.strerror})") from None
    label = classes.index(entry.label) if classes else -1
    sample_json = SampleJson(
        key=entry.key,
        captions=entry.captions or None,
        label=None if entry.captions else label,
        class_name=None if entry.captions else entry.label,
        group=entry.group,
        num_frames=video.num_frames,
        fps=video.fps,
        source=entry.name,
        flow=None if video.flow is None else packing.flow,
        flow_bound=None if video.flow is None else packing.flow_bound,
    ).to_json()
    video_offset = target.add_member(f"{entry.key}.{video.suffix}", video.data)
    flow: dict[str, Any] = {}
    if video.flow is not None:
        flow = {
            "flow_offset": target.add_member(f"{entry.key}.flow.mp4", video.flow),
            "flow_size": len(video.flow),
            "flow_crc32": zlib.crc32(video.flow),
            "flow_bound": packing.flow_bound,
        }
    return IndexRow(
        key=entry.key,
        label=label,
        group=entry.group,
        num_frames=video.num_frames,
        num_captions=len(entry.captions),
        fps=video.fps,
        video_offset=video_offset,
        video_size=len(video.data),
        video_crc32=zlib.crc32(video.data),
        **flow,
        json_offset=target.add_member(f"{entry.key}.json", sample_json),
        json_size=len(sample_json),
    )


def finish_packing(plan: Plan) -> DatasetInfo:
    """Writes the index and dataset.json from the records of all shards. Raises BadShards if no video could be stored."""
    shards = {split: [shard.name for shard in plan.shards if shard.name.startswith(f"{split}-")] for split in SPLITS}
    return finish_dataset(
        open_store(plan.url),
        shards,
        lambda contents: DatasetInfo(
            classes=plan.classes,
            packing=plan.packing,
            splits=contents.splits,
            plan=plan.digest,
            source=plan.source,
            rejected=contents.rejected,
        ),
        missing=((entry.split, Rejected(path=entry.name, reason=NO_FILE)) for entry in plan.missing),
    )
