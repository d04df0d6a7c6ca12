"""Entries -> WebDataset shards, their index and dataset.json.

    plan_packing      listing + settings -> which entries go into which shard (shuffled with a seed)
    pack_shard        one shard's entries -> TAR + its record; runs anywhere, as often as needed
    finish_packing    all records -> index, rejected.jsonl, dataset.json

Each output is written under a temporary name, flushed to disk and renamed, so a file under its final name is complete.
A shard counts as finished once its record is there. Packing the same plan again gives the same bytes.
"""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from shards.flow import flow_between
from shards.index import SCHEMA, BadShards, DatasetInfo, Shard, file_sha256, index_path, read_dataset
from shards.sources import SPLITS, Entry, Listing
from shards.video import BadVideo, Packing, store_video

NO_FILE = "listed, but there is no such file"
RECORDS = ".packing"  # folder of the records of finished shards, while a packing is under way


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What goes into one shard."""

    name: str
    entries: tuple[Entry, ...]
    packing: Packing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole packing, before any video has been opened."""

    folder: Path
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
    folder: Path, listing: Listing, packing: Packing, videos_per_shard: int, seed: int, source: dict[str, Any]
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
        folder=folder,
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
            size = entry.path.stat().st_size
            digest.update(json.dumps([entry.name, entry.key, entry.label, entry.group, size]).encode())
    return digest.hexdigest()


def open_target(plan: Plan) -> list[ShardPlan]:
    """Makes the folder ready for the plan and gives back the shards that are still to be packed.

    Raises BadShards if the folder holds another packing, OSError if it cannot be written.
    """
    if (plan.folder / "dataset.json").exists():
        if read_dataset(plan.folder).plan != plan.digest:
            raise BadShards(other_packing(plan.folder))
        shutil.rmtree(plan.folder / RECORDS, ignore_errors=True)  # of a packing that was killed in its last moment
        return []
    records = plan.folder / RECORDS
    records.mkdir(parents=True, exist_ok=True)
    for leftover in [*plan.folder.glob(".*.partial"), *records.glob(".*.partial")]:
        leftover.unlink()  # of a packing that was killed
    of_plan = records / "plan"
    if not of_plan.exists():
        with written(of_plan) as file:
            file.write(plan.digest.encode())
    if of_plan.read_text() != plan.digest:
        raise BadShards(other_packing(plan.folder))
    return [shard for shard in plan.shards if not record_path(plan.folder, shard.name).exists()]


def other_packing(folder: Path) -> str:
    return (
        f"{folder}: holds shards of other videos or other settings than these; "
        "choose another folder, or delete this one to pack it anew"
    )


def pack_shard(folder: Path, shard: ShardPlan, classes: Sequence[str]) -> Iterator[Progress]:
    """Writes one shard and its record, yielding after each video.

    A video that is missing or does not decode to its last frame is left out, named with its reason in the record.
    Raises OSError if the disk is full or a folder cannot be written; nothing half-written stays under a final name.
    """
    samples: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    tar_path = folder / shard.name
    with written(tar_path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for entry in shard.entries:
            try:
                samples.append(add_sample(tar, entry, shard.packing, classes))
                yield Progress(name=entry.name)
            except BadVideo as error:
                rejected.append(refusal(entry, str(error)))
                yield Progress(name=entry.name, refused=str(error))
    record = {"name": shard.name, "samples": samples, "rejected": rejected, "sha256": file_sha256(tar_path)}
    record["size_bytes"] = tar_path.stat().st_size
    if not samples:
        tar_path.unlink()
    with written(record_path(folder, shard.name)) as file:
        file.write(json.dumps(record).encode())


def add_sample(tar: tarfile.TarFile, entry: Entry, packing: Packing, classes: Sequence[str]) -> dict[str, Any]:
    """Appends KEY.mp4, KEY.flow.mp4 if wanted, and KEY.json, and gives back the sample's row of the index."""
    if not entry.path.is_file():
        raise BadVideo(NO_FILE)
    try:
        video = store_video(entry.path, packing)
    except PermissionError as error:
        raise BadVideo(f"cannot be read ({error.strerror})") from None
    label = classes.index(entry.label)
    about = {
        "key": entry.key,
        "label": label,
        "class": entry.label,
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
    if (plan.folder / "dataset.json").exists():
        return read_dataset(plan.folder)
    splits: dict[str, tuple[Shard, ...]] = {}
    num_rejected = len(plan.missing)
    with written(plan.folder / "rejected.jsonl") as refusals:
        refusals.writelines(as_line(refusal(entry, NO_FILE)) for entry in plan.missing)
        for split in SPLITS:
            shards = []
            with written(index_path(plan.folder, split)) as file, pa.ipc.new_file(file, SCHEMA) as rows:
                for record in read_records(plan, split):
                    samples, rejected = record.pop("samples"), record.pop("rejected")
                    num_rejected += len(rejected)
                    refusals.writelines(map(as_line, rejected))
                    if samples:
                        rows.write_batch(pa.RecordBatch.from_pylist(samples, schema=SCHEMA))
                        shards.append(Shard(samples=len(samples), **record))
            splits[split] = tuple(shards)
    if not any(splits.values()):
        raise BadShards(
            f"{plan.folder}: none of the {num_rejected} listed videos could be stored; the reasons are in "
            f"{plan.folder / 'rejected.jsonl'}"
        )
    info = DatasetInfo(
        classes=plan.classes,
        packing=plan.packing,
        splits=splits,
        index_sha256={split: file_sha256(index_path(plan.folder, split)) for split in SPLITS},
        plan=plan.digest,
        source=plan.source,
        rejected=num_rejected,
    )
    with written(plan.folder / "dataset.json") as file:
        file.write(info.to_json().encode())
    shutil.rmtree(plan.folder / RECORDS)
    return info


def refusal(entry: Entry, reason: str) -> dict[str, str]:
    return {"path": entry.name, "split": entry.split, "reason": reason}


def as_line(content: dict[str, str]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def read_records(plan: Plan, split: str) -> Iterator[dict[str, Any]]:
    """The records of a split's shards, one at a time, in the shards' order."""
    for shard in plan.shards:
        if shard.name.startswith(f"{split}-"):
            yield json.loads(record_path(plan.folder, shard.name).read_text())


def record_path(folder: Path, shard_name: str) -> Path:
    return folder / RECORDS / f"{shard_name}.json"


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears as `path` only when the block ends well: flushed to disk, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, "no space left on the device; make room and run the same again", str(path)
            ) from None
        raise
