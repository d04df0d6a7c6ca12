"""How a video is stored in a shard: what packing writes and reading relies on.

A stored video is an mp4 of H.264 with a key frame every `gop` frames. Frames are counted, never placed by their timestamps:
in real data sets timestamps repeat, run backwards or jump by days.

Planes are the pixels as codecs hold them, yuv420p: an array (H * 3 // 2, W) uint8 with the H rows of Y, then U and V at half
size (BT.601, limited range).

Optical flow says how far each pixel moves from one frame to the next. It is stored as a second video with a field (2, H, W)
for each frame: u, to the right, and v, down, in pixels of the stored frames.

    frames   0 ──> 1 ──> 2 ──> 3
    fields     0     1     2   2     field i leads from frame i to frame i + 1; the last repeats the one before

A stored field is a picture of 2H x W bytes, the H rows of u above those of v. A byte is 128 + 127 * pixels / bound: 128 is
exactly no motion, and a motion the other way is the byte mirrored at 128. Longer motions are cut to the bound, as in the
two-stream networks' pictures of flow, which end at 20 pixels too (Wang et al. 2016).
"""

from dataclasses import dataclass
from typing import Literal

FlowMethod = Literal["none", "tvl1", "dis"]
FLOW_METHODS = ("none", "tvl1", "dis")
Stream = Literal["rgb", "flow"]  # what of a stored video is read: its frames, or the optical flow beside them
MAX_PIXELS = 8192 * 4320  # of a frame: the largest format that films come in


class BadVideo(ValueError):
    """A video that cannot become a sample, or a stored one that cannot be read. The message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a video is stored in a shard."""

    width: int = 340
    """Width of the stored frames, in pixels (even)."""
    height: int = 256
    """Height of the stored frames, in pixels (even). Frames are stretched to width x height."""
    gop: int = 16
    """Frames from one key frame to the next; short ones make random clips cheap to read."""
    crf: int = 18
    """x264's constant rate factor: 0 is lossless, 18 looks so, 51 is worst."""
    preset: str = "medium"
    """x264's preset: slower ones make smaller files."""
    copy: bool = False
    """Keep each video's bytes as they are; width and height then hold for reading only, and clips are slow to read."""
    flow: FlowMethod = "none"
    """Optical flow to store beside each video: tvl1 as in the literature (a core packs about 1 frame a second at 340 x 256)
    or dis (about 50). Needs the extra grurcn[flow]."""
    flow_bound: float = 20.0
    """The longest motion that is stored, in pixels a frame; longer ones are cut to it."""
    flow_crf: int = 14
    """x264's constant rate factor of the flow: 14 is off by 0.05 pixels in the mean, of which 0.03 are the rounding to bytes."""

    def __post_init__(self) -> None:
        if self.width < 16 or self.height < 16 or self.width % 2 or self.height % 2:
            raise ValueError(f"{self.width} x {self.height} frames: expected even sizes of at least 16 (yuv420p)")
        if self.gop < 1:
            raise ValueError(f"gop {self.gop}: expected at least 1 frame from key frame to key frame")
        for name, crf in (("crf", self.crf), ("flow_crf", self.flow_crf)):
            if not 0 <= crf <= 51:
                raise ValueError(f"{name} {crf}: expected 0 (lossless) to 51")
        if self.flow not in FLOW_METHODS:
            raise ValueError(f"flow {self.flow!r}: expected one of {', '.join(FLOW_METHODS)}")
        if not 0 < self.flow_bound < 1000:
            raise ValueError(f"flow_bound {self.flow_bound:g}: expected above 0 and below 1000 pixels")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one video may take while it is packed. One that needs more is left out; the stored bytes do not depend on it."""

    time_limit: float | None = None
    """Seconds that one video may take. Default: 600, and 7,200 with flow tvl1."""
    memory_limit: float = 4.0
    """GiB of memory (address space) that decoding one video may take, and its encoder as much again."""
    max_pixels: int = MAX_PIXELS
    """Pixels that a frame may have, width x height."""

    def __post_init__(self) -> None:
        if self.time_limit is not None and not 0 < self.time_limit <= 1e6:
            raise ValueError(f"time_limit {self.time_limit:g}: expected above 0 and at most 1,000,000 seconds")
        if not 0.5 <= self.memory_limit <= 1e6:
            raise ValueError(f"memory_limit {self.memory_limit:g}: expected 0.5 to 1,000,000 GiB")
        if not 1 <= self.max_pixels < 2**31:
            raise ValueError(f"max_pixels {self.max_pixels}: expected 1 to {2**31 - 1:,} (ffmpeg's own limit)")

    def seconds(self, packing: Packing) -> float:
        """The time limit of one video under this packing."""
        return self.time_limit or (7200.0 if packing.flow == "tvl1" else 600.0)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A video as it goes into a shard."""

    data: bytes
    suffix: str  # of the member in the tar: "mp4", or the original's with copy
    num_frames: int  # counted by decoding
    fps: float
    flow: bytes | None  # a video of as many fields
