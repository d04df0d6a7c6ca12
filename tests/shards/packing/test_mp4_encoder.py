"""Planes become an mp4 with key frames at an interval, and nothing else."""

import resource
from fractions import Fraction

import av
import numpy as np
import pytest
from videos import (
    TINY,
    all_frames,
    encode_planes,
    level,
    luma,
    numbered_planes,
    write_video,
)

from shards.packing.mp4_encoder import video_encoder
from shards.packing.transcode import store_video
from shards.reading.decode import read_frames
from shards.video import BadVideo, Packing


def test_lossless_storing_keeps_every_pixel(tmp_path):
    rng = np.random.default_rng(0)
    planes = rng.integers(16, 236, (6, 48, 32), dtype=np.uint8)
    encode_planes(planes, tmp_path / "stored.mp4", Packing(width=32, height=32, crf=0), Fraction(25))
    read = read_frames((tmp_path / "stored.mp4").read_bytes(), range(6), TINY)
    np.testing.assert_array_equal(read, planes)


def test_key_frames_come_at_the_interval_even_where_the_scene_changes(tmp_path):
    planes = numbered_planes(20)
    planes[7:, :32] = 235
    encode_planes(planes, tmp_path / "stored.mp4", Packing(width=32, height=32, gop=6), Fraction(25))
    with av.open(str(tmp_path / "stored.mp4")) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys == [0, 6, 12, 18]


def test_a_stored_video_that_grows_beyond_the_largest_file_allowed_is_refused(tmp_path):
    planes = np.random.default_rng(0).integers(16, 236, (200, 48, 32), dtype=np.uint8)
    encoder = video_encoder(tmp_path / "stored.mp4", TINY, Fraction(25))
    resource.prlimit(encoder.process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(BadVideo, match=r"its first \d+ frames fill the largest file allowed"), encoder:
        list(encoder.passing(planes))


def test_the_levels_of_numbered_frames_survive_the_codec(tmp_path):
    """What the tests above rest on."""
    stored = store_video(write_video(tmp_path / "video.avi", numbered_planes(40)), TINY)
    found = luma(all_frames(stored.data)).mean(axis=(1, 2))
    np.testing.assert_allclose(found, [level(number) for number in range(40)], atol=1.5)
