"""The demos, whole: GRU-RCN learns the motion, single frames do not."""

import json

import pytest

from jobs.commands import load


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # a busy machine may take as long as it likes
def test_over_gru_rcn_the_decoder_names_the_motion_and_over_single_frames_it_cannot(tmp_path):
    demo, json_file = load("demo"), tmp_path / "result.json"
    words = ["caption", "--folder", str(tmp_path / "demo"), "--json", str(json_file)]
    assert demo.main(demo.parse(words, "demo")) == 0
    result = json.loads(json_file.read_text())
    assert result["gru_rcn_motion"] > 0.9
    assert result["single_frame_motion"] < 0.5
    assert result["gru_rcn_scores"]["bleu4"] > 0.8
