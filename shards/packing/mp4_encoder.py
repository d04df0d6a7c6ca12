"""Planes -> an H.264 mp4, by the ffmpeg program."""

import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np

from shards.video import BadVideo, Packing


class Encoder:
    """Writes planes as an H.264 mp4 with a key frame every `gop` frames. The file is whole when the `with` block has ended.

    The same frames give the same file: one thread, no dates, no version of the encoder. ffmpeg reads raw frames from a pipe
    and nothing else, so nothing inside a stranger's video can make it open files or connections.
    Raises OSError with ffmpeg's message if it fails. If the block raises, ffmpeg is killed.
    """

    def __init__(self, target: Path, height: int, packing: Packing, fps: Fraction, options: dict[str, Any]):
        """options: of x264, and the colours of the file. The planes have the file's color_range, so no byte is changed."""
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
        # Its messages go to a file: a pipe could fill up while nobody reads it.
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.messages)
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
        """Writes pictures, and yields each after it is written."""
        for planes in pictures:
            self.write(planes)
            yield planes

    def check_end(self) -> None:
        """Waits for ffmpeg. Raises OSError unless it ended with status 0 and no message, BadVideo if its file grew too large."""
        status = self.process.wait()
        self.messages.seek(0)
        messages = self.messages.read().decode(errors="replace").strip()
        if status == -signal.SIGXFSZ:
            raise BadVideo(f"its first {self.count} frames fill the largest file allowed (ulimit -f, --memory-limit)")
        if status or messages:
            raise OSError(f"ffmpeg ended with status {status} after {self.count} frames: {messages[:300]}")

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with suppress(BrokenPipeError):  # it has ended already; the next line raises the reason
                    self.pipe.close()
                self.check_end()
        finally:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):
                self.pipe.close()
            self.messages.close()


def video_encoder(target: Path, packing: Packing, fps: Fraction) -> Encoder:
    """Encodes the planes (H * 3 // 2, W) of a video's frames."""
    colours = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "smpte170m")
    options = {"crf": packing.crf, "tune": "fastdecode", "color_range": "tv", **colours}
    return Encoder(target, packing.height, packing, fps, options)


def flow_encoder(target: Path, packing: Packing, fps: Fraction) -> Encoder:
    """Encodes the planes (3H, W) of a video's flow: tuned for a small error, not for the eye; all byte values are used."""
    options = {"crf": packing.flow_crf, "tune": "psnr,fastdecode", "color_range": "pc"}
    return Encoder(target, 2 * packing.height, packing, fps, options)
