"""Videos: decode one to its last frame, transcode it for cheap random access, and read a clip of a stored one.

Frames are counted, never placed by their timestamps: in real data sets timestamps repeat, run backwards or jump by
days. Planes are the pixels as codecs hold them, yuv420p: an array (H * 3 // 2, W) uint8 with the H rows of Y, then U
and V at half size (BT.601, limited range).
"""

import io
import math
import signal
import stat
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av.logging
import ffmpeg
import imageio_ffmpeg
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from shards.flow import FLOW_METHODS, FlowMethod, flow_planes

av.logging.set_level(av.logging.PANIC)  # what a file's decoder has to say reaches the user in BadVideo

# A video is one file: playlists, image lists, concat scripts and the references of a mov could name others, or open
# connections.
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "enable_drefs": "0",
    "format_whitelist": "avi,mov,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v,h264,hevc,ivf,dv,3gp,mp4,wav,mp3,flac",
}
DEFAULT_FPS = Fraction(25)
MAX_PIXELS = 8192 * 4320  # of a frame: the largest format that films come in


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
    flow: FlowMethod = "none"
    """Optical flow to store beside each video: tvl1 as in the literature (a core packs about 1 frame a second at 340 x 256)
    or dis (about 50). Wants the extra grurcn[flow]."""
    flow_bound: float = 20.0
    """The longest motion that is stored, in pixels a frame; longer ones are cut to it."""
    flow_crf: int = 14
    """x264's constant rate factor of the flow: 14 is off by 0.05 pixels in the mean, of which 0.03 are the rounding to bytes."""

    def __post_init__(self) -> None:
        if self.width < 16 or self.height < 16 or self.width % 2 or self.height % 2:
            raise ValueError(f"{self.width} x {self.height} frames: wanted even sizes of at least 16 (yuv420p)")
        if self.gop < 1:
            raise ValueError(f"gop {self.gop}: wanted at least 1 frame from key frame to key frame")
        for name, crf in (("crf", self.crf), ("flow_crf", self.flow_crf)):
            if not 0 <= crf <= 51:
                raise ValueError(f"{name} {crf}: wanted 0 (lossless) to 51")
        if self.flow not in FLOW_METHODS:
            raise ValueError(f"flow {self.flow!r}: wanted one of {', '.join(FLOW_METHODS)}")
        if not 0 < self.flow_bound < 1000:
            raise ValueError(f"flow_bound {self.flow_bound:g}: wanted above 0 and below 1000 pixels")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one video may take while it is packed; one that wants more is left out. The stored bytes do not depend on it."""

    time_limit: float | None = None
    """Seconds that one video may take. Default: 600, and 7,200 with flow tvl1."""
    memory_limit: float = 4.0
    """GiB of memory (address space) that decoding one video may take, and its encoder as much again."""
    max_pixels: int = MAX_PIXELS
    """Pixels that a frame may have, width x height."""

    def __post_init__(self) -> None:
        if self.time_limit is not None and not 0 < self.time_limit <= 1e6:
            raise ValueError(f"time_limit {self.time_limit:g}: wanted above 0 and at most 1,000,000 seconds")
        if not 0.5 <= self.memory_limit <= 1e6:
            raise ValueError(f"memory_limit {self.memory_limit:g}: wanted 0.5 to 1,000,000 GiB")
        if not 1 <= self.max_pixels < 2**31:
            raise ValueError(f"max_pixels {self.max_pixels}: wanted 1 to {2**31 - 1:,} (ffmpeg's own limit)")

    def seconds(self, packing: Packing) -> float:
        """The time limit of a video that is packed so."""
        return self.time_limit or (7200.0 if packing.flow == "tvl1" else 600.0)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A video as it goes into a shard."""

    data: bytes
    suffix: str  # of the member in the tar: "mp4", or the original's with copy
    num_frames: int  # counted by decoding
    fps: float
    flow: bytes | None  # a video of as many fields


def store_video(
    path: Path,
    packing: Packing,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Stored:
    """Decodes a video file to its last frame, once, and gives back the bytes to store.

    With a start or an end, the segment between them is stored as a video of its own: the frames from round(start * fps) on,
    and before round(end * fps), at the rate that the container states. What comes before is decoded as well, as frames
    are counted; what comes after is not looked at.

    Raises BadVideo if any of it does not decode, if a frame has more than max_pixels, and if a tenth of the segment (and
    0.2 s) is missing; OSError if the file cannot be read; MemoryError; ValueError for a segment that cannot be.
    """
    check_segment(packing, start_seconds, end_seconds)
    fps = frame_rate(path, max_pixels)
    first, stop = segment_frames(start_seconds, end_seconds, fps)
    with tempfile.TemporaryDirectory(prefix="grurcn-pack-") as folder:
        video, flow = Path(folder) / "video.mp4", Path(folder) / "flow.mp4"
        with ExitStack() as encoders:  # each frame goes through all of them before the next one is decoded
            pictures = decode_upright(path, packing, first, stop, max_pixels)
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
    """Raises ValueError for a segment that no video could have."""
    start, end = start_seconds or 0.0, math.inf if end_seconds is None else end_seconds
    if not 0 <= start < end:
        raise ValueError(f"a segment from {start:g} to {end:g} s: wanted 0 <= start < end")
    if packing.copy and (start_seconds, end_seconds) != (None, None):
        raise ValueError(
            f"a segment from {start:g} to {end:g} s: copy keeps whole files; pack without it, or cut the videos before"
        )


def segment_frames(start_seconds: float | None, end_seconds: float | None, fps: Fraction) -> tuple[int, int | None]:
    """A segment's first frame and the one after its last, None for the video's end. Raises BadVideo if none is between."""
    first = round((start_seconds or 0) * fps)
    stop = None if end_seconds is None else round(end_seconds * fps)
    if stop is not None and stop <= first:
        raise BadVideo(f"{segment_name(first, stop, fps)} holds no frame at {float(fps):g} frames a second")
    return first, stop


def check_found(found: int, first: int, stop: int | None, fps: Fraction) -> None:
    """Raises BadVideo for a segment of which too few frames were found. A tenth may be missing, and 0.2 s: lists of
    segments are as inexact as headers are."""
    if first and not found:
        raise BadVideo(f"{segment_name(first, stop, fps)} begins after the video's end")
    if stop is not None and found < Fraction(9, 10) * (stop - first) - fps / 5:
        raise BadVideo(
            f"{segment_name(first, stop, fps)} has {stop - first} frames, but the video ends after {found} of them"
        )


def segment_name(first: int, stop: int | None, fps: Fraction) -> str:
    end = "on" if stop is None else f"to {float(stop / fps):.2f} s"
    return f"the segment from {float(first / fps):.2f} s {end}"


def decode_upright(
    path: Path, packing: Packing, first: int = 0, stop: int | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[np.ndarray]:
    """The frames [first, stop) of a video file as planes (H * 3 // 2, W) of the packing's size, turned as its display
    matrix says. Without a stop the video is decoded to its last frame.

        first = 2, stop = 5        ..fff|         the frames behind the stop are not decoded

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
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a named pipe would keep its reader waiting for ever
        raise BadVideo("not a regular file (a folder, a named pipe or a device)")
    if not about.st_size:
        raise BadVideo("the file is empty")
    try:
        return av.open(str(path.absolute()), metadata_errors="ignore", options=OPEN_OPTIONS)
    except FFmpegError as error:
        raise BadVideo(f"not a video that ffmpeg reads ({reason_of(error)})") from None


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
                f"frames of {codec.width:,} x {codec.height:,} pixels: wanted at most {max_pixels:,} pixels (--max-pixels)"
            )
        codec.options = {"max_pixels": str(max_pixels)}
    codec.thread_type = "NONE"
    codec.thread_count = 1  # decoders from outside of ffmpeg start a thread a core otherwise
    return stream


def frame_rate(path: Path, max_pixels: int = MAX_PIXELS) -> Fraction:
    """Frames a second as the container states it; 25 where it states none or nonsense."""
    with open_video(path) as container:
        stream = video_stream(container, max_pixels)
        rate = stream.average_rate or stream.guessed_rate
    return rate if rate and 1 <= rate <= 240 else DEFAULT_FPS


def broken(count: int, promised: int, reason: str) -> str:
    of = f" of {promised}" if promised else ""
    return f"frame {count + 1}{of} does not decode ({reason}); re-encode it or leave it out"


def reason_of(error: Exception) -> str:
    """ffmpeg's own words: without PyAV's error number, path and log line, but for the one that tells of --max-pixels."""
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


class Encoder:
    """Writes planes as an H.264 mp4 with a key frame every `gop` frames; the file is whole when its `with` block has ended.

    One thread, no dates and no encoder's whims in the bytes: the same frames give the same file. ffmpeg reads raw
    frames from a pipe and nothing else, so nothing inside a stranger's video can make it open files or connections.
    Raises OSError with ffmpeg's words if it fails; where the block ends by an error, ffmpeg is killed.
    """

    def __init__(self, target: Path, height: int, packing: Packing, fps: Fraction, options: dict[str, Any]):
        """options: of x264 and the colours; the range of the bytes that come in is that of the file, so none is changed."""
        command = (
            ffmpeg.input(
                "pipe:",
                format="rawvideo",
                pix_fmt="yuv420p",
                video_size=(packing.width, height),
                framerate=str(fps),
                color_range=options["color_range"],
            )
            .output(
                str(target),
                vcodec="libx264",
                preset=packing.preset,
                g=packing.gop,
                keyint_min=packing.gop,
                sc_threshold=0,
                threads=1,
                map_metadata=-1,
                fflags="+bitexact",
                **{"flags:v": "+bitexact"},
                **options,
            )
            .global_args("-loglevel", "error", "-nostats")
            .overwrite_output()
            .compile(cmd=imageio_ffmpeg.get_ffmpeg_exe())
        )
        self.count = 0
        # Its words go to a file, not a pipe, which could fill up while nobody reads it.
        self.words = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.words)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin

    def write(self, planes: np.ndarray) -> None:
        try:
            self.pipe.write(np.ascontiguousarray(planes).data)
        except BrokenPipeError:
            self.check_end()
            raise
        self.count += 1

    def passing(self, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Writes pictures and hands each on."""
        for planes in pictures:
            self.write(planes)
            yield planes

    def check_end(self) -> None:
        """Waits for ffmpeg. Raises OSError unless it ended well and without a word, BadVideo if its file grew too large."""
        status = self.process.wait()
        self.words.seek(0)
        said = self.words.read().decode(errors="replace").strip()
        if status == -signal.SIGXFSZ:
            raise BadVideo(f"its first {self.count} frames fill the largest file allowed (ulimit -f, --memory-limit)")
        if status or said:
            raise OSError(f"ffmpeg ended with status {status} after {self.count} frames: {said[:300]}")

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with suppress(BrokenPipeError):  # it has ended before; the next line says why
                    self.pipe.close()
                self.check_end()
        finally:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):
                self.pipe.close()
            self.words.close()


def video_encoder(target: Path, packing: Packing, fps: Fraction) -> Encoder:
    """Takes the planes (H * 3 // 2, W) of a video's frames."""
    colours = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "smpte170m")
    options = {"crf": packing.crf, "tune": "fastdecode", "color_range": "tv", **colours}
    return Encoder(target, packing.height, packing, fps, options)


def flow_encoder(target: Path, packing: Packing, fps: Fraction) -> Encoder:
    """Takes the planes (3H, W) of a video's flow. Coded for a small error and not for the eye; all byte values are used."""
    options = {"crf": packing.flow_crf, "tune": "psnr,fastdecode", "color_range": "pc"}
    return Encoder(target, 2 * packing.height, packing, fps, options)


def read_frames(data: bytes, wanted: Sequence[int], packing: Packing) -> np.ndarray:
    """Frames by number from a stored video's bytes -> planes (len(wanted), H * 3 // 2, W) uint8.

    `wanted` counts from 0 and may repeat. Raises BadVideo where a wanted frame is not there.
    """
    height, width = packing.height, packing.width

    def put(frame: VideoFrame, out: np.ndarray) -> None:
        if packing.copy:
            out[:] = to_planes(frame, width, height)
            return
        luma, u, v = planes_of(frame, width, height)
        halves = out[height:].reshape(2, height // 2, width // 2)
        out[:height], halves[0], halves[1] = luma, u, v

    return read_numbered(data, wanted, (height * 3 // 2, width), None if packing.copy else packing.gop, put)


def read_flow(data: bytes, wanted: Sequence[int], packing: Packing) -> np.ndarray:
    """Fields by number from the bytes of a stored video's flow -> (len(wanted), 2H, W) uint8, u above v, as decoded.

    Raises BadVideo where a wanted field is not there.
    """
    width, height = packing.width, 2 * packing.height

    def put(frame: VideoFrame, out: np.ndarray) -> None:
        out[:] = planes_of(frame, width, height)[0]

    return read_numbered(data, wanted, (height, width), packing.gop, put)


def planes_of(frame: VideoFrame, width: int, height: int) -> list[np.ndarray]:
    """Views of a decoded frame's three planes, each (rows, columns) uint8. Raises BadVideo for a frame of another size."""
    if (frame.width, frame.height) != (width, height) or frame.format.name not in ("yuv420p", "yuvj420p"):
        found = f"{frame.width} x {frame.height}, {frame.format.name}"
        raise BadVideo(f"has frames of {found}: wanted {width} x {height}, yuv420p, as they are packed")
    planes: Any = frame.planes  # they are buffers, which their type does not say
    return [np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] for plane in planes]


def read_numbered(
    data: bytes,
    wanted: Sequence[int],
    shape: tuple[int, int],
    gop: int | None,
    put: Callable[[VideoFrame, np.ndarray], None],
) -> np.ndarray:
    """Frames by number, each decoded once and put into arrays of `shape` -> (len(wanted), *shape) uint8.

    With a known key-frame interval the decoder starts at the last key frame before the first wanted one; copied videos
    (gop None) are decoded from their first frame, so that frames stay counted.

        gop = 4, wanted = 6 7 8       K...K...K...      starts at frame 4
                                          ----^^^
    """
    pictures = np.empty((len(wanted), *shape), np.uint8)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(wanted):
        places.setdefault(int(number), []).append(place)
    frames = counted(data) if gop is None else numbered(data, read_track(data), set(places), gop)
    try:
        with closing(frames):
            for number, frame in frames:
                if number in places:
                    first, *repeats = places.pop(number)
                    put(frame, pictures[first])
                    for other in repeats:
                        pictures[other] = pictures[first]
                if not places:
                    return pictures
    except FFmpegError as error:
        raise BadVideo(f"does not decode ({reason_of(error)})") from None
    raise BadVideo(f"frame {min(places)} is wanted, but the video ends before it")


def counted(data: bytes) -> Generator[tuple[int, VideoFrame], None, None]:
    """(number, frame) of every frame of any video."""
    with av.open(io.BytesIO(data), "r", metadata_errors="ignore", options=OPEN_OPTIONS) as container:
        yield from enumerate(container.decode(video_stream(container)))


def numbered(data: bytes, track: "Track", wanted: Set[int], gop: int) -> Generator[tuple[int, VideoFrame], None, None]:
    """(number, frame) of a video of ours, from the last key frame at or before the first wanted one to the last wanted one.

    The decoder gets no packet more than it must: those up to the last that holds a frame of these, without the frames before
    them that no other is predicted from.

        as shown      K1 2 3 4          wanted = 1 2: K, 4, 2, 1 are decoded
        as decoded    K4 2 1 3          wanted = 2: K, 4, 2, as nothing is predicted from 1
    """
    first, last = min(wanted), min(max(wanted), len(track.numbers) - 1)
    key = first // gop * gop  # no frame is predicted across key frames, so these have the same place in both orders
    missing = last - key + 1
    decoder = thread_decoder(track.parameters)
    for place in range(key, len(track.numbers)):
        number, start = track.numbers[place], track.offsets[place]
        missing -= number <= last
        if number < first and missing and not is_reference(data, start):
            continue
        packet = av.Packet(data[start : track.offsets[place + 1]])
        packet.pts = number
        frames = decoder.decode(packet)
        if not missing:
            frames += decoder.decode(None)  # which it has kept for their order
        for frame in frames:
            assert frame.pts is not None
            yield frame.pts, frame
        if not missing:
            return


def is_reference(data: bytes, start: int) -> bool:
    """Whether other frames are predicted from that whose packet starts there: the two bits nal_ref_idc of its first slice."""
    while start + 5 <= len(data):
        size, header = struct.unpack_from(">IB", data, start)
        if 1 <= header & 31 <= 5:  # a slice
            return header & 96 != 0
        start += 4 + size
    return True  # damaged: the decoder will say so


DECODERS = threading.local()


def thread_decoder(parameters: bytes) -> VideoCodecContext:
    """This thread's decoder of H.264 with these parameters, fresh. It is kept, as opening one takes as long as two frames."""
    decoder: VideoCodecContext | None = getattr(DECODERS, "kept", None)
    if decoder is not None and decoder.extradata == parameters:
        decoder.flush_buffers()
        return decoder
    DECODERS.kept = decoder = VideoCodecContext.create("h264", "r")
    decoder.extradata = parameters
    decoder.thread_type, decoder.thread_count = "NONE", 1  # pyright: ignore[reportAttributeAccessIssue]
    return decoder


@dataclass(frozen=True, kw_only=True)
class Track:
    """What an mp4 of ours says of its frames, which lie in it in the order of decoding."""

    numbers: list[int]  # of the frames, in the order in which they are shown
    offsets: list[int]  # of each frame's first byte, and of the first behind them all
    parameters: bytes  # the decoder's


def read_track(data: bytes) -> Track:
    """Of a file that Encoder wrote. Raises BadVideo for any other.

    Its layout is known: a demuxer, which finds out what is in a file and can read any, takes a sixth of a clip's time.
    """
    try:
        span = (0, len(data))
        for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            span = boxes(data, *span)[name]
        table = boxes(data, *span)
        [_, size_of_all, count], sizes = np.split(words(data, table[b"stsz"]), [3])
        if not 0 < count < len(data):
            raise ValueError
        times = np.cumsum(repeated(words(data, table[b"stts"]), count))  # when each is shown, but for a constant
        if b"ctts" in table:
            times += repeated(words(data, table[b"ctts"]), count)
        chunks = words(data, table[b"stco"])[2:]
        offsets = chunks[0] + np.cumsum(np.append(0, np.full(count, size_of_all) if size_of_all else sizes))
        if len(offsets) != count + 1 or (offsets[offsets.searchsorted(chunks)] != chunks).any():
            raise ValueError
        entry, end = boxes(data, table[b"stsd"][0] + 8, table[b"stsd"][1])[b"avc1"]
        start, end = boxes(data, entry + 78, end)[b"avcC"]
    except (KeyError, IndexError, ValueError, struct.error):
        raise BadVideo("does not decode (Invalid data found: not an mp4 of one H.264 video as packed)") from None
    numbers = times.argsort().argsort()
    return Track(numbers=numbers.tolist(), offsets=offsets.tolist(), parameters=data[start:end])


def boxes(data: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """The boxes in a part of an mp4: {name: (start, end) of its contents}."""
    found = {}
    while start < end:
        size, name = struct.unpack_from(">I4s", data, start)
        if size < 8:
            raise ValueError
        found[name] = (start + 8, start + size)
        start += size
    return found


def words(data: bytes, span: tuple[int, int]) -> np.ndarray:
    """The 32-bit numbers that fill a box."""
    start, end = span
    return np.frombuffer(data, ">i4", (end - start) // 4, start).astype(np.int64)


def repeated(table: np.ndarray, count: int) -> np.ndarray:
    """A box's (times, value) pairs -> each value so many times, `count` in all. Raises ValueError if they are not so many."""
    times, values = table[2:].reshape(-1, 2).T
    if times.sum() != count:
        raise ValueError
    return np.repeat(values, times)
