"""Frames of stored videos by number: the same as decoding from the start, from the key frame before them."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import (
    DATA,
    TINY,
    all_frames,
    decoded,
    encode_planes,
    frame_numbers,
    needs_data,
    numbered_planes,
    write_video,
)

from shards.packing.transcode import store_video
from shards.reading import decode
from shards.reading.decode import read_frames
from shards.video import BadVideo, Packing


@settings(max_examples=40, deadline=None)
@given(
    num_frames=st.integers(1, 40),
    gop=st.integers(1, 20),
    preset=st.sampled_from(["ultrafast", "medium"]),  # medium has B-frames
    fps=st.sampled_from(["25", "30000/1001", "1", "240", "45000/1499", "1000000/33333", "123457/10007"]),
    data=st.data(),
)
def test_reading_by_number_is_the_same_as_decoding_from_the_start(num_frames, gop, preset, fps, data):
    packing = Packing(width=32, height=32, gop=gop, preset=preset)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stored.mp4"
        assert encode_planes(numbered_planes(num_frames), target, packing, Fraction(fps)) == num_frames
        stored = target.read_bytes()
    frames = all_frames(stored)
    assert frame_numbers(frames) == list(range(num_frames))
    for number in range(num_frames):
        np.testing.assert_array_equal(read_frames(stored, [number], packing)[0], frames[number])
    wanted = data.draw(st.lists(st.integers(0, num_frames - 1), min_size=1, max_size=12))  # any order, repeats
    np.testing.assert_array_equal(read_frames(stored, wanted, packing), frames[wanted])


def test_reading_starts_at_the_last_key_frame_before_the_first_wanted_one(tmp_path, monkeypatch):
    """So that a clip's cost does not grow with its place in the video."""
    packing = Packing(width=32, height=32, gop=4)
    encode_planes(numbered_planes(40), tmp_path / "stored.mp4", packing, Fraction(25))
    seen = []

    def spy(container, stream, first, gop):
        for number, frame in numbered(container, stream, first, gop):
            seen.append(number)
            yield number, frame

    numbered = decode.decode_gops
    monkeypatch.setattr(decode, "decode_gops", spy)
    stored = (tmp_path / "stored.mp4").read_bytes()
    read_frames(stored, [30, 31, 32], packing)
    assert [number for number in seen if number != 29] == [28, 30, 31, 32]
    # 29 is decoded if a later frame is predicted from it
    track = decode.read_track(stored)
    assert (29 in seen) == decode.is_reference(stored, track.offsets[track.numbers.index(29)])


def test_frames_before_the_first_wanted_one_from_which_none_is_predicted_are_not_decoded(tmp_path):
    packing = Packing(width=32, height=32, gop=16)
    encode_planes(numbered_planes(32), tmp_path / "stored.mp4", packing, Fraction(25))
    stored = (tmp_path / "stored.mp4").read_bytes()
    track = decode.read_track(stored)
    alone = {
        number
        for number, start in zip(track.numbers, track.offsets, strict=False)
        if not decode.is_reference(stored, start)
    }
    assert len(alone & set(range(16, 30))) > 3  # B-frames
    decoded = [number for number, _ in decode.decode_gops(stored, track, {30, 31}, packing.gop)]
    assert decoded == [number for number in range(16, 32) if number >= 30 or number not in alone]


@pytest.mark.parametrize("preset", ["ultrafast", "medium"])
def test_a_frame_after_the_last_is_refused(preset, tmp_path):
    packing = Packing(width=32, height=32, gop=4, preset=preset)
    encode_planes(numbered_planes(10), tmp_path / "stored.mp4", packing, Fraction(25))
    with pytest.raises(BadVideo, match="the video ends before frame 10"):
        read_frames((tmp_path / "stored.mp4").read_bytes(), [9, 10], packing)


def test_bytes_that_are_not_a_video_are_refused_when_read():
    with pytest.raises(BadVideo, match=r"does not decode .Invalid data found"):
        read_frames(b"not a video" * 100, [0], TINY)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_copied_video_keeps_its_bytes_and_gives_the_right_frames(codec, tmp_path):
    path = write_video(tmp_path / "Video.AVI", numbered_planes(30, height=48, width=64), codec=codec)
    packing = Packing(width=32, height=32, copy=True)

    stored = store_video(path, packing)

    assert (stored.data, stored.suffix) == (path.read_bytes(), "avi")
    assert (stored.num_frames, stored.fps) == (30, 25)
    wanted = [29, 0, 17, 17, 5]
    read = read_frames(stored.data, wanted, packing)
    assert frame_numbers(read) == wanted
    np.testing.assert_array_equal(read, decoded(path)[wanted])


@needs_data
def test_a_copied_video_with_timestamps_that_jump_gives_the_right_frames():
    path = DATA / "ut-interaction" / "Hugging" / "53_9_1.avi"
    packing = Packing(width=64, height=48, copy=True)
    frames = decoded(path, packing)
    wanted = [len(frames) - 1, 3, 40]
    np.testing.assert_array_equal(read_frames(path.read_bytes(), wanted, packing), frames[wanted])
