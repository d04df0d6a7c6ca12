"""Which frames and which part of the picture: by hand, within bounds, and evenly spread."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from captioned import wanted_frames
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reading.captions import Segments
from shards.reading.clips import (
    ClipConfig,
    clip_span,
    corners_and_centre,
    evaluation_clips,
    evaluation_views,
    frames_from,
    pick,
    segment_frames,
    train_clip,
    train_clips,
)
from shards.reading.order import CLIP_OF_SAMPLE, random_bits

CONFIGS = st.builds(
    ClipConfig,
    num_frames=st.integers(1, 16),
    stride=st.integers(1, 5),
    size=st.just(16),
    crop_scales=st.lists(st.floats(0.1, 1), min_size=1, max_size=4).map(tuple),
    mirror=st.booleans(),
    test_scale=st.floats(0.1, 1),
    stream=st.sampled_from(["rgb", "flow"]),
    flow_fields=st.integers(1, 12),
)
SIDES = st.integers(8, 200).map(lambda half: 2 * half)


def within(box, height, width):
    top, left, box_height, box_width = box
    return top >= 0 and left >= 0 and 0 < box_height <= height - top and 0 < box_width <= width - left


@pytest.mark.parametrize(("num_frames", "stride", "span"), [(4, 1, 4), (4, 2, 7), (1, 5, 1), (10, 3, 28)])
def test_a_clips_span_as_worked_by_hand(num_frames, stride, span):
    assert clip_span(num_frames, stride) == span
    assert clip_span(num_frames, stride, fields=4) == span + 3


@pytest.mark.parametrize(
    ("start", "video_frames", "frames"),
    [(0, 9, [0, 2, 4, 6]), (2, 9, [2, 4, 6, 8]), (0, 5, [0, 2, 4, 4]), (0, 1, [0, 0, 0, 0])],
)
def test_frames_as_worked_by_hand_and_a_short_video_holds_its_last(start, video_frames, frames):
    assert frames_from(start, video_frames, ClipConfig(num_frames=4, stride=2)).tolist() == frames


@settings(deadline=None)
@given(config=CONFIGS, video_frames=st.integers(1, 80), height=SIDES, width=SIDES, sample=st.integers(0, 10**9))
def test_a_training_clip_lies_within_its_video(config, video_frames, height, width, sample):
    clip = train_clip(video_frames, height, width, config, seed=5, epoch=2, sample=sample)
    assert clip.frames.shape == (config.frames_read,)
    assert 0 <= clip.frames.min() <= clip.frames.max() < video_frames
    steps = np.diff(clip.frames)
    if video_frames >= config.span:
        assert (steps == (1 if config.stream == "flow" else config.stride)).all()
    else:
        assert clip.frames[0] == 0
        assert clip.frames[-1] == video_frames - 1
    assert within(clip.box, height, width)
    assert clip.box[2] in {round(min(height, width) * scale) for scale in config.crop_scales}
    assert config.mirror or not clip.mirror
    assert 0 <= clip.draw < 2**63


@settings(deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6), sample=st.integers(0, 10**9))
def test_a_training_clip_depends_on_its_arguments_alone(config, seed, epoch, sample):
    def drawn():
        clip = train_clip(60, 64, 48, config, seed, epoch, sample)
        return clip.frames.tolist(), clip.box, clip.mirror, clip.draw

    first = drawn()
    train_clip(60, 64, 48, config, seed, epoch + 1, sample + 1)
    np.random.default_rng().random()
    assert drawn() == first


@settings(deadline=None)
@given(
    config=CONFIGS,
    gap=st.none() | st.integers(0, 4),
    video_frames=st.lists(st.integers(1, 80), max_size=5),
    height=SIDES,
    width=SIDES,
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
    data=st.data(),
)
def test_training_clips_are_those_of_the_definition(config, gap, video_frames, height, width, seed, epoch, data):
    """Sample by sample and number by number."""
    config = replace(config, crop_gap=gap)
    samples = [data.draw(st.integers(0, 10**9)) for _ in video_frames]
    found = train_clips(video_frames, height, width, config, seed, epoch, samples)
    for clip, frames, sample in zip(found, video_frames, samples, strict=True):
        bits = random_bits(6, seed, epoch, CLIP_OF_SAMPLE, sample).tolist()
        scales, side = config.crop_scales, min(height, width)
        tall = pick(bits[1], len(scales))
        near = [scale for place, scale in enumerate(scales) if gap is None or abs(place - tall) <= gap]
        wide = near[pick(bits[2], len(near))]
        boxes = corners_and_centre(height, width, round(side * scales[tall]), round(side * wide))
        start = pick(bits[0], max(1, frames - config.span + 1))
        np.testing.assert_array_equal(clip.frames, frames_from(start, frames, config))
        assert clip.box == boxes[pick(bits[3], 5)]
        assert (clip.mirror, clip.draw) == (config.mirror and bits[4] >> 63 == 1, bits[5] // 2)


def test_another_sample_epoch_or_seed_draws_anew():
    draws = {
        train_clip(60, 64, 48, ClipConfig(), seed, epoch, sample).draw
        for seed in range(3)
        for epoch in range(3)
        for sample in range(3)
    }
    assert len(draws) == 27


def even(counts, choices, draws):
    """Whether each of so many choices was drawn about equally often: within five standard deviations."""
    share = 1 / choices
    slack = 5 * (draws * share * (1 - share)) ** 0.5
    return len(counts) == choices and all(abs(count - draws * share) < slack for count in counts.values())


def test_training_clips_cover_all_starts_boxes_and_mirrors_evenly():
    config = ClipConfig(num_frames=4, stride=2, crop_scales=(1.0, 0.75, 0.5))
    draws = 6000
    clips = [train_clip(16, 64, 80, config, seed=0, epoch=1, sample=sample) for sample in range(draws)]
    assert even(Counter(int(clip.frames[0]) for clip in clips), 10, draws)  # starts 0 .. 9: 9 + span 7 = 16
    assert even(Counter(clip.box[2:] for clip in clips), 9, draws)  # heights and widths apart
    assert even(Counter(clip.mirror for clip in clips), 2, draws)
    assert even(Counter(clip.draw & 7 for clip in clips), 8, draws)
    places = Counter(clip.box[:2] for clip in clips if clip.box[2:] == (32, 32))
    assert even(places, 5, sum(places.values()))
    # Start and mirror are drawn apart: all pairs are equally frequent.
    assert even(Counter((int(clip.frames[0]), clip.mirror) for clip in clips), 20, draws)


def test_the_clips_first_draws_never_change():
    """A resumed run shows the same pixels whatever the versions of this program and of NumPy."""
    clip = train_clip(50, 256, 340, ClipConfig(), seed=1, epoch=2, sample=3)
    assert (clip.frames[0], clip.box, clip.mirror, clip.draw) == (27, (0, 0, 224, 224), False, 3777802435149240367)


@settings(deadline=None)
@given(bits=st.integers(0, 2**64 - 1), choices=st.integers(1, 10**6))
def test_picking_stays_within_the_choices(bits, choices):
    assert 0 <= pick(bits, choices) < choices


def test_picking_as_worked_by_hand():
    quarter = 2**62
    assert [pick(part * quarter, 4) for part in range(4)] == [0, 1, 2, 3]
    assert pick(2**64 - 1, 10) == 9


# Optical flow


@pytest.mark.parametrize(
    ("start", "video_frames", "fields"),
    [(5, 20, [5, 6, 7, 8, 9, 10, 11, 12]), (5, 9, [5, 6, 7, 8, 8, 8, 8, 8]), (0, 1, [0, 0, 0, 0, 0, 0, 0, 0])],
)
def test_fields_of_a_flow_clip_as_worked_by_hand(start, video_frames, fields):
    """Three steps of four fields each, two apart: 5 6 7 8, 7 8 9 10, 9 10 11 12."""
    config = ClipConfig(num_frames=3, stride=2, stream="flow", flow_fields=4)
    assert (config.span, config.frames_read, config.channels) == (8, 8, 8)
    assert frames_from(start, video_frames, config).tolist() == fields


@settings(deadline=None)
@given(config=CONFIGS, start=st.integers(0, 100), length=st.integers(1, 100))
def test_a_flow_clip_reads_each_field_of_its_steps_once(config, start, length):
    """Against the list of the fields that each step shows."""
    config = replace(config, stream="flow")
    wanted = {
        start + step * config.stride + field for step in range(config.num_frames) for field in range(config.flow_fields)
    }
    if config.flow_fields >= config.stride:  # else some between two steps are read and not shown
        assert frames_from(start, 10**6, config).tolist() == sorted(wanted)
    else:
        assert frames_from(start, 10**6, config).tolist() == list(range(min(wanted), max(wanted) + 1))
    held = frames_from(start, start + length, config)
    assert held.tolist() == [min(field, start + length - 1) for field in range(start, start + config.span)]


def test_an_rgb_clip_reads_its_frames_alone_whatever_is_said_of_flow():
    config = ClipConfig(num_frames=4, stride=3, flow_fields=7)
    assert (config.span, config.frames_read, config.channels) == (10, 4, 3)


# Evaluation


@pytest.mark.parametrize(
    ("video_frames", "num_clips", "clips"),
    [
        (9, 3, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (9, 1, [[3, 4, 5]]),
        (10, 2, [[0, 1, 2], [7, 8, 9]]),
        (4, 3, [[0, 1, 2], [0, 1, 2], [1, 2, 3]]),  # starts 0, 0.5 (to even: 0), 1
        (3, 2, [[0, 1, 2], [0, 1, 2]]),
        (2, 2, [[0, 1, 1], [0, 1, 1]]),
        (1, 1, [[0, 0, 0]]),
    ],
)
def test_evaluation_clips_as_worked_by_hand(video_frames, num_clips, clips):
    config = ClipConfig(num_frames=3)
    assert evaluation_clips(video_frames, num_clips, config).tolist() == clips


@settings(deadline=None)
@given(config=CONFIGS, video_frames=st.integers(1, 200), num_clips=st.integers(2, 25))
def test_evaluation_clips_are_equally_spaced_from_the_start_to_the_end(config, video_frames, num_clips):
    clips = evaluation_clips(video_frames, num_clips, config)
    assert clips.shape == (num_clips, config.frames_read)
    assert 0 <= clips.min() <= clips.max() < video_frames
    starts = clips[:, 0]
    last = max(0, video_frames - config.span)
    assert starts[0] == 0
    assert starts[-1] == last
    np.testing.assert_allclose(starts, np.arange(num_clips) * last / (num_clips - 1), atol=0.5)


@settings(deadline=None)
@given(config=CONFIGS, video_frames=st.integers(1, 200))
def test_one_evaluation_clip_lies_in_the_middle(config, video_frames):
    [clip] = evaluation_clips(video_frames, 1, config)
    before, after = clip[0], video_frames - 1 - clip[-1]
    if video_frames >= config.span:
        assert 0 <= after - before <= 1


VIEWS = ClipConfig(test_scale=0.5)
CORNERS = [(0, 0, 20, 20), (0, 40, 20, 20), (20, 0, 20, 20), (20, 40, 20, 20)]
CENTRE = (10, 20, 20, 20)


@pytest.mark.parametrize(
    ("num_views", "views"),
    [
        (1, [(CENTRE, False)]),
        (2, [(CENTRE, False), (CENTRE, True)]),
        (5, [(box, False) for box in [*CORNERS, CENTRE]]),
        (10, [(box, mirror) for mirror in (False, True) for box in [*CORNERS, CENTRE]]),
    ],
)
def test_views_of_40_x_60_frames_as_worked_by_hand(num_views, views):
    assert evaluation_views(40, 60, num_views, VIEWS) == views


@settings(deadline=None)
@given(config=CONFIGS, height=SIDES, width=SIDES, num_views=st.sampled_from([1, 5]))
def test_views_lie_within_the_frame(config, height, width, num_views):
    for box, mirror in evaluation_views(height, width, num_views, config):
        assert within(box, height, width)
        assert box[2] == box[3]
        assert not mirror


@pytest.mark.parametrize("num_views", [0, 3, 4, 20])
def test_another_number_of_views_is_refused(num_views):
    with pytest.raises(ValueError, match=rf"^{num_views} views: expected 1 .*, 2 .*, 5 .* or 10"):
        evaluation_views(40, 60, num_views, VIEWS)


@pytest.mark.parametrize("num_views", [2, 10])
def test_mirrored_views_of_a_recipe_that_does_not_mirror_are_refused(num_views):
    with pytest.raises(ValueError, match=rf"^{num_views} views hold mirrored ones, .* expected 1 or 5"):
        evaluation_views(40, 60, num_views, ClipConfig(mirror=False))


def test_corners_and_centre_as_worked_by_hand():
    assert corners_and_centre(9, 12, 4, 6) == [(0, 0, 4, 6), (0, 6, 4, 6), (5, 0, 4, 6), (5, 6, 4, 6), (2, 3, 4, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, r"num_frames 0, stride 1, size 224, flow_fields 10: expected at least 1 of each"),
        ({"stride": -1}, r"stride -1"),
        ({"size": 0}, r"size 0"),
        ({"flow_fields": 0}, r"flow_fields 0: expected at least 1"),
        ({"stream": "Flow"}, r"stream 'Flow': expected rgb or flow"),
        ({"crop_scales": (1.0, 0.0)}, r"a crop of 0 of the shorter side: expected above 0 and at most 1"),
        ({"test_scale": 1.2}, r"a crop of 1\.2 of the shorter side"),
    ],
)
def test_clip_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClipConfig(**options)


@pytest.mark.parametrize(("gap", "pairs"), [(None, 16), (0, 4), (1, 10), (2, 14), (9, 16)])
def test_height_and_width_of_a_crop_differ_by_at_most_the_gap(gap, pairs):
    config = ClipConfig(crop_gap=gap)
    sides = [round(256 * scale) for scale in config.crop_scales]
    drawn = set()
    for sample in range(600):
        _, _, height, width = train_clip(40, 256, 340, config, 0, 0, sample).box
        drawn.add((sides.index(height), sides.index(width)))
    assert len(drawn) == pairs
    assert all(gap is None or abs(one - other) <= gap for one, other in drawn)


def test_a_gap_below_zero_is_refused():
    with pytest.raises(ValueError, match="crop_gap -1: expected at least 0"):
        ClipConfig(crop_gap=-1)


# Segments


@pytest.mark.parametrize(
    ("video_frames", "num_segments", "offsets", "frames", "own"),
    [
        (10, 4, (0, 1, 2), [[0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9]], 4),
        (10, 3, (0, 4), [[0, 4], [3, 7], [6, 9]], 3),
        (2, 4, (0, 1), [[0, 1], [1, 1], [1, 1], [1, 1]], 2),
        (1, 2, (0, 5), [[0, 0], [0, 0]], 1),
        (4, 4, (0,), [[0], [1], [2], [3]], 4),
        (5, 4, (0,), [[0], [1], [2], [3]], 4),
        (7, 4, (0,), [[0], [1], [3], [5]], 4),
        (9, 1, (2, 0), [[2, 0]], 1),
    ],
)
def test_segments_as_worked_by_hand(video_frames, num_segments, offsets, frames, own):
    found, segments = segment_frames(video_frames, num_segments, offsets)
    assert found.tolist() == frames
    assert segments.tolist() == [True] * own + [False] * (num_segments - own)
    assert (found.dtype, segments.dtype) == (np.int64, np.bool_)


@given(
    video_frames=st.integers(1, 500),
    num_segments=st.integers(1, 60),
    offsets=st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple),
)
def test_segments_lie_within_their_video_and_are_equally_spaced(video_frames, num_segments, offsets):
    frames, own = segment_frames(video_frames, num_segments, offsets)
    assert frames.shape == (num_segments, len(offsets))
    assert 0 <= frames.min() <= frames.max() < video_frames
    assert own.sum() == min(video_frames, num_segments)
    starts, _ = segment_frames(video_frames, num_segments, (0,))
    lengths = np.diff([*starts[own, 0].tolist(), video_frames])
    assert starts[0] == 0
    assert lengths.min() >= 1
    assert lengths.max() - lengths.min() <= 1  # they tile the video, as evenly as whole frames can
    segments = Segments(num_segments=num_segments, offsets=offsets)
    assert frames[own].tolist() == wanted_frames(video_frames, segments)
    assert not own[own.sum() :].any()
    assert (starts[~own] == video_frames - 1).all()
