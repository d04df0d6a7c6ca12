"""Order -> bytes -> clip batches: a webdataset pipeline whose source is ours.

    source      (epoch, step) by (epoch, step), which clip of which sample    order.py, clips.py: no I/O
    read        + the bytes of the video or of its flow, checked by CRC-32    at once what is in memory, the rest by many threads
    decode      + the clip's planes                                           one thread a core
    batch       -> ClipBatch                                                  these lanes' part of the global batch
    ahead       the stages above run this many batches ahead                  a thread

In evaluation, reading and decoding may also be done elsewhere, by other processes on other machines.

Samples travel as dicts, as in any webdataset pipeline; stages of a user's own go between decode and batch. Threads and
not processes: PyAV lets go of Python's lock while it decodes, nothing is forked inside a Ray worker, and the order of
samples is kept whatever the threads do.

B clips, T frames, N fields of flow, H x W the stored frames' size.
"""

import ctypes
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from webdataset.pipeline import DataPipeline
from zlib_ng.zlib_ng import crc32  # that of zlib, fourteen times as fast

from shards.index import Index
from shards.reading.clips import Clip, ClipConfig, evaluation_clips, evaluation_views, train_clips
from shards.reading.decode import read_flow, read_frames
from shards.reading.order import PADDING, WINDOW, Order, lanes_of
from shards.rows import Flow, Sample
from shards.store import BadShards, FolderStore, Store
from shards.threads import ahead, ordered_map
from shards.video import BadVideo, Stream

Batch = TypeVar("Batch")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT_BYTES, MOST_KEPT_BYTES = 2**25, 2**28  # of one piece (glibc takes no more), and at the end of an arena
DRAWN_AT_ONCE = 128  # samples of consecutive steps: step by step would take longer

Stage = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]
Source = Callable[[], Iterator[dict[str, Any]]]


class Elsewhere(Protocol):
    """Processes that read and decode samples in place of this one."""

    at_once: int  # how many samples

    def __call__(
        self, function: Callable[[Index, dict[str, Any]], dict[str, Any]], item: dict[str, Any]
    ) -> dict[str, Any]:
        """function(the index, item), computed there; several threads call it. Raises what the function raised."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Clips of stored frames, not yet cropped: what shards/ hands to the model. Padding has weight 0."""

    frames: Tensor  # (B, T, H * 3 // 2, W) uint8, yuv420p planes; of flow (B, N, 2H, W) uint8, u above v (flow.py)
    flow_bound: Tensor  # (B,) float32: pixels that the largest byte of flow means; 0 where there is none
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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much work and memory reading may take. It never changes what is read."""

    decode_threads: int = 2
    """Threads that decode videos, in each worker."""
    batches_ahead: int = 2
    """Batches that each worker decodes ahead of the one in use."""
    requests: int = 16
    """Videos that each worker reads from the shards at the same time; more for stores that answer slowly."""

    def __post_init__(self) -> None:
        if min(self.decode_threads, self.batches_ahead, self.requests) < 1:
            raise ValueError(
                f"decode_threads {self.decode_threads}, batches_ahead {self.batches_ahead}, requests {self.requests}: "
                "wanted at least 1 of each"
            )


def train_batches(
    index: Index,
    clips: ClipConfig,
    order: Order,
    *,
    rank: int,
    world_size: int,
    start: tuple[int, int] = (0, 0),
    reading: Reading | None = None,
    stages: Sequence[Stage] = (),
) -> Generator[tuple[tuple[int, int], ClipBatch], None, None]:
    """This rank's part of every global batch from (epoch, step) on, without end: ((epoch, step), its lanes' clips).

    Raises BadBatch if the workers do not divide the global batch, BadShards if the stream was not packed; while reading,
    BadShards with shard, key and offset.
    """
    index.check_stream(clips.stream)
    lanes = lanes_of(rank, world_size, order.global_batch)
    source = partial(train_source, index, clips, order, lanes, start)
    return clip_batches(source, index, len(lanes), reading or Reading(), stages)


def evaluation_batches(
    index: Index,
    clips: ClipConfig,
    *,
    global_batch: int,
    num_clips: int = 1,
    rank: int = 0,
    world_size: int = 1,
    reading: Reading | None = None,
    elsewhere: Elsewhere | None = None,
) -> Generator[tuple[tuple[int, int], ClipBatch], None, None]:
    """This rank's part of one pass over a split: every video once, `num_clips` equally spaced clips of each.

    A batch holds the clips of global_batch / world_size videos, video by video, centre view; all ranks get equally many
    batches, the last of them filled up with padding of weight 0.
    """
    index.check_stream(clips.stream)
    order = Order([shard.samples for shard in index.shards], global_batch, seed=None)
    lanes = lanes_of(rank, world_size, global_batch)
    source = partial(evaluation_source, index, clips, order, lanes, num_clips)
    return clip_batches(source, index, len(lanes), reading or Reading(), (), elsewhere)


def clip_batches(
    source: Source,
    index: Index,
    batch_size: int,
    reading: Reading,
    stages: Sequence[Stage],
    elsewhere: Elsewhere | None = None,
) -> Generator[tuple[tuple[int, int], ClipBatch], None, None]:
    """The pipeline: the samples of a source -> ((epoch, step), ClipBatch)."""
    keep_freed_memory()
    index.hold(shards_held(batch_size))
    if elsewhere:
        decoded = [partial(decode_elsewhere, function=read_and_decode, elsewhere=elsewhere, batch_size=batch_size)]
    else:
        decoded = [
            partial(read_videos, index=index, reading=reading, batch_size=batch_size),
            partial(decode_clips, index=index, reading=reading, batch_size=batch_size),
        ]
    yield from DataPipeline(
        source,
        *decoded,
        *stages,
        partial(batched, batch_size=batch_size, join=collate),
        partial(ahead, depth=reading.batches_ahead),
    )


def shards_held(lanes: int) -> int:
    """Shards whose rows are wanted again and again: each lane reads in one window, or in two while it goes to the next."""
    return 2 * WINDOW * lanes


def keep_freed_memory() -> None:
    """Has glibc keep what this process frees for what it takes next, instead of giving it back to the system at once.

    Each sample takes and frees a megabyte or more. From fresh pages, that takes as long as reading and checking it.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


def train_source(
    index: Index, clips: ClipConfig, order: Order, lanes: range, start: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Which clip of which sample each lane shows at each step, for ever."""
    packing, seed = index.info.packing, order.seed
    assert seed is not None
    for epoch, places, numbers in lane_numbers(order, lanes, start):
        samples = index.samples(numbers)
        frames = [sample.num_frames for sample in samples]
        drawn = train_clips(frames, packing.height, packing.width, clips, seed, epoch, numbers)
        for place, sample, clip in zip(places, samples, drawn, strict=True):
            yield {
                "__key__": sample.key,
                "place": place,
                "sample": sample,
                "part": part_of(sample, clips.stream),
                "clip": clip,
                "weight": 1.0,
            }


def lane_numbers(
    order: Order, lanes: range, start: tuple[int, int]
) -> Iterator[tuple[int, list[tuple[int, int]], list[int]]]:
    """(epoch, the places (epoch, step) of some consecutive steps, each as often as there are lanes, and the numbers that the
    lanes read there), from a place on, for ever."""
    epoch, step = start
    while True:
        steps = range(step, min(step + max(1, DRAWN_AT_ONCE // len(lanes)), order.steps_per_epoch))
        numbers = np.concatenate([order.samples(epoch, step, lanes) for step in steps]).tolist()
        yield epoch, [(epoch, step) for step in steps for _ in lanes], numbers
        epoch, step = (epoch, steps.stop) if steps.stop < order.steps_per_epoch else (epoch + 1, 0)


def evaluation_source(
    index: Index, clips: ClipConfig, order: Order, lanes: range, num_clips: int
) -> Iterator[dict[str, Any]]:
    """Every sample once, its clips laid end to end; padding repeats sample 0 with weight 0, so that shapes stay equal."""
    packing = index.info.packing
    [(box, mirror)] = evaluation_views(packing.height, packing.width, 1, clips)
    for step in range(order.steps_per_epoch):
        numbers = order.samples(0, step, lanes)
        for number, sample in zip(numbers, index.samples(np.maximum(0, numbers).tolist()), strict=True):
            frames = evaluation_clips(sample.num_frames, num_clips, clips)
            clip = Clip(frames=frames.reshape(-1), box=box, mirror=mirror, draw=0)
            weight = float(number != PADDING)
            yield {
                "__key__": sample.key, "place": (0, step), "sample": sample, "part": part_of(sample, clips.stream),
                "clip": clip, "weight": weight, "num_clips": num_clips,
            }  # fmt: skip


def part_of(sample: Sample, stream: Stream) -> Sample | Flow:
    """What of a sample is read for a stream: its video, or the video of its flow."""
    if stream == "rgb":
        return sample
    assert sample.flow is not None  # Index.check_stream
    return sample.flow


def read_videos(
    items: Iterator[dict[str, Any]], index: Index, reading: Reading, batch_size: int
) -> Generator[dict[str, Any], None, None]:
    """The same items, in order, each with its bytes: what is in memory at once, of others `requests` at the same time."""
    store, in_flight = index.shard_store, max(reading.requests, batch_size)
    yield from ordered_map(
        partial(read_video, store), items, reading.requests, in_flight, at_once=partial(is_in_memory, store)
    )


def is_in_memory(store: Store, item: dict[str, Any]) -> bool:
    """Whether reading an item's bytes takes microseconds, as the system holds them in memory."""
    part: Sample | Flow = item["part"]
    return isinstance(store, FolderStore) and store.in_memory(item["sample"].shard, part.offset, part.size_bytes)


def decode_clips(
    items: Iterator[dict[str, Any]], index: Index, reading: Reading, batch_size: int
) -> Generator[dict[str, Any], None, None]:
    """The same items, in order, each with its clip's planes: `decode_threads` of them are decoded at the same time."""
    in_flight = max(reading.decode_threads, batch_size)
    yield from ordered_map(partial(decode_clip, index), items, reading.decode_threads, in_flight)


def decode_elsewhere(
    items: Iterator[dict[str, Any]],
    function: Callable[[Index, dict[str, Any]], dict[str, Any]],
    elsewhere: Elsewhere,
    batch_size: int,
) -> Generator[dict[str, Any], None, None]:
    """function(index, item) of the same items, in order, computed by other processes."""
    yield from ordered_map(partial(elsewhere, function), items, elsewhere.at_once, max(elsewhere.at_once, batch_size))


def read_and_decode(index: Index, item: dict[str, Any]) -> dict[str, Any]:
    """Adds the clip's planes."""
    return decode_clip(index, read_video(index.shard_store, item))


def read_video(store: Store, item: dict[str, Any]) -> dict[str, Any]:
    """Adds the part's bytes. Raises BadShards with shard, key and offset if they are not those that were packed."""
    sample: Sample = item["sample"]
    part: Sample | Flow = item["part"]
    try:
        data = store.read(sample.shard, part.offset, part.size_bytes)
    except BadShards as error:
        raise BadShards(f"sample {sample.key}: {error}") from None
    if crc32(data) != part.crc32:
        raise BadShards(
            f"{store.url}/{sample.shard}: the {part.size_bytes} bytes at offset {part.offset} are not those of {sample.key} "
            "that were packed (CRC-32 differs); restore the shard, or pack again"
        )
    item["mp4"] = data
    return item


def decode_clip(index: Index, item: dict[str, Any]) -> dict[str, Any]:
    """Replaces the part's bytes by the clip's planes: (T, H * 3 // 2, W) uint8 of frames, (N, 2H, W) uint8 of flow."""
    sample: Sample = item["sample"]
    part: Sample | Flow = item["part"]
    clip: Clip = item["clip"]
    read = read_flow if isinstance(part, Flow) else read_frames
    try:
        planes = read(item.pop("mp4"), clip.frames.tolist(), index.info.packing)
    except BadVideo as error:
        raise BadShards(f"{sample.shard}: {sample.key} at offset {part.offset}: {error}") from None
    return {**item, "planes": planes}


def batched(
    items: Iterator[dict[str, Any]], batch_size: int, join: Callable[[Sequence[dict[str, Any]]], Batch]
) -> Iterator[tuple[tuple[int, int], Batch]]:
    """Joins `batch_size` samples of one step.

    Raises ValueError if a stage before it did not hand on each sample once, in order.
    """
    items = iter(items)
    while group := [item for _, item in zip(range(batch_size), items, strict=False)]:
        place = group[0]["place"]
        if len(group) < batch_size or any(item["place"] != place for item in group):
            raise ValueError(
                f"epoch {place[0]}, step {place[1]}: {batch_size} samples of this step are wanted, other ones came; "
                "a stage must hand on every sample once, in order"
            )
        yield place, join(group)


def collate(group: Sequence[dict[str, Any]]) -> ClipBatch:
    """Samples of one or several clips laid end to end."""
    num_clips = group[0].get("num_clips", 1)

    def column(values: Iterable[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).repeat_interleave(num_clips, dim=0)

    frames = torch.from_numpy(np.stack([item["planes"] for item in group]))
    return ClipBatch(
        frames=frames.reshape(len(group) * num_clips, -1, *frames.shape[2:]),
        flow_bound=column((bound_of(item["part"]) for item in group), torch.float32),
        box=column((item["clip"].box for item in group), torch.int64),
        mirror=column((item["clip"].mirror for item in group), torch.bool),
        label=column((item["sample"].label for item in group), torch.int64),
        weight=column((item["weight"] for item in group), torch.float32),
        draw=column((item["clip"].draw for item in group), torch.int64),
        sample=column((item["sample"].number for item in group), torch.int64),
    )


def bound_of(part: Sample | Flow) -> float:
    return part.bound if isinstance(part, Flow) else 0.0
