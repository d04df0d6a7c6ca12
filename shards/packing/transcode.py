"""A source video, or a segment of one -> the bytes that are stored: decoded once, and encoded again by ffmpeg."""

import math
import tempfile
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from shards.packing.decode_source import decode_source, frame_rate
from shards.packing.flow import flow_planes
from shards.packing.mp4_encoder import flow_encoder, video_encoder
from shards.video import MAX_PIXELS, BadVideo, Packing, Stored


def store_video(
    path: Path,
    packing: Packing,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Stored:
    """Decodes a video file to its last frame, once, and returns the bytes to store.

    With a start or an end, the segment between them is stored as a video of its own: the frames from round(start * fps) on
    and before round(end * fps), at the rate that the container states. The frames before it are decoded as well, because
    frames are counted. The frames after it are not decoded.

    Raises BadVideo if any of it does not decode, if a frame has more than max_pixels, or if more than a tenth of the segment
    (and 0.2 s) is missing; OSError if the file cannot be read; MemoryError; ValueError for an impossible segment.
    """
    check_segment(packing, start_seconds, end_seconds)
    fps = frame_rate(path, max_pixels)
    first, stop = segment_bounds(start_seconds, end_seconds, fps)
    with tempfile.TemporaryDirectory(prefix="grurcn-pack-") as folder:
        video, flow = Path(folder) / "video.mp4", Path(folder) / "flow.mp4"
        with ExitStack() as encoders:  # each frame goes through all of them before the next one is decoded
            pictures = decode_source(path, packing, first, stop, max_pixels)
            if not packing.copy:
                pictures = encoders.enter_context(video_encoder(video, packing, fps)).passing(pictures)
            if packing.flow != "none":
                fields = flow_planes(pictures, packing.flow, packing.flow_bound)
                pictures = encoders.enter_context(flow_encoder(flow, packing, fps)).passing(fields)
            num_frames = sum(1 for _ in pictures)
            check_found(num_frames, first, stop, fps)
        return Stored(
            data=(path if packing.copy else video).read_bytes(),
            suffix=stored_suffix(path, packing),
            num_frames=num_frames,
            fps=float(fps),
            flow=flow.read_bytes() if packing.flow != "none" else None,
        )


def stored_suffix(path: Path, packing: Packing) -> str:
    return path.suffix[1:].lower() if packing.copy else "mp4"


def check_segment(packing: Packing, start_seconds: float | None, end_seconds: float | None) -> None:
    """Raises ValueError for a segment that no video can have."""
    start, end = start_seconds or 0.0, math.inf if end_seconds is None else end_seconds
    if not 0 <= start < end:
        raise ValueError(f"a segment from {start:g} to {end:g} s: expected 0 <= start < end")
    if packing.copy and (start_seconds, end_seconds) != (None, None):
        raise ValueError(
            f"a segment from {start:g} to {end:g} s: copy keeps whole files; pack without it, or cut the videos before"
        )


def segment_bounds(start_seconds: float | None, end_seconds: float | None, fps: Fraction) -> tuple[int, int | None]:
    """A segment's first frame and the one after its last, None for the video's end. Raises BadVideo if it has no frame."""
    first = round((start_seconds or 0) * fps)
    stop = None if end_seconds is None else round(end_seconds * fps)
    if stop is not None and stop <= first:
        raise BadVideo(f"{segment_name(first, stop, fps)} holds no frame at {float(fps):g} frames a second")
    return first, stop


def check_found(found: int, first: int, stop: int | None, fps: Fraction) -> None:
    """Raises BadVideo if too few frames of a segment were found. A tenth and 0.2 s may be missing, as lists of segments
    are inexact."""
    if first and not found:
        raise BadVideo(f"{segment_name(first, stop, fps)} begins after the video's end")
    if stop is not None and found < Fraction(9, 10) * (stop - first) - fps / 5:
        raise BadVideo(
            f"{segment_name(first, stop, fps)} has {stop - first} frames, but the video ends after {found} of them"
        )


def segment_name(first: int, stop: int | None, fps: Fraction) -> str:
    end = "on" if stop is None else f"to {float(stop / fps):.2f} s"
    return f"the segment from {float(first / fps):.2f} s {end}"
