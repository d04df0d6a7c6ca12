"""Order -> bytes -> caption batches: what a captioning model sees of videos, and what people have said of them.

    source      (epoch, step) by (epoch, step), which caption of which video   order.py: no I/O but the index's rows
    read        + the bytes of the video, or of its vectors, and of its JSON   as in stream.py, by many threads
    decode      + the planes of its segments, or their vectors; captions       one thread a core
    batch       -> CaptionBatch                                                these lanes' part of the global batch
    ahead       the stages above run this many batches ahead                   a thread

In training each (video, caption) pair is shown once an epoch, in evaluation each video, with all its captions. A data set
holds videos, or the vectors that a fixed encoder has computed of their segments (encoded.py): both are read by this code.

B samples, K segments of a video, R frames that are read of each, D a vector's length, H x W the stored frames' size.
"""

import io
import json
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from webdataset.pipeline import DataPipeline

from shards.dataset import DatasetInfo
from shards.index import Index
from shards.reading.clips import segment_frames
from shards.reading.decode import read_frames
from shards.reading.order import CAPTION_OF_PAIR, PADDING, Order, lanes_of, random_rows
from shards.reading.stream import (
    Elsewhere,
    Reading,
    Source,
    batched,
    decode_elsewhere,
    keep_freed_memory,
    lane_numbers,
    read_video,
    shards_held,
)
from shards.rows import Sample
from shards.sample_json import BadSample, parse_captions
from shards.store import BadShards, FolderStore, Store
from shards.threads import ahead, ordered_map
from shards.video import BadVideo

# NumPy reads a header by Python's parser, of which two threads at once can raise SystemError in Python 3.11.
PARSING = threading.Lock()

Batches = Generator[tuple[tuple[int, int], "CaptionBatch"], None, None]


class BadVectors(ValueError):
    """Vectors that are not those of a video's segments. The message says what was found and what was wanted."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """What is read of each video. Where a data set holds vectors this was decided when they were computed."""

    num_segments: int  # K
    offsets: tuple[int, ...]  # of the R frames of a segment, counted from its start

    def __post_init__(self) -> None:
        if self.num_segments < 1:
            raise ValueError(f"num_segments {self.num_segments}: wanted at least 1")
        if not self.offsets or min(self.offsets) < 0:
            raise ValueError(f"offsets {self.offsets}: wanted at least one, and none below 0")


@dataclass(frozen=True, kw_only=True)
class CaptionBatch:
    """Videos as a captioning model sees them, and their captions. Padding has weight 0."""

    seen: Tensor  # (B, K, R, H * 3 // 2, W) uint8, yuv420p planes; of an encoded data set (B, K, D) float32 vectors
    segments: Tensor  # (B, K) bool: which of them the video has; planes of others repeat the last, vectors are zeros
    captions: tuple[tuple[str, ...], ...]  # of each sample: in training the one of its pair, in evaluation all
    weight: Tensor  # (B,) float32: 1, or 0 for padding
    draw: Tensor  # (B,) int64: 63 random bits of each pair in this epoch
    sample: Tensor  # (B,) int64: the video's number in its split
    keys: tuple[str, ...]  # of the videos

    def __len__(self) -> int:
        return len(self.weight)

    def to(self, device: torch.device) -> "CaptionBatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def split(self, parts: int) -> list["CaptionBatch"]:
        """Equal parts, in order, one for each accumulated step."""
        size = len(self) // parts
        return [
            CaptionBatch(**{field.name: getattr(self, field.name)[at : at + size] for field in fields(self)})
            for at in range(0, len(self), size)
        ]


def train_captions(
    index: Index,
    segments: Segments,
    order: Order,
    *,
    rank: int,
    world_size: int,
    start: tuple[int, int] = (0, 0),
    reading: Reading | None = None,
) -> Batches:
    """This rank's part of every global batch of pairs from (epoch, step) on, without end: ((epoch, step), its lanes' pairs).

    The order is over pairs: Order([shard.captions for shard in index.shards], ...). Raises BadBatch if the workers do not
    divide the global batch; while reading, BadShards with shard, key and offset.
    """
    lanes = lanes_of(rank, world_size, order.global_batch)
    source = partial(train_source, index, order, lanes, start)
    return caption_batches(source, index, segments, len(lanes), reading or Reading())


def evaluation_captions(
    index: Index,
    segments: Segments,
    *,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    reading: Reading | None = None,
    elsewhere: Elsewhere | None = None,
) -> Batches:
    """This rank's part of one pass over a split: every video once, with all its captions.

    All ranks get equally many batches, the last of them filled up with padding of weight 0.
    """
    order = Order([shard.samples for shard in index.shards], global_batch, seed=None)
    lanes = lanes_of(rank, world_size, global_batch)
    source = partial(evaluation_source, index, order, lanes)
    return caption_batches(source, index, segments, len(lanes), reading or Reading(), elsewhere)


def caption_batches(
    source: Source,
    index: Index,
    segments: Segments,
    batch_size: int,
    reading: Reading,
    elsewhere: Elsewhere | None = None,
) -> Batches:
    """The pipeline: the samples of a source -> ((epoch, step), CaptionBatch)."""
    keep_freed_memory()
    index.hold(shards_held(batch_size))
    if elsewhere:
        function = partial(read_and_decode, segments)
        decoded = [partial(decode_elsewhere, function=function, elsewhere=elsewhere, batch_size=batch_size)]
    else:
        decoded = [
            partial(read_samples, index=index, reading=reading, batch_size=batch_size),
            partial(decode_samples, index=index, segments=segments, reading=reading, batch_size=batch_size),
        ]
    yield from DataPipeline(
        source,
        *decoded,
        partial(batched, batch_size=batch_size, join=collate),
        partial(ahead, depth=reading.batches_ahead),
    )


def train_source(index: Index, order: Order, lanes: range, start: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Which caption of which video each lane shows at each step, for ever."""
    seed = order.seed
    assert seed is not None
    for epoch, places, numbers in lane_numbers(order, lanes, start):
        draws = (random_rows(1, seed, epoch, CAPTION_OF_PAIR, numbers)[:, 0] >> 1).tolist()
        for place, (sample, caption), draw in zip(places, index.pairs(numbers), draws, strict=True):
            yield {**item_of(sample), "place": place, "caption": caption, "weight": 1.0, "draw": draw}


def evaluation_source(index: Index, order: Order, lanes: range) -> Iterator[dict[str, Any]]:
    """Every video once; padding repeats video 0 with weight 0, so that shapes stay equal."""
    for step in range(order.steps_per_epoch):
        numbers = order.samples(0, step, lanes)
        for number, sample in zip(numbers, index.samples(np.maximum(0, numbers).tolist()), strict=True):
            weight = float(number != PADDING)
            yield {**item_of(sample), "place": (0, step), "caption": None, "weight": weight, "draw": 0}


def item_of(sample: Sample) -> dict[str, Any]:
    """A sample whose video, or whose vectors, are to be read."""
    return {"__key__": sample.key, "sample": sample, "part": sample}


# Bytes


def read_samples(
    items: Iterator[dict[str, Any]], index: Index, reading: Reading, batch_size: int
) -> Generator[dict[str, Any], None, None]:
    """The same items, in order, each with its bytes: what is in memory at once, of others `requests` at the same time."""
    store, in_flight = index.shard_store, max(reading.requests, batch_size)
    yield from ordered_map(
        partial(read_sample, store), items, reading.requests, in_flight, at_once=partial(is_in_memory, store)
    )


def is_in_memory(store: Store, item: dict[str, Any]) -> bool:
    """Whether reading an item's bytes takes microseconds, as the system holds them in memory."""
    sample: Sample = item["sample"]
    places = [(sample.offset, sample.size_bytes), (sample.json_offset, sample.json_size_bytes)]
    return isinstance(store, FolderStore) and all(
        store.in_memory(sample.shard, offset, size_bytes) for offset, size_bytes in places if size_bytes
    )


def read_sample(store: Store, item: dict[str, Any]) -> dict[str, Any]:
    """Adds the bytes of the video, or of its vectors, and those of its JSON. Raises BadShards as stream.read_video does."""
    item["json"] = read_json(store, item["sample"])
    return read_video(store, item)


def read_json(store: Store, sample: Sample) -> bytes:
    """The bytes of KEY.json; none where a sample of somebody's tar has no captions."""
    if not sample.json_size_bytes:
        return b""
    try:
        return store.read(sample.shard, sample.json_offset, sample.json_size_bytes)
    except BadShards as error:
        raise BadShards(f"sample {sample.key}: {error}") from None


def read_captions(store: Store, sample: Sample, is_json: bool = False) -> tuple[str, ...]:
    """A video's captions. is_json: they cannot be lines of a text, as in a KEY.txt of somebody's tar.

    Raises BadShards with shard, key and offset if they are not as many as the index says.
    """
    return checked_captions(store, sample, read_json(store, sample) if sample.num_captions else b"", is_json)


def checked_captions(store: Store, sample: Sample, data: bytes, is_json: bool) -> tuple[str, ...]:
    """The captions in the bytes of a KEY.json. Raises BadShards, as read_captions does."""
    if not sample.num_captions:
        return ()
    try:
        if is_json and not is_object(data):  # parse_captions would take each line for a caption
            raise BadSample("no JSON object")
        captions = parse_captions(data)
        if len(captions) != sample.num_captions:
            raise BadSample(f"{len(captions)} captions, the index says {sample.num_captions}")
    except BadSample as error:
        raise BadShards(
            f"{store.url}/{sample.shard}: the JSON of {sample.key} at offset {sample.json_offset} is not the one that was "
            f"packed ({error}); restore the shard, or pack again"
        ) from None
    return captions


def is_object(data: bytes) -> bool:
    """Whether bytes are a JSON object."""
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


# What is seen


def decode_samples(
    items: Iterator[dict[str, Any]], index: Index, segments: Segments, reading: Reading, batch_size: int
) -> Generator[dict[str, Any], None, None]:
    """The same items, in order, each with what is seen of it: `decode_threads` of them are decoded at the same time."""
    in_flight = max(reading.decode_threads, batch_size)
    yield from ordered_map(partial(decode_sample, index, segments), items, reading.decode_threads, in_flight)


def read_and_decode(segments: Segments, index: Index, item: dict[str, Any]) -> dict[str, Any]:
    """Adds what is seen of the video, and its captions."""
    return decode_sample(index, segments, read_sample(index.shard_store, item))


def decode_sample(index: Index, segments: Segments, item: dict[str, Any]) -> dict[str, Any]:
    """Replaces the bytes by "seen" (K, R, H * 3 // 2, W) uint8 or (K, D) float32, "segments" (K,) bool, and "captions"."""
    sample: Sample = item["sample"]
    is_json = not index.info.is_external
    captions = checked_captions(index.shard_store, sample, item["json"], is_json)
    data = item.pop("mp4")
    try:
        if index.info.encoder is None:
            seen, own = planes_of_segments(data, sample, segments, index.info)
        else:
            seen, own = padded_vectors(data, sample, index.info.encoder)
    except (BadVideo, BadVectors) as error:
        raise BadShards(f"{sample.shard}: {sample.key} at offset {sample.offset}: {error}") from None
    caption = item.get("caption")
    wanted = captions if caption is None else captions[caption : caption + 1]
    return {**item, "seen": seen, "segments": own, "captions": wanted}


def planes_of_segments(
    data: bytes, sample: Sample, segments: Segments, info: DatasetInfo
) -> tuple[np.ndarray, np.ndarray]:
    """A video's bytes -> (planes (K, R, H * 3 // 2, W) uint8, segments (K,) bool)"""
    frames, own = segment_frames(sample.num_frames, segments.num_segments, segments.offsets)
    planes = read_frames(data, frames.reshape(-1).tolist(), info.packing)
    return planes.reshape(*frames.shape, *planes.shape[1:]), own


def padded_vectors(data: bytes, sample: Sample, encoder: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of KEY.npy -> (vectors (K, D) float32, zeros where there is no segment, segments (K,) bool)"""
    shape = vectors_shape(sample, encoder)
    vectors = np.zeros((encoder["segments"], encoder["size"]), np.float32)
    vectors[: shape[0]] = read_vectors(data, shape)
    return vectors, np.arange(len(vectors)) < shape[0]


def vectors_shape(sample: Sample, encoder: dict[str, Any]) -> tuple[int, int]:
    """(how many segments the video has, a vector's length)"""
    return min(sample.num_frames, encoder["segments"]), encoder["size"]


def read_vectors(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The array of a KEY.npy: float32 of that shape, all of them finite. Raises BadVectors for anything else.

    Nothing is allocated for what the header may promise, and nothing unpickled.
    """
    start = header_of(shape)
    if data.startswith(start) and len(data) == len(start) + 4 * shape[0] * shape[1]:
        offset = len(start)
    else:
        offset = checked_offset(data, shape)
    vectors = np.frombuffer(data, "<f4", offset=offset).reshape(shape)
    if not np.isfinite(vectors).all():
        raise BadVectors("vectors that are not finite numbers")
    return vectors


@lru_cache(maxsize=64)
def header_of(shape: tuple[int, int]) -> bytes:
    """What np.save writes before float32 of that shape."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    return file.getvalue()


def checked_offset(data: bytes, shape: tuple[int, int]) -> int:
    """Where the numbers of a KEY.npy begin, whose header another version of NumPy may have written. Raises BadVectors."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        with PARSING:
            header = npy.read_array_header_1_0(file) if version == (1, 0) else None
    except (ValueError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise BadVectors(f"not a NumPy array ({str(error).splitlines()[0][:100]})") from None
    if header is None:
        raise BadVectors(f"a NumPy array of format version {version}: wanted (1, 0), as encoding writes it")
    found, is_fortran, dtype = header
    if found != shape or is_fortran or dtype != np.dtype("<f4"):
        order = ", in Fortran's order" if is_fortran else ""
        raise BadVectors(f"an array {found} of {dtype}{order}: wanted {shape} of float32")
    if len(data) - file.tell() != 4 * shape[0] * shape[1]:
        raise BadVectors(f"{len(data) - file.tell():,} bytes behind its header: wanted {4 * shape[0] * shape[1]:,}")
    return file.tell()


def collate(group: Sequence[dict[str, Any]]) -> CaptionBatch:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([item[name] for item in group], dtype=dtype)

    return CaptionBatch(
        seen=torch.from_numpy(np.stack([item["seen"] for item in group])),
        segments=torch.from_numpy(np.stack([item["segments"] for item in group])),
        captions=tuple(item["captions"] for item in group),
        weight=column("weight", torch.float32),
        draw=column("draw", torch.int64),
        sample=torch.tensor([item["sample"].number for item in group], dtype=torch.int64),
        keys=tuple(item["__key__"] for item in group),
    )
