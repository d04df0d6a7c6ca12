"""Tiny videos and data sets for the tests, and the way to the real ones."""

import subprocess
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest

from shards.packing.decode_source import decode_source
from shards.packing.entries import Entry, Listing
from shards.packing.mp4_encoder import video_encoder
from shards.packing.pack import finish_packing, pack_shard, plan_packing, shards_to_pack
from shards.video import Packing

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real videos are not at {DATA}")

TINY = Packing(width=32, height=32, gop=4, preset="ultrafast")


def ffmpeg(*args: object) -> None:
    """Runs the bundled ffmpeg; raises CalledProcessError if it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, args)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def lavfi_video(path: Path, *options: object, source: str = "testsrc2=size=32x32:rate=25", num_frames: int = 8) -> Path:
    """A video of one of ffmpeg's own sources."""
    ffmpeg("-f", "lavfi", "-i", source, "-frames:v", num_frames, *options, path)
    return path


def level(number: int) -> int:
    """The luma of a numbered frame: told apart by eye and by a codec up to number 40."""
    return 16 + 5 * number


def numbered_planes(num_frames: int, height: int = 32, width: int = 32, first: int = 0) -> np.ndarray:
    """Grey frames (N, H * 3 // 2, W) uint8, each of its number's luma."""
    planes = np.full((num_frames, height * 3 // 2, width), 128, np.uint8)
    planes[:, :height] = np.array([level(first + number) for number in range(num_frames)])[:, None, None]
    return planes


def write_video(path: Path, planes: np.ndarray, rate: Fraction | int = 25, codec: str = "mpeg4") -> Path:
    """A video of the given frames (N, H * 3 // 2, W), by PyAV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = planes.shape[1] * 2 // 3, planes.shape[2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in planes:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="yuv420p")))
        container.mux(stream.encode(None))
    return path


def frame_numbers(planes: np.ndarray) -> list[int]:
    """The numbers of numbered frames (..., H * 3 // 2, W), from their luma."""
    height = planes.shape[-2] * 2 // 3
    luma = planes[..., :height, :].reshape(-1, height * planes.shape[-1]).mean(axis=1)
    return [round((float(mean) - 16) / 5) for mean in luma]


def decoded(path: Path, packing: Packing = TINY) -> np.ndarray:
    """All frames of a source video (N, H * 3 // 2, W)."""
    return np.stack(list(decode_source(path, packing)))


def encode_planes(planes: np.ndarray, target: Path, packing: Packing, fps: Fraction) -> int:
    """Stores planes (N, H * 3 // 2, W) and gives back how many there were."""
    with video_encoder(target, packing, fps) as encoder:
        for of_frame in planes:
            encoder.write(of_frame)
    return encoder.count


def luma(planes: np.ndarray) -> np.ndarray:
    """Planes (..., H * 3 // 2, W) -> (..., H, W), signed."""
    return planes[..., : planes.shape[-2] * 2 // 3, :].astype(int)


def mean_difference(planes: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(planes.astype(int) - others).mean())


def all_frames(data: bytes) -> np.ndarray:
    """Every frame of a stored video (N, H * 3 // 2, W), decoded from the first to the last and not converted."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(data)
        with av.open(file.name) as container:
            return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def listing_of(folder: Path, frames: Sequence[int], splits: Sequence[str] = ("train",)) -> Listing:
    """Videos of so many frames each, of two classes, the splits dealt out in turn; each starts at another level."""
    entries = []
    for number, num_frames in enumerate(frames):
        name = f"{'ab'[number % 2]}/video_{number:02}.avi"
        if not (folder / name).exists():
            write_video(folder / name, numbered_planes(num_frames, first=number))
        entries.append(
            Entry(
                path=folder / name,
                name=name,
                key=f"{'ab'[number % 2]}-video_{number:02}",
                label="ab"[number % 2],
                split=splits[number % len(splits)],
                group=name,
            )
        )
    return Listing(classes=("a", "b"), entries=tuple(entries))


def pack(folder: Path, listing: Listing, packing: Packing = TINY, videos_per_shard: int = 3) -> Path:
    """Packs a listing in this process and gives back the folder."""
    plan = plan_packing(folder, listing, packing, videos_per_shard, seed=0, source={"kind": "tests"})
    for shard in shards_to_pack(plan):
        for _ in pack_shard(plan.url, shard, plan.classes):
            pass
    finish_packing(plan)
    return folder
