"""Packing beside the bare ffmpeg program: the same files, size, x264 options and cores; and its memory for more videos.

ours      pack_shard, one task a core: a helper that decodes and checks every frame, ffmpeg that encodes, tar, hashes
ffmpeg    decodes, scales and encodes each file, as many programs at a time as cores
"""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from jobs.bench.memory import PeakMemory
from jobs.bench.read import make_videos
from shards.packing.annotation_files import video_files
from shards.packing.pack import finish_packing, open_target, pack_shard, plan_packing
from shards.packing.sources import Folder
from shards.video import Packing


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Packing against the bare ffmpeg program, and its peak memory for four times the videos."""

    videos: Path | None = None
    """Folder of CLASS/VIDEO. Default: synthetic H.264 clips of 320 x 240 are made."""
    num_videos: int = 24
    """Synthetic clips."""
    seconds: int = 8
    """Length of each of them."""
    cores: int = os.cpu_count() or 1
    """Videos that are packed at the same time."""
    repeats: int = 5
    """Turns of each; the median counts."""
    json: Path | None = None
    """Write the tables as JSON to this file."""

    def __post_init__(self) -> None:
        if min(self.num_videos, self.seconds, self.cores, self.repeats) < 1:
            raise ValueError("wanted at least one of everything that is counted")


def bench_pack(job: Pack) -> dict[str, list[dict[str, Any]]]:
    """{title: rows}: videos a second of both, and the memory of ours."""
    with tempfile.TemporaryDirectory(prefix="grurcn-bench-") as name:
        folder = Path(name)
        videos = job.videos or make_videos(folder / "videos", job.num_videos, job.seconds)
        files = video_files(videos)
        numbers = count()
        works = {
            "ours": lambda: pack(videos, folder / f"packed{next(numbers)}", job.cores),
            "ffmpeg": lambda: encode(files, folder / f"encoded{next(numbers)}", job.cores),
        }
        title = f"{len(files)} videos -> 340 x 256, {job.cores} at a time"
        return {title: beside(works, len(files), job.repeats), "Memory of packing": memory(videos, folder, job)}


def beside(works: dict[str, Callable[[], None]], num_videos: int, repeats: int) -> list[dict[str, Any]]:
    """Videos a second, in turns."""
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
            "wanted": "",
        },
        {
            "what": "bare ffmpeg",
            "videos a second": num_videos / statistics.median(seconds["ffmpeg"]),
            "ours / this": statistics.median(ratios),
            "wanted": "0.9 or more",
        },
    ]


def pack(videos: Path, folder: Path, cores: int) -> None:
    """The folder's videos into shards, as jobs.make_shards packs them, a thread for each of its tasks."""
    listing = Folder(videos=videos, val_share=0, test_share=0).entries()
    per_shard = -(-len(listing.entries) // cores)  # usual ones are larger: starting helpers does not count
    plan = plan_packing(folder, listing, Packing(), per_shard, seed=0, source={"kind": "bench"})
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda shard: list(pack_shard(plan.url, shard, plan.classes)), open_target(plan)))
    finish_packing(plan)


def encode(files: list[Path], folder: Path, cores: int) -> None:
    """The files by ffmpeg alone, with the options that shards.video gives its encoder."""
    folder.mkdir()
    packing = Packing()
    size = f"scale={packing.width}:{packing.height}:flags=bicubic"
    options = (
        *("-an", "-vf", size, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", packing.preset, "-crf", packing.crf),
        *("-tune", "fastdecode", "-g", packing.gop, "-keyint_min", packing.gop, "-sc_threshold", 0, "-threads", 1),
    )

    def run(numbered: tuple[int, Path]) -> None:
        number, path = numbered
        before = (
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-loglevel",
            "fatal",
            "-threads",
            1,
            "-filter_threads",
            1,
            "-i",
            path,
        )
        subprocess.run([*map(str, (*before, *options, folder / f"{number}.mp4"))], check=True, stdin=subprocess.DEVNULL)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(run, enumerate(files)))


def memory(videos: Path, folder: Path, job: Pack) -> list[dict[str, Any]]:
    """The most that packing held at once, all its processes together, for the videos and for four times as many."""
    peaks = {}
    for times in (1, 4):
        linked = folder / f"times{times}"
        for number in range(times):
            for path in video_files(videos):
                link = linked / path.parent.name / f"{number}-{path.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
        with PeakMemory(seconds_between_looks=0.2) as watched:
            pack(linked, folder / f"packed-times{times}", job.cores)
        peaks[times] = watched.peak_bytes
    return [
        {"what": f"{times} x the videos", "MiB": peaks[times] / 2**20, "times the first": peaks[times] / peaks[1],
         "wanted": "" if times == 1 else "at most 1.1"}
        for times in peaks
    ]  # fmt: skip
