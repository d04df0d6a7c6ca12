"""Optical flow as it is computed and packed: the right motion, at the right frame, and the same bytes again."""

import json
import os
import random
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moving import CLIPS, MOTIONS, SMALL, cv2, listing_of_motions, middle, moving_planes, part, steady, to_pixels
from packers import WebDataset, contents, plan_of, start_packer
from packers import run as run_plan
from videos import DATA, TINY, listing_of, needs_data, numbered_planes, pack, write_video

from grurcn.inference.model_input import model_input
from grurcn.models.pixels import FLOW_SCALE
from shards.index import Index
from shards.packing.decode_source import decode_source
from shards.packing.flow import NoOpenCV, flow_between, flow_planes, to_bytes
from shards.packing.mp4_encoder import flow_encoder
from shards.packing.transcode import store_video
from shards.reading.decode import read_flow
from shards.reading.stream import evaluation_batches
from shards.store import BadShards
from shards.video import Packing

ROOT = Path(__file__).parents[3]
METHODS = ["dis", "tvl1"]


def fields_of(planes: np.ndarray, method: Any = "dis", bound: float = 20.0) -> np.ndarray:
    """Planes of frames -> their fields (N, 2, H, W) in pixels, not stored."""
    height = planes.shape[1] * 2 // 3
    stored = np.stack(list(flow_planes(iter(planes), method, bound)))
    return to_pixels(stored[:, : 2 * height], bound).reshape(len(stored), 2, height, -1)


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    return listing_of_motions(tmp_path_factory.mktemp("moving"), MOTIONS)


@pytest.fixture(scope="module")
def packed(listing, tmp_path_factory):
    """Six videos of steady motions, and their flow, in two shards."""
    return pack(tmp_path_factory.mktemp("data") / "shards", listing, SMALL)


@pytest.fixture(scope="module")
def index(packed):
    return Index(packed, "train")


# Motion


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_known_motion_comes_back_from_packed_shards(method, copy, tmp_path):
    """Two pixels to the right and one up, in every frame, from packing to the model's input."""
    listing = listing_of_motions(tmp_path, [steady(20)])
    index = Index(pack(tmp_path / "shards", listing, replace(SMALL, flow=method, copy=copy)), "train")
    [(_, batch)] = evaluation_batches(index, CLIPS, global_batch=1, num_clips=2)

    assert batch.frames.shape == (2, 8, 96, 64)
    assert batch.flow_bound.tolist() == [20, 20]
    stored = to_pixels(batch.frames.numpy(), 20.0).reshape(2, 8, 2, 48, 64)
    np.testing.assert_allclose(middle(stored), np.broadcast_to([2.0, -1.0], (2, 8, 2)), atol=0.2)
    seen = model_input(batch.frames, batch.flow_bound, batch.box, batch.mirror, CLIPS)
    assert seen.shape == (2, 3, 8, 16, 16)
    pixels = (seen / FLOW_SCALE).unflatten(2, (4, 2)).numpy()
    np.testing.assert_allclose(
        pixels[..., 4:-4, 4:-4].mean(axis=(-2, -1)), np.broadcast_to([2, -1], (2, 3, 4, 2)), atol=0.2
    )


@pytest.mark.parametrize("method", METHODS)
def test_field_i_leads_from_frame_i_to_the_next_and_the_last_is_repeated(method):
    """Still but for one jump after frame 3, and one at the very end."""
    places = [(0, 0)] * 4 + [(3, 0)] * 3 + [(3, 2)]
    motions = middle(fields_of(moving_planes(places), method))
    expected = [[0, 0]] * 3 + [[3, 0]] + [[0, 0]] * 2 + [[0, 2]] * 2
    np.testing.assert_allclose(motions, expected, atol=0.15)


def test_a_video_of_one_frame_does_not_move():
    assert not fields_of(moving_planes([(0, 0)])).any()


def test_a_still_video_does_not_move_by_a_single_bit():
    assert not fields_of(moving_planes([(0, 0)] * 4)).any()


@pytest.mark.parametrize("method", METHODS)
def test_fields_are_those_of_opencv_from_the_luma_of_the_frames(method):
    planes = moving_planes(steady(4))
    planes[:, 48:] = np.random.default_rng(0).integers(0, 256, planes[:, 48:].shape, dtype=np.uint8)  # colour
    opencv = {
        "dis": lambda: cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM),
        "tvl1": cv2.optflow.DualTVL1OpticalFlow.create,
    }[method]()
    found = fields_of(planes, method)
    for field, (before, after) in zip(found, pairwise(planes[:, :48]), strict=False):
        wanted = opencv.calc(before, after, None).transpose(2, 0, 1)
        np.testing.assert_allclose(field, wanted, atol=20 / 127 / 2 + 1e-4)
    np.testing.assert_array_equal(found[-1], found[-2])


def test_flow_holds_one_frame_however_long_the_video_is():
    drawn = []

    def frames():
        for planes in moving_planes(steady(30)):
            drawn.append(len(drawn))
            yield planes

    pulled = [len(drawn) for _ in flow_planes(frames(), "dis", 20.0)]
    assert pulled == [*range(2, 31), 30]


# Bytes


@pytest.mark.parametrize(
    ("pixels", "byte"),
    [(0, 128), (20, 255), (-20, 1), (10, 192), (-10, 64), (20 / 127, 129), (-20 / 127, 127), (90, 255), (-1e9, 1)],
)
def test_bytes_of_motions_as_worked_by_hand(pixels, byte):
    """10 is 63.5 bytes, which rounds to the even 64."""
    assert to_bytes(np.array(pixels, np.float32), 20.0) == byte


@given(pixels=st.floats(-50, 50), bound=st.floats(0.5, 50))
def test_a_stored_motion_is_off_by_half_a_level_at_most_and_cut_at_the_bound(pixels, bound):
    back = to_pixels(to_bytes(np.array([pixels, -pixels]), bound), bound)
    assert back[0] == -back[1]
    assert back[0] == pytest.approx(np.clip(pixels, -bound, bound), abs=bound / 127 / 2 + 1e-5)


def test_every_byte_value_survives_storing_whoever_reads_it(tmp_path):
    """Codecs and players take bytes for limited range, 16 to 235, where nothing says otherwise."""
    stored = np.random.default_rng(0).integers(0, 256, (6, 96, 64), dtype=np.uint8)
    stored[0], stored[1], stored[2, :, ::2] = 0, 255, 0
    packing = replace(SMALL, flow_crf=0)
    target = tmp_path / "flow.mp4"
    with flow_encoder(target, packing, Fraction(25)) as encoder:
        for field in stored:
            encoder.write(np.concatenate([field, np.full((48, 64), 128, np.uint8)]))

    np.testing.assert_array_equal(read_flow(target.read_bytes(), range(6), packing), stored)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "error",
        "-i",
        target,
        "-pix_fmt",
        "gray",
        "-f",
        "rawvideo",
    ]
    shown = subprocess.run(
        [*map(str, command), "-"], check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ).stdout
    np.testing.assert_array_equal(np.frombuffer(shown, np.uint8).reshape(stored.shape), stored)


def test_stored_flow_has_key_frames_at_the_videos_interval_and_no_colour(index, tmp_path):
    sample = index[0]
    (tmp_path / "flow.mp4").write_bytes(part(index, sample, sample.flow))
    with av.open(str(tmp_path / "flow.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == sample.num_frames
    assert [number for number, frame in enumerate(frames) if frame.key_frame] == list(range(0, len(frames), 4))
    assert (frames[0].height, frames[0].width) == (96, 64)
    assert all((frame.to_ndarray()[96:] == 128).all() for frame in frames)


REAL = [("ut-interaction/Hugging/53_9_1.avi", "dis", 40), ("ucf101/videos/YoYo/v_YoYo_g01_c01.avi", "dis", 40)]
REAL += [("ut-interaction/Hugging/53_9_1.avi", "tvl1", 8)]


@needs_data
@pytest.mark.parametrize(("name", "method", "num_frames"), REAL)
def test_flow_of_a_real_video_is_stored_to_a_quarter_of_a_pixel(name, method, num_frames, tmp_path):
    packing = Packing(flow=method)
    frames = list(islice(decode_source(DATA / name, packing), num_frames))
    with flow_encoder(tmp_path / "flow.mp4", packing, Fraction(25)) as encoder:
        for planes in flow_planes(iter(frames), method, 20.0):
            encoder.write(planes)
    between, read = flow_between(method), read_flow((tmp_path / "flow.mp4").read_bytes(), range(num_frames), packing)
    errors = [
        np.abs(to_pixels(field, 20.0) - between(before[:256], after[:256]).reshape(512, 340)).mean()
        for field, before, after in zip(read, frames, frames[1:], strict=False)
    ]
    assert np.mean(errors) < 0.1


# The same bytes again


@pytest.mark.parametrize("method", METHODS)
def test_storing_the_same_flow_twice_gives_the_same_bytes_whatever_opencv_was_set_to(method, tmp_path):
    path = write_video(tmp_path / "video.avi", moving_planes(steady(6), 128, 96))
    packing = Packing(width=96, height=128, flow=method)
    first = store_video(path, packing)
    store_video(write_video(tmp_path / "other.avi", moving_planes(steady(5, -4, 3), 128, 96)), packing)
    cv2.setNumThreads(3)
    assert store_video(path, packing) == first
    assert cv2.getNumThreads() == 1
    assert first.flow is not None
    assert b" threads=1 " in first.flow
    assert b"Lavf" not in first.flow


def test_a_copied_video_keeps_its_bytes_and_has_the_same_flow(tmp_path):
    path = write_video(tmp_path / "video.avi", moving_planes(steady(10)))
    stored, copied = store_video(path, SMALL), store_video(path, replace(SMALL, copy=True))
    assert copied.data == path.read_bytes() != stored.data
    assert copied.flow == stored.flow
    assert (copied.num_frames, copied.suffix) == (10, "avi")


def test_flow_changes_no_byte_of_the_video(tmp_path):
    path = write_video(tmp_path / "video.avi", moving_planes(steady(10)))
    assert store_video(path, replace(SMALL, flow="none")) == replace(store_video(path, SMALL), flow=None)


def test_packing_again_elsewhere_gives_the_same_bytes(listing, packed, tmp_path):
    time.sleep(1.1)  # another second: a date in the bytes would show
    again = pack(tmp_path / "shards", replace(listing, entries=listing.entries[::-1]), SMALL)
    assert contents(again) == contents(packed)


def test_a_packing_of_flow_that_is_killed_ends_with_the_same_bytes(listing, packed, tmp_path):
    plan = plan_of(tmp_path / "shards", listing, SMALL, videos_per_shard=3)
    for _ in range(3):
        process = start_packer(plan, tmp_path / "temporary")
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
    run_plan(plan)
    assert contents(Path(plan.url)) == contents(packed)


@pytest.mark.parametrize("change", [{"flow": "none"}, {"flow": "tvl1"}, {"flow_bound": 10.0}, {"flow_crf": 20}])
def test_a_folder_of_other_flow_is_another_packing(change, listing, packed):
    before = contents(packed)
    with pytest.raises(BadShards, match="holds shards of other videos or other settings"):
        run_plan(plan_of(packed, listing, replace(SMALL, **change), videos_per_shard=3))
    assert contents(packed) == before


# Shards


def test_any_webdataset_reader_finds_video_flow_and_json_in_one_sample(index):
    read = list(WebDataset([str(Path(index.url) / shard.name) for shard in index.shards], shardshuffle=False))
    assert len(read) == len(index) == len(MOTIONS)
    for number, members in enumerate(read):
        sample = index[number]
        assert set(members) == {"mp4", "flow.mp4", "json", "__key__", "__url__", "__local_path__"}
        assert members["__key__"] == sample.key
        assert members["mp4"] == part(index, sample, sample)
        assert sample.flow is not None
        assert members["flow.mp4"] == part(index, sample, sample.flow)
        assert zlib.crc32(members["flow.mp4"]) == sample.flow.crc32
        assert sample.flow.bound == 20.0
        about = json.loads(members["json"])
        assert (about["flow"], about["flow_bound"], about["num_frames"]) == ("dis", 20.0, sample.num_frames)


def test_shards_without_flow_say_nothing_of_it(tmp_path):
    index = Index(pack(tmp_path / "shards", listing_of(tmp_path / "videos", [8])), "train")
    [members] = WebDataset(str(Path(index.url) / index.shards[0].name), shardshuffle=False)
    assert "flow.mp4" not in members
    assert not {"flow", "flow_bound"} & set(json.loads(members["json"]))
    assert index[0].flow is None
    index.check_stream("rgb")


# Without OpenCV


ABSENT = {
    "absent": "raise ModuleNotFoundError(\"No module named 'cv2'\", name='cv2')",
    "without contrib": "setNumThreads = print\nclass ocl: setUseOpenCL = print",
}


@pytest.mark.parametrize("opencv", ABSENT)
def test_packing_flow_without_opencv_is_one_clear_line_before_anything_is_packed(opencv, videos, tmp_path):
    (tmp_path / "cv2.py").write_text(ABSENT[opencv])
    words = ["--out", tmp_path / "out", "--flow", "tvl1", "--workers", "0", "folder", "--videos", videos]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.make_shards", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: --flow tvl1: needs OpenCV with its contrib modules, which is not installed here"
    )
    assert "pip install 'grurcn[flow]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_packing_without_flow_and_reading_flow_want_no_opencv(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    pack(tmp_path / "shards", listing_of(tmp_path / "videos", [8]), TINY)
    assert len(list(evaluation_batches(index, CLIPS, global_batch=6))) == 1
    with pytest.raises(NoOpenCV, match="--flow dis: needs OpenCV"):
        store_video(write_video(tmp_path / "video.avi", numbered_planes(8)), SMALL)
