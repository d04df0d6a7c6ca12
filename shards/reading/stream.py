"""Order -> bytes -> clip batches, by the stages of stages.py.

    source      which clip of which sample        order.py, clips.py
    decode      the bytes of the video, or of its flow -> the clip's planes
    ...         stages of a user's own, as in any webdataset pipeline: each takes and yields DecodedClips
    collate     -> ClipBatch

B clips, T frames, N fields of flow, H x W the stored frames' size.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.index import Index
from shards.reading.clips import Clip, ClipConfig, evaluation_clips, evaluation_views, train_clips
from shards.reading.decode import read_flow, read_frames
from shards.reading.order import Order, lanes_of
from shards.reading.stages import (
    ByteRange,
    Loaded,
    Place,
    ReadingOptions,
    RemoteDecoder,
    batches,
    evaluation_steps,
    load_and_decode,
    training_steps,
)
from shards.rows import Flow, Sample
from shards.store import BadShards
from shards.video import BadVideo, Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """Which clip of which sample a batch shows."""

    place: Place
    sample: Sample
    part: Sample | Flow  # what of the sample is read: its video, or the video of its flow
    clip: Clip
    weight: float  # 1, or 0 for padding
    num_clips: int = 1  # that lie end to end in `clip`

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        return (ByteRange(self.part.offset, self.part.size_bytes, self.part.crc32),)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedClip:
    """A clip's pixels, not yet cropped."""

    request: ClipRequest
    planes: np.ndarray  # (T, H * 3 // 2, W) uint8 of frames, (N, 2H, W) uint8 of flow

    @property
    def place(self) -> Place:
        return self.request.place


Stage = Callable[[Iterator[DecodedClip]], Iterator[DecodedClip]]


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Clips of stored frames, not yet cropped: what shards/ gives to the model. Padding has weight 0."""

    frames: Tensor  # (B, T, H * 3 // 2, W) uint8, yuv420p planes; of flow (B, N, 2H, W) uint8, u above v (video.py)
    flow_bound: Tensor  # (B,) float32: pixels that the largest byte of flow stands for; 0 for frames
    box: Tensor  # (B, 4) int64: top, left, height, width of the part to cut out
    mirror: Tensor  # (B,) bool
    label: Tensor  # (B,) int64
    weight: Tensor  # (B,) float32: 1, or 0 for padding
    draw: Tensor  # (B,) int64: 63 random bits of each sample in this epoch
    sample: Tensor  # (B,) int64: the sample's number in its split

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> "ClipBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list["ClipBatch"]:
        """Equal parts, in order, one for each accumulated step."""
        size = len(self) // parts
        return [self.map(lambda tensor, at=at: tensor[at : at + size]) for at in range(0, len(self), size)]

    def map(self, function: Callable[[Tensor], Tensor]) -> "ClipBatch":
        return ClipBatch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


def train_batches(
    index: Index,
    clips: ClipConfig,
    order: Order,
    *,
    rank: int,
    world_size: int,
    start: Place = (0, 0),
    reading: ReadingOptions | None = None,
    stages: Sequence[Stage] = (),
) -> Generator[tuple[Place, ClipBatch], None, None]:
    """((epoch, step), its lanes' clips): this rank's part of every global batch from a place on, without end.

    Raises BadBatch if the workers do not divide the global batch, BadShards if the stream was not packed; while reading,
    BadShards with shard, key and offset.
    """
    index.check_stream(clips.stream)
    lanes = lanes_of(rank, world_size, order.global_batch)
    source = partial(train_requests, index, clips, order, lanes, start)
    return batches(source, index, decode_clip, collate, len(lanes), reading or ReadingOptions(), stages)


def evaluation_batches(
    index: Index,
    clips: ClipConfig,
    *,
    global_batch: int,
    num_clips: int = 1,
    rank: int = 0,
    world_size: int = 1,
    reading: ReadingOptions | None = None,
    remote: RemoteDecoder | None = None,
) -> Generator[tuple[Place, ClipBatch], None, None]:
    """This rank's part of one pass over a split: every video once, `num_clips` equally spaced clips of each.

    A batch holds the clips of global_batch / world_size videos, video by video, centre view. All ranks get equally many
    batches; the last one is filled up with padding of weight 0. Raises as train_batches does.
    """
    index.check_stream(clips.stream)
    order = Order([shard.samples for shard in index.shards], global_batch, seed=None)
    lanes = lanes_of(rank, world_size, global_batch)
    source = partial(evaluation_requests, index, clips, order, lanes, num_clips)
    return batches(source, index, decode_clip, collate, len(lanes), reading or ReadingOptions(), remote=remote)


def train_requests(index: Index, clips: ClipConfig, order: Order, lanes: range, start: Place) -> Iterator[ClipRequest]:
    """The clip that each lane shows at each step, without end."""
    packing, seed = index.info.packing, order.seed
    assert seed is not None
    for epoch, places, numbers in training_steps(order, lanes, start):
        samples = index.samples(numbers)
        frames = [sample.num_frames for sample in samples]
        drawn = train_clips(frames, packing.height, packing.width, clips, seed, epoch, numbers)
        for place, sample, clip in zip(places, samples, drawn, strict=True):
            part = part_of(sample, clips.stream)
            yield ClipRequest(place=place, sample=sample, part=part, clip=clip, weight=1.0)


def evaluation_requests(
    index: Index, clips: ClipConfig, order: Order, lanes: range, num_clips: int
) -> Iterator[ClipRequest]:
    """Every sample once, its clips laid end to end."""
    packing = index.info.packing
    [(box, mirror)] = evaluation_views(packing.height, packing.width, 1, clips)
    for place, sample, weight in evaluation_steps(index, order, lanes):
        frames = evaluation_clips(sample.num_frames, num_clips, clips)
        clip = Clip(frames=frames.reshape(-1), box=box, mirror=mirror, draw=0)
        part = part_of(sample, clips.stream)
        yield ClipRequest(place=place, sample=sample, part=part, clip=clip, weight=weight, num_clips=num_clips)


def part_of(sample: Sample, stream: Stream) -> Sample | Flow:
    """What of a sample is read for a stream: its video, or the video of its flow."""
    if stream == "rgb":
        return sample
    assert sample.flow is not None  # Index.check_stream
    return sample.flow


def read_clip(index: Index, sample: Sample, clip: Clip, stream: Stream) -> ClipBatch:
    """A batch of one clip. Raises BadShards with shard, key and offset if it cannot be read."""
    part = part_of(sample, stream)
    request = ClipRequest(place=(0, 0), sample=sample, part=part, clip=clip, weight=1.0)
    return collate([load_and_decode(decode_clip, index, request)])


def decode_clip(index: Index, loaded: Loaded[ClipRequest]) -> DecodedClip:
    """The clip's planes. Raises BadShards with shard, key and offset for a video that does not decode."""
    request = loaded.request
    read = read_flow if isinstance(request.part, Flow) else read_frames
    try:
        planes = read(loaded.data[0], request.clip.frames.tolist(), index.info.packing)
    except BadVideo as error:
        sample = request.sample
        raise BadShards(f"{sample.shard}: {sample.key} at offset {request.part.offset}: {error}") from None
    return DecodedClip(request=request, planes=planes)


def collate(group: Sequence[DecodedClip]) -> ClipBatch:
    """Samples of one or several clips laid end to end."""
    requests = [decoded.request for decoded in group]
    num_clips = requests[0].num_clips

    def column(values: Iterable[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).repeat_interleave(num_clips, dim=0)

    frames = torch.from_numpy(np.stack([decoded.planes for decoded in group]))
    return ClipBatch(
        frames=frames.reshape(len(group) * num_clips, -1, *frames.shape[2:]),
        flow_bound=column((flow_bound_of(request.part) for request in requests), torch.float32),
        box=column((request.clip.box for request in requests), torch.int64),
        mirror=column((request.clip.mirror for request in requests), torch.bool),
        label=column((request.sample.label for request in requests), torch.int64),
        weight=column((request.weight for request in requests), torch.float32),
        draw=column((request.clip.draw for request in requests), torch.int64),
        sample=column((request.sample.number for request in requests), torch.int64),
    )


def flow_bound_of(part: Sample | Flow) -> float:
    return part.bound if isinstance(part, Flow) else 0.0
