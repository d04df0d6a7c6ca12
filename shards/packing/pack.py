"""Entries -> WebDataset shards, their index and dataset.json.

    plan_packing      listing + settings -> which entries go into which shard (shuffled with a seed)
    pack_shard        one shard's entries -> TAR + its record; runs anywhere, as often as needed
    finish_packing    all records -> index, rejected.jsonl, dataset.json

They go to a folder or an object store (store.py), where a file under its final name is complete. A shard counts as finished
once its record is there. Packing the same plan again gives the same bytes.
"""

import hashlib
import io
import json
import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.dataset import DESCRIPTION, PLAN, REJECTED, DatasetInfo, Shard, read_dataset
from shards.packing.entries import SPLITS, Entry, Listing
from shards.packing.flow import flow_between
from shards.packing.sandbox import VideoPacker
from shards.rows import written_index
from shards.store import BadShards, NoFile, Store, absolute_url, has_file, open_store
from shards.video import BadVideo, Limits, Packing

DEFAULT_LIMITS = Limits()
NO_FILE = "listed, but there is no such file"
HALF_WRITTEN = re.compile(r"(^|/)\.[^/]+\.\d+\.partial$")  # as FolderStore.written calls it
RECORDS = ".packing"  # folder of the plan and the records of finished shards, while a packing is under way


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
    source: dict[str, Any]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One video is done with: stored, or refused with a reason."""

    name: str
    refused: str | None = None


def plan_packing(
    url: str | Path, listing: Listing, packing: Packing, videos_per_shard: int, seed: int, source: dict[str, Any]
) -> Plan:
    """Shuffles each split's videos with the seed, so that no shard holds one class, and cuts them into shards.

    Listed videos that are not on disk take no place in a shard. Raises ValueError for shards of no videos, NoOpenCV where
    optical flow cannot be computed.
    """
    if videos_per_shard < 1:
        raise ValueError(f"{videos_per_shard} videos per shard: wanted at least 1")
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


def open_target(plan: Plan) -> list[ShardPlan]:
    """Makes the place ready for the plan and gives back the shards that are still to be packed.

    Raises BadShards if it holds another packing or cannot be written, OSError for a folder that cannot be made.
    """
    other = BadShards(
        f"{plan.url}: holds shards of other videos or other settings than these; "
        "choose another folder, or delete this one to pack it anew"
    )
    finished = finished_records(open_store(plan.url), plan.digest, plan.digest, other)
    return [] if finished is None else [shard for shard in plan.shards if record_name(shard.name) not in finished]


def finished_records(store: Store, digest: str, whole_digest: str, other: BadShards) -> set[str] | None:
    """The records that are there of a plan with this digest, which is begun if it was not yet; None if all is finished, with
    whole_digest in its description. What a kill has left half-written is deleted.

    Raises `other` if the place holds another plan, BadShards or OSError if it cannot be written.
    """
    if has_file(store, DESCRIPTION):
        if read_dataset(store).plan != whole_digest:
            raise other
        store.delete(store.names(RECORDS))  # of a packing that was killed in its last moment
        return None
    try:
        found = store.read_file(PLAN).decode()
    except NoFile:
        found = digest
        with store.written(PLAN) as file:
            file.write(found.encode())
    if found != digest:
        raise other
    store.delete([name for name in store.names() if HALF_WRITTEN.search(name)])
    return set(store.names(RECORDS))


def pack_shard(
    url: str, shard: ShardPlan, classes: Sequence[str], limits: Limits = DEFAULT_LIMITS
) -> Iterator[Progress]:
    """Writes one shard and its record, yielding after each video.

    A video that is missing, goes beyond the limits or does not decode to its last frame is left out, named with its reason in
    the record.
    Raises OSError if the disk is full or a folder cannot be written; nothing half-written stays under a final name.
    """
    store = open_store(url)
    with VideoPacker(limits) as packer, written_shard(store, shard.name, record_name(shard.name)) as (tar, record):
        for entry in shard.entries:
            try:
                record["samples"].append(add_sample(tar, entry, packer, shard.packing, classes))
                yield Progress(name=entry.name)
            except BadVideo as error:
                record["rejected"].append(refusal(entry, str(error)))
                yield Progress(name=entry.name, refused=str(error))


@contextmanager
def written_shard(store: Store, name: str, record_at: str) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """A shard, to add members to, and its record, to add "samples" and "rejected" to. When the block ends well they appear
    under their names, the record last; of a shard without samples only the record."""
    record: dict[str, Any] = {"samples": [], "rejected": []}
    with store.written(name) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            yield tar, record
        record["size_bytes"] = file.tell()
        file.seek(0)
        record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    if not record["samples"]:
        store.delete([name])
    with store.written(record_at) as file:
        file.write(json.dumps(record).encode())


def add_sample(
    tar: tarfile.TarFile, entry: Entry, packer: VideoPacker, packing: Packing, classes: Sequence[str]
) -> dict[str, Any]:
    """Appends KEY.mp4, KEY.flow.mp4 if wanted, and KEY.json, and gives back the sample's row of the index."""
    if not entry.path.is_file():
        raise BadVideo(NO_FILE)
    try:
        video = packer.store(entry.path, packing, entry.start_seconds, entry.end_seconds)
    except PermissionError as error:
        raise BadVideo(f"cannot be read ({error.strerror})") from None
    label = classes.index(entry.label) if classes else -1
    about = {
        "key": entry.key,
        **({"captions": entry.captions} if entry.captions else {"label": label, "class": entry.label}),
        "group": entry.group,
        "num_frames": video.num_frames,
        "fps": video.fps,
        "source": entry.name,
    }
    row = {
        "key": entry.key,
        "label": label,
        "group": entry.group,
        "num_frames": video.num_frames,
        "num_captions": len(entry.captions),
        "fps": video.fps,
        "video_offset": add_member(tar, f"{entry.key}.{video.suffix}", video.data),
        "video_size": len(video.data),
        "video_crc32": zlib.crc32(video.data),
    }
    if video.flow is not None:
        about |= {"flow": packing.flow, "flow_bound": packing.flow_bound}
        row |= {
            "flow_offset": add_member(tar, f"{entry.key}.flow.mp4", video.flow),
            "flow_size": len(video.flow),
            "flow_crc32": zlib.crc32(video.flow),
            "flow_bound": packing.flow_bound,
        }
    about_json = json.dumps(about).encode()
    return {
        **row,
        "json_offset": add_member(tar, f"{entry.key}.json", about_json),
        "json_size": len(about_json),
    }


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member without dates or owners and gives back the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return tar.offset - padded


def finish_packing(plan: Plan) -> DatasetInfo:
    """Writes rejected.jsonl, the index of each split and, last, dataset.json, from the records of all shards.

    Raises BadShards if no video at all could be stored.
    """
    store = open_store(plan.url)
    if has_file(store, DESCRIPTION):
        return read_dataset(store)
    splits: dict[str, tuple[Shard, ...]] = {}
    num_rejected = len(plan.missing)
    with store.written(REJECTED) as refusals:
        refusals.writelines(as_line(refusal(entry, NO_FILE)) for entry in plan.missing)
        for split in SPLITS:
            shards = []
            names = [shard.name for shard in plan.shards if shard.name.startswith(f"{split}-")]
            with written_index(store, split) as index:
                for name, record in zip(names, read_records(store, names), strict=True):
                    samples, rejected = record.pop("samples"), record.pop("rejected")
                    num_rejected += len(rejected)
                    refusals.writelines(map(as_line, rejected))
                    if samples:
                        shards.append(index.add(samples, name=name, **record))
            splits[split] = tuple(shards)
    if not any(splits.values()):
        raise BadShards(
            f"{plan.url}: none of the {num_rejected} listed videos could be stored; the reasons are in "
            f"{plan.url}/{REJECTED}"
        )
    info = DatasetInfo(
        classes=plan.classes,
        packing=plan.packing,
        splits=splits,
        plan=plan.digest,
        source=plan.source,
        rejected=num_rejected,
    )
    with store.written(DESCRIPTION) as file:
        file.write(info.to_json().encode())
    store.delete([*(record_name(shard.name) for shard in plan.shards), PLAN])
    return info


def refusal(entry: Entry, reason: str) -> dict[str, str]:
    return {"path": entry.name, "split": entry.split, "reason": reason}


def as_line(content: dict[str, str]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def read_records(store: Store, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of shards in their order, as many read at the same time as a store likes."""
    for content in store.read_files([record_name(shard) for shard in shards]):
        yield json.loads(content)


def record_name(shard: str) -> str:
    return f"{RECORDS}/{shard}.json"
