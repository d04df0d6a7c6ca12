"""Synthetic videos for benchmarks, and packing them."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg

from shards.index import Index
from shards.packing.pack import finish_packing, pack_shard, plan_packing, shards_to_pack
from shards.packing.sources import Folder
from shards.video import Packing

# Moving pictures with a camera's noise; %d makes another picture in every clip.
PICTURES = (
    "testsrc2=size=320x240:rate=25,rotate=0.3*sin(t+%d):c=gray,gblur=1",
    "mandelbrot=size=320x240:rate=25:start_scale=3:end_scale=0.05:end_pts=1000:start_x=-0.7436%d,gblur=1.5",
    "life=size=80x60:rate=10:mold=20:ratio=0.1:seed=%d:death_color=#4040C0:life_color=#F0F060,scale=320:240,gblur=2,fps=25",
)
SMALL = Packing(width=32, height=32, preset="ultrafast")
SMALL_FRAMES = 16


def make_videos(folder: Path, count: int, seconds: int) -> Path:
    """FOLDER/CLASS/VIDEO.mp4, coded as videos usually are: H.264, 320 x 240, a key frame every 250 frames."""

    def make(number: int) -> None:
        kind, version = number % len(PICTURES), number // len(PICTURES)
        path = folder / f"kind{kind}" / f"{version:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        source = f"{PICTURES[kind] % version},noise=alls=6:allf=t"
        options = ("-t", seconds, "-c:v", "libx264", "-g", 250, "-pix_fmt", "yuv420p", "-threads", 1)
        ffmpeg("-f", "lavfi", "-i", source, *options, path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))
    return folder


def make_small_videos(folder: Path, count: int) -> Path:
    """Videos of SMALL_FRAMES frames, cut from one video."""
    parts, cuts = folder / "parts", range(SMALL_FRAMES, SMALL_FRAMES * count, SMALL_FRAMES)
    parts.mkdir(parents=True)
    source = ("-f", "lavfi", "-i", "testsrc2=size=32x32:rate=25", "-frames:v", SMALL_FRAMES * count)
    key_frames = ("-g", SMALL_FRAMES, "-keyint_min", SMALL_FRAMES, "-sc_threshold", 0)
    segments = ("-f", "segment", "-segment_frames", ",".join(map(str, cuts)), "-reset_timestamps", 1)
    ffmpeg(*source, "-c:v", "libx264", "-preset", "ultrafast", *key_frames, *segments, parts / "%04d.mp4")
    return folder


def ffmpeg(*args: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, args)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def pack(
    videos: Path,
    folder: Path,
    packing: Packing,
    *,
    videos_per_shard: int,
    val_fraction: float = 0,
    processes: int | None = None,
) -> Index:
    """Packs FOLDER/CLASS/VIDEO as jobs.make_shards does, so many shards at a time (default: the number of cores)."""
    listing = Folder(videos=videos, val_fraction=val_fraction, test_fraction=0).entries()
    plan = plan_packing(folder, listing, packing, videos_per_shard, seed=0, source={"kind": "bench"})
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        list(pool.map(lambda shard: list(pack_shard(plan.url, shard, plan.classes)), shards_to_pack(plan)))
    finish_packing(plan)
    return Index(folder, "train")
