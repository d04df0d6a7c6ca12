"""Optical flow from packing to the model's input: the right motion, at the right frame, in pixels, and the same bytes again."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packers import WebDataset, contents, plan_of, start_packer
from packers import run as run_plan
from packing import packing_job
from small_runs import TINY as RECIPE
from small_runs import job as train_job
from small_runs import run_evaluate, run_train
from videos import DATA, TINY, listing_of, needs_data, numbered_planes, pack, write_video

from cluster.checkpoints.run_folder import Model, load_best
from cluster.checkpoints.state import Training
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.models.pixels import FLOW_SCALE, flow_to_clips, to_clips
from grurcn.models.votes import log_mean_vote
from jobs import evaluate, make_shards, train
from shards.index import Index
from shards.packing.decode_source import decode_source
from shards.packing.encoder import flow_encoder
from shards.packing.entries import Entry, Listing
from shards.packing.flow import NoOpenCV, flow_between, flow_planes, to_bytes
from shards.packing.transcode import store_video
from shards.reading import decode
from shards.reading.clips import ClipConfig, evaluation_clips, evaluation_views, train_clip
from shards.reading.decode import read_flow
from shards.reading.order import Order
from shards.reading.stream import evaluation_batches, train_batches
from shards.store import BadShards, FolderStore
from shards.video import Packing

cv2: Any = pytest.importorskip("cv2", reason="packing optical flow wants the extra grurcn[flow]")

ROOT = Path(__file__).parents[2]
METHODS = ["dis", "tvl1"]
SMALL = Packing(width=64, height=48, gop=4, preset="ultrafast", flow="dis")
CLIPS = ClipConfig(num_frames=3, stride=2, size=16, stream="flow", flow_fields=4)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey blobs (H, W) uint8, a few pixels wide."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 30, 220, cv2.NORM_MINMAX).astype(np.uint8)


def moving_planes(places: list[tuple[int, int]], height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frames (N, H * 3 // 2, W) of a textured plane that has moved by (right, down) pixels since the first."""
    plane = texture(height + 160, width + 160, seed)
    planes = np.full((len(places), height * 3 // 2, width), 128, np.uint8)
    for of_frame, (right, down) in zip(planes, places, strict=True):
        of_frame[:height] = plane[80 - down : 80 - down + height, 80 - right : 80 - right + width]
    return planes


def steady(num_frames: int, right: int = 2, down: int = -1) -> list[tuple[int, int]]:
    return [(right * number, down * number) for number in range(num_frames)]


def fields_of(planes: np.ndarray, method: Any = "dis", bound: float = 20.0) -> np.ndarray:
    """Planes of frames -> their fields (N, 2, H, W) in pixels, not stored."""
    height = planes.shape[1] * 2 // 3
    stored = np.stack(list(flow_planes(iter(planes), method, bound)))
    return to_pixels(stored[:, : 2 * height], bound).reshape(len(stored), 2, height, -1)


def to_pixels(stored: np.ndarray, bound: float) -> np.ndarray:
    """Stored bytes -> motions float32 in pixels, by the definition (shards/video.py)."""
    return (stored.astype(np.float32) - 128) * (bound / 127)


def middle(fields: np.ndarray) -> np.ndarray:
    """(..., 2, H, W) -> the motion (..., 2) in the middle of the picture, where nothing comes in from outside."""
    return np.median(fields[..., 8:-8, 8:-8], axis=(-2, -1))


def listing_of_motions(folder: Path, motions: list[list[tuple[int, int]]]) -> Listing:
    """One video a list of places, of two classes in turn."""
    entries = []
    for number, places in enumerate(motions):
        name = f"{'ab'[number % 2]}/video_{number:02}.avi"
        path = write_video(folder / name, moving_planes(places, seed=number))
        key = f"{'ab'[number % 2]}-video_{number:02}"
        entries.append(Entry(path=path, name=name, key=key, label="ab"[number % 2], split="train", group=name))
    return Listing(classes=("a", "b"), entries=tuple(entries))


MOTIONS = [steady(12), steady(9, -3, 0), steady(15, 0, 2), steady(10, 1, 1), steady(3, -2, -2), steady(14, 4, 3)]


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


def part(index: Index, sample: Any, of: Any) -> bytes:
    return (Path(index.url) / sample.shard).read_bytes()[of.offset :][: of.size_bytes]


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


@given(st.data())
def test_reading_fields_by_number_is_the_same_as_decoding_all(index, data):
    sample = index[data.draw(st.integers(0, len(index) - 1))]
    stored = part(index, sample, sample.flow)
    wanted = data.draw(st.lists(st.integers(0, sample.num_frames - 1), min_size=1, max_size=8))
    every = read_flow(stored, range(sample.num_frames), SMALL)
    np.testing.assert_array_equal(read_flow(stored, wanted, SMALL), every[wanted])


def test_reading_a_late_clip_starts_at_the_key_frame_before_it_also_beside_a_copied_video(index, monkeypatch):
    sample, seen = index[int(np.argmax([index[number].num_frames for number in range(len(index))]))], []

    def spy(*place):
        for number, frame in numbered(*place):
            seen.append(number)
            yield number, frame

    numbered = decode.decode_gops
    monkeypatch.setattr(decode, "decode_gops", spy)
    read_flow(part(index, sample, sample.flow), [9, 10], replace(SMALL, copy=True))
    assert seen == [8, 9, 10]


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


NO_FLOW = r"shards: packed without optical flow, which the stream 'flow' needs; .*jobs\.make_shards --flow tvl1"


def test_clips_of_flow_that_was_not_packed_are_refused_before_anything_is_read(tmp_path):
    index = Index(pack(tmp_path / "shards", listing_of(tmp_path / "videos", [8])), "train")
    with pytest.raises(BadShards, match=NO_FLOW):
        train_batches(index, CLIPS, Order([1], 1, seed=0), rank=0, world_size=1)
    with pytest.raises(BadShards, match=NO_FLOW):
        evaluation_batches(index, CLIPS, global_batch=1)


def test_training_and_evaluation_refuse_flow_that_was_not_packed(shards, tmp_path, monkeypatch):
    recipe = replace(RECIPE, clips=replace(RECIPE.clips, stream="flow"))
    with pytest.raises(BadShards, match=NO_FLOW):
        train.main("tiny", train_job(shards, tmp_path, "flow", recipe=recipe))
    kept = {"classes": ["down", "left", "right", "up"]}
    training = Training(step=0, recipe=recipe.to_dict(), model=kept)
    model = Model(weights={}, training=training, step=0, best=True, checkpoint=tmp_path)
    monkeypatch.setattr(evaluate, "load_best", lambda _: model)
    with pytest.raises(BadShards, match=NO_FLOW):
        evaluate.main(evaluate.Evaluate(run=str(tmp_path), shards=str(shards)))
    assert not list(tmp_path.iterdir())


# Clip batches


def slow_clip(index: Index, sample: Any, fields: np.ndarray) -> np.ndarray:
    """(N, 2H, W): each field decoded from the start, alone."""
    every = read_flow(part(index, sample, sample.flow), range(sample.num_frames), SMALL)
    return every[fields]


def test_training_batches_of_flow_are_those_of_the_definition_over_any_number_of_workers(index):
    order = Order([shard.samples for shard in index.shards], 2, seed=3)

    def batches(workers):
        parts = []
        for rank in range(workers):
            with closing(train_batches(index, CLIPS, order, rank=rank, world_size=workers)) as of_rank:
                parts.append(list(islice(of_rank, 7)))
        return [(step[0][0], torch.cat([batch.frames for _, batch in step])) for step in zip(*parts, strict=True)]

    one, two = batches(1), batches(2)
    for ((epoch, step), frames), (place, other) in zip(one, two, strict=True):
        assert place == (epoch, step)
        assert torch.equal(frames, other)
        for found, number in zip(frames, order.samples(epoch, step, range(2)), strict=True):
            sample = index[int(number)]
            clip = train_clip(sample.num_frames, 48, 64, CLIPS, 3, epoch, sample.number)
            np.testing.assert_array_equal(found, slow_clip(index, sample, clip.frames))


def test_evaluation_lays_the_clips_of_a_video_end_to_end(index):
    for _, batch in evaluation_batches(index, CLIPS, global_batch=2, num_clips=3):
        assert batch.frames.shape == (6, 8, 96, 64)
        assert batch.flow_bound.tolist() == [20.0] * 6
        for place in range(0, 6, 3):
            sample = index[int(batch.sample[place])]
            clips = evaluation_clips(sample.num_frames, 3, CLIPS)
            wanted = slow_clip(index, sample, clips.reshape(-1)).reshape(3, 8, 96, 64)
            np.testing.assert_array_equal(batch.frames[place : place + 3], wanted)


def test_frames_of_shards_with_flow_are_those_of_shards_without(listing, index, tmp_path):
    without = Index(pack(tmp_path / "shards", listing, replace(SMALL, flow="none")), "train")
    rgb = replace(CLIPS, stream="rgb")
    pairs = [evaluation_batches(of, rgb, global_batch=6, num_clips=2) for of in (index, without)]
    for (_, batch), (_, other) in zip(*pairs, strict=True):
        assert torch.equal(batch.frames, other.frames)
        assert batch.frames.shape == (12, 3, 72, 64)
        assert not batch.flow_bound.any()


def test_only_the_bytes_of_the_stream_are_read(index, monkeypatch):
    read = []

    def spy(store, name, offset, size_bytes):
        read.append((name, offset, size_bytes))
        return read_range(store, name, offset, size_bytes)

    read_range = FolderStore.read
    monkeypatch.setattr(FolderStore, "read", spy)
    for clips in (CLIPS, replace(CLIPS, stream="rgb")):
        read.clear()
        list(evaluation_batches(index, clips, global_batch=6))
        samples = [index[number] for number in range(6)]
        parts = [(sample, sample.flow if clips.stream == "flow" else sample) for sample in samples]
        assert sorted(read) == sorted((sample.shard, of.offset, of.size_bytes) for sample, of in parts if of)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_one_flipped_bit_of_flow_stops_the_run_with_shard_key_and_offset(share, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "spoilt")
    index = Index(folder, "train")
    sample = index[4]
    flow = sample.flow
    assert flow is not None
    with (folder / sample.shard).open("r+b") as file:
        file.seek(flow.offset + int(flow.size_bytes * share))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))

    message = rf"{sample.shard}: the {flow.size_bytes} bytes at offset {flow.offset} are not those of {sample.key}"
    with pytest.raises(BadShards, match=message):
        list(evaluation_batches(index, CLIPS, global_batch=6))


def test_flow_with_fewer_fields_than_the_index_says_is_named_with_its_place(index, monkeypatch):
    monkeypatch.setattr("shards.reading.stream.evaluation_clips", lambda *_: np.array([[90]]))
    sample = index[0]
    assert sample.flow is not None
    message = rf"{sample.shard}: {sample.key} at offset {sample.flow.offset}: the video ends before frame 90"
    with pytest.raises(BadShards, match=message):
        list(evaluation_batches(index, CLIPS, global_batch=1))


# The model's input


def test_the_flow_of_a_mirrored_video_is_the_mirrored_flow_of_the_video():
    """Motion to the right and down; DIS is not symmetric itself, hence the tolerance."""
    planes = moving_planes([(right, down // 2) for right, down in steady(5, 3, 4)])
    mirrored = planes.copy()
    mirrored[:, :48] = planes[:, :48, ::-1]

    def seen(planes, mirror):
        stored = torch.from_numpy(np.stack(list(flow_planes(iter(planes), "dis", 20.0)))[None, :, :96])
        box, bound = torch.tensor([[8, 8, 32, 48]]), torch.tensor([20.0])
        return flow_to_clips(stored, bound, box, torch.tensor([mirror]), 24, 2, 1, 4) / FLOW_SCALE

    assert seen(planes, False)[:, :, ::2].mean() == pytest.approx(3, abs=0.2)
    assert (seen(planes, True) - seen(mirrored, False)).abs().mean() < 0.1
    assert (seen(planes, True) - seen(planes, False)).abs().mean() > 2


def test_the_models_input_is_that_of_the_configs_stream(index):
    rgb = replace(CLIPS, stream="rgb")
    [(_, fields)], [(_, frames)] = (list(evaluation_batches(index, of, global_batch=6)) for of in (CLIPS, rgb))
    box, mirror = fields.box, torch.arange(6) % 2 == 0
    found = model_input(fields.frames, fields.flow_bound, box, mirror, CLIPS)
    wanted = flow_to_clips(fields.frames, fields.flow_bound, box, mirror, 16, 3, 2, 4)
    assert found.shape == (6, 3, CLIPS.channels, 16, 16)
    assert torch.equal(found, wanted)
    found = model_input(frames.frames, frames.flow_bound, box, mirror, rgb)
    assert found.shape == (6, 3, rgb.channels, 16, 16)
    assert torch.equal(found, to_clips(frames.frames, box, mirror, 16))


def test_a_model_is_trained_and_evaluated_on_flow(videos, storage, tmp_path):
    """Its scores against the same by hand: one clip and one view at a time, fields read anew for each."""
    job, folder = packing_job(videos, tmp_path / "shards"), tmp_path / "shards"
    packing = replace(job.packing, flow="dis", flow_bound=8.0)
    assert make_shards.main(replace(job, packing=packing)) == 0
    clips = replace(CLIPS, mirror=False, flow_fields=2)
    recipe = replace(RECIPE, clips=clips, num_steps=2, val_every=2)
    assert run_train(folder, storage, "on-flow", recipe=recipe)["steps"] == 2
    result = run_evaluate(storage / "on-flow", folder, clips=2, views=5, clips_at_once=3)
    rows = {row["key"]: row["scores"] for row in pq.read_table(result["scores"]).to_pylist()}

    index = Index(folder, "test")
    assert len(index) == len(rows) == 4
    model = build_model(recipe.model, 4, 0, in_channels=4)
    model.load_state_dict(load_best(storage / "on-flow").weights)
    model.eval()
    for number in range(len(index)):
        sample = index[number]
        assert sample.flow is not None
        assert sample.flow.bound == 8.0
        every = torch.from_numpy(read_flow(part(index, sample, sample.flow), range(sample.num_frames), packing))
        votes = []
        for fields in evaluation_clips(sample.num_frames, 2, clips):
            for box, mirror in evaluation_views(40, 40, 5, clips):
                place = torch.tensor([8.0]), torch.tensor([box]), torch.tensor([mirror])
                clip = flow_to_clips(every[fields][None], *place, 16, num_steps=3, stride=2, num_fields=2)
                with torch.no_grad():
                    votes.append(log_mean_vote(model(clip, torch.zeros(1, dtype=torch.int64))).exp()[0])
        assert rows[sample.key] == pytest.approx(torch.stack(votes).mean(dim=0).tolist(), rel=1e-4)


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
