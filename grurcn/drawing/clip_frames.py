"""A clip of a data set as RGB frames, cut out, resized and mirrored as a model gets it.

T frames of S x S pixels a clip, H x W the stored frames' size.
"""

from dataclasses import dataclass, replace

import av
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from torch import Tensor

from grurcn.inference.model_input import model_input
from grurcn.models.pixels import FLOW_SCALE, MEAN, STD
from shards.index import Index
from shards.reading.captions import read_captions
from shards.reading.clips import Clip, ClipConfig, evaluation_clips, evaluation_views
from shards.reading.stream import read_clip
from shards.rows import Sample


@dataclass(frozen=True, kw_only=True)
class RenderedClip:
    """A clip's frames and what is written beside them."""

    sample: Sample
    class_name: str  # empty in a data set of captions
    captions: tuple[str, ...]
    clip: Clip
    seconds_between_frames: float
    frames: np.ndarray  # (T, S, S, 3) uint8
    flow: np.ndarray | None  # (T, S, S, 3) uint8, its colours
    flow_reach: float  # pixels a frame that have the full colour
    remarks: tuple[str, ...] = ()  # further lines beside the frames

    @property
    def strips(self) -> list[np.ndarray]:
        """The frames and, if there is flow, its colours: (T, S, S, 3) uint8 each."""
        return [self.frames] if self.flow is None else [self.frames, self.flow]

    @property
    def span(self) -> str:
        numbers = self.clip.frames
        return f"frames {numbers[0]}-{numbers[-1]} of {self.sample.num_frames}, {self.sample.fps:.4g} fps"

    @property
    def crop(self) -> str:
        top, left, height, width = self.clip.box
        return f"{width} x {height} at x {left}, y {top}{', mirrored' if self.clip.mirror else ''}"


def render_clip(
    index: Index, sample: Sample, clip: Clip, clips: ClipConfig, remarks: tuple[str, ...] = ()
) -> RenderedClip:
    """Reads a sample's clip. A clip of flow has the frame at which each step begins, and each step's first field.

    Raises BadShards or BadVideo if the video cannot be read.
    """
    fields, at = None, clip
    if clips.stream == "flow":
        fields = model_input_of(index, sample, clip, clips)[:, :2] / FLOW_SCALE  # (T, 2, S, S) in stored pixels
        at = replace(clip, frames=clip.frames[:: clips.stride][: clips.num_frames])
    frames = model_input_of(index, sample, at, replace(clips, stream="rgb"))
    colours, reach = flow_colours(fields.numpy()) if fields is not None else (None, 0.0)
    return RenderedClip(
        sample=sample,
        class_name=index.info.classes[sample.label] if index.info.classes else "",
        captions=read_captions(index, sample),
        clip=at,
        seconds_between_frames=clips.stride / sample.fps,
        frames=as_pixels(frames),
        flow=colours,
        flow_reach=reach,
        remarks=remarks,
    )


def middle_clip(index: Index, sample: Sample, clips: ClipConfig) -> Clip:
    """The clip that validation uses: in the middle of the video, centre view."""
    packing = index.info.packing
    box, mirror = evaluation_views(packing.height, packing.width, 1, clips)[0]
    return Clip(frames=evaluation_clips(sample.num_frames, 1, clips)[0], box=box, mirror=mirror, draw=0)


def model_input_of(index: Index, sample: Sample, clip: Clip, clips: ClipConfig) -> Tensor:
    """What a model gets of one clip: (T, C, S, S) float32."""
    batch = read_clip(index, sample, clip, clips.stream)
    return model_input(batch.frames, batch.flow_bound, batch.box, batch.mirror, clips)[0]


def as_pixels(frames: Tensor) -> np.ndarray:
    """(T, 3, S, S), normalised for a model -> (T, S, S, 3) uint8."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((frames * std + mean) * 255).round().clamp(0, 255).byte().movedim(1, -1).numpy()


def rgb_of(planes: np.ndarray) -> np.ndarray:
    """yuv420p planes (H * 3 // 2, W) uint8 -> (H, W, 3) uint8."""
    return av.VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")


def flow_colours(fields: np.ndarray) -> tuple[np.ndarray, float]:
    """Motions (T, 2, S, S), u and v in pixels -> (colours (T, S, S, 3) uint8, pixels that have the full colour).

    White does not move. The hue is the direction: red right, yellow-green down, cyan left, violet up. The saturation is the
    length; the longest percent of the motions has the full colour.
    """
    u, v = fields[:, 0], fields[:, 1]
    length = np.hypot(u, v)
    reach = max(1.0, float(np.quantile(length, 0.99)))
    hue = np.arctan2(v, u) / (2 * np.pi) % 1
    colours = hsv_to_rgb(np.stack([hue, np.clip(length / reach, 0, 1), np.ones_like(hue)], axis=-1))
    return np.rint(colours * 255).astype(np.uint8), reach


def flow_legend(size: int) -> np.ndarray:
    """A disc with the colours of motions in all directions: (size, size, 3) uint8."""
    v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    inside = np.hypot(u, v) < 1
    colours = flow_colours(np.where(inside, np.stack([u, v]), 0)[None])[0][0]
    return np.where(inside[..., None], colours, 255).astype(np.uint8)
