"""Frames of a stored video, or fields of its flow, by number: decoded from the key frame before the first of them."""

import io
import struct
import threading
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import closing
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from shards.frames import OPEN_OPTIONS, reason_of, to_planes, video_stream
from shards.reading.mp4 import Track, read_track
from shards.video import BadVideo, Packing


def read_frames(data: bytes, numbers: Sequence[int], packing: Packing) -> np.ndarray:
    """Frames by number from a stored video's bytes -> planes (len(numbers), H * 3 // 2, W) uint8.

    `numbers` count from 0 and may repeat. Raises BadVideo for a frame that is not there or does not decode.
    """
    height, width = packing.height, packing.width

    def put(frame: VideoFrame, out: np.ndarray) -> None:
        if packing.copy:
            out[:] = to_planes(frame, width, height)
            return
        luma, u, v = planes_of(frame, width, height)
        halves = out[height:].reshape(2, height // 2, width // 2)
        out[:height], halves[0], halves[1] = luma, u, v

    return read_numbered(data, numbers, (height * 3 // 2, width), None if packing.copy else packing.gop, put)


def read_flow(data: bytes, numbers: Sequence[int], packing: Packing) -> np.ndarray:
    """Fields by number from the bytes of a stored video's flow -> (len(numbers), 2H, W) uint8, u above v, as decoded.

    Raises BadVideo for a field that is not there or does not decode.
    """
    width, height = packing.width, 2 * packing.height

    def put(frame: VideoFrame, out: np.ndarray) -> None:
        out[:] = planes_of(frame, width, height)[0]

    return read_numbered(data, numbers, (height, width), packing.gop, put)


def planes_of(frame: VideoFrame, width: int, height: int) -> list[np.ndarray]:
    """Views of a decoded frame's three planes, each (rows, columns) uint8. Raises BadVideo for a frame of another size."""
    if (frame.width, frame.height) != (width, height) or frame.format.name not in ("yuv420p", "yuvj420p"):
        found = f"{frame.width} x {frame.height}, {frame.format.name}"
        raise BadVideo(f"has frames of {found}: expected {width} x {height}, yuv420p, as they are packed")
    planes: Any = frame.planes  # they are buffers, which their type does not say
    return [np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] for plane in planes]


def read_numbered(
    data: bytes,
    numbers: Sequence[int],
    shape: tuple[int, int],
    gop: int | None,
    put: Callable[[VideoFrame, np.ndarray], None],
) -> np.ndarray:
    """Frames by number, each decoded once and put into arrays of `shape` -> (len(numbers), *shape) uint8.

    With a known key-frame interval the decoder starts at the last key frame before the first of them. Copied videos
    (gop None) are decoded from their first frame, so that frames stay counted.

        gop = 4, numbers = 6 7 8      K...K...K...      starts at frame 4
                                          ----^^^
    """
    pictures = np.empty((len(numbers), *shape), np.uint8)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(int(number), []).append(place)
    frames = decode_all(data) if gop is None else decode_gops(data, read_track(data), set(places), gop)
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
    raise BadVideo(f"the video ends before frame {min(places)}")


def decode_all(data: bytes) -> Generator[tuple[int, VideoFrame], None, None]:
    """(number, frame) of every frame of any video."""
    with av.open(io.BytesIO(data), "r", metadata_errors="ignore", options=OPEN_OPTIONS) as container:
        yield from enumerate(container.decode(video_stream(container)))


def decode_gops(data: bytes, track: Track, wanted: Set[int], gop: int) -> Generator[tuple[int, VideoFrame], None, None]:
    """(number, frame) of a stored video, from the last key frame at or before the first wanted frame to the last wanted one.

    The decoder gets only the packets that it needs: none after the last wanted frame's, and before the first wanted frame
    only those that other frames are predicted from.

        as shown      K1 2 3 4          wanted = 1 2: K, 4, 2, 1 are decoded
        as decoded    K4 2 1 3          wanted = 2: K, 4, 2, as nothing is predicted from 1
    """
    first, last = min(wanted), min(max(wanted), len(track.numbers) - 1)
    key = first // gop * gop  # frames are never predicted across a key frame, so it has the same place in both orders
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
            frames += decoder.decode(None)  # those that it still holds
        for frame in frames:
            assert frame.pts is not None
            yield frame.pts, frame
        if not missing:
            return


def is_reference(data: bytes, start: int) -> bool:
    """Whether other frames are predicted from the one whose packet starts there: nal_ref_idc of its first slice."""
    while start + 5 <= len(data):
        size, header = struct.unpack_from(">IB", data, start)
        if 1 <= header & 31 <= 5:  # a slice
            return header & 96 != 0
        start += 4 + size
    return True  # damaged: the decoder raises the error


DECODERS = threading.local()


def thread_decoder(parameters: bytes) -> VideoCodecContext:
    """This thread's H.264 decoder for these parameters, flushed. It is kept, as opening one takes as long as two frames."""
    decoder: VideoCodecContext | None = getattr(DECODERS, "kept", None)
    if decoder is not None and decoder.extradata == parameters:
        decoder.flush_buffers()
        return decoder
    DECODERS.kept = decoder = VideoCodecContext.create("h264", "r")
    decoder.extradata = parameters
    decoder.thread_type, decoder.thread_count = "NONE", 1  # pyright: ignore[reportAttributeAccessIssue]
    return decoder
