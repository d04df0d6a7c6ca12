"""Overlays: what stands in the written videos, pixel by pixel, is what the model says of the clips; heat lies where something
moves; videos of one frame, names of any kind, and what is refused."""

import dataclasses
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoints.state import Training
from grurcn.drawing.heat import HeatMaps, onto_line, shown_steps, votes_and_changes
from grurcn.drawing.overlay import sliding_clips, write_overlay
from grurcn.drawing.overlay_frame import (
    COLOURS,
    OTHERS,
    OverlayLayout,
    OverlayPainter,
    VideoVotes,
    legend_of,
    runs,
    shade,
    ticks,
)
from grurcn.inference.classifier import Classifier
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.gru_rcn import GRURCN
from grurcn.training.recipes import Recipe
from shards.packing.mp4_encoder import flow_encoder, video_encoder
from shards.reading.clips import ClipConfig
from shards.video import BadVideo, Packing, Stored

PACKING = Packing(width=48, height=32, gop=4, crf=4, preset="ultrafast")
MODEL = ModelConfig(taps=("pool1", "pool2"), hidden=(4, 6), width=1 / 16)
CLIPS = ClipConfig(num_frames=4, stride=2, size=16, test_scale=1.0)
FINE = dataclasses.replace(CLIPS, size=32)  # a pixel of the input is one that is stored
FPS = Fraction(30000, 1001)
MOST_OFF = 14  # of a colour's 255: what a lossy codec of half the colours' resolution may do to it


def classifier_of(classes: int | list[str] = 5, model: ModelConfig = MODEL, clips: ClipConfig = CLIPS) -> Classifier:
    """A model of random weights, which is sure of what it says, and says something else of other frames."""
    names = [f"class {number}" for number in range(classes)] if isinstance(classes, int) else classes
    recipe = Recipe(model=model, clips=clips)
    network = build_model(recipe.model, len(names), seed=1, in_channels=clips.channels)
    if isinstance(network, GRURCN):
        generator = torch.Generator().manual_seed(3)
        for head in network.heads:
            assert isinstance(head, torch.nn.Linear)
            torch.nn.init.normal_(head.weight, std=20, generator=generator)
    training = Training(step=0, recipe=recipe.to_dict(), model={"classes": names, "packing": vars(PACKING)})
    return Classifier(network.state_dict(), training, torch.device("cpu"), "fp32")


def scene(num_frames: int) -> np.ndarray:
    """Planes (N, H * 3 // 2, W) of a still picture, at the left of which a bright square moves down and begins anew."""
    height, width = PACKING.height, PACKING.width
    rng = np.random.default_rng(0)
    still = np.kron(rng.integers(40, 120, (height // 8, width // 8)), np.ones((8, 8)))
    planes = np.full((num_frames, height * 3 // 2, width), 128, np.uint8)
    planes[:, :height] = still
    for number in range(num_frames):
        y = 5 * number % 26
        planes[number, y : y + 6, 10:16] = 230
    return planes


def stored(planes: np.ndarray, folder: Path, flow: np.ndarray | None = None) -> Stored:
    """Planes as a shard would hold them."""
    data = []
    for content, encoder in ((planes, video_encoder), (flow, flow_encoder)):
        if content is not None:
            with encoder(folder / "stored.mp4", PACKING, FPS) as file:
                for each in content:
                    file.write(each)
            data.append((folder / "stored.mp4").read_bytes())
    return Stored(data=data[0], suffix="mp4", num_frames=len(planes), fps=float(FPS), flow=(*data, None)[1])


def pictures(path: Path) -> np.ndarray:
    """(N, H, W, 3) uint8 RGB of a video."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def votes_of(classifier: Classifier, video: Stored) -> VideoVotes:
    """What the model says, clip by clip, asked one by one."""
    clips = classifier.recipe.clips
    last = max(0, video.num_frames - clips.span)
    firsts = range(last + 1)  # few enough frames for a clip at each
    frames = np.array(
        [[min(first + clips.stride * t, video.num_frames - 1) for t in range(clips.num_frames)] for first in firsts]
    )
    bound = torch.full((1,), classifier.packing.flow_bound)
    votes = [
        classifier.votes(classifier.read_clips(video, row[None]).planes, bound, classifier.views(1)) for row in frames
    ]
    return VideoVotes(
        votes=torch.cat(votes),
        frames=frames,
        num_frames=video.num_frames,
        fps=video.fps,
        classes=classifier.classes,
        levels=classifier.levels,
    )


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return classifier_of()


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Stored:
    return stored(scene(14), tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def written(classifier, video, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "new folder" / "overlay.mp4"
    write_overlay(classifier, video, path)
    return path


@pytest.fixture(scope="module")
def shown(written) -> np.ndarray:
    return pictures(written)


@pytest.fixture(scope="module")
def layout(classifier, video) -> OverlayLayout:
    return OverlayLayout(stored=(PACKING.height, PACKING.width), prediction=votes_of(classifier, video))


# The file


def test_the_file_is_an_h264_mp4_of_the_videos_frames_and_rate(written, video, layout):
    with av.open(str(written)) as container:
        stream = container.streams.video[0]
        found = (stream.codec_context.name, stream.pix_fmt, stream.average_rate, (stream.width, stream.height))
        assert found == ("h264", "yuv420p", FPS, layout.size)
        times = [Fraction(frame.pts or 0) * (frame.time_base or 0) for frame in container.decode(video=0)]
    assert times == [number / FPS for number in range(video.num_frames)]
    data = written.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser plays it while it loads
    assert [path.name for path in written.parent.iterdir()] == ["overlay.mp4"]


def test_it_shows_the_stored_frames_enlarged(shown, layout):
    height, width = layout.frame_size
    assert (height, width) == (427, 640)
    for number, picture in enumerate(shown):
        luma = picture[:height, :width].astype(float) @ (0.299, 0.587, 0.114)
        rows, columns = (np.linspace(0, side, cells + 1).astype(int) for side, cells in ((height, 8), (width, 12)))
        blocks = np.array(
            [[luma[a:b, c:d].mean() for c, d in itertools.pairwise(columns)] for a, b in itertools.pairwise(rows)]
        )
        wanted = (scene(14)[number, :32].astype(float) - 16) * 255 / 219
        assert np.abs(blocks - wanted.reshape(8, 4, 12, 4).mean(axis=(1, 3))).max() < 16, (
            number
        )  # the moving square's edges are resized too


def test_the_same_video_gives_the_same_bytes(classifier, video, written, tmp_path):
    write_overlay(classifier, video, tmp_path / "again.mp4")
    assert (tmp_path / "again.mp4").read_bytes() == written.read_bytes()


# What stands in it


def test_the_cursor_is_at_each_frames_time(shown, layout, video):
    y = layout.row(1) - 2  # between two rows, where nothing else is
    left, right = layout.strip
    for number, picture in enumerate(shown):
        found = left + int(picture[y, left:right].sum(axis=1).argmin())
        assert abs(found - (left + (right - left) * (number + 0.5) / video.num_frames)) <= 2


def test_each_cell_has_the_colour_of_its_levels_vote_as_strong_as_it_is_probable(shown, layout):
    prediction, picture = layout.prediction, shown[-1].astype(int)
    middles = [(row[0] + row[-1] + 1) / 2 for row in prediction.frames.tolist()]
    edges = [0, *[(one + next_one) / 2 for one, next_one in itertools.pairwise(middles)], prediction.num_frames]
    left, right = layout.strip
    seen = set()
    for (clip, votes), level in itertools.product(enumerate(prediction.votes.tolist()), range(len(prediction.levels))):
        probabilities = votes[level]
        winner = max(range(5), key=probabilities.__getitem__)
        seen.add((level, winner))
        ink = [int(COLOURS[winner][place : place + 2], 16) for place in (1, 3, 5)]
        wanted = [255 - (255 - part) * probabilities[winner] for part in ink]
        middle = (edges[clip] + edges[clip + 1]) / 2 if clip < len(middles) - 1 else edges[clip] + 0.5
        x = left + round((right - left) * middle / prediction.num_frames)
        found = picture[layout.row(level) + 2 : layout.row(level) + 4, x - 2 : x + 3].mean(axis=(0, 1))
        assert np.abs(found - wanted).max() < MOST_OFF, (clip, level, found, wanted)
    assert len({winner for _, winner in seen}) > 1  # the colours do differ


def test_the_bars_are_the_mean_over_the_clips_that_have_ended(shown, layout):
    prediction = layout.prediction
    left, right = layout.bars
    for number, picture in enumerate(shown.astype(int)):
        ended = [votes for votes, row in zip(prediction.votes, prediction.frames, strict=True) if row[-1] <= number]
        wanted = sorted(torch.stack(ended).mean(dim=(0, 1)).tolist(), reverse=True)[:3] if ended else [0.0] * 3
        for place, share in enumerate(wanted):
            y = layout.bar(place) + layout.px(8)
            track = np.array([0xEE, 0xF0, 0xF3])
            length = (np.abs(picture[y, left:right] - track).sum(axis=1) > 60).sum()
            assert abs(length - share * (right - left)) <= 3, (number, place)
    assert prediction.ended(5) == 0
    assert prediction.ended(6) == 1  # a clip of 4 frames, every second: 0 2 4 6


def test_the_likeliest_classes_come_first(classifier, video, layout):
    prediction = layout.prediction
    for clip in (0, 3, len(prediction.votes) - 1):
        mean = prediction.votes[: clip + 1].mean(dim=(0, 1))
        wanted = [(int(number), float(mean[number])) for number in mean.argsort(descending=True)[:3]]
        assert [number for number, _ in prediction.top(clip)] == [number for number, _ in wanted]
        assert [share for _, share in prediction.top(clip)] == pytest.approx([share for _, share in wanted])


# Clips and times


@given(frames=st.integers(1, 3000), num_frames=st.integers(1, 20), stride=st.integers(1, 4), most=st.integers(2, 100))
def test_clips_slide_in_equal_steps_from_the_start_to_the_end(frames, num_frames, stride, most):
    config = ClipConfig(num_frames=num_frames, stride=stride)
    clips = sliding_clips(frames, config, most)
    assert 1 <= len(clips) <= most
    assert clips[0, 0] == 0
    assert clips[-1, -1] == frames - 1
    steps = np.diff(clips[:, 0])
    assert (steps > 0).all()
    assert len(set(steps[:-1].tolist())) <= 1
    assert (np.diff(clips, axis=1) <= stride).all()


def test_clips_slide_as_the_docstring_draws():
    assert sliding_clips(8, ClipConfig(num_frames=3), most=4).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [5, 6, 7]]


@given(seconds=st.floats(0.01, 1e5))
def test_times_below_the_strip_are_few_and_within_the_video(seconds):
    found = ticks(seconds)
    assert 1 <= len(found) <= 9
    assert found[0] == 0
    assert found[-1] <= seconds * (1 + 1e-6)


def test_neighbours_that_agree_are_named_once():
    assert runs([4, 4, 2, 4]) == [(0, 2), (2, 3), (3, 4)]


# Colours


def votes_with_winners(winners: list[int], classes: int) -> VideoVotes:
    votes = torch.full((len(winners), 1, classes), 0.1, dtype=torch.float64)
    votes[torch.arange(len(winners)), 0, torch.tensor(winners)] = 0.9
    frames = np.arange(len(winners))[:, None]
    names = tuple(f"class {number}" for number in range(classes))
    return VideoVotes(votes=votes, frames=frames, num_frames=len(winners), fps=10.0, classes=names, levels=("pool1",))


def test_with_few_classes_each_has_its_own_colour_in_every_video():
    assert votes_with_winners([3, 3, 1], 8).colours == {3: COLOURS[3], 1: COLOURS[1]}
    assert votes_with_winners([1, 7], 8).colours == {1: COLOURS[1], 7: COLOURS[7]}


def test_with_many_classes_the_most_frequent_have_colours_of_their_own_and_the_others_share_one():
    winners = [50, 50, 50, 9, 9, *range(20, 28)]
    prediction = votes_with_winners(winners, 101)
    colours = prediction.colours
    assert [colours[50], colours[9]] == [*COLOURS[:2]]
    own = [colour for colour in colours.values() if colour != OTHERS]
    assert sorted(own) == sorted(COLOURS[:7])
    assert legend_of(prediction)[-1] == (OTHERS, "3 other classes")


def test_a_shade_is_between_paper_and_the_colour():
    assert shade("#0072b2", 0) == (255, 255, 255)
    assert shade("#0072b2", 1) == (0, 0x72, 0xB2)
    assert shade("#000000", 0.2) == (204, 204, 204)


# Odd videos and names


@pytest.mark.parametrize("num_frames", [1, 3])
def test_videos_shorter_than_a_clip_are_told_of_at_their_end(classifier, tmp_path, num_frames):
    video = stored(scene(num_frames), tmp_path)
    for heat in (False, True):
        write_overlay(classifier, video, tmp_path / "o.mp4", heat=heat)
        assert len(pictures(tmp_path / "o.mp4")) == num_frames
    prediction = votes_of(classifier, video)
    assert [prediction.ended(number) for number in range(num_frames)] == [0] * (num_frames - 1) + [1]
    assert prediction.edges.tolist() == [0, num_frames]


def test_names_of_any_length_and_letters_stay_within_their_places(tmp_path):
    names = ["x" * 300, "\x1b[31m\n\t\0", "Ünïcödé 漢字 \u202e\U0001f600", "", "<b>&amp;</b>"]
    model, video = classifier_of(names), stored(scene(4), tmp_path)
    write_overlay(model, video, tmp_path / "odd.mp4")
    write_overlay(classifier_of(5), video, tmp_path / "plain.mp4")
    odd, plain = pictures(tmp_path / "odd.mp4").astype(int), pictures(tmp_path / "plain.mp4").astype(int)
    assert odd.shape == plain.shape
    layout = OverlayLayout(stored=(PACKING.height, PACKING.width), prediction=votes_of(model, video))
    rows = slice(layout.bar(0), layout.bar(3))
    for outside in (slice(0, layout.margin - 4), slice(layout.bars[0] + 2, None)):
        assert (
            np.abs(odd[:, rows, outside] - plain[:, rows, outside]).max() < 90
        )  # nothing is written over the bars: ink would be 200 off
    assert (
        np.abs(odd[:, rows, layout.margin : layout.bars[0]] - plain[:, rows, layout.margin : layout.bars[0]]).max()
        > 100
    )


def test_one_class_and_two_are_enough(tmp_path):
    for classes in (1, 2):
        write_overlay(classifier_of(classes), stored(scene(2), tmp_path), tmp_path / "o.mp4")


@pytest.mark.parametrize(
    ("stored_size", "frame", "width"),
    [
        ((40, 40), (640, 640), 640),
        ((256, 340), (482, 640), 640),
        ((340, 256), (640, 482), 640),
        ((720, 1280), (720, 1280), 1280),
    ],
)
def test_frames_keep_the_stored_ones_aspect(layout, stored_size, frame, width):
    other = dataclasses.replace(layout, stored=stored_size)
    assert other.frame_size == frame
    assert other.width == width
    assert all(side % 2 == 0 for side in other.size)
    picture = OverlayPainter(other).picture(0, np.full((*stored_size, 3), 200, np.uint8))
    assert picture.size == other.size


def test_a_model_of_flow_shows_the_frames(tmp_path):
    clips = dataclasses.replace(CLIPS, stream="flow", flow_fields=3)
    model = classifier_of(clips=clips)
    model.training.model["packing"] = {**vars(PACKING), "flow": "dis"}
    fields = np.full((7, 3 * PACKING.height, PACKING.width), 128, np.uint8)
    fields[:, :20] += np.arange(7, dtype=np.uint8)[:, None, None] * 8
    video = stored(scene(7), tmp_path, fields)
    for heat in (True, False):
        write_overlay(model, video, tmp_path / "o.mp4", heat=heat)
        shown = pictures(tmp_path / "o.mp4")
        assert len(shown) == 7
    for number, picture in enumerate(shown):  # without heat
        bright = np.argwhere(picture[:427, :, 0] > 190).mean(axis=0) / (427, 640) * (32, 48)
        square = np.argwhere(scene(7)[number, :32] == 230).mean(axis=0) + 0.5
        assert np.abs(bright - square).max() < 1


# Heat


@pytest.mark.parametrize(("stacked", "bidirectional"), [(False, False), (True, True)])
def test_a_change_is_what_a_frame_does_to_the_state_that_the_frame_before_would_not_have_done(stacked, bidirectional):
    model = classifier_of(model=dataclasses.replace(MODEL, stacked=stacked, bidirectional=bidirectional))
    planes = torch.from_numpy(scene(8))[None, ::2]
    bound, view = torch.full((1,), 20.0), model.views(1)[0]
    votes, changes = votes_and_changes(model, planes, bound, view)
    torch.testing.assert_close(votes, model.votes(planes, bound, [view]))

    assert isinstance(model.model, GRURCN)
    network = model.model
    raw: list[list[np.ndarray]] = [[], []]

    def states(shown: torch.Tensor) -> list[torch.Tensor]:
        clips = model_input(shown, bound, torch.tensor([view[0]]), torch.tensor([False]), model.recipe.clips)
        return list(network.states(network.grus, network.maps(clips, torch.zeros(1, dtype=torch.int64)), False))

    with torch.inference_mode():
        right = states(planes)
        for t in range(1, 4):
            repeated = planes.clone()
            repeated[:, t] = planes[:, t - 1]
            for level, (state, other) in enumerate(zip(right, states(repeated), strict=True)):
                raw[level].append((state[0, t] - other[0, t]).abs().mean(dim=0).numpy())
    for level, change in enumerate(changes):
        wanted = np.stack(raw[level])
        full = np.quantile(wanted.max(axis=(1, 2)), 0.9)
        np.testing.assert_allclose(change.maps[0], np.clip(wanted / full, 0, 1), atol=2e-4)


def test_heat_is_zero_where_nothing_moves_and_nowhere_else():
    classifier = classifier_of(clips=FINE)
    planes = torch.from_numpy(scene(8))[None, ::2]
    _, changes = votes_and_changes(classifier, planes, torch.full((1,), 20.0), classifier.views(1)[0])
    # The view is the middle square, columns 8 to 40, of which the moving one fills 10 to 16. A cell of pool2 sees 6 pixels
    # around its own 4, and its GRU two cells around it: the last two of eight cells see columns from 8 + 24 - 8 - 6 on.
    for change in changes:
        quarter = change.maps.shape[3] // 4
        assert (change.maps[..., :quarter].max(axis=(2, 3)) > 0.5).all()
        assert (change.maps[..., -quarter:] < 1e-5).all()  # rounding


def test_a_still_video_has_no_heat_though_its_states_move(classifier):
    planes = torch.from_numpy(scene(1))[None].expand(1, 4, -1, -1)
    _, changes = votes_and_changes(classifier, planes, torch.full((1,), 20.0), classifier.views(1)[0])
    assert all(change.maps.max() < 1e-3 for change in changes)


def test_heat_is_drawn_over_what_moves_within_the_models_view(video, tmp_path):
    write_overlay(classifier_of(clips=FINE), video, tmp_path / "heat.mp4", heat=True)
    shown = pictures(tmp_path / "heat.mp4").astype(int)
    assert len(shown) == video.num_frames
    glow = shown[:, :427, :, 0] - shown[:, :427, :, 2]  # the scene is grey
    assert np.abs(glow[0]).max() < 30  # before the second frame there is no change
    columns = (np.maximum(glow[1:], 0)).mean(axis=1)  # (N, 640)
    scale = 640 / PACKING.width
    over = columns[:, round(10 * scale) : round(16 * scale)].mean(axis=1)
    still = columns[:, round(35 * scale) : round(39 * scale)].mean(axis=1)
    outside = columns[:, : round(7 * scale)].mean(axis=1)
    assert (over > 15).all()
    assert (still < 3).all()
    assert (outside < 3).all()


def test_each_frame_shows_the_step_that_has_seen_most_before():
    clips = ClipConfig(num_frames=3, stride=2)
    frames = np.array([[0, 2, 4], [1, 3, 5]])
    found = shown_steps(frames, 6, clips)
    assert found[:, 0].tolist() == [-1, 0, 0, 0, 0, 1]
    assert found[:, 1].tolist() == [-1, 1, 1, 2, 2, 2]


def test_a_step_of_flow_ends_with_its_last_field():
    clips = ClipConfig(num_frames=2, stride=2, stream="flow", flow_fields=3)  # 0 1 2, 2 3 4
    assert shown_steps(np.arange(5)[None], 6, clips)[:, 1].tolist() == [-1, -1, -1, 1, 1, -1]


def test_maps_are_laid_through_the_view_onto_the_frame():
    # A line of 4 cells over pixels 2 to 10 of 12, drawn twice as large: each cell covers 2 stored and 4 drawn pixels.
    weights = onto_line(4, 2, 8, 1.0, 12, 24)
    assert (weights[:4] == 0).all()
    assert (weights[20:] == 0).all()
    np.testing.assert_allclose(weights[4:20].sum(axis=1), 1)
    assert weights[4:20].argmax(axis=1).tolist() == sorted([*range(4)] * 4)
    np.testing.assert_allclose(
        weights[9], [0.125, 0.875, 0, 0]
    )  # its middle is at 0.875 of the way to the second cell's


def test_the_heat_of_a_frame_is_the_mean_over_the_levels(classifier, video):
    planes = classifier.read_clips(video, np.array([[0, 2, 4, 6]])).planes
    _, changes = votes_and_changes(classifier, planes, torch.full((1,), 20.0), classifier.views(1)[0])
    steps = np.array([[-1, -1], [0, 2]])
    painters = [
        HeatMaps(some, steps, (0, 8, 32, 32), (32, 48), (64, 96)) for some in (changes, changes[:1], changes[1:])
    ]
    both, first, second = (painter.of_frame(1) for painter in painters)
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)
    assert both.max() > 0.1
    assert not painters[0].of_frame(0).any()


@pytest.mark.parametrize(
    ("model", "clips", "said"),
    [
        (
            ModelConfig(kind="frames", taps=("pool1",), width=1 / 64),
            CLIPS,
            "a model of kind frames has none.*kind gru-rcn",
        ),
        (ModelConfig(kind="c3d", width=1 / 64), ClipConfig(num_frames=16, size=112), "kind c3d has none.*kind gru-rcn"),
        (ModelConfig(taps=("fc7",), hidden=(3,), width=1 / 64), CLIPS, "more than one cell.*fc7 at 1 x 1"),
    ],
)
def test_heat_of_a_model_without_states_in_places_is_refused(video, tmp_path, model, clips, said):
    with pytest.raises(ValueError, match=said):
        write_overlay(classifier_of(model=model, clips=clips), video, tmp_path / "o.mp4", heat=True)
    assert not list(tmp_path.iterdir())


# Failures


def test_a_video_that_ends_early_leaves_no_file(classifier, video, tmp_path):
    with pytest.raises(BadVideo, match="frame 14"):
        write_overlay(classifier, dataclasses.replace(video, num_frames=40), tmp_path / "o.mp4")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_an_os_error(classifier, video, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_overlay(classifier, video, tmp_path / "file" / "o.mp4")
