"""A video with a classifier's prediction as it develops: an H.264 mp4 to look at.

    +----------------------------+
    |                            |    the stored frames; with heat, where they change the GRUs' states
    +----------------------------+
    | left        =======  71 %  |    the mean over the clips that have ended so far: its three likeliest classes
    | up          ==       14 %  |
    | right       =         6 %  |
    | pool2   [][][][]|[][][][]  |    a row for each level: the class that it votes for at that time, the paler the less probable
    | pool3   [][][][]|[][][][]  |    | is now
    | [] left   [] up            |    the classes' colours
    +----------------------------+

Clips slide over the video. A clip's cells are around its middle: they end half-way to the middles of its neighbours.

N clips, L levels, K classes.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from grurcn.drawing.clip_frames import rgb_of
from grurcn.drawing.heat import HeatMaps, check_heat, shown_steps, votes_and_changes
from grurcn.drawing.overlay_frame import OverlayLayout, OverlayPainter, VideoVotes
from grurcn.inference.classifier import Classifier
from shards.frames import to_planes
from shards.packing.mp4_encoder import Encoder
from shards.reading.clips import ClipConfig, frames_from
from shards.reading.decode import read_frames
from shards.store import written_file
from shards.video import Packing, Stored

MOST_CLIPS = 100
READ_AT_ONCE = 64  # frames
READ_AT_ONCE_COPIED = 1024  # a copied video is decoded from its first frame each time
FPS_LARGEST_DENOMINATOR = 1001  # 30000/1001 and its like


def write_overlay(classifier: Classifier, video: Stored, out: Path, heat: bool = False) -> None:
    """Writes the overlay of a stored video, of its number of frames and rate. The file appears when it is whole.

    The same video and model give the same bytes on the same machine. Raises ValueError for heat of a model without GRUs,
    BadVideo if a frame does not decode, OSError if the file cannot be written.
    """
    if heat:
        check_heat(classifier)
    clips, packing = classifier.recipe.clips, classifier.packing
    view = classifier.views(1)[0]
    seen = classifier.read_clips(video, sliding_clips(video.num_frames, clips))
    bound = torch.full((len(seen.frames),), packing.flow_bound)
    if heat:
        votes, changes = votes_and_changes(classifier, seen.planes, bound, view)
    else:
        votes, changes = classifier.votes(seen.planes, bound, [view]), []
    prediction = VideoVotes(
        votes=votes,
        frames=seen.frames,
        num_frames=video.num_frames,
        fps=video.fps,
        classes=classifier.classes,
        levels=classifier.levels,
    )
    layout = OverlayLayout(stored=(packing.height, packing.width), prediction=prediction)
    painter = OverlayPainter(layout, box=view[0] if heat else None)
    steps = shown_steps(seen.frames, video.num_frames, clips)
    maps = HeatMaps(changes, steps, view[0], layout.stored, layout.frame_size) if heat else None

    with written_file(out) as target, overlay_encoder(Path(target.name), layout, video.fps) as file:
        for number, pixels in enumerate(stored_pixels(video, packing)):
            picture = np.asarray(painter.picture(number, pixels, maps.of_frame(number) if maps else None))
            file.write(to_planes(av.VideoFrame.from_ndarray(picture, "rgb24"), *layout.size))


def sliding_clips(video_frames: int, clips: ClipConfig, most: int = MOST_CLIPS) -> np.ndarray:
    """(N, clips.frames_read) numbers of the frames, or fields, of clips that slide over a video in equal steps.

    The first clip is at the video's start, the last at its end; N is `most` at most.

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
            yield rgb_of(planes)


def overlay_encoder(target: Path, layout: OverlayLayout, fps: float) -> Encoder:
    """Writes planes of the layout's size as an mp4 that a browser plays while it loads."""
    rate = Fraction(fps).limit_denominator(FPS_LARGEST_DENOMINATOR)
    width, height = layout.size
    packing = Packing(width=width, height=height, gop=48, preset="veryfast")
    colours = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "smpte170m")
    options = {"crf": 18, "color_range": "tv", "movflags": "+faststart", "f": "mp4", **colours}
    return Encoder(target, height, packing, rate, options)
