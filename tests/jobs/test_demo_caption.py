"""The captioning demo: its videos say what their captions say, and the whole of it learns."""

import json

import numpy as np
import pytest

from jobs.demo.caption import CaptionDemo, main
from jobs.demo.videos import DIRECTIONS, SHAPES, directions_in, draw_scene, sentences


@pytest.mark.parametrize("first", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_moves_as_its_captions_say(first, shape):
    """By the phase of the picture's first harmonic: the edges meet, so a shift is a rotation of it."""
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
    said = sentences("red", "square", "left", "up")
    assert said[0] == "a red square moves left, then up"
    assert len(set(said)) == 3
    assert all(directions_in(caption) == ["left", "up"] for caption in said)
    assert directions_in("a blue disc goes down and then down") == ["down", "down"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # a busy machine may take as long as it likes
def test_over_gru_rcn_the_decoder_names_the_motion_and_over_single_frames_it_cannot(tmp_path):
    assert main(CaptionDemo(folder=tmp_path / "demo", json=tmp_path / "result.json")) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["gru_rcn_motion"] > 0.9
    assert result["single_frame_motion"] < 0.5
    assert result["gru_rcn_scores"]["bleu4"] > 0.8
