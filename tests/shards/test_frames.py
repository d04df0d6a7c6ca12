"""Frames of any codec, colour and rotation become upright planes of BT.601."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from videos import (
    DATA,
    TINY,
    decoded,
    ffmpeg,
    lavfi_video,
    mean_difference,
    needs_data,
)

from shards.frames import turn
from shards.packing.transcode import store_video
from shards.reading.decode import read_frames
from shards.video import Packing

ODD = DATA / "odd"


def by_ffmpeg(path, width, height):
    """The frames as the ffmpeg program shows them (N, H * 3 // 2, W): it turns them by itself."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough"]
    command += ["-vf", f"scale={width}:{height}:flags=bicubic,format=yuv420p", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height * 3 // 2, width)


@needs_data
def test_a_phone_video_is_stored_upright():
    packing = Packing(width=64, height=96)
    shown, ours = by_ffmpeg(ODD / "video_90.mov", 64, 96), decoded(ODD / "video_90.mov", packing)
    assert mean_difference(ours, shown) < 2
    assert mean_difference(np.stack([turn(planes, 2) for planes in ours]), shown) > 20  # upside down
    stored = store_video(ODD / "video_90.mov", packing)
    assert mean_difference(read_frames(stored.data, [0, 1, 2], packing), shown) < 3


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_every_quarter_turn_is_ffmpegs(degrees, tmp_path):
    lavfi_video(tmp_path / "flat.mp4", "-pix_fmt", "yuv420p", source="testsrc2=size=64x48:rate=25", num_frames=3)
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    width, height = (48, 64) if degrees % 180 else (64, 48)
    for copy in (False, True):
        packing = Packing(width=width, height=height, copy=copy)
        shown = by_ffmpeg(tmp_path / "turned.mp4", width, height)
        np.testing.assert_array_equal(decoded(tmp_path / "turned.mp4", packing), shown)
    read = read_frames((tmp_path / "turned.mp4").read_bytes(), [0, 1, 2], packing)
    np.testing.assert_array_equal(read, shown)


def test_turning_moves_each_pixel_as_worked_by_hand():
    """Luma 2 x 4 and chroma 1 x 2; a quarter turn counter-clockwise puts the right column on top.

    0 1 2 3        3 7
    4 5 6 7        2 6      U: 8 9 -> 9    V: 10 11 -> 11
                   1 5              8               10
                   0 4
    """
    planes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert turn(planes, 1).tolist() == [[3, 7], [2, 6], [1, 5], [0, 4], [9, 8], [11, 10]]
    assert turn(planes, 2).tolist() == [[7, 6, 5, 4], [3, 2, 1, 0], [9, 8, 11, 10]]
    np.testing.assert_array_equal(turn(turn(planes, 1), 3), planes)


# (Y, U, V) of BT.601, limited range, by hand: Y = 16 + 219 (.299 R + .587 G + .114 B), chroma 128 +- 112.
COLOURS = {"red": (81, 90, 240), "lime": (145, 54, 34), "blue": (41, 240, 110), "white": (235, 128, 128)}
CODINGS = {
    "BT.601, not tagged": ("-vf", "scale=out_color_matrix=bt601:out_range=tv,format=yuv420p"),
    "BT.709": (
        *("-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p", "-color_range", "tv"),
        *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    ),
    "BT.601, full range": (
        *("-vf", "scale=out_color_matrix=bt601:out_range=pc,format=yuv420p"),
        *("-colorspace", "smpte170m", "-color_range", "pc"),
    ),
    "motion JPEG": ("-vf", "format=yuvj444p", "-c:v", "mjpeg", "-q:v", "1"),
    "RGB": ("-c:v", "png", "-pix_fmt", "rgb24"),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_comes_back_as_bt601_however_it_was_coded(coding, colour, tmp_path):
    source = f"color={colour}:size=48x64:rate=25,format=rgb24"
    path = lavfi_video(tmp_path / "colour.mov", *CODINGS[coding], source=source, num_frames=2)

    [stored] = read_frames(store_video(path, TINY).data, [1], TINY)
    [copied] = read_frames(path.read_bytes(), [1], Packing(width=32, height=32, copy=True))

    for planes in (stored, copied):
        y, u, v = planes[:32], planes[32:40], planes[40:]
        assert [float(plane.mean()) for plane in (y, u, v)] == pytest.approx(COLOURS[colour], abs=2.5)
