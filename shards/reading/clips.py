"""Which frames of a video, or fields of its optical flow, and which part of the picture: arithmetic from (seed, epoch, sample).

A box is (top, left, height, width) in pixels of the stored frames; it is cut out and resized on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from shards.reading.order import CLIP_OF_SAMPLE, random_rows

T = TypeVar("T")

Box = tuple[int, int, int, int]
Stream = Literal["rgb", "flow"]


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What the model sees of a video (paper section 5.1)."""

    num_frames: int = 10
    """Frames in a clip."""
    stride: int = 1
    """Frames of the video from one frame of a clip to the next."""
    stream: Stream = "rgb"
    """rgb: the frames themselves; flow: the optical flow that was packed beside them."""
    flow_fields: int = 10
    """Fields of flow that the model sees at each frame of a clip: the one that starts there and the next ones."""
    size: int = 224
    """Height and width of the model's input, in pixels."""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.65625)
    """Training crops: height and width are each drawn from these fractions of the stored frames' shorter side
    (256, 224, 192, 168 of 256)."""
    crop_gap: int | None = None
    """How many places of crop_scales a crop's height and width may be apart. Default: any."""
    mirror: bool = True
    """Mirror half of the training clips, and the second half of ten test views. Off where left and right matter."""
    test_scale: float = 0.875
    """Side of the square test crops, as a fraction of the stored frames' shorter side."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.stride, self.size, self.flow_fields) < 1:
            raise ValueError(
                f"num_frames {self.num_frames}, stride {self.stride}, size {self.size}, flow_fields {self.flow_fields}: "
                "expected at least 1 of each"
            )
        if self.crop_gap is not None and self.crop_gap < 0:
            raise ValueError(f"crop_gap {self.crop_gap}: expected at least 0 (square crops)")
        if self.stream not in ("rgb", "flow"):
            raise ValueError(f"stream {self.stream!r}: expected rgb or flow")
        for scale in (*self.crop_scales, self.test_scale):
            if not 0 < scale <= 1:
                raise ValueError(f"a crop of {scale:g} of the shorter side: expected above 0 and at most 1")

    def scales_near(self, place: int) -> tuple[float, ...]:
        """The crop scales that the width may have if the height has the one at `place`."""
        gap = len(self.crop_scales) if self.crop_gap is None else self.crop_gap
        return self.crop_scales[max(0, place - gap) : place + gap + 1]

    @property
    def span(self) -> int:
        """Frames of a video from the first to the last that a clip shows, both counted."""
        return clip_span(self.num_frames, self.stride, self.flow_fields if self.stream == "flow" else 1)

    @property
    def frames_read(self) -> int:
        """Stored frames that a clip is made of. Of flow, the fields of its whole span, as the clip's steps share them."""
        return self.span if self.stream == "flow" else self.num_frames

    @property
    def channels(self) -> int:
        """Of the model's input: red, green, blue, or u and v of each field."""
        return 2 * self.flow_fields if self.stream == "flow" else 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip of one video, not yet read."""

    frames: np.ndarray  # (T,) numbers of frames, or (N,) of fields: config.frames_read of them
    box: Box
    mirror: bool
    draw: int  # 63 random bits of this sample in this epoch, for dropout


def clip_span(num_frames: int, stride: int, fields: int = 1) -> int:
    """Frames from the first to the last of a clip, both counted; each frame of the clip shows so many fields from it on.

    num_frames = 4, stride = 1: ffff       span 4
    num_frames = 4, stride = 2: f.f.f.f    span 7

    num_frames = 3, stride = 2, fields = 4:
                        ffff
                          ffff
                            ffff           span 8
    """
    return stride * (num_frames - 1) + fields


def frames_from(start: ArrayLike, video_frames: ArrayLike, config: ClipConfig) -> np.ndarray:
    """(..., config.frames_read) numbers of a clip's frames, or fields, from `start` (...) on. A video shorter than a clip
    repeats its last.

    video_frames = 3, num_frames = 5: 0 1 2 2 2
    """
    stride = 1 if config.stream == "flow" else config.stride
    last = np.asarray(video_frames)[..., None] - 1
    return np.minimum(np.asarray(start)[..., None] + stride * np.arange(config.frames_read), last)


def train_clip(
    video_frames: int, height: int, width: int, config: ClipConfig, seed: int, epoch: int, sample: int
) -> Clip:
    """The clip of a sample in an epoch: a random start, a random box at a corner or the centre, mirrored or not."""
    return train_clips([video_frames], height, width, config, seed, epoch, [sample])[0]


def train_clips(
    video_frames: Sequence[int],
    height: int,
    width: int,
    config: ClipConfig,
    seed: int,
    epoch: int,
    samples: Sequence[int],
) -> list[Clip]:
    """The clip of each of some samples in an epoch."""
    boxes, span = train_boxes(height, width, config), config.span
    bits = random_rows(6, seed, epoch, CLIP_OF_SAMPLE, samples).tolist()
    starts = [pick(of[0], max(1, frames - span + 1)) for frames, of in zip(video_frames, bits, strict=True)]
    return [
        Clip(
            frames=frames,
            box=choose(of[3], choose(of[2], choose(of[1], boxes))),
            mirror=config.mirror and pick(of[4], 2) == 1,
            draw=of[5] >> 1,
        )
        for frames, of in zip(frames_from(starts, video_frames, config), bits, strict=True)
    ]


def train_boxes(height: int, width: int, config: ClipConfig) -> list[list[list[Box]]]:
    """All boxes of training clips: [height][width that goes with it][place]."""
    side = min(height, width)
    return [
        [
            corners_and_centre(height, width, round(side * tall), round(side * wide))
            for wide in config.scales_near(place)
        ]
        for place, tall in enumerate(config.crop_scales)
    ]


def evaluation_clips(video_frames: int, num_clips: int, config: ClipConfig) -> np.ndarray:
    """(num_clips, config.frames_read) numbers of the frames, or fields, of equally spaced clips, the first at the start and
    the last at the end.

    video_frames = 9, num_frames = 3, num_clips = 3:  0 1 2   3 4 5   6 7 8
    One clip lies in the middle.
    """
    last = max(0, video_frames - config.span)
    starts = np.rint(np.linspace(0, last, num_clips)).astype(np.int64) if num_clips > 1 else [last // 2]
    return frames_from(starts, video_frames, config)


def segment_frames(video_frames: int, num_segments: int, offsets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(frames (K, len(offsets)) int64, segments (K,) bool): K equally spaced segments of a video, the frames at each one's
    start + offsets, and which of the segments the video has. Frames beyond the end repeat the last.

    video_frames = 10, num_segments = 4, offsets = 0 1 2:   0 1 2   2 3 4   5 6 7   7 8 9
    video_frames = 10, num_segments = 3, offsets = 0 4:     0 4     3 7     6 9
    A video of fewer frames than segments has one a frame; the others repeat the last.
    video_frames = 2, num_segments = 4, offsets = 0 1:      0 1     1 1     (1 1)   (1 1)
    """
    own = min(video_frames, num_segments)
    numbers = np.arange(num_segments, dtype=np.int64)
    starts = np.minimum(numbers, own - 1) * video_frames // own
    frames = np.minimum(starts[:, None] + np.asarray(offsets, np.int64), video_frames - 1)
    return frames, numbers < own


def evaluation_views(height: int, width: int, num_views: int, config: ClipConfig) -> list[tuple[Box, bool]]:
    """(box, mirrored) of each test view: 1 the centre, 2 the centre and its mirror, 5 centre and corners, 10 all of them.

    Raises ValueError for another number, and for mirrored views of a recipe that does not mirror.
    """
    side = round(min(height, width) * config.test_scale)
    boxes = corners_and_centre(height, width, side, side)
    centre = boxes[4]
    views = {
        1: [(centre, False)],
        2: [(centre, False), (centre, True)],
        5: [(box, False) for box in boxes],
        10: [(box, mirror) for mirror in (False, True) for box in boxes],
    }
    if num_views not in views:
        raise ValueError(
            f"{num_views} views: expected 1 (centre), 2 (and its mirror), 5 (and corners) or 10 (all mirrored)"
        )
    if num_views in (2, 10) and not config.mirror:
        raise ValueError(
            f"{num_views} views hold mirrored ones, but this recipe was not trained to mirror; expected 1 or 5"
        )
    return views[num_views]


def corners_and_centre(height: int, width: int, box_height: int, box_width: int) -> list[Box]:
    """The five boxes of a size: top left, top right, bottom left, bottom right, centre."""
    down, right = height - box_height, width - box_width
    tops_and_lefts = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    return [(top, left, box_height, box_width) for top, left in tops_and_lefts]


def pick(bits: int, choices: int) -> int:
    """One of 0 .. choices - 1 from 64 random bits (53 of them as a fraction)."""
    return int((bits >> 11) / 2**53 * choices)


def choose(bits: int, choices: Sequence[T]) -> T:
    """One of some choices from 64 random bits."""
    return choices[pick(bits, len(choices))]
