"""A source video decoded to its last frame. What does not decode, or ends too early, is refused with the reason."""

import stat
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from shards.frames import OPEN_OPTIONS, reason_of, to_planes, video_stream
from shards.video import MAX_PIXELS, BadVideo, Packing

DEFAULT_FPS = Fraction(25)


def decode_source(
    path: Path, packing: Packing, first: int = 0, stop: int | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[np.ndarray]:
    """The frames [first, stop) of a video file as planes (H * 3 // 2, W) of the packing's size, turned as its display
    matrix says. Without a stop the video is decoded to its last frame.

        first = 2, stop = 5        ..fff|         the frames after the stop are not decoded

    Raises BadVideo at the first frame or packet that is broken, if the file ends long before its header says or before the
    stop, and if there is no frame at all.
    """
    count, end = 0, 0.0
    with open_video(path) as container:
        stream = video_stream(container, max_pixels)
        promised = stream.frames
        try:
            for packet in container.demux():  # sound as well: it may go on after the last frame
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                if packet.is_corrupt:
                    raise BadVideo(broken(count, promised, "damaged data"))
                for frame in packet.decode():
                    assert isinstance(frame, VideoFrame)
                    if frame.is_corrupt:
                        raise BadVideo(broken(count, promised, "decoded with errors"))
                    if count >= first:
                        yield to_planes(frame, packing.width, packing.height)
                    count += 1
                    if count == stop:
                        return
        except MemoryError:
            raise
        except (FFmpegError, EOFError) as error:
            raise BadVideo(broken(count, promised, reason_of(error))) from None
        if stop is None:
            check_end(container, stream, end)
    if count == 0:
        raise BadVideo("the video stream has no frames")


def check_end(container: InputContainer, stream: VideoStream, end_seconds: float) -> None:
    """Raises BadVideo for a file that was cut off between two packets, which no decoder notices.

    Compares seconds, not frames, as headers count dropped and hidden frames too. Headers of many whole files are a little
    off, so a tenth is allowed.
    """
    promised = (container.duration or 0) / av.time_base
    if container.format.name == "avi" and stream.time_base is not None:
        promised = float(stream.frames * stream.time_base)  # the container's is a guess from the file's length
    if end_seconds < 0.9 * promised - 0.2:
        raise BadVideo(
            f"ends after {end_seconds:.2f} of the {promised:.2f} s that its header promises; get the whole file"
        )


def open_video(path: Path) -> InputContainer:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # reading a named pipe would never end
        raise BadVideo("not a regular file (a folder, a named pipe or a device)")
    if not about.st_size:
        raise BadVideo("the file is empty")
    try:
        return av.open(str(path.absolute()), metadata_errors="ignore", options=OPEN_OPTIONS)
    except FFmpegError as error:
        raise BadVideo(f"not a video that ffmpeg reads ({reason_of(error)})") from None


def frame_rate(path: Path, max_pixels: int = MAX_PIXELS) -> Fraction:
    """Frames a second as the container states it; 25 where it states none or nonsense."""
    with open_video(path) as container:
        stream = video_stream(container, max_pixels)
        rate = stream.average_rate or stream.guessed_rate
    return rate if rate and 1 <= rate <= 240 else DEFAULT_FPS


def broken(count: int, promised: int, reason: str) -> str:
    of = f" of {promised}" if promised else ""
    return f"frame {count + 1}{of} does not decode ({reason}); re-encode it or leave it out"
