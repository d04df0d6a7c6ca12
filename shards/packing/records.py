"""A data set in the making: a record of each finished shard, and the files that make a data set of them.

    unfinished        the shards of a plan that have no record yet
    written_shard     a tar, then its record
    finish_dataset    all records -> rejected.jsonl, an index for each split and, last, dataset.json

Packing (pack.py), indexing of external tars (external.py) and encoding (vectors.py) share them. The files go to a folder or
an object store (store.py), where a file under its final name is complete. A shard is finished once its record is there.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from shards.dataset import DESCRIPTION, PLAN, REJECTED, DatasetInfo, Shard, read_dataset
from shards.packing.tar_reader import padded
from shards.rows import written_index
from shards.store import BadShards, NoFile, Store, has_file

RECORDS = ".packing"  # folder of the plan and the records while a data set is in the making
HALF_WRITTEN = re.compile(r"(^|/)\.[^/]+\.\d+\.partial$")  # as FolderStore.written calls it


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """A sample's row of the index (index.SCHEMA)."""

    key: str
    label: int | str | None  # -1 without classes; in the record of an external tar also a class's name, or nothing
    class_name: str | None = None  # of a label that is a number, in the record of an external tar
    group: str
    num_frames: int
    num_captions: int
    fps: float
    video_offset: int
    video_size: int
    video_crc32: int
    flow_offset: int | None = None
    flow_size: int | None = None
    flow_crc32: int | None = None
    flow_bound: float | None = None
    json_offset: int
    json_size: int


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A video that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a finished shard holds, and what was left out of it."""

    samples: Sequence[IndexRow]
    rejected: Sequence[Rejected]
    size_bytes: int
    sha256: str


def record_path(shard: str) -> str:
    """Where a shard's record lies; shards in folders have theirs beside the others."""
    return f"{RECORDS}/{quote(shard, safe='')}.json"


def write_record(store: Store, shard: str, record: ShardRecord) -> None:
    with store.written(record_path(shard)) as file:
        file.write(json.dumps(asdict(record)).encode())


def read_records(store: Store, shards: Sequence[str]) -> Iterator[ShardRecord]:
    """The records of shards in their order, as many read at the same time as a store likes."""
    for content in store.read_files([record_path(shard) for shard in shards]):
        record = upgrade_record(json.loads(content))
        yield ShardRecord(
            samples=[IndexRow(**sample) for sample in record.pop("samples")],
            rejected=[Rejected(**rejected) for rejected in record.pop("rejected")],
            **record,
        )


def upgrade_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record as this program writes it: older ones say "class" and have the split of what was rejected."""
    for sample in record["samples"]:
        if "class" in sample:
            sample["class_name"] = sample.pop("class")
    for rejected in record["rejected"]:
        rejected.pop("split", None)
    return record


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def unfinished(store: Store, shards: Sequence[T], digest: str, other: str, finished_digest: str = "") -> list[T]:
    """The shards of the plan with this digest that have no record yet; none if the data set is finished.

    Starts the plan if nothing is there, and deletes what a kill has left half-written. finished_digest: the digest in
    dataset.json, if it is not the same.

    Raises BadShards with the message `other` if the place holds another plan, BadShards or OSError if it cannot be written.
    """
    if has_file(store, DESCRIPTION):
        if read_dataset(store).plan != (finished_digest or digest):
            raise BadShards(other)
        store.delete(store.names(RECORDS))  # of a packing that was killed in its last moment
        return []
    try:
        found = store.read_file(PLAN).decode()
    except NoFile:
        found = digest
        with store.written(PLAN) as file:
            file.write(found.encode())
    if found != digest:
        raise BadShards(other)
    store.delete([name for name in store.names() if HALF_WRITTEN.search(name)])
    records = set(store.names(RECORDS))
    return [shard for shard in shards if record_path(shard.name) not in records]


@dataclass(frozen=True, kw_only=True)
class OpenShard:
    """A shard that is being written, and what its record will hold."""

    tar: tarfile.TarFile
    samples: list[IndexRow] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def add_member(self, name: str, data: bytes) -> int:
        """Appends a member without dates or owners; returns the offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        return self.tar.offset - padded(len(data))


@contextmanager
def written_shard(store: Store, name: str) -> Iterator[OpenShard]:
    """A shard to fill. When the block ends well, tar and record appear under their names, the record last.

    Of a shard without samples only the record is written.
    """
    with store.written(name) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            shard = OpenShard(tar=tar)
            yield shard
        size_bytes = file.tell()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    if not shard.samples:
        store.delete([name])
    record = ShardRecord(samples=shard.samples, rejected=shard.rejected, size_bytes=size_bytes, sha256=sha256)
    write_record(store, name, record)


@dataclass(kw_only=True)
class Contents:
    """What the records of a data set hold together."""

    splits: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    rejected: int = 0
    num_frames: int = 0


def finish_dataset(
    store: Store,
    shards: Mapping[str, Sequence[str]],
    describe: Callable[[Contents], DatasetInfo],
    *,
    missing: Iterable[tuple[str, Rejected]] = (),
    resolve: Callable[[str, str, ShardRecord], ShardRecord] = lambda split, shard, record: record,
    can_reject: bool = True,
) -> DatasetInfo:
    """Writes rejected.jsonl, the index of each split and, last, dataset.json; deletes the records.

    shards: {split: names of its shards}. missing: (split, video) that was listed and is in no shard. resolve: (split, shard,
    record) -> the record with the rows that go into the index. can_reject: whether rejected.jsonl is written.

    Raises BadShards if no sample is left.
    """
    if has_file(store, DESCRIPTION):
        return read_dataset(store)
    contents = Contents()
    with store.written(REJECTED) if can_reject else nullcontext(io.BytesIO()) as rejections:

        def reject(split: str, rejected: Rejected) -> None:
            contents.rejected += 1
            line = {"path": rejected.path, "split": split, "reason": rejected.reason}
            rejections.write(json.dumps(line).encode() + b"\n")

        for split, rejected in missing:
            reject(split, rejected)
        for split, names in shards.items():
            finished = []
            with written_index(store, split) as index:
                for name, record in zip(names, read_records(store, names), strict=True):
                    record = resolve(split, name, record)
                    for rejected in record.rejected:
                        reject(split, rejected)
                    contents.num_frames += sum(row.num_frames for row in record.samples)
                    if record.samples:
                        rows = [vars(row) for row in record.samples]
                        finished.append(index.add(rows, name=name, size_bytes=record.size_bytes, sha256=record.sha256))
            contents.splits[split] = tuple(finished)
    if not any(contents.splits.values()):
        raise BadShards(
            f"{store.url}: none of the {contents.rejected} videos can be used; the reasons are in {store.url}/{REJECTED}"
        )
    info = describe(contents)
    with store.written(DESCRIPTION) as file:
        file.write(info.to_json().encode())
    store.delete(store.names(RECORDS))
    return info
