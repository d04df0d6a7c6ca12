"""Source videos, and segments of them, become the bytes that are stored."""

import re
import tempfile
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import (
    TINY,
    all_frames,
    decoded,
    frame_numbers,
    lavfi_video,
    luma,
    mean_difference,
    numbered_planes,
    write_video,
)

from shards.packing import decode_source as source_module
from shards.packing import transcode
from shards.packing.transcode import store_video
from shards.video import BadVideo, Packing


def test_stored_frames_are_close_to_the_decoded_ones(tmp_path):
    path = lavfi_video(tmp_path / "video.mp4", source="testsrc2=size=64x48:rate=30000/1001", num_frames=20)
    packing = Packing(width=64, height=48, crf=18)
    stored = store_video(path, packing)
    assert (stored.num_frames, stored.suffix) == (20, "mp4")
    assert stored.fps == pytest.approx(29.97, abs=0.001)
    frames, original = all_frames(stored.data), decoded(path, packing)
    assert frames.shape == (20, 72, 64)
    assert mean_difference(frames, original) < 3
    worse = store_video(path, Packing(width=64, height=48, crf=45))
    assert mean_difference(all_frames(worse.data), original) > 2 * mean_difference(frames, original)


def test_a_video_is_stretched_to_the_stored_size(tmp_path):
    """Left half black, right half white, of another shape: still half and half."""
    planes = np.full((2, 96, 48), 128, np.uint8)
    planes[:, :64, :24], planes[:, :64, 24:] = 16, 235
    write_video(tmp_path / "tall.avi", planes)
    stored = decoded(tmp_path / "tall.avi")
    assert stored.shape == (2, 48, 32)
    assert luma(stored)[:, :, :12].max() < 40
    assert luma(stored)[:, :, 20:].min() > 210


def test_storing_the_same_video_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    path = lavfi_video(tmp_path / "video.mp4", num_frames=20)
    first = store_video(path, Packing(width=64, height=48))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    assert store_video(path, Packing(width=64, height=48)) == first


def test_a_stored_video_tells_nothing_of_the_machine_that_made_it(tmp_path):
    """The encoder's number of threads changes its bytes; muxers write dates and versions."""
    stored = store_video(write_video(tmp_path / "video.avi", numbered_planes(8)), TINY)
    assert b" threads=1 " in stored.data  # in x264's own note of its options
    assert b"Lavf" not in stored.data
    (tmp_path / "stored.mp4").write_bytes(stored.data)
    with av.open(str(tmp_path / "stored.mp4")) as container:
        assert set(container.metadata) == {"major_brand", "minor_version", "compatible_brands"}


def test_a_frame_rate_that_is_nonsense_counts_as_25(tmp_path):
    path = lavfi_video(tmp_path / "fast.avi", "-r", "1000", source="testsrc2=size=32x32:rate=1000")
    assert store_video(path, TINY).fps == 25


def encoders():
    """The ffmpeg processes of this one, which may have other children: other tests start some that stay."""
    found = psutil.Process().children()
    return [one for one in found if one.status() != psutil.STATUS_ZOMBIE and one.name().startswith("ffmpeg")]


@pytest.mark.parametrize("flow", ["none", "dis"])
def test_a_video_that_breaks_off_and_an_encoder_that_dies_leave_no_process_behind(flow, tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.avi", numbered_planes(40))

    def until(number, error):
        def frames(*_):
            for count, planes in enumerate(numbered_planes(40)):
                if count == number:
                    assert len(encoders()) == (1 if flow == "none" else 2)
                    error()
                yield planes

        monkeypatch.setattr(transcode, "decode_source", frames)

    def break_off():
        raise BadVideo("breaks off")

    until(20, break_off)
    with pytest.raises(BadVideo, match="breaks off"):
        store_video(path, replace(TINY, flow=flow))
    assert not encoders()

    until(20, lambda: [process.kill() for process in encoders()])
    with pytest.raises(OSError, match=r"ffmpeg ended with status -9 after \d+ frames"):
        store_video(path, replace(TINY, flow=flow))
    assert not encoders()


def test_a_preset_that_the_encoder_does_not_know_is_an_error_and_not_a_bad_video(tmp_path):
    path = write_video(tmp_path / "video.avi", numbered_planes(8))
    with pytest.raises(OSError, match=r"ffmpeg ended with status .*hasty"):
        store_video(path, Packing(width=32, height=32, preset="hasty"))


# Segments


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """40 numbered frames, 25 a second."""
    return write_video(tmp_path_factory.mktemp("forty") / "forty.avi", numbered_planes(40))


@pytest.mark.parametrize(
    ("start", "end", "first", "stop"),
    [
        (None, None, 0, 40),
        (0.0, 1.6, 0, 40),
        (0.4, 1.2, 10, 30),  # frame 30, at 1.2 s, is not in it
        (None, 1.0, 0, 25),
        (1.0, None, 25, 40),
        (0.41, 0.43, 10, 11),  # 10.25 and 10.75 frames
        (1.56, 1.6, 39, 40),
        (1.0, 1.7, 25, 40),  # two of 17 frames are not there
        (1.52, 1.8, 38, 40),  # five of seven are not, but lists are only exact to 0.2 s
    ],
)
def test_a_segment_holds_the_frames_between_its_seconds(start, end, first, stop, forty):
    stored = store_video(forty, TINY, start, end)
    assert (stored.num_frames, stored.fps) == (stop - first, 25)
    assert frame_numbers(all_frames(stored.data)) == list(range(first, stop))


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 39), length=st.integers(1, 40), rate=st.sampled_from(["25", "30000/1001", "240", "7/3"]))
def test_segments_that_follow_each_other_share_no_frame_and_leave_none_out(first, length, rate):
    """Frame n lasts from n / rate to (n + 1) / rate; a list may say that with a few digits only."""
    fps = Fraction(rate)
    stop = min(first + length, 40)
    at_start, at_end = round(float(first / fps), 3), round(float(stop / fps), 3)
    assert transcode.segment_bounds(at_start, at_end, fps) == (first, stop)
    assert transcode.segment_bounds(at_end, None, fps) == (stop, None)


def test_a_segment_has_the_flow_of_its_own_frames(forty):
    pytest.importorskip("cv2")
    stored = store_video(forty, replace(TINY, flow="dis"), 0.4, 0.8)
    assert stored.flow is not None
    assert stored.num_frames == len(all_frames(stored.flow)) == 10


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (1.2, 3.2, r"the segment from 1\.20 s to 3\.20 s has 50 frames, but the video ends after 10 of them"),
        (5.0, 6.0, r"the segment from 5\.00 s to 6\.00 s begins after the video's end"),
        (1.6, None, r"the segment from 1\.60 s on begins after the video's end"),
        (1.01, 1.012, r"the segment from 1\.00 s to 1\.00 s holds no frame at 25 frames a second"),
    ],
)
def test_a_segment_that_is_not_there_is_refused(start, end, message, forty):
    with pytest.raises(BadVideo, match=message):
        store_video(forty, TINY, start, end)


@pytest.mark.parametrize(
    ("start", "end"), [(-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_a_segment_of_nonsense_is_no_fault_of_the_video(start, end, forty):
    with pytest.raises(ValueError, match=r"a segment from .* s: expected 0 <= start < end") as caught:
        store_video(forty, TINY, start, end)
    assert not isinstance(caught.value, BadVideo)


def test_copying_a_segment_is_refused(forty):
    with pytest.raises(ValueError, match="copy keeps whole files") as caught:
        store_video(forty, replace(TINY, copy=True), 0.4, 1.2)
    assert not isinstance(caught.value, BadVideo)


def test_what_lies_behind_a_segment_is_not_looked_at_and_what_lies_before_is(tmp_path):
    path = lavfi_video(tmp_path / "whole.avi", "-c:v", "mpeg4", num_frames=40)
    data = bytearray(path.read_bytes())
    packet = [match.start() for match in re.finditer(b"00dc", data) if match.start() > data.index(b"movi")][30]
    size = int.from_bytes(data[packet + 4 : packet + 8], "little")
    (tmp_path / "cut.avi").write_bytes(data[:packet])
    data[packet + 8 : packet + 8 + size] = b"\xff" * size
    (tmp_path / "damaged.avi").write_bytes(data)

    assert store_video(tmp_path / "damaged.avi", TINY, 0.4, 1.2).num_frames == 20
    assert store_video(tmp_path / "cut.avi", TINY, 0.4, 1.2).num_frames == 20
    for start, end in [(0.0, 1.24), (1.4, 1.6), (1.4, None)]:
        with pytest.raises(BadVideo, match="frame 31 of 40 does not decode"):
            store_video(tmp_path / "damaged.avi", TINY, start, end)
    with pytest.raises(BadVideo, match="its header promises"):
        store_video(tmp_path / "cut.avi", TINY, 0.4)


def test_frames_before_a_segment_are_not_scaled(forty, monkeypatch):
    scaled = []
    monkeypatch.setattr(source_module, "to_planes", lambda frame, *_: scaled.append(frame) or numbered_planes(1)[0])
    store_video(forty, TINY, 0.4, 1.2)
    assert len(scaled) == 20
