"""Settings of packing and limits: which are refused, and how much time a video has."""

from dataclasses import replace

import pytest
from videos import (
    TINY,
)

from shards.video import Limits, Packing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 341}, "341 x 256 frames: expected even sizes of at least 16"),
        ({"height": 14}, "340 x 14 frames: expected even sizes of at least 16"),
        ({"gop": 0}, "gop 0: expected at least 1"),
        ({"crf": 52}, "crf 52: expected 0 .lossless. to 51"),
        ({"flow_crf": -1}, "flow_crf -1: expected 0 .lossless. to 51"),
        ({"flow": "farneback"}, "flow 'farneback': expected one of none, tvl1, dis"),
        ({"flow_bound": 0.0}, "flow_bound 0: expected above 0 and below 1000 pixels"),
        ({"flow_bound": float("nan")}, "flow_bound nan"),
    ],
)
def test_packing_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Packing(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit": 0.0}, "time_limit 0: expected above 0 and at most 1,000,000 seconds"),
        ({"time_limit": float("nan")}, "time_limit nan"),
        ({"memory_limit": 0.25}, r"memory_limit 0\.25: expected 0\.5 to 1,000,000 GiB"),
        ({"max_pixels": 0}, "max_pixels 0: expected 1 to 2,147,483,647"),
    ],
)
def test_limits_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


def test_a_video_whose_tv_l1_flow_is_wanted_has_more_time():
    assert Limits().seconds(TINY) == Limits().seconds(replace(TINY, flow="dis")) == 600
    assert Limits().seconds(replace(TINY, flow="tvl1")) == 7200
    assert Limits(time_limit=5).seconds(replace(TINY, flow="tvl1")) == 5
