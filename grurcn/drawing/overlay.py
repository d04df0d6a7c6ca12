"""A video with what a model takes it for, while it runs: an H.264 mp4 to look at.

    +----------------------------+
    |                            |    the stored frames; with heat, where they change the GRUs' states
    +----------------------------+
    | left        =======  71 %  |    the mean over the clips that have ended so far: its three likeliest classes
    | up          ==       14 %  |
    | right       =         6 %  |
    | pool2   [][][][]|[][][][]  |    a row a level: the class that it votes for at that time, the paler the less probable
    | pool3   [][][][]|[][][][]  |    | is now
    | [] left   [] up            |    the classes' colours
    +----------------------------+

Clips slide over the video. A clip's cells lie around its middle: they end half-way to the neighbouring clips' middles.

N clips, L levels, K classes.
"""

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from grurcn.drawing.heat import HeatPainter, check_heat, shown_steps, votes_and_changes
from grurcn.drawing.overlay_frame import Drawing, Layout, Told
from grurcn.inference.classifier import Recogniser
from shards.frames import to_planes
from shards.packing.encoder import Encoder
from shards.reading.clips import ClipConfig, frames_from
from shards.reading.decode import read_frames
from shards.video import Packing, Stored

MOST_CLIPS = 100
READ_AT_ONCE = 64  # frames
READ_AT_ONCE_COPIED = 1024  # a copied video is decoded from its first frame each time
FPS_LARGEST_DENOMINATOR = 1001  # 30000/1001 and its like

Progress = Callable[[int, int], None]  # frames written, frames in all


def overlay(
    recogniser: Recogniser,
    video: Stored,
    out: Path,
    *,
    heat: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes the overlay of a stored video, of its frames' number and rate; it appears under its name when it is whole.

    The same video and model give the same bytes on the same machine. Raises ValueError for heat of a model without GRUs,
    BadVideo if a frame does not decode, OSError if the file cannot be written.
    """
    if heat:
        check_heat(recogniser)
    clips, packing = recogniser.recipe.clips, recogniser.packing
    frames = sliding_clips(video.num_frames, clips)
    view = recogniser.views(1)[0]
    planes, bound = recogniser.read(video, frames), torch.full((len(frames),), packing.flow_bound)
    if heat:
        votes, changes = votes_and_changes(recogniser, planes, bound, view)
    else:
        votes, changes = recogniser.votes(planes, bound, [view]), None
    told = Told(
        votes=votes,
        frames=frames,
        num_frames=video.num_frames,
        fps=video.fps,
        classes=recogniser.classes,
        levels=recogniser.levels,
    )
    drawing = Drawing(told, Layout(stored=(packing.height, packing.width), told=told))
    if changes is not None:
        steps, size = shown_steps(frames, video.num_frames, clips), drawing.layout.frame_size
        drawing.heat = HeatPainter(changes, steps, view[0], (packing.height, packing.width), size)
        drawing.box = view[0]

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with encoder(partial, drawing.layout, video.fps) as file:
            for number, pixels in enumerate(stored_pixels(video, packing)):
                picture = np.asarray(drawing.picture(number, pixels))
                file.write(to_planes(av.VideoFrame.from_ndarray(picture, "rgb24"), *drawing.layout.size))
                progress(number + 1, video.num_frames)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def sliding_clips(video_frames: int, clips: ClipConfig, most: int = MOST_CLIPS) -> np.ndarray:
    """(N, clips.frames_read) numbers of the frames, or fields, of clips that slide over a video in equal steps, the first at
    its start, and one at its end; N is `most` at most.

    video_frames = 8, num_frames = 3, most = 4:     0 1 2   2 3 4   4 5 6   5 6 7
    """
    last = max(0, video_frames - clips.span)
    step = max(1, -(-last // (most - 1)))
    return frames_from([*range(0, last, step), last], video_frames, clips)


def stored_pixels(video: Stored, packing: Packing) -> Iterator[np.ndarray]:
    """The stored frames in their order, (H, W, 3) uint8 RGB."""
    size = READ_AT_ONCE_COPIED if packing.copy else READ_AT_ONCE
    for first in range(0, video.num_frames, size):
        numbers = range(first, min(first + size, video.num_frames))
        for planes in read_frames(video.data, numbers, packing):
            yield av.VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")


def encoder(target: Path, layout: Layout, fps: float) -> Encoder:
    """Writes planes of the layout's size as an mp4 that a browser plays while it loads."""
    rate = Fraction(fps).limit_denominator(FPS_LARGEST_DENOMINATOR)
    width, height = layout.size
    packing = Packing(width=width, height=height, gop=48, preset="veryfast")
    colours = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "smpte170m")
    options = {"crf": 18, "color_range": "tv", "movflags": "+faststart", "f": "mp4", **colours}
    return Encoder(target, height, packing, rate, options)
