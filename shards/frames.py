"""A video's stream, opened without trust, and its decoded frames as planes (video.py)."""

import av.logging
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from shards.video import BadVideo

av.logging.set_level(av.logging.PANIC)  # a decoder's complaints reach the user as a BadVideo

# A video is one file. Playlists, image lists, concat scripts and the references of a mov could name others, or open
# connections.
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "enable_drefs": "0",
    "format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v,h264,hevc,ivf,dv,3gp,mp4,wav,mp3,flac",
}


def video_stream(container: InputContainer, max_pixels: int | None = None) -> VideoStream:
    """The stream that a player would show. Decoded by one thread: videos, not frames, are what runs side by side.

    Raises BadVideo if there is none, or one whose header promises frames of more than max_pixels; larger frames than
    promised do not decode then.
    """
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:  # a song's cover
        covers = Disposition.attached_pic
        kinds = ["cover picture" if other.disposition & covers else other.type for other in container.streams]
        raise BadVideo(f"no video stream (streams found: {', '.join(kinds) or 'none'})")
    codec = stream.codec_context
    if codec is None:
        raise BadVideo("ffmpeg has no decoder for its video stream")
    if max_pixels is not None:
        if codec.width * codec.height > max_pixels:
            raise BadVideo(
                f"frames of {codec.width:,} x {codec.height:,} pixels: expected at most {max_pixels:,} pixels (--max-pixels)"
            )
        codec.options = {"max_pixels": str(max_pixels)}
    codec.thread_type = "NONE"
    codec.thread_count = 1  # decoders from outside of ffmpeg start a thread a core otherwise
    return stream


def reason_of(error: Exception) -> str:
    """ffmpeg's message without PyAV's error number, path and log line. Of the log only the line on --max-pixels is kept."""
    log = getattr(error, "log", None)
    if log and "max pixel count" in log[2]:
        return log[2].split(",")[0]
    return getattr(error, "strerror", None) or str(error)


def to_planes(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """A decoded frame -> upright planes (height * 3 // 2, width) uint8, BT.601, limited range."""
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    if turns % 2:
        width, height = height, width
    frame = frame.reformat(
        width=width,
        height=height,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
        threads=1,
    )
    planes = frame.to_ndarray()
    return turn(planes, turns) if turns else planes


def turn(planes: np.ndarray, turns: int) -> np.ndarray:
    """Planes (H * 3 // 2, W) turned counter-clockwise by quarter `turns`."""
    width = planes.shape[1]
    height = planes.shape[0] * 2 // 3
    luma, u, v = np.split(planes.reshape(-1), [height * width, height * width * 5 // 4])
    halves = [np.rot90(plane.reshape(height // 2, width // 2), turns).ravel() for plane in (u, v)]
    turned = np.rot90(luma.reshape(height, width), turns)
    flat = np.concatenate([turned.ravel(), *halves])
    return flat.reshape(-1, turned.shape[1])
