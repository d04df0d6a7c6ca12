"""Checks that a data set is what its index says. Each shard is read once, from its first byte to its last.

    rows            the CRC-32 of the shard's rows; keys, labels, frames and offsets that are possible
    tar             each video, flow and JSON is a member of its name and size, where the row says
    video, flow     its CRC-32; decoded to its last frame in a sandbox, the frames counted
    vectors         its CRC-32; shape and type, and that all numbers are finite
    JSON            key, label, frames and captions as in the row
    shard           its length and SHA-256

A fault stops nothing: what can still be read is checked as well. Memory does not grow with the number of samples.
"""

import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset import DESCRIPTION, DatasetInfo
from shards.index import Index
from shards.packing.annotation_files import VIDEO_SUFFIXES
from shards.packing.duplicates import Duplicates
from shards.packing.sandbox import Sandbox
from shards.packing.tar_reader import BadTar, TarReader, key_and_suffix, key_in_tar, padded
from shards.printable import printable
from shards.reading.vector_files import BadVectors, read_vectors, vectors_shape
from shards.rows import ARROW_MAGIC, SCHEMA, Rows, Sample, index_name
from shards.sample_json import BadSample, parse_captions, parse_object
from shards.store import REQUESTS, BadShards
from shards.threads import ordered_map
from shards.video import BadVideo, Limits, Packing

LONGEST_JSON = 64 * 2**20  # bytes
LONGEST_HEADER = 1024  # bytes, of vectors
NUMBERS = [name for name in SCHEMA.names if name not in ("key", "group") and not name.startswith("flow_")]
SAMPLES_AT_ONCE = 100  # reported together where nothing is decoded


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is not as it should be."""

    file: str
    key: str | None = None
    offset: int | None = None
    what: str

    def __str__(self) -> str:
        key = f" {printable(self.key)}" if self.key is not None else ""
        at = f" at offset {self.offset}" if self.offset is not None else ""
        return f"{printable(self.file)}:{key}{at}{':' if key or at else ''} {self.what}"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Some samples of a shard have been checked, or the rest of it."""

    samples: int = 0
    size_bytes: int = 0
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A member of a shard that a row points at."""

    sample: Sample
    kind: str  # "video", "vectors", "flow" or "json"
    offset: int
    size_bytes: int
    crc32: int | None

    def fault(self, what: str) -> Fault:
        return Fault(file=self.sample.shard, key=self.sample.key, offset=self.offset, what=f"{self.kind}: {what}")


# The description and the index


def check_description(info: DatasetInfo) -> Iterator[Fault]:
    """What dataset.json must not say, whatever the files are like."""
    names = Counter(shard.name for shards in info.splits.values() for shard in shards)
    for name, count in names.items():
        if count > 1:
            yield Fault(file=DESCRIPTION, what=f"the shard {printable(name)} is listed {count} times")
        if name.startswith("/") or ".." in name.split("/"):
            yield Fault(file=DESCRIPTION, what=f"the shard {printable(name)} lies outside of the data set's folder")
    if len(set(info.classes)) < len(info.classes):
        yield Fault(file=DESCRIPTION, what="two classes have the same name")


def check_index(index: Index) -> Iterator[Fault]:
    """The index file around its rows, and keys that come more than once in the split."""
    name = index_name(index.split)
    [size] = index.store.sizes([name])
    rows_end = max(shard.rows_offset + shard.rows_size for shard in index.shards)
    if size is None or size <= rows_end:
        state = "missing" if size is None else f"{size:,} bytes"
        yield Fault(
            file=name, what=f"{state}, its rows alone end at byte {rows_end:,}; restore the file, or pack again"
        )
        return
    ends = index.store.read(name, 0, len(ARROW_MAGIC)), index.store.read(name, size - 6, 6)
    if ends != (ARROW_MAGIC, ARROW_MAGIC[:6]):
        yield Fault(file=name, what="does not begin and end as an Arrow file does: it is damaged or cut off")
    with Duplicates() as keys:
        texts_of_shards = ordered_map(partial(keys_of, index), range(len(index.shards)), REQUESTS, REQUESTS)
        for number, texts in enumerate(texts_of_shards):
            start = int(index.starts[number])
            keys.add(texts, np.arange(start, start + len(texts)))
        for numbers in keys.found():
            first = index[numbers[0]]
            for other in map(index.__getitem__, numbers[1:]):
                what = f"another sample has the same key, in {printable(first.shard)} at offset {first.offset}"
                yield Fault(file=other.shard, key=other.key, offset=other.offset, what=what)


def keys_of(index: Index, number: int) -> list[str]:
    """The keys in a shard's rows; none if they cannot be read, which verify_shard reports."""
    try:
        keys = index.read_rows(number).texts["key"].to_pylist()
        return [str(key) for key in keys[: index.shards[number].samples]]
    except (ValueError, OSError, KeyError, MemoryError):
        return []


@lru_cache(maxsize=8)
def opened(url: str, split: str, digest: str) -> Index:
    """A split's index, kept from one shard to the next. The digest makes another one of a data set that has changed."""
    return Index(url, split)


# A shard


def verify_shard(url: str, split: str, digest: str, number: int, quick: bool, limits: Limits) -> Iterator[Checked]:
    """Checks one shard of a split, yielding as it goes; runs anywhere. `quick` decodes nothing."""
    index = opened(url, split, digest)
    waiting: list[Checked] = []
    with ExitStack() as until_done:
        sandbox = None if quick else until_done.enter_context(Sandbox(limits))
        folder = until_done.enter_context(tempfile.TemporaryDirectory(prefix="grurcn-verify-"))
        for checked in until_done.enter_context(closing(check_shard(index, number, sandbox, Path(folder) / "video"))):
            waiting.append(checked)
            if not quick or len(waiting) >= SAMPLES_AT_ONCE:
                yield joined(waiting)
                waiting.clear()
    yield joined(waiting)


def joined(checks: list[Checked]) -> Checked:
    return Checked(
        samples=sum(checked.samples for checked in checks),
        size_bytes=sum(checked.size_bytes for checked in checks),
        faults=tuple(fault for checked in checks for fault in checked.faults),
    )


def check_shard(index: Index, number: int, sandbox: Sandbox | None, video: Path) -> Generator[Checked, None, None]:
    """Checks a shard's rows, its samples one after the other, then the shard as a whole. `video` is a temporary file."""
    shard, info = index.shards[number], index.info
    rows, faults = read_rows(index, number)
    try:
        [size] = index.shard_store.sizes([shard.name])
    except BadShards as error:
        yield Checked(samples=shard.samples, faults=(*faults, Fault(file=shard.name, what=str(error))))
        return
    if size != shard.size_bytes:
        state = "missing" if size is None else f"{size:,} bytes"
        faults.append(Fault(file=shard.name, what=f"{state}, {DESCRIPTION} says {shard.size_bytes:,} bytes"))
    yield Checked(faults=tuple(faults))
    if size is None:
        yield Checked(samples=shard.samples)
        return
    checked = 0
    with closing(TarReader(index.shard_store, shard.name, size)) as reader:
        try:
            for row in range(len(rows.texts["key"]) if rows else 0):
                assert rows is not None
                sample = rows.sample(shard.name, int(index.starts[number]) + row, row)
                before, faults = reader.position, list(check_row(sample, info))
                for part in parts_of(sample, info):
                    faults += check_part(reader, part, info, sandbox, video)
                checked += 1
                yield Checked(samples=1, size_bytes=reader.position - before, faults=tuple(faults))
            before, faults = reader.position, []
            if reader.sha256() != shard.sha256:
                what = f"its bytes are not those that {DESCRIPTION} describes (SHA-256 differs)"
                faults.append(Fault(file=shard.name, what=f"{what}; restore it, or pack again"))
            yield Checked(samples=max(0, shard.samples - checked), size_bytes=size - before, faults=tuple(faults))
        except BadShards as error:  # of the store
            what = f"cannot be read to its end, and is not checked any further: {error}"
            fault = Fault(file=shard.name, offset=reader.position, what=what)
            yield Checked(samples=max(0, shard.samples - checked), faults=(fault,))


def read_rows(index: Index, number: int) -> tuple[Rows | None, list[Fault]]:
    """A shard's rows, if they can be read, and what is wrong with them as a whole."""
    shard = index.shards[number]

    def fault(what: str) -> list[Fault]:
        what = f"the rows of {printable(shard.name)}: {what}"
        return [Fault(file=index_name(index.split), offset=shard.rows_offset, what=what)]

    try:
        rows = index.read_rows(number)
    except BadShards as error:
        return None, fault(str(error))
    except (ValueError, OSError, KeyError, MemoryError) as error:
        return None, fault(f"not as packing writes them ({printable(repr(error))})")
    empty = [name for name, column in rows.texts.items() if column.null_count]
    empty += [name for name in NUMBERS if np.isnan(rows.columns[name]).any()]
    if empty:
        return None, fault(f"some have no {', '.join(empty)}")
    found = len(rows.texts["key"]), int(rows.columns["num_captions"].sum())
    if found != (shard.samples, shard.captions):
        return rows, fault(
            f"{found[0]} samples with {found[1]} captions, {DESCRIPTION} says {shard.samples} with {shard.captions}"
        )
    return rows, []


# A sample


def check_row(sample: Sample, info: DatasetInfo) -> Iterator[Fault]:
    """What a row must not say, whatever the shard is like."""

    def fault(what: str) -> Fault:
        return Fault(file=sample.shard, key=sample.key, offset=sample.offset, what=f"its row has {what}")

    labels = range(len(info.classes)) if info.classes else (-1,)
    if sample.label not in labels:
        yield fault(f"the label {sample.label}, there are {len(info.classes)} classes")
    if sample.num_frames < 1 or not sample.fps > 0:
        yield fault(f"{sample.num_frames} frames at {sample.fps:g} a second")
    if sample.size_bytes < 1 or (sample.json_size_bytes < 1 and not info.is_external):
        what = "vectors" if info.encoder is not None else "a video"
        yield fault(f"{what} of {sample.size_bytes} bytes and a JSON of {sample.json_size_bytes}")
    if (sample.flow is None) != (info.packing.flow == "none"):
        yield fault(f"{'no' if sample.flow is None else 'a'} flow, packed with flow {info.packing.flow}")


def parts_of(sample: Sample, info: DatasetInfo) -> list[Part]:
    """The members of a sample, in the order in which they lie."""
    kind = "video" if info.encoder is None else "vectors"
    parts = [
        Part(sample=sample, kind=kind, offset=sample.offset, size_bytes=sample.size_bytes, crc32=sample.crc32),
        Part(sample=sample, kind="json", offset=sample.json_offset, size_bytes=sample.json_size_bytes, crc32=None),
    ]
    if sample.flow is not None:
        flow = sample.flow
        parts.append(Part(sample=sample, kind="flow", offset=flow.offset, size_bytes=flow.size_bytes, crc32=flow.crc32))
    return sorted((part for part in parts if part.size_bytes), key=lambda part: part.offset)


def check_part(
    reader: TarReader, part: Part, info: DatasetInfo, sandbox: Sandbox | None, video: Path
) -> Iterator[Fault]:
    """Checks a member's header and bytes; the reader stands behind them then. Nothing is read twice."""
    missing = part.offset + part.size_bytes - reader.size_bytes
    if missing > 0:
        yield part.fault(f"the shard ends {missing:,} bytes before it does")
        return
    if part.offset < reader.position or part.size_bytes < 0:
        yield part.fault("its place is within what lies before it")
        return
    try:
        what = check_header(reader, part, info)
    except BadTar as error:
        what = str(error)
    if what is not None:
        yield part.fault(what)
    reader.skip_to(part.offset)
    match part.kind:
        case "json" if part.size_bytes > LONGEST_JSON:
            yield part.fault(f"{part.size_bytes:,} bytes")
        case "json":
            yield from map(part.fault, check_json(reader.read(part.size_bytes), part.sample, info))
        case "vectors":
            yield from map(part.fault, check_vectors(reader, part, info))
        case _:
            yield from map(part.fault, check_video(reader, part, info.packing, sandbox, video))


def check_header(reader: TarReader, part: Part, info: DatasetInfo) -> str | None:
    """Goes from the end of the part before to this one, which must be the next member, of the right name and size.

    Raises BadTar where a header on the way is none.
    """
    start = padded(reader.position)
    if start > part.offset:
        return "no member begins there"
    reader.skip_to(start)
    while True:
        member = reader.next_member(part.offset)
        if member is None:
            return "no member begins there"
        if member.offset == part.offset:
            break
        if member.end > part.offset:
            return f"it lies within the member {printable(member.name)}"
        reader.skip_to(member.end)
    if member.kind != "file" or member.size_bytes != part.size_bytes:
        return f"its header says: a {member.kind} of {member.size_bytes:,} bytes, its row {part.size_bytes:,}"
    return None if is_name_of(member.name, part, info) else f"the member there is {printable(member.name)}"


def is_name_of(name: str, part: Part, info: DatasetInfo) -> bool:
    """Whether a member of this name can be the part."""
    key, suffix = key_and_suffix(name)
    keys = (key, key_in_tar(part.sample.shard, key)) if info.is_external else (key,)
    match part.kind:
        case "video" if info.packing.copy:
            is_suffix = f".{suffix}" in VIDEO_SUFFIXES
        case "video":
            is_suffix = suffix == "mp4"
        case "vectors":
            is_suffix = suffix == "npy"
        case "flow":
            is_suffix = suffix == "flow.mp4"
        case _:
            is_suffix = suffix == "json" or (info.is_external and suffix == "txt")
    return is_suffix and part.sample.key in keys


def check_json(data: bytes, sample: Sample, info: DatasetInfo) -> Iterator[str]:
    """What KEY.json says that the row does not. In external tars only the captions are compared."""
    try:
        captions = parse_captions(data)
        content = {} if info.is_external else parse_object(data)
    except BadSample as error:
        yield f"cannot be read ({printable(str(error))})"
        return
    if len(captions) != sample.num_captions:
        yield f"{len(captions)} captions, its row says {sample.num_captions}"
    if info.is_external:
        return
    expected: dict[str, Any] = {"key": sample.key, "num_frames": sample.num_frames, "group": sample.group}
    if 0 <= sample.label < len(info.classes) and not sample.num_captions:
        expected |= {"label": sample.label, "class": info.classes[sample.label]}
    for name, value in expected.items():
        if content.get(name) != value:
            yield f"{name} {printable(repr(content.get(name)))}, its row says {printable(repr(value))}"


def check_vectors(reader: TarReader, part: Part, info: DatasetInfo) -> Iterator[str]:
    """Reads the vectors of a video, unless they are far too long, and checks each number."""
    assert info.encoder is not None
    shape = vectors_shape(part.sample, info.encoder)
    size = 4 * shape[0] * shape[1]
    if part.size_bytes > size + LONGEST_HEADER:
        yield f"{part.size_bytes:,} bytes; expected {size:,} behind a header"
        return
    data = reader.read(part.size_bytes)
    if zlib.crc32(data) != part.crc32:
        yield f"its {part.size_bytes:,} bytes are not those that were encoded (CRC-32 differs)"
        return
    try:
        read_vectors(data, shape)
    except BadVectors as error:
        yield str(error)


def check_video(reader: TarReader, part: Part, packing: Packing, sandbox: Sandbox | None, video: Path) -> Iterator[str]:
    """Reads a video, or the video of its flow, and decodes it to its last frame."""
    with video.open("wb") if sandbox else nullcontext() as file:
        crc32 = reader.copy(part.size_bytes, file)
    if crc32 != part.crc32:
        yield f"its {part.size_bytes:,} bytes are not those that were packed (CRC-32 differs)"
    elif sandbox is not None:
        pictures, height = ("frames", packing.height) if part.kind == "video" else ("fields", 2 * packing.height)
        try:
            found = sandbox.store(video, replace(packing, copy=True, flow="none", height=height)).num_frames
        except BadVideo as error:
            yield str(error)
            return
        if found != part.sample.num_frames:
            yield f"decodes to {found} {pictures}, its row says {part.sample.num_frames}"
