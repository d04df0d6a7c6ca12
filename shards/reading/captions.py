"""Order -> bytes -> caption batches, by the stages of stages.py: what a captioning model sees of videos, and their captions.

    source      which caption of which video      order.py and the index's rows
    decode      the bytes of the video, or of its vectors, and of its JSON -> the planes of its segments, or vectors; captions
    collate     -> CaptionBatch

In training each (video, caption) pair is shown once an epoch; in evaluation each video, with all its captions. A data set
holds videos, or the vectors that an encoder computed of their segments (vector_files.py). Both are read here.

B samples, K segments of a video, R frames that are read of each, D a vector's length, H x W the stored frames' size.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shards.index import Index
from shards.reading.clips import segment_frames
from shards.reading.decode import read_frames
from shards.reading.order import CAPTION_OF_PAIR, Order, lanes_of, random_rows
from shards.reading.stages import (
    ByteRange,
    Loaded,
    Place,
    ReadingOptions,
    RemoteDecoder,
    batches,
    evaluation_steps,
    read_range,
    training_steps,
)
from shards.reading.vector_files import BadVectors, padded_vectors
from shards.rows import Sample
from shards.sample_json import BadSample, parse_captions, parse_object
from shards.store import BadShards
from shards.video import BadVideo, Packing

Batches = Generator[tuple[Place, "CaptionBatch"], None, None]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """What is read of each video. Where a data set holds vectors, this was decided when they were computed."""

    num_segments: int  # K
    offsets: tuple[int, ...]  # of the R frames of a segment, counted from its start

    def __post_init__(self) -> None:
        if self.num_segments < 1:
            raise ValueError(f"num_segments {self.num_segments}: expected at least 1")
        if not self.offsets or min(self.offsets) < 0:
            raise ValueError(f"offsets {self.offsets}: expected at least one, and none below 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionRequest:
    """Which video, or its vectors, a batch shows, and which of its captions."""

    sample: Sample
    place: Place = (0, 0)
    caption: int | None = None  # None: all
    weight: float = 1.0  # or 0 for padding
    draw: int = 0

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        """The JSON, and the video or its vectors."""
        return (json_range(self.sample), ByteRange(self.sample.offset, self.sample.size_bytes, self.sample.crc32))


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedVideo:
    """What a captioning model sees of a video, and its captions."""

    request: CaptionRequest
    seen: np.ndarray  # (K, R, H * 3 // 2, W) uint8 planes, or (K, D) float32 vectors
    segments: np.ndarray  # (K,) bool: which of them the video has
    captions: tuple[str, ...]  # the one that was requested, or all
    json: bytes  # as it lies in the shard

    @property
    def place(self) -> Place:
        return self.request.place


@dataclass(frozen=True, kw_only=True)
class CaptionBatch:
    """Videos as a captioning model sees them, and their captions. Padding has weight 0."""

    seen: Tensor  # (B, K, R, H * 3 // 2, W) uint8, yuv420p planes; of an encoded data set (B, K, D) float32 vectors
    segments: Tensor  # (B, K) bool: which of them the video has; of the others planes repeat the last, vectors are 0
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
    start: Place = (0, 0),
    reading: ReadingOptions | None = None,
) -> Batches:
    """((epoch, step), its lanes' pairs): this rank's part of every global batch of pairs from a place on, without end.

    The order is over pairs: Order([shard.captions for shard in index.shards], ...). Raises BadBatch if the workers do not
    divide the global batch; while reading, BadShards with shard, key and offset.
    """
    lanes = lanes_of(rank, world_size, order.global_batch)
    source = partial(train_requests, index, order, lanes, start)
    decode = partial(decode_video, segments)
    return batches(source, index, decode, collate, len(lanes), reading or ReadingOptions())


def evaluation_captions(
    index: Index,
    segments: Segments,
    *,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    reading: ReadingOptions | None = None,
    remote: RemoteDecoder | None = None,
) -> Batches:
    """This rank's part of one pass over a split: every video once, with all its captions.

    All ranks get equally many batches; the last one is filled up with padding of weight 0.
    """
    order = Order([shard.samples for shard in index.shards], global_batch, seed=None)
    lanes = lanes_of(rank, world_size, global_batch)
    source = partial(evaluation_requests, index, order, lanes)
    decode = partial(decode_video, segments)
    return batches(source, index, decode, collate, len(lanes), reading or ReadingOptions(), remote=remote)


def train_requests(index: Index, order: Order, lanes: range, start: Place) -> Iterator[CaptionRequest]:
    """The caption that each lane shows at each step, without end."""
    seed = order.seed
    assert seed is not None
    for epoch, places, numbers in training_steps(order, lanes, start):
        draws = (random_rows(1, seed, epoch, CAPTION_OF_PAIR, numbers)[:, 0] >> 1).tolist()
        for place, (sample, caption), draw in zip(places, index.pairs(numbers), draws, strict=True):
            yield CaptionRequest(sample=sample, place=place, caption=caption, draw=draw)


def evaluation_requests(index: Index, order: Order, lanes: range) -> Iterator[CaptionRequest]:
    """Every video once, with all its captions."""
    for place, sample, weight in evaluation_steps(index, order, lanes):
        yield CaptionRequest(sample=sample, place=place, weight=weight)


def json_range(sample: Sample) -> ByteRange:
    """Where KEY.json lies, or what else holds a sample's captions."""
    return ByteRange(sample.json_offset, sample.json_size_bytes)


def read_captions(index: Index, sample: Sample) -> tuple[str, ...]:
    """A video's captions. Raises BadShards with shard, key and offset if they are not as many as the index says."""
    if not sample.num_captions:
        return ()
    return captions_of(index, sample, read_range(index.shard_store, sample, json_range(sample)))


def captions_of(index: Index, sample: Sample, data: bytes) -> tuple[str, ...]:
    """The captions in the bytes of a KEY.json. Raises BadShards, as read_captions does."""
    if not sample.num_captions:
        return ()
    try:
        if not index.info.is_external:  # where a KEY.txt may hold them, one a line
            parse_object(data)
        captions = parse_captions(data)
        if len(captions) != sample.num_captions:
            raise BadSample(f"{len(captions)} captions, the index says {sample.num_captions}")
    except BadSample as error:
        raise BadShards(
            f"{index.shard_store.url}/{sample.shard}: the JSON of {sample.key} at offset {sample.json_offset} is not the one "
            f"that was packed ({error}); restore the shard, or pack again"
        ) from None
    return captions


def decode_video(segments: Segments, index: Index, loaded: Loaded[CaptionRequest]) -> CaptionedVideo:
    """What is seen of a video, and its captions. Raises BadShards with shard, key and offset for what cannot be decoded."""
    request, (json, data) = loaded.request, loaded.data
    sample, encoder = request.sample, index.info.encoder
    captions = captions_of(index, sample, json)
    try:
        if encoder is None:
            seen, own = planes_of_segments(data, sample, segments, index.info.packing)
        else:
            seen, own = padded_vectors(data, sample, encoder)
    except (BadVideo, BadVectors) as error:
        raise BadShards(f"{sample.shard}: {sample.key} at offset {sample.offset}: {error}") from None
    if request.caption is not None:
        captions = captions[request.caption : request.caption + 1]
    return CaptionedVideo(request=request, seen=seen, segments=own, captions=captions, json=json)


def planes_of_segments(
    data: bytes, sample: Sample, segments: Segments, packing: Packing
) -> tuple[np.ndarray, np.ndarray]:
    """A video's bytes -> (planes (K, R, H * 3 // 2, W) uint8, segments (K,) bool)."""
    frames, own = segment_frames(sample.num_frames, segments.num_segments, segments.offsets)
    planes = read_frames(data, frames.reshape(-1).tolist(), packing)
    return planes.reshape(*frames.shape, *planes.shape[1:]), own


def collate(group: Sequence[CaptionedVideo]) -> CaptionBatch:
    requests = [video.request for video in group]
    samples = [request.sample for request in requests]
    return CaptionBatch(
        seen=torch.from_numpy(np.stack([video.seen for video in group])),
        segments=torch.from_numpy(np.stack([video.segments for video in group])),
        captions=tuple(video.captions for video in group),
        weight=torch.tensor([request.weight for request in requests], dtype=torch.float32),
        draw=torch.tensor([request.draw for request in requests], dtype=torch.int64),
        sample=torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        keys=tuple(sample.key for sample in samples),
    )
