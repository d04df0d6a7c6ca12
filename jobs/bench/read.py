"""Reading clips against the usual way and against the limit; without decoding; decode threads, memory, open files.

    ours         train_batches of our shards: random clips as yuv420p planes, one decode thread
    usual way    webdataset over a tar of the original videos, PyAV: seek, decode the clip, convert to RGB
    limit        libavcodec alone: the packets that ours must decode for the same clips, read from the videos beforehand,
                 in an open decoder

All are measured in turns, and ratios are medians of the turns. Seconds per core are those that all threads of the process
computed, so that waiting and other work on the machine do not count. webdataset runs in a process of its own, without our
settings.
"""

import io
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from jobs.bench.data import SMALL, make_small_videos, make_videos, pack
from jobs.bench.tables import Row, Tables
from shards.index import Index
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stages import ReadingOptions, keep_freed_memory, load, load_all, shards_held
from shards.reading.stream import train_batches, train_requests
from shards.video import Packing

WARM_BATCHES = 4  # read before the clock starts
MANY_BATCHES = 1000  # after these, memory must not grow


@dataclass(frozen=True, kw_only=True)
class ReadBench:
    """Random clips against webdataset + PyAV and against libavcodec alone; bytes, threads, memory."""

    videos: Path | None = None
    """Folder of CLASS/VIDEO. Default: synthetic H.264 clips of 320 x 240 are made."""
    num_videos: int = 24
    """Synthetic clips."""
    seconds: int = 10
    """Length of each of them."""
    frames: int = 10
    """Consecutive frames in a clip."""
    batch: int = 8
    """Clips in a batch."""
    batches: int = 24
    """Batches of ours in a turn; the usual way reads a quarter of the clips."""
    repeats: int = 7
    """Turns; the median counts."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of decode threads to compare."""
    small_videos: int = 200
    """Videos of 32 x 32 pixels, two in a shard, for small_batches."""
    small_batches: int = 10_000
    """Batches of their clips during which memory is measured."""
    json: Path | None = None
    """Write the tables as JSON to this file."""

    def __post_init__(self) -> None:
        counts = (self.num_videos, self.seconds, self.frames, self.batch, self.batches, self.repeats)
        if min(*counts, *self.threads, self.small_videos, self.small_batches) < 1:
            raise ValueError("all counts must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one item: seconds of the clock, and seconds that all threads of the process computed."""

    clock: float
    core: float


def bench_read(job: ReadBench) -> Tables:
    """Tables of clips, bytes, threads and memory, with targets."""
    with tempfile.TemporaryDirectory(prefix="grurcn-bench-") as name:
        folder = Path(name)
        videos = job.videos or make_videos(folder / "videos", job.num_videos, job.seconds)
        index = pack(videos, folder / "shards", Packing(), videos_per_shard=8)
        originals = plain_tar(videos, folder / "videos.tar")
        small_videos = make_small_videos(folder / "small-videos", job.small_videos)
        small = pack(small_videos, folder / "small", replace(SMALL, copy=True), videos_per_shard=100)
        many = pack(small_videos, folder / "many", SMALL, videos_per_shard=2)
        return {
            f"Random clips of {job.frames} frames, {len(index)} videos": compare_clips(index, originals, job),
            f"Bytes without decoding, samples of {size_of(index)}": compare_bytes(index, job),
            f"Bytes without decoding, samples of {size_of(small)}": compare_bytes(small, job),
            "Decode threads": compare_threads(index, job),
            f"Memory and open files, small clips in {len(many.shards)} shards": measure_memory(many, job),
        }


def size_of(index: Index) -> str:
    return f"{sum(shard.size_bytes for shard in index.shards) / len(index) / 1000:,.0f} kB"


def another_process() -> ProcessPoolExecutor:
    """A new Python process that shares nothing with this one."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@contextmanager
def one_core() -> Iterator[None]:
    """Binds this thread, and the threads and processes that it starts in the block, to one core.

    Two cores of a virtual machine are often halves of one: the same work takes longer when both compute.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measured(function: Callable[[], int]) -> Cost:
    """The cost of each item. function does the work and returns the number of items."""
    clock, core = time.perf_counter(), time.process_time()
    count = function()
    return Cost(clock=(time.perf_counter() - clock) / count, core=(time.process_time() - core) / count)


def in_turns(works: dict[str, Callable[[], Cost]], repeats: int) -> dict[str, list[Cost]]:
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            costs[name].append(work())
    return costs


def ratio(costs: dict[str, list[Cost]], slower: str, faster: str, of: str = "core") -> float:
    """How many times as fast `faster` is: the median of the turns."""
    pairs = zip(costs[slower], costs[faster], strict=True)
    return statistics.median(getattr(one, of) / getattr(other, of) for one, other in pairs)


def rates(costs: dict[str, list[Cost]], name: str) -> dict[str, float]:
    """Items a second, by the clock and per core."""
    return {
        "a second": 1 / statistics.median(cost.clock for cost in costs[name]),
        "a second and core": 1 / statistics.median(cost.core for cost in costs[name]),
    }


# Clips


def compare_clips(index: Index, originals: Path, job: ReadBench) -> list[Row]:
    clips = ClipConfig(num_frames=job.frames)
    limit, seeds = Limit(index, clips, job), iter(range(job.repeats))
    with one_core(), another_process() as other:
        works = {
            "ours": lambda: ours(index, clips, job, decode_threads=1),
            "usual way": lambda: other.submit(usual_way, originals, job, next(seeds)).result(),
            "limit": lambda: measured(limit.decode),
        }
        costs = in_turns(works, job.repeats)
    targets = {"ours": "", "usual way": "5 or more", "limit": "0.8 or more"}
    return [
        {
            "what": name,
            **rates(costs, name),
            "ours / this, per core": ratio(costs, name, "ours"),
            "target": targets[name],
        }
        for name in works
    ]


def ours(index: Index, clips: ClipConfig, job: ReadBench, decode_threads: int) -> Cost:
    """Cost of a clip, after the first batches."""
    reading = ReadingOptions(decode_threads=decode_threads)
    order = order_of(index, job.batch)
    with closing(train_batches(index, clips, order, rank=0, world_size=1, reading=reading)) as batches:
        for _ in range(WARM_BATCHES):
            next(batches)
        return measured(lambda: sum(len(batch) for _, batch in islice(batches, job.batches)))


def order_of(index: Index, batch: int) -> Order:
    return Order([shard.samples for shard in index.shards], min(batch, len(index)), seed=0)


def usual_way(tar: Path, job: ReadBench, seed: int) -> Cost:
    """Cost of a random RGB clip of the original videos, after webdataset has filled its shuffle buffer."""
    rng = np.random.default_rng(seed)

    def clip(sample: dict[str, Any]) -> np.ndarray:
        [data] = [value for key, value in sample.items() if not key.startswith("__") and key != "cls"]
        return rgb_clip(data, job.frames, rng)

    samples: Any = WebDataset([str(tar)], shardshuffle=False, empty_check=False)  # its methods have no types
    clips = iter(samples.repeat().shuffle(100).map(clip))
    next(clips)
    return measured(lambda: sum(1 for _ in islice(clips, max(1, job.batches * job.batch // 4))))


def rgb_clip(data: bytes, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8: consecutive frames from a random start; fewer if the video ends before."""
    with av.open(io.BytesIO(data), "r", metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.average_rate is not None
        assert stream.time_base is not None
        ticks = 1 / (stream.average_rate * stream.time_base)
        start = int((stream.start_time or 0) + int(rng.integers(max(1, stream.frames - num_frames + 1))) * ticks)
        container.seek(start, stream=stream)
        frames, found = deque[av.VideoFrame](maxlen=num_frames), 0
        for frame in container.decode(stream):  # from the key frame before `start` on
            frames.append(frame)
            found += frame.pts is None or frame.pts >= start
            if found == num_frames:
                break
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


class Limit:
    """The packets of the clips that `ours` reads in its turn, and a decoder for each video."""

    def __init__(self, index: Index, clips: ClipConfig, job: ReadBench):
        lanes = range(min(job.batch, len(index)))
        source = train_requests(index, clips, order_of(index, job.batch), lanes, (0, 0))
        first, count = WARM_BATCHES * len(lanes), job.batches * len(lanes)
        self.decoders: dict[str, VideoCodecContext] = {}
        self.clips: list[tuple[VideoCodecContext, list[av.Packet]]] = []
        for request in islice(source, first, first + count):
            [data] = load(index.shard_store, request).data
            with av.open(io.BytesIO(data), "r") as container:
                decoder = self.decoders.setdefault(request.sample.key, new_decoder(container.streams.video[0]))
                self.clips.append((decoder, packets_of(container, request.clip.frames)))

    def decode(self) -> int:
        for decoder, packets in self.clips:
            for packet in packets:
                decoder.decode(packet)
            decoder.decode(None)
            decoder.flush_buffers()
        return len(self.clips)


def new_decoder(stream: VideoStream) -> VideoCodecContext:
    decoder = VideoCodecContext.create("h264", "r")
    decoder.extradata = stream.codec_context.extradata
    decoder.thread_type, decoder.thread_count = "NONE", 1  # pyright: ignore[reportAttributeAccessIssue]
    return decoder


def packets_of(container: InputContainer, frames: np.ndarray) -> list[av.Packet]:
    """The packets from the last key frame before the clip to the clip's last frame, in the order of decoding."""
    packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts or 0 for packet in packets]
    shown = {time: number for number, time in enumerate(sorted(times))}
    numbers = [shown[time] for time in times]
    start = max(place for place, packet in enumerate(packets) if packet.is_keyframe and numbers[place] <= frames[0])
    stop = max(place for place, of in enumerate(numbers) if of <= frames[-1])
    return packets[start : stop + 1]


# Bytes


def compare_bytes(index: Index, job: ReadBench) -> list[Row]:
    clips, reading, lanes = ClipConfig(num_frames=1), ReadingOptions(), range(min(job.batch, len(index)))
    count = 4 * job.batches * job.batch
    tars = [f"{index.url}/{shard.name}" for shard in index.shards]
    keep_freed_memory()
    index.hold(shards_held(len(lanes)))

    def ours() -> Cost:
        source = train_requests(index, clips, order_of(index, job.batch), lanes, (0, 0))
        with closing(load_all(source, index, reading, len(lanes))) as items:
            next(items)
            return measured(lambda: sum(1 for _ in islice(items, count)))

    with another_process() as other:
        costs = in_turns({"ours": ours, "peer": lambda: other.submit(peer_bytes, tars, count).result()}, job.repeats)
    return [
        {
            "what": "ours: in random order, checked by CRC-32",
            **rates(costs, "ours"),
            "ours / this": 1.0,
            "per core": 1.0,
            "target": "",
        },
        {
            "what": "webdataset: one tar after the other",
            **rates(costs, "peer"),
            "ours / this": ratio(costs, "peer", "ours", of="clock"),
            "per core": ratio(costs, "peer", "ours"),
            "target": "3 or more",
        },
    ]


def peer_bytes(tars: list[str], count: int) -> Cost:
    """Cost of the bytes of a sample in webdataset."""
    samples = iter(WebDataset(tars, shardshuffle=False, empty_check=False).repeat())
    next(samples)
    return measured(lambda: sum(1 for _ in islice(samples, count)))


# Threads and memory


def compare_threads(index: Index, job: ReadBench) -> list[Row]:
    clips = ClipConfig(num_frames=job.frames)
    works = {f"{count} decode threads": partial(ours, index, clips, job, decode_threads=count) for count in job.threads}
    costs = in_turns(works, job.repeats)
    first = next(iter(works))
    return [
        {"what": name, **rates(costs, name), f"times {first}": ratio(costs, first, name, of="clock")} for name in works
    ]


def measure_memory(index: Index, job: ReadBench) -> list[Row]:
    """Resident memory of a process that only reads, after many batches and after many more, and its open files."""
    with another_process() as other:
        half_way, early, late, files = other.submit(memory_of, index.url, job).result()
    return [
        {"what": f"resident after {half_way:,} batches", "measured": f"{early / 2**20:.1f} MiB", "target": ""},
        {"what": f"resident after {job.small_batches:,} batches", "measured": f"{late / 2**20:.1f} MiB", "target": ""},
        {"what": "the second / the first", "measured": f"{late / early:.3f}", "target": "at most 1.05"},
        {"what": "files open at once, above those at the start", "measured": f"{files}", "target": "at most 70"},
    ]


def memory_of(shards: str, job: ReadBench) -> tuple[int, int, int, int]:
    """(batches, resident bytes after them, resident bytes after all batches, the most files open at once)"""
    index, process = Index(shards, "train"), psutil.Process()
    clips, order = ClipConfig(num_frames=4, size=16), order_of(index, job.batch)
    half_way = max(1, min(MANY_BATCHES, job.small_batches // 2))
    files_before, most_files, memory = process.num_fds(), 0, {}
    with closing(train_batches(index, clips, order, rank=0, world_size=1)) as batches:
        for number, _ in enumerate(islice(batches, job.small_batches), start=1):
            most_files = max(most_files, process.num_fds() - files_before)
            if number in (half_way, job.small_batches):
                memory[number] = process.memory_info().rss
    return half_way, memory[half_way], memory[job.small_batches], most_files


def plain_tar(videos: Path, tar: Path) -> Path:
    """A usual WebDataset tar of the original videos: KEY.mp4 (or another suffix) and KEY.cls."""
    with TarWriter(str(tar)) as writer:
        for number, path in enumerate(sorted(path for path in videos.glob("*/*") if path.is_file())):
            sample = {"__key__": f"{number:06}", path.suffix[1:].lower(): path.read_bytes(), "cls": path.parent.name}
            writer.write(sample)
    return tar
