"""The index of a split: an Arrow IPC file with one record batch a shard and one row a sample.

A shard's rows are a range of its bytes, with a CRC-32 in dataset.json, so that they can be read and checked on their own.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from shards.dataset import Shard
from shards.store import Store

ARROW_MAGIC = b"ARROW1\0\0"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # -1 in a data set of captions
        ("group", pa.string()),
        ("num_frames", pa.int32()),
        ("num_captions", pa.int32()),  # in the JSON
        ("fps", pa.float32()),
        ("video_offset", pa.int64()),  # of the video's bytes in the tar
        ("video_size", pa.int64()),
        ("video_crc32", pa.uint32()),
        ("flow_offset", pa.int64()),  # of the optical flow's bytes; null, as the next three, where none was packed
        ("flow_size", pa.int64()),
        ("flow_crc32", pa.uint32()),
        ("flow_bound", pa.float32()),  # pixels that the largest byte stands for
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Where the optical flow of one video lies."""

    offset: int  # bytes from the shard's start to its first byte
    size_bytes: int
    crc32: int
    bound: float  # pixels that the largest byte stands for


class Sample(NamedTuple):  # one is made for each video that is read, and a tuple is made fastest
    """One row: where a video lies, and what is known of it without reading it."""

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
        """(samples + 1,) the captions before each sample, and those of all samples."""
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
    """Writes a split's index, one shard's rows at a time."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.writer = pa.ipc.new_file(file, SCHEMA)
        self.end = len(ARROW_MAGIC) + SCHEMA.serialize().size

    def add(self, samples: Sequence[dict[str, Any]], **shard: Any) -> Shard:
        """Appends the rows of a shard and returns its entry for dataset.json. shard: name, size_bytes, sha256."""
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
    """A writer of a split's index, which appears under its name when it is whole."""
    with store.written(index_name(split)) as file:
        index = IndexWriter(file)
        yield index
        index.writer.close()


def index_name(split: str) -> str:
    return f"{split}.index.arrow"
