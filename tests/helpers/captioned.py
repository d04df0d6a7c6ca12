"""Tiny captioned data sets for the tests, as videos and as vectors, and what is in them by the definition."""

import io
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from videos import listing_of, pack

from shards.index import Index
from shards.packing.entries import Entry, Listing
from shards.reading.captions import Segments
from shards.rows import SCHEMA, written_index
from shards.store import FolderStore
from shards.vectors import Encode, encode_shard, finish_encoding, open_encoding

SEGMENTS = Segments(num_segments=4, offsets=(0, 1, 3))
ENCODER = {"segments": 4, "size": 3, "digest": "abc", "parts": [{"kind": "frame", "source": "runs/x"}]}


def captioned(entries: Sequence[Entry], counts: Sequence[int]) -> Listing:
    """The same videos, with so many captions each and without classes."""
    return Listing(
        classes=(),
        entries=tuple(
            replace(entry, label="", captions=captions_of(entry.key, count))
            for entry, count in zip(entries, counts, strict=True)
        ),
    )


def captions_of(key: str, count: int) -> tuple[str, ...]:
    return tuple(f"{key} says sentence {number} «ä»" for number in range(count))


def captioned_set(
    folder: Path, frames: Sequence[int], counts: Sequence[int], splits: Sequence[str] = ("train",), **options: Any
) -> Path:
    """A packed data set of videos of so many frames and captions each."""
    listing = listing_of(folder / "videos", frames, splits)
    return pack(folder / "shards", captioned(listing.entries, counts), **options)


def mean_luma(planes: Tensor, segments: Tensor) -> Tensor:
    """planes (B, K, R, H * 3 // 2, W) -> (B, K, R): an encoder that sees how bright each frame is."""
    height = planes.shape[-2] * 2 // 3
    return planes[..., :height, :].double().mean(dim=(-2, -1)).float()


def encode(
    source: str | Path,
    out: str | Path,
    encoder: dict[str, Any] = ENCODER,
    network: Encode = mean_luma,
    **options: Any,
) -> list[str]:
    """Encodes in this process what is not encoded yet; the names of those shards."""
    encoding = open_encoding(source, out, encoder)
    segments = replace(SEGMENTS, num_segments=encoder["segments"])
    for shard in encoding.left:
        args = (encoding.source, encoding.out, shard, segments, encoder["size"], network)
        assert sum(encode_shard(*args, **options)) == shard.videos
    finish_encoding(encoding)
    return [shard.name for shard in encoding.left]


def wanted_frames(num_frames: int, segments: Segments) -> list[list[int]]:
    """The frames of each of a video's own segments."""
    starts = (
        [math.floor(k * num_frames / segments.num_segments) for k in range(segments.num_segments)]
        if num_frames >= segments.num_segments
        else list(range(num_frames))
    )
    return [[min(start + offset, num_frames - 1) for offset in segments.offsets] for start in starts]


def number_in(key: str) -> int:
    """Of a video that listing_of named."""
    return int(key.rpartition("_")[2])


def rewrite_member(folder: Path, split: str, number: int, data: bytes, **changes: Any) -> None:
    """Puts other bytes in the place of a video or of its vectors, as an encoder with a fault would have written them: their
    length and checksum fit."""
    index = Index(folder, split)
    sample = index[number]
    assert len(data) <= sample.size_bytes
    path = folder / sample.shard
    content = bytearray(path.read_bytes())
    content[sample.offset : sample.offset + len(data)] = data
    path.write_bytes(content)
    changes |= {"video_size": len(data), "video_crc32": zlib.crc32(data)}
    reindex(folder, split, {sample.key: changes})


def reindex(folder: Path, split: str, changes: dict[str, dict[str, Any]]) -> None:
    """Writes a split's index anew, with other values in the rows of some keys."""
    index, shards = Index(folder, split), []
    with written_index(FolderStore(folder), split) as file:
        for number, shard in enumerate(index.shards):
            rows = index.read_rows(number)
            columns = {**{name: text.to_pylist() for name, text in rows.texts.items()}, **rows.columns}
            samples = []
            for row in range(shard.samples):
                sample = {name: as_python(columns[name][row]) for name in SCHEMA.names}
                samples.append(sample | changes.get(sample["key"], {}))
            shards.append(file.add(samples, name=shard.name, size_bytes=shard.size_bytes, sha256=shard.sha256))
    description = folder / "dataset.json"
    content = json.loads(description.read_text())
    content["splits"][split] = [{name: getattr(shard, name) for name in shard.__slots__} for shard in shards]
    description.write_text(json.dumps(content))


def as_python(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def npy_of(array: np.ndarray, **options: Any) -> bytes:
    """The bytes that np.save writes."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()
