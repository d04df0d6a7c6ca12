"""Videos of known motions, and the optical flow that is packed from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import write_video

from shards.index import Index
from shards.packing.entries import Entry, Listing
from shards.reading.clips import ClipConfig
from shards.video import Packing

cv2: Any = pytest.importorskip("cv2", reason="packing optical flow needs the extra grurcn[flow]")


SMALL = Packing(width=64, height=48, gop=4, preset="ultrafast", flow="dis")
CLIPS = ClipConfig(num_frames=3, stride=2, size=16, stream="flow", flow_fields=4)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey blobs (H, W) uint8, a few pixels wide."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 30, 220, cv2.NORM_MINMAX).astype(np.uint8)


def moving_planes(places: list[tuple[int, int]], height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frames (N, H * 3 // 2, W) of a textured plane that has moved by (right, down) pixels since the first."""
    plane = texture(height + 160, width + 160, seed)
    planes = np.full((len(places), height * 3 // 2, width), 128, np.uint8)
    for of_frame, (right, down) in zip(planes, places, strict=True):
        of_frame[:height] = plane[80 - down : 80 - down + height, 80 - right : 80 - right + width]
    return planes


def steady(num_frames: int, right: int = 2, down: int = -1) -> list[tuple[int, int]]:
    return [(right * number, down * number) for number in range(num_frames)]


def to_pixels(stored: np.ndarray, bound: float) -> np.ndarray:
    """Stored bytes -> motions float32 in pixels, by the definition (shards/video.py)."""
    return (stored.astype(np.float32) - 128) * (bound / 127)


def middle(fields: np.ndarray) -> np.ndarray:
    """(..., 2, H, W) -> the motion (..., 2) in the middle of the picture, where nothing comes in from outside."""
    return np.median(fields[..., 8:-8, 8:-8], axis=(-2, -1))


def listing_of_motions(folder: Path, motions: list[list[tuple[int, int]]]) -> Listing:
    """One video a list of places, of two classes in turn."""
    entries = []
    for number, places in enumerate(motions):
        name = f"{'ab'[number % 2]}/video_{number:02}.avi"
        path = write_video(folder / name, moving_planes(places, seed=number))
        key = f"{'ab'[number % 2]}-video_{number:02}"
        entries.append(Entry(path=path, name=name, key=key, label="ab"[number % 2], split="train", group=name))
    return Listing(classes=("a", "b"), entries=tuple(entries))


MOTIONS = [steady(12), steady(9, -3, 0), steady(15, 0, 2), steady(10, 1, 1), steady(3, -2, -2), steady(14, 4, 3)]


def part(index: Index, sample: Any, of: Any) -> bytes:
    return (Path(index.url) / sample.shard).read_bytes()[of.offset :][: of.size_bytes]
