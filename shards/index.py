"""What lies where: dataset.json describes a packed data set, one Arrow file a split says where each sample is.

    dataset.json          classes, counts, packing, every shard's size and SHA-256, where its rows lie, format version
    train.index.arrow     an Arrow IPC file: one record batch a shard, one row a sample
    train-000000.tar ...  plain WebDataset shards: KEY.mp4, KEY.flow.mp4 where flow was packed, KEY.json
    rejected.jsonl        videos that were listed and refused or missing, with the reason

They lie in a folder or an object store (store.py). A sample's number is its row in the split's index: shards in order, samples
in the order in which they lie there. A shard's rows are read when one of its samples is wanted, checked by their CRC-32,
and a bounded number of shards' rows is kept, so that nothing here grows with the number of samples.
"""

import hashlib
import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from shards.reading.clips import Stream
from shards.store import REQUESTS, BadShards, NoFile, Store, has, open_store
from shards.threads import ordered_map
from shards.video import Packing

FORMAT = "grurcn-shards"
FORMAT_VERSION = 3
DESCRIPTION, PLAN = "dataset.json", ".packing/plan"
REJECTED = "rejected.jsonl"
EXTERNAL = "webdataset"  # kind of source of a data set whose tars others wrote
SHARDS_HELD = 32  # of which the rows are kept, if nobody wants more
SHARDS_CHECKED = 256  # of which the rows are checked before a run, at most
ARROW_MAGIC = b"ARROW1\0\0"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # -1 in a data set of captions
        ("group", pa.string()),
        ("num_frames", pa.int32()),
        ("num_captions", pa.int32()),  # in its JSON
        ("fps", pa.float32()),
        ("video_offset", pa.int64()),  # of the video's bytes in the tar
        ("video_size", pa.int64()),
        ("video_crc32", pa.uint32()),
        ("flow_offset", pa.int64()),  # of the optical flow's bytes; null, as the next three, where none was packed
        ("flow_size", pa.int64()),
        ("flow_crc32", pa.uint32()),
        ("flow_bound", pa.float32()),  # pixels that its largest byte means
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar of a split."""

    name: str
    samples: int
    captions: int  # of all its samples
    size_bytes: int
    sha256: str
    rows_offset: int  # where its rows lie in the index: the bytes of one record batch
    rows_size: int
    rows_crc32: int


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Where the optical flow of one video lies."""

    offset: int  # bytes from the shard's start to its first byte
    size_bytes: int
    crc32: int
    bound: float  # pixels that its largest byte means


class Sample(NamedTuple):  # as one is made for each video that is read, and a tuple is made soonest
    """Where one video lies, and what is known of it without reading it."""

    number: int  # in the split, from 0
    key: str
    label: int  # -1 in a data set of captions
    group: str
    num_frames: int
    num_captions: int
    fps: float
    shard: str
    offset: int  # bytes from the shard's start to the video's first byte
    size_bytes: int
    crc32: int
    flow: Flow | None
    json_offset: int
    json_size_bytes: int


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """dataset.json."""

    classes: tuple[str, ...]  # none in a data set of captions
    packing: Packing
    splits: dict[str, tuple[Shard, ...]]
    plan: str  # digest of the listing and the settings that were packed
    source: dict[str, Any]
    rejected: int
    shards_at: str | None = None  # where the shards lie, if they were made elsewhere and only their index is here
    encoder: dict[str, Any] | None = None  # what has computed the vectors that lie there instead of videos (encoded.py)

    @property
    def is_external(self) -> bool:
        """Whether others wrote the tars: they were indexed, not packed."""
        return self.source.get("kind") == EXTERNAL

    def to_json(self) -> str:
        content = asdict(self)
        if self.encoder is None:  # sets of videos are described, and known by their digest, as before there were others
            del content["encoder"]
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **content}, indent=1) + "\n"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole description, and through it of every shard and row: what a run was trained on."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_dataset(store: Store) -> DatasetInfo:
    """Reads dataset.json. Raises BadShards if there is none, one of another format, or one that no packing has written."""
    path = f"{store.url}/{DESCRIPTION}"
    try:
        content = json.loads(store.read_file(DESCRIPTION))
    except NoFile:
        state = "its packing was not finished" if has(store, PLAN) else "nothing was packed there"
        raise BadShards(f"{path}: not found ({state}); pack videos with: python -m jobs.make_shards") from None
    except ValueError as error:
        if isinstance(error, BadShards):
            raise
        raise BadShards(f"{path}: not a JSON file ({error}); pack the videos again") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise BadShards(f"{path}: not the description of a packed data set (no format {FORMAT!r})")
    version = content.pop("version", None)
    if version != FORMAT_VERSION:
        raise BadShards(
            f"{path}: format version {version}, this program reads version {FORMAT_VERSION}; "
            "pack the videos again, or use the program that packed them"
        )
    try:
        return checked(
            DatasetInfo(
                **{
                    **content,
                    "classes": tuple(content["classes"]),
                    "packing": Packing(**content["packing"]),
                    "splits": {
                        split: tuple(Shard(**shard) for shard in shards) for split, shards in content["splits"].items()
                    },
                }
            )
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadShards(f"{path}: not as a packing writes it ({error!r}); restore the file, or pack again") from None


def checked(info: DatasetInfo) -> DatasetInfo:
    """The same. Raises ValueError, TypeError or AttributeError for numbers and texts that are none."""
    shards = [shard for split in info.splits.values() for shard in split]
    for text in (*info.classes, *(text for shard in shards for text in (shard.name, shard.sha256))):
        text.encode()  # as UTF-8
    for shard in shards:
        for number in (shard.samples, shard.captions, shard.size_bytes, shard.rows_offset, shard.rows_size):
            if not 0 <= number < 2**62:
                raise ValueError(f"{number} in {shard.name}")
    if info.encoder is not None:
        check_encoder(info.encoder)
    return info


def check_encoder(encoder: dict[str, Any]) -> None:
    """Raises ValueError unless it says what every reader of its vectors wants to know."""
    sizes = [encoder.get(name) for name in ("segments", "size")]
    if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(encoder.get("digest"), str):
        raise ValueError(
            f"an encoder with segments {sizes[0]!r}, size {sizes[1]!r} and digest {encoder.get('digest')!r}: wanted two "
            "numbers of at least 1, and a text"
        )


class Index:
    """One split of a packed data set: which samples there are and where their bytes lie. Safe to use from several threads."""

    def __init__(self, url: str | Path, split: str):
        """Opens a folder's or URL's split. Raises BadShards if it is not there, BadUrl for no place at all."""
        self.store = open_store(url)
        self.split = split
        self.info = read_dataset(self.store)
        self.shard_store = open_store(self.info.shards_at) if self.info.shards_at else self.store
        self.shards = self.info.splits.get(split, ())
        if not self.shards:
            found = ", ".join(name for name, shards in self.info.splits.items() if shards)
            raise BadShards(f"{self.url}: no samples in the split {split!r} (splits with samples: {found or 'none'})")
        self.starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.caption_starts = np.cumsum([0, *(shard.captions for shard in self.shards)])
        self.held: OrderedDict[int, Rows] = OrderedDict()
        self.most_held = SHARDS_HELD
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.store.url

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_captions(self) -> int:
        return int(self.caption_starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample of that number, 0 to len - 1. Raises BadShards if its row is damaged."""
        return self.samples([number])[0]

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of those numbers; rows that are not held are read side by side."""
        size = len(self)
        for number in numbers:
            if not 0 <= number < size:
                raise IndexError(f"sample {number} of {size}")
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        places = (np.asarray(numbers) - self.starts[shards]).tolist()
        rows = self.rows_of(shards.tolist())
        return [
            rows[shard].sample(self.shards[shard].name, number, place)
            for shard, number, place in zip(shards.tolist(), numbers, places, strict=True)
        ]

    def pairs(self, numbers: Sequence[int]) -> list[tuple[Sample, int]]:
        """(video, which of its captions) of each of those pairs, numbered from 0 to num_captions - 1: shard by shard, video by
        video, caption by caption.

        videos with 2, 0 and 3 captions:    pair  0 1   2 3 4
                                            video 0 0   2 2 2
                                          caption 0 1   0 1 2

        Raises BadShards if a shard's rows are damaged.
        """
        size = self.num_captions
        for number in numbers:
            if not 0 <= number < size:
                raise IndexError(f"pair {number} of {size}")
        shards = np.searchsorted(self.caption_starts, numbers, side="right") - 1
        rows_of = self.rows_of(shards.tolist())
        pairs = []
        for number, shard in zip(numbers, shards.tolist(), strict=True):
            starts, about = rows_of[shard].caption_starts, self.shards[shard]
            if starts[-1] != about.captions:
                raise BadShards(
                    f"{self.url}: {about.name} has {starts[-1]} captions by its rows, {about.captions} by {DESCRIPTION}; restore "
                    "the files, or pack again"
                )
            within = number - int(self.caption_starts[shard])
            row = int(np.searchsorted(starts, within, side="right")) - 1
            sample = rows_of[shard].sample(about.name, int(self.starts[shard]) + row, row)
            pairs.append((sample, within - int(starts[row])))
        return pairs

    def hold(self, shards: int) -> None:
        """From now on the rows of so many shards are kept, or of as many as before if that is more."""
        self.most_held = max(self.most_held, shards)

    def rows_of(self, shards: Sequence[int]) -> dict[int, "Rows"]:
        """The rows of each of these shards."""
        with self.lock:
            found = {shard: self.held[shard] for shard in shards if shard in self.held}
        missing = sorted(set(shards) - found.keys())
        if len(missing) > 1:
            with ThreadPoolExecutor(min(REQUESTS, len(missing))) as pool:
                found |= zip(missing, pool.map(self.read_rows, missing), strict=True)
        elif missing:
            found[missing[0]] = self.read_rows(missing[0])
        with self.lock:
            for shard in found:
                self.held[shard] = found[shard]
                self.held.move_to_end(shard)
            while len(self.held) > max(self.most_held, len(found)):
                self.held.popitem(last=False)
        return found

    def read_rows(self, number: int) -> "Rows":
        """A shard's rows. Raises BadShards if they are not those that dataset.json describes."""
        shard, name = self.shards[number], index_name(self.split)
        data = self.store.read(name, shard.rows_offset, shard.rows_size)
        if zlib.crc32(data) != shard.rows_crc32:
            raise BadShards(
                f"{self.url}/{name}: the {shard.rows_size:,} bytes at offset {shard.rows_offset:,} are not the rows of "
                f"{shard.name} that {DESCRIPTION} describes (CRC-32 differs): the file is damaged or of another packing; "
                "restore it, or pack again"
            )
        return Rows(pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(data)), SCHEMA))

    def check_videos(self) -> None:
        """Raises BadShards if there are vectors and no videos."""
        if self.info.encoder is not None:
            raise BadShards(
                f"{self.url}: holds vectors that an encoder computed (python -m jobs.encode), no videos; name the shards that "
                "jobs.make_shards wrote"
            )

    def check_stream(self, stream: Stream) -> None:
        """Raises BadShards if clips of this stream are wanted and were not packed."""
        self.check_videos()
        if stream == "flow" and self.info.packing.flow == "none":
            raise BadShards(
                f"{self.url}: packed without optical flow, clips of the stream {stream!r} are wanted; pack the videos "
                "again into another folder with: python -m jobs.make_shards --flow tvl1"
            )

    def check_classes(self) -> None:
        """Raises BadShards if the videos have no classes."""
        if not self.info.classes:
            raise BadShards(
                f"{self.url}: packed with captions and without classes; wanted videos with classes, as "
                "jobs.make_shards packs them from ucf101, hmdb51, kinetics, folder or csv"
            )

    def check_captions(self) -> None:
        """Raises BadShards unless every video has a caption. Of large data sets the rows of SHARDS_CHECKED shards are read."""
        if not self.num_captions:
            raise BadShards(
                f"{self.url}: no video of the split {self.split} has a caption; wanted videos with captions, as "
                "jobs.make_shards packs them from msvd"
            )
        first, without, looked_at, some = "", 0, 0, self.some_shards()
        for number, rows in zip(some, ordered_map(self.read_rows, some, REQUESTS, REQUESTS), strict=True):
            bare = np.flatnonzero(rows.columns["num_captions"] == 0)
            if len(bare) and not without:
                first = f"{rows.texts['key'][int(bare[0])]} in {self.shards[number].name}"
            without, looked_at = without + len(bare), looked_at + self.shards[number].samples
        if without:
            raise BadShards(
                f"{self.url}: {without:,} of {looked_at:,} videos of the split {self.split} have no caption, the first: "
                f"{first}; give each a caption, or leave these videos out, and pack again"
            )

    def check_files(self) -> None:
        """Raises BadShards unless every shard is there in its full length and the index is the one that was packed.

        Of large data sets the rows of SHARDS_CHECKED shards, as this is done before each run; all other rows, and the
        videos, are checked when they are read, and by `python -m jobs.inspect_shards verify`.
        """
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(self.read_rows, self.some_shards()))
        for shard, found in zip(
            self.shards, self.shard_store.sizes([shard.name for shard in self.shards]), strict=True
        ):
            if found != shard.size_bytes:
                state = "missing" if found is None else f"{found:,} bytes"
                raise BadShards(
                    f"{self.shard_store.url}/{shard.name}: {state}, the index wants {shard.size_bytes:,} bytes; "
                    "restore the file, or pack again"
                )

    def some_shards(self) -> list[int]:
        """Numbers of the shards whose rows are looked at before a run: all, or SHARDS_CHECKED of them."""
        return np.linspace(0, len(self.shards) - 1, min(len(self.shards), SHARDS_CHECKED)).astype(int).tolist()


class Rows:
    """The rows of one shard's samples, a column each, as they lie in the index."""

    def __init__(self, batch: pa.RecordBatch):
        self.texts = {name: batch.column(name) for name in ("key", "group")}
        columns = {
            field.name: batch.column(field.name).to_numpy(zero_copy_only=False)
            for field in SCHEMA
            if field.name not in self.texts
        }
        self.rows = np.empty(len(batch), [(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            self.rows[name] = column
        self.columns = {name: self.rows[name] for name in columns}  # views of the rows

    @cached_property
    def caption_starts(self) -> np.ndarray:
        """(samples + 1,) captions before each sample, and all."""
        return np.cumsum([0, *self.columns["num_captions"]])

    def sample(self, shard: str, number: int, row: int) -> Sample:
        """The sample in a row."""
        (
            label, frames, captions, fps, offset, size, crc32,
            flow_offset, flow_size, flow_crc32, bound, json_offset, json_size,
        ) = self.rows[row].item()  # fmt: skip
        flow = None
        if bound == bound:  # null is not a number, and not equal to itself
            flow = Flow(offset=int(flow_offset), size_bytes=int(flow_size), crc32=int(flow_crc32), bound=bound)
        key, group = self.texts["key"][row].as_py(), self.texts["group"][row].as_py()
        return Sample(
            number, key, label, group, frames, captions, fps, shard, offset, size, crc32, flow, json_offset, json_size
        )


class IndexWriter:
    """Writes a split's index, a shard's rows at a time."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.writer = pa.ipc.new_file(file, SCHEMA)
        self.end = len(ARROW_MAGIC) + SCHEMA.serialize().size

    def add(self, samples: Sequence[dict[str, Any]], **shard: Any) -> Shard:
        """Appends the rows of a shard and gives back what dataset.json says of it. shard: name, size_bytes, sha256."""
        self.writer.write_batch(pa.RecordBatch.from_pylist(list(samples), schema=SCHEMA))
        start, self.end = self.end, self.file.tell()
        self.file.seek(start)
        rows = self.file.read(self.end - start)
        captions = sum(sample["num_captions"] for sample in samples)
        return Shard(
            samples=len(samples),
            captions=captions,
            rows_offset=start,
            rows_size=len(rows),
            rows_crc32=zlib.crc32(rows),
            **shard,
        )


@contextmanager
def written_index(store: Store, split: str) -> Iterator[IndexWriter]:
    """The index of a split, to be written; it appears under its name when it is whole."""
    with store.written(index_name(split)) as file:
        index = IndexWriter(file)
        yield index
        index.writer.close()


def index_name(split: str) -> str:
    return f"{split}.index.arrow"
