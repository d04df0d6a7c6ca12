"""Synthetic videos move as their names and captions say."""

import numpy as np
import pytest

from shards.synthetic import DIRECTIONS, MOTIONS, SHAPES, directions_in, draw_scene, make_motion_videos, scene_captions


@pytest.mark.parametrize("first", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_moves_as_its_captions_say(first, shape):
    """Measured by the phase of the picture's first harmonic: the edges meet, so a shift turns the phase."""
    second = next(direction for direction in DIRECTIONS if direction != first)
    frames = draw_scene("green", shape, first, second, np.random.default_rng(3)).astype(float)
    green = frames[..., 1] - frames[..., 0]  # grey patches vanish
    phases = {
        "x": np.unwrap(np.angle(np.fft.fft(green.sum(axis=1), axis=1)[:, 1])),
        "y": np.unwrap(np.angle(np.fft.fft(green.sum(axis=2), axis=1)[:, 1])),
    }
    for direction, some in ((first, slice(0, 9)), (second, slice(15, 24))):
        dx, dy = DIRECTIONS[direction]
        moved = {axis: phase[some][-1] - phase[some][0] for axis, phase in phases.items()}
        assert np.sign(np.round(-moved["x"])) == dx
        assert np.sign(np.round(-moved["y"])) == dy


def test_captions_name_the_directions_in_their_order():
    captions = scene_captions("red", "square", "left", "up")
    assert captions[0] == "a red square moves left, then up"
    assert len(set(captions)) == 3
    assert all(directions_in(caption) == ["left", "up"] for caption in captions)
    assert directions_in("a blue disc goes down and then down") == ["down", "down"]


def test_motion_videos_are_the_same_each_time_and_existing_ones_are_kept(tmp_path):
    made: list[int] = []
    make_motion_videos(tmp_path / "one", 1, lambda: made.append(1))
    kept = tmp_path / "two" / "left" / "left-000.avi"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    make_motion_videos(tmp_path / "two", 1)
    assert len(made) == len(MOTIONS)
    assert kept.read_bytes() == b"kept"
    for motion in list(MOTIONS)[1:]:
        one, two = (tmp_path / name / motion / f"{motion}-000.avi" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
