"""Packing against the bare ffmpeg program with the same files, size, x264 options and cores; and its peak memory.

ours      pack_shard, one task a core: a process decodes and checks every frame, ffmpeg encodes, tar, hashes
ffmpeg    decodes, scales and encodes each file, one program a core
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from jobs.bench.data import ffmpeg, make_videos, pack
from jobs.bench.tables import Row, Tables
from jobs.memory import PeakMemory
from shards.packing.annotation_files import video_files
from shards.video import Packing


@dataclass(frozen=True, kw_only=True)
class PackBench:
    """Packing against the bare ffmpeg program, and its peak memory for four times the videos."""

    videos: Path | None = None
    """Folder of CLASS/VIDEO. Default: synthetic H.264 clips of 320 x 240 are made."""
    num_videos: int = 24
    """Synthetic clips."""
    seconds: int = 8
    """Length of each of them."""
    cores: int = os.cpu_count() or 1
    """Videos to pack at the same time."""
    repeats: int = 5
    """Measurements of each, in turns; the median counts."""
    json: Path | None = None
    """Write the tables as JSON to this file."""

    def __post_init__(self) -> None:
        if min(self.num_videos, self.seconds, self.cores, self.repeats) < 1:
            raise ValueError("all counts must be at least 1")


def bench_pack(job: PackBench) -> Tables:
    """Videos a second of both, and the memory of ours."""
    with tempfile.TemporaryDirectory(prefix="grurcn-bench-") as name:
        folder = Path(name)
        videos = job.videos or make_videos(folder / "videos", job.num_videos, job.seconds)
        files = video_files(videos)
        numbers = count()
        works = {
            "ours": lambda: pack_on(videos, folder / f"packed{next(numbers)}", job.cores),
            "ffmpeg": lambda: encode(files, folder / f"encoded{next(numbers)}", job.cores),
        }
        title = f"{len(files)} videos -> 340 x 256, {job.cores} at a time"
        return {title: compare(works, len(files), job.repeats), "Memory of packing": memory(videos, folder, job)}


def compare(works: dict[str, Callable[[], None]], num_videos: int, repeats: int) -> list[Row]:
    """Videos a second, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    ratios = [ffmpeg / ours for ours, ffmpeg in zip(seconds["ours"], seconds["ffmpeg"], strict=True)]
    return [
        {
            "what": "ours",
            "videos a second": num_videos / statistics.median(seconds["ours"]),
            "ours / this": 1.0,
            "target": "",
        },
        {
            "what": "bare ffmpeg",
            "videos a second": num_videos / statistics.median(seconds["ffmpeg"]),
            "ours / this": statistics.median(ratios),
            "target": "0.9 or more",
        },
    ]


def pack_on(videos: Path, folder: Path, cores: int) -> None:
    """Packs into one shard a core: usual shards are larger, and starting a task does not count there."""
    videos_per_shard = -(-len(video_files(videos)) // cores)
    pack(videos, folder, Packing(), videos_per_shard=videos_per_shard, processes=cores)


def encode(files: list[Path], folder: Path, cores: int) -> None:
    """Encodes the files by ffmpeg alone, with the options of our encoder (shards/video.py)."""
    folder.mkdir()
    packing = Packing()
    size = f"scale={packing.width}:{packing.height}:flags=bicubic"
    options = (
        *("-an", "-vf", size, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", packing.preset, "-crf", packing.crf),
        *("-tune", "fastdecode", "-g", packing.gop, "-keyint_min", packing.gop, "-sc_threshold", 0, "-threads", 1),
    )

    def run(numbered: tuple[int, Path]) -> None:
        number, path = numbered
        ffmpeg("-threads", 1, "-filter_threads", 1, "-i", path, *options, folder / f"{number}.mp4")

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(run, enumerate(files)))


def memory(videos: Path, folder: Path, job: PackBench) -> list[Row]:
    """The most memory that all processes of packing held together, for the videos and for four times as many."""
    peaks = {}
    for times in (1, 4):
        linked = folder / f"times{times}"
        for number in range(times):
            for path in video_files(videos):
                link = linked / path.parent.name / f"{number}-{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
        with PeakMemory(seconds_between_samples=0.2) as watched:
            pack_on(linked, folder / f"packed-times{times}", job.cores)
        peaks[times] = watched.peak_bytes
    return [
        {"what": f"{times} x the videos", "MiB": peaks[times] / 2**20, "times the first": peaks[times] / peaks[1],
         "target": "" if times == 1 else "at most 1.1"}
        for times in peaks
    ]  # fmt: skip
