"""Videos: decode one to its last frame, transcode it for cheap random access, and read a clip of a stored one.

Frames are counted, never placed by their timestamps: in real data sets timestamps repeat, run backwards or jump by
days. Planes are the pixels as codecs hold them, yuv420p: an array (H * 3 // 2, W) uint8 with the H rows of Y, then U
and V at half size (BT.601, limited range).
"""

import io
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av.logging
import ffmpeg
import imageio_ffmpeg
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

av.logging.set_level(av.logging.PANIC)  # what a file's decoder has to say reaches the user in BadVideo

# A video is one file: playlists, image lists and concat scripts could name others, or open connections.
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v,h264,hevc,ivf,dv,3gp,mp4,wav,mp3,flac",
}
DEFAULT_FPS = Fraction(25)


class BadVideo(ValueError):
    """A video that cannot become a sample. The message says what is wrong with it."""


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

    def __post_init__(self) -> None:
        if self.width < 16 or self.height < 16 or self.width % 2 or self.height % 2:
            raise ValueError(f"{self.width} x {self.height} frames: wanted even sizes of at least 16 (yuv420p)")
        if self.gop < 1:
            raise ValueError(f"gop {self.gop}: wanted at least 1 frame from key frame to key frame")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf {self.crf}: wanted 0 (lossless) to 51")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A video as it goes into a shard."""

    data: bytes
    suffix: str  # of the member in the tar: "mp4", or the original's with copy
    num_frames: int  # counted by decoding
    fps: float


def store_video(path: Path, packing: Packing) -> Stored:
    """Decodes a video file to its last frame and gives back the bytes to store.

    Raises BadVideo if any of it does not decode, OSError if the file cannot be read.
    """
    if packing.copy:
        data = path.read_bytes()
        num_frames = sum(1 for _ in decode_upright(path, packing))
        return Stored(data=data, suffix=path.suffix[1:].lower(), num_frames=num_frames, fps=float(frame_rate(path)))
    with tempfile.TemporaryDirectory(prefix="grurcn-pack-") as folder:
        target = Path(folder) / "video.mp4"
        fps = frame_rate(path)
        num_frames = encode(decode_upright(path, packing), target, packing, fps)
        data = target.read_bytes()
    return Stored(data=data, suffix="mp4", num_frames=num_frames, fps=float(fps))


def decode_upright(path: Path, packing: Packing) -> Iterator[np.ndarray]:
    """Every frame of a video file as planes (H * 3 // 2, W) of the packing's size, turned as its display matrix says.

    Raises BadVideo at the first frame or packet that is broken, if the file ends long before its header says, and if
    there is no frame at all.
    """
    count, end = 0, 0.0
    with open_video(path) as container:
        stream = video_stream(container)
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
                    yield to_planes(frame, packing.width, packing.height)
                    count += 1
        except (FFmpegError, EOFError) as error:
            raise BadVideo(broken(count, promised, reason_of(error))) from None
        check_end(container, stream, end)
    if count == 0:
        raise BadVideo("the video stream has no frames")


def check_end(container: InputContainer, stream: VideoStream, end_seconds: float) -> None:
    """Raises BadVideo for a file that was cut off between two packets, at which no decoder takes offence.

    Time and not frames: headers count dropped and hidden frames too. They are off by a little in many whole files, so
    a tenth is allowed.
    """
    promised = (container.duration or 0) / av.time_base
    if container.format.name == "avi" and stream.time_base is not None:
        promised = float(stream.frames * stream.time_base)  # the container's is a guess from the file's length
    if end_seconds < 0.9 * promised - 0.2:
        raise BadVideo(
            f"ends after {end_seconds:.2f} of the {promised:.2f} s that its header promises; get the whole file"
        )


def open_video(path: Path) -> InputContainer:
    if not path.stat().st_size:
        raise BadVideo("the file is empty")
    try:
        return av.open(str(path), metadata_errors="ignore", options=OPEN_OPTIONS)
    except FFmpegError as error:
        raise BadVideo(f"not a video that ffmpeg reads ({reason_of(error)})") from None


def video_stream(container: InputContainer) -> VideoStream:
    """The stream that a player would show. Decoded by one thread: videos, not frames, are what runs side by side."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:  # a song's cover
        covers = Disposition.attached_pic
        kinds = ["cover picture" if other.disposition & covers else other.type for other in container.streams]
        raise BadVideo(f"no video stream (streams found: {', '.join(kinds) or 'none'})")
    stream.thread_type = "NONE"
    return stream


def frame_rate(path: Path) -> Fraction:
    """Frames a second as the container states it; 25 where it states none or nonsense."""
    with open_video(path) as container:
        stream = video_stream(container)
        rate = stream.average_rate or stream.guessed_rate
    return rate if rate and 1 <= rate <= 240 else DEFAULT_FPS


def broken(count: int, promised: int, reason: str) -> str:
    of = f" of {promised}" if promised else ""
    return f"frame {count + 1}{of} does not decode ({reason}); re-encode it or leave it out"


def reason_of(error: Exception) -> str:
    """ffmpeg's own words: without PyAV's error number, path and log line."""
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


def encode(frames: Iterator[np.ndarray], target: Path, packing: Packing, fps: Fraction) -> int:
    """Writes planes as an H.264 mp4 with a key frame every `gop` frames, and gives back how many there were.

    One thread, no dates and no encoder's whims in the bytes: the same frames give the same file. ffmpeg reads raw
    frames from a pipe and nothing else, so nothing inside a stranger's video can make it open files or connections.
    """
    encoder = (
        ffmpeg.input(
            "pipe:",
            format="rawvideo",
            pix_fmt="yuv420p",
            video_size=(packing.width, packing.height),
            framerate=str(fps),
        )
        .output(
            str(target),
            vcodec="libx264",
            crf=packing.crf,
            preset=packing.preset,
            tune="fastdecode",
            g=packing.gop,
            keyint_min=packing.gop,
            sc_threshold=0,
            threads=1,
            colorspace="smpte170m",
            color_primaries="smpte170m",
            color_trc="smpte170m",
            color_range="tv",
            map_metadata=-1,
            fflags="+bitexact",
            **{"flags:v": "+bitexact"},
        )
        .global_args("-loglevel", "error", "-nostats")
        .overwrite_output()
        .compile(cmd=imageio_ffmpeg.get_ffmpeg_exe())
    )
    count = 0
    # Its words go to a file, not a pipe, which could fill up while nobody reads it.
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(encoder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words)
        assert process.stdin is not None
        try:
            for planes in frames:
                process.stdin.write(np.ascontiguousarray(planes).data)
                count += 1
            process.stdin.close()
            status = process.wait()
        except BrokenPipeError:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        words.seek(0)
        said = words.read().decode(errors="replace").strip()
    if status or said:
        raise OSError(f"ffmpeg ended with status {status} after {count} frames: {said[:300]}")
    return count


def read_frames(data: bytes, wanted: Sequence[int], packing: Packing) -> np.ndarray:
    """Frames by number from a stored video's bytes -> planes (len(wanted), H * 3 // 2, W) uint8.

    `wanted` counts from 0 and may repeat. With a known key-frame interval the decoder starts at the last key frame
    before the first wanted one; copied videos are decoded from their first frame, so that frames stay counted.
    Raises BadVideo where a wanted frame is not there.

        gop = 4, wanted = 6 7 8       K...K...K...      starts at frame 4
                                          ----^^^
    """
    height, width = packing.height, packing.width
    planes = np.empty((len(wanted), height * 3 // 2, width), np.uint8)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(wanted):
        places.setdefault(int(number), []).append(place)
    last = max(places)
    try:
        with av.open(io.BytesIO(data), "r", metadata_errors="ignore", options=OPEN_OPTIONS) as container:
            stream = video_stream(container)
            for number, frame in numbered(container, stream, min(places), packing):
                for place in places.pop(number, ()):
                    planes[place] = to_planes(frame, width, height)
                if number >= last:
                    break
    except FFmpegError as error:
        raise BadVideo(f"does not decode ({reason_of(error)})") from None
    if places:
        raise BadVideo(f"frame {min(places)} is wanted, but the video ends before it")
    return planes


def numbered(
    container: InputContainer, stream: VideoStream, first: int, packing: Packing
) -> Iterator[tuple[int, VideoFrame]]:
    """(number, frame) from some key frame at or before `first` on."""
    if packing.copy:
        yield from enumerate(container.decode(stream))
        return
    # Our own files have a constant rate, so that number and timestamp are proportional.
    assert stream.average_rate is not None
    assert stream.time_base is not None
    ticks = 1 / (stream.average_rate * stream.time_base)  # from frame to frame
    start = stream.start_time or 0
    if first >= packing.gop:
        container.seek(int(start + first * ticks), stream=stream)
    for frame in container.decode(stream):
        assert frame.pts is not None
        yield round((frame.pts - start) / ticks), frame
