"""Order -> bytes -> clip batches: the same pixels whoever reads them, errors with their place, and no thread left behind."""

import random
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import assert_equal, joined
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from videos import TINY, frame_numbers, listing_of, pack

from shards.index import Index
from shards.packing.entries import Listing
from shards.packing.transcode import store_video
from shards.reading.clips import ClipConfig, evaluation_clips, evaluation_views, train_clip
from shards.reading.decode import read_frames
from shards.reading.order import BadBatch, Order
from shards.reading.stages import ReadingOptions
from shards.reading.stream import ClipBatch, evaluation_batches, train_batches
from shards.store import BadShards, FolderStore

FRAMES = [8, 9, 10, 11, 12, 3, 9, 10, 11, 8, 14]  # 11 videos: in batches of 4, two steps and three left over
CLIPS = ClipConfig(num_frames=4, stride=2, size=16, crop_scales=(1.0, 0.75))
GLOBAL_BATCH, SEED = 4, 7


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Shards of 3, 3, 3 and 2 videos. Video n's frame f is grey at the level of n + f."""
    folder = tmp_path_factory.mktemp("data")
    return pack(folder / "shards", listing_of(folder / "videos", FRAMES))


@pytest.fixture(scope="module")
def index(packed):
    return Index(packed, "train")


def order_of(index, global_batch=GLOBAL_BATCH, seed=SEED):
    return Order([shard.samples for shard in index.shards], global_batch, seed)


def train(index, num_batches, *, workers=1, **options):
    """The global batches: each rank's parts, joined."""
    parts = []
    for rank in range(workers):
        with closing(train_batches(index, CLIPS, order_of(index), rank=rank, world_size=workers, **options)) as batches:
            parts.append(list(islice(batches, num_batches)))
    return [joined(step) for step in zip(*parts, strict=True)]


def evaluate(index, *, workers=1, **options):
    """Each rank's batches of one pass."""
    return [
        [batch for _, batch in evaluation_batches(index, CLIPS, rank=rank, world_size=workers, **options)]
        for rank in range(workers)
    ]


def bytes_of(index, sample):
    return (Path(index.url) / sample.shard).read_bytes()[sample.offset :][: sample.size_bytes]


def slow_batch(index, epoch, step, order=None):
    """A global batch by the definition, one sample after the other."""
    packing, order = index.info.packing, order or order_of(index)
    assert order.seed is not None
    batch = []
    for number in order.samples(epoch, step, range(order.global_batch)):
        sample = index[int(number)]
        clip = train_clip(sample.num_frames, packing.height, packing.width, CLIPS, order.seed, epoch, sample.number)
        planes = read_frames(bytes_of(index, sample), clip.frames.tolist(), packing)
        batch.append((planes, 0.0, clip.box, clip.mirror, sample.label, 1.0, clip.draw, sample.number))
    names = ("frames", "flow_bound", "box", "mirror", "label", "weight", "draw", "sample")
    return {name: torch.tensor(np.array(column)) for name, column in zip(names, zip(*batch, strict=True), strict=True)}


# Training


@settings(max_examples=25, deadline=None)
@given(
    workers=st.sampled_from([1, 2, 4]),
    decode_threads=st.integers(1, 4),
    batches_ahead=st.integers(1, 3),
    requests=st.integers(1, 5),
    epoch=st.integers(0, 3),
    step=st.integers(0, 1),
)
def test_global_batches_are_those_of_the_definition_whoever_reads_them(
    index, workers, decode_threads, batches_ahead, requests, epoch, step
):
    reading = ReadingOptions(decode_threads=decode_threads, batches_ahead=batches_ahead, requests=requests)
    found = train(index, 3, workers=workers, start=(epoch, step), reading=reading)
    wanted = [divmod(2 * epoch + step + number, 2) for number in range(3)]
    assert [place for place, _ in found] == wanted
    for place, batch in found:
        assert_equal(batch, slow_batch(index, *place), check_dtype=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Thirteen stored videos, to be packed as they are: a packing of any of them takes milliseconds."""
    folder = tmp_path_factory.mktemp("stored")
    entries = listing_of(folder / "videos", [4 + number % 5 for number in range(13)]).entries
    listed = []
    for entry in entries:
        path = folder / f"{entry.key}.mp4"
        path.write_bytes(store_video(entry.path, TINY).data)
        listed.append(replace(entry, path=path, name=path.name))
    return listed


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_data_set_gives_the_same_pixels_to_any_workers_and_after_any_interruption(stored, tmp_path, data):
    """Random numbers of samples, shards, lanes, workers, threads, epochs and seeds, beside the definition."""
    entries = stored[: data.draw(st.integers(1, 13), "samples")]
    workers = data.draw(st.sampled_from([1, 2, 3]), "workers")
    global_batch = workers * data.draw(st.integers(1, max(1, len(entries) // workers)), "lanes of a worker")
    assume(global_batch <= len(entries))
    seed, epoch = data.draw(st.integers(0, 2**32), "seed"), data.draw(st.integers(0, 5), "epoch")
    reading = ReadingOptions(
        decode_threads=data.draw(st.integers(1, 3), "decode threads"),
        batches_ahead=data.draw(st.integers(1, 3), "batches ahead"),
        requests=data.draw(st.integers(1, 5), "requests"),
    )
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    listing = Listing(classes=("a", "b"), entries=tuple(entries))
    copied = replace(TINY, copy=True)
    index = Index(pack(folder, listing, copied, data.draw(st.integers(1, 5), "videos a shard")), "train")
    order = order_of(index, global_batch, seed)
    steps = order.steps_per_epoch
    start = epoch * steps + data.draw(st.integers(0, steps - 1), "step")
    read = data.draw(st.integers(1, 2 * steps + 1), "steps")
    broken_off = data.draw(st.integers(0, read), "interrupted after")

    def batches_from(place, number):
        parts = []
        for rank in range(workers):
            options = {"rank": rank, "world_size": workers, "start": divmod(place, steps), "reading": reading}
            with closing(train_batches(index, CLIPS, order, **options)) as batches:
                parts.append(list(islice(batches, number)))
        return [joined(step) for step in zip(*parts, strict=True)]

    found = batches_from(start, broken_off) + batches_from(start + broken_off, read - broken_off)

    assert [place for place, _ in found] == [divmod(start + number, steps) for number in range(read)]
    shown = defaultdict(list)
    for place, batch in found:
        assert_equal(batch, slow_batch(index, *place, order=order), check_dtype=False)
        shown[place[0]] += batch["sample"].tolist()
    for samples in shown.values():  # each at most once an epoch; of whole epochs all but the remainder
        assert len(set(samples)) == len(samples) <= steps * global_batch
    for of, samples in shown.items():
        if start <= of * steps and (of + 1) * steps <= start + read:
            assert len(samples) == steps * global_batch > len(entries) - global_batch


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_evaluation_of_any_data_set_by_any_workers_shows_each_video_once(stored, tmp_path, data):
    entries = stored[: data.draw(st.integers(1, 13), "samples")]
    workers = data.draw(st.sampled_from([1, 2, 3, 5]), "workers")
    global_batch = workers * data.draw(st.integers(1, 4), "lanes of a worker")
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    listing = Listing(classes=("a", "b"), entries=tuple(entries))
    index = Index(pack(folder, listing, replace(TINY, copy=True), data.draw(st.integers(1, 5), "a shard")), "train")
    ranks = evaluate(index, global_batch=global_batch, workers=workers)
    assert len({len(batches) for batches in ranks}) == 1
    counts = Counter(
        int(number) for batches in ranks for batch in batches for number in batch.sample[batch.weight == 1]
    )
    assert counts == dict.fromkeys(range(len(entries)), 1)


def test_a_resumed_reading_goes_on_as_if_it_had_not_stopped(index):
    uninterrupted = train(index, 8)
    for num_read, workers in [(1, 2), (2, 4), (5, 1)]:
        resumed = train(index, 8 - num_read, workers=workers, start=divmod(num_read, 2))
        for (place, batch), (other_place, other) in zip(uninterrupted[num_read:], resumed, strict=True):
            assert place == other_place
            assert_equal(batch, other)


def test_an_epoch_shows_each_video_once_but_for_the_remainder(index):
    batches = train(index, 12)
    for epoch in range(6):
        samples = torch.cat([batch["sample"] for (of, _), batch in batches if of == epoch]).tolist()
        assert len(set(samples)) == len(samples) == 8


def test_a_batchs_shapes_types_and_values(index):
    [(_, batch)] = train(index, 1)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "frames": ((4, 4, 48, 32), torch.uint8),
        "flow_bound": ((4,), torch.float32),
        "box": ((4, 4), torch.int64),
        "mirror": ((4,), torch.bool),
        "label": ((4,), torch.int64),
        "weight": ((4,), torch.float32),
        "draw": ((4,), torch.int64),
        "sample": ((4,), torch.int64),
    }
    for planes, label, number in zip(batch["frames"], batch["label"], batch["sample"], strict=True):
        sample = index[int(number)]
        video = int(sample.key[-2:])
        assert label == video % 2
        numbers = frame_numbers(planes.numpy())
        start, last = numbers[0] - video, FRAMES[video] - 1
        assert [of - video for of in numbers] == [min(start + 2 * place, last) for place in range(4)]


def test_other_epochs_show_other_clips_of_a_video(index):
    seen = {}
    for (epoch, _), batch in train(index, 40):
        for sample, draw in zip(batch["sample"].tolist(), batch["draw"].tolist(), strict=True):
            seen.setdefault(sample, {})[epoch] = draw
    for draws in seen.values():
        assert len(draws) > 3
        assert len(set(draws.values())) == len(draws)


def test_workers_that_do_not_divide_the_batch_are_refused_before_anything_is_read(index):
    with pytest.raises(BadBatch, match="global batch of 4 cannot be shared evenly by 3 workers"):
        train_batches(index, CLIPS, order_of(index), rank=0, world_size=3)


def test_a_batch_is_cut_into_equal_parts_for_accumulation_and_moves_whole(index):
    [(_, batch)] = islice(train_batches(index, CLIPS, order_of(index), rank=0, world_size=1), 1)
    assert len(batch) == 4
    first, second = batch.split(2)
    assert (len(first), len(second)) == (2, 2)
    assert torch.cat([first.sample, second.sample]).tolist() == batch.sample.tolist()
    torch.testing.assert_close(torch.cat([first.frames, second.frames]), batch.frames)
    assert {tensor.device.type for tensor in vars(batch.to(torch.device("meta"))).values()} == {"meta"}


# Evaluation


@pytest.mark.parametrize(("global_batch", "workers"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (16, 1), (16, 8)])
def test_evaluation_shows_each_video_once_over_any_number_of_workers(global_batch, workers, index):
    ranks = evaluate(index, global_batch=global_batch, workers=workers)
    counts = Counter()
    assert {len(batches) for batches in ranks} == {-(-11 // global_batch)}
    for batches in ranks:
        for batch in batches:
            assert len(batch) == global_batch // workers
            assert set(batch.weight.tolist()) <= {0.0, 1.0}
            counts.update(batch.sample[batch.weight == 1].tolist())
    assert counts == dict.fromkeys(range(11), 1)


def test_evaluation_shows_the_same_pixels_over_any_number_of_workers(index):
    def pixels(workers):
        return {
            int(number): planes
            for batches in evaluate(index, global_batch=4, workers=workers, num_clips=2)
            for batch in batches
            for number, planes, weight in zip(
                batch.sample[::2], batch.frames.unflatten(0, (-1, 2)), batch.weight[::2], strict=True
            )
            if weight
        }

    one = pixels(1)
    assert len(one) == 11
    for workers in (2, 4):
        other = pixels(workers)
        assert all(torch.equal(one[number], other[number]) for number in range(11))


def test_evaluation_shows_equally_spaced_clips_of_the_centre_video_by_video(index):
    [[batch, *others]] = evaluate(index, global_batch=4, num_clips=3)
    assert len(others) == 2
    assert batch.frames.shape == (12, 4, 48, 32)
    [(box, _)] = evaluation_views(32, 32, 1, CLIPS)
    assert batch.box.tolist() == [list(box)] * 12
    assert not batch.mirror.any()
    assert batch.sample.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]  # 4 lanes of 3 steps
    for place in range(0, 12, 3):
        sample = index[int(batch.sample[place])]
        clips = evaluation_clips(sample.num_frames, 3, CLIPS)
        wanted = read_frames(bytes_of(index, sample), clips.reshape(-1).tolist(), index.info.packing)
        np.testing.assert_array_equal(batch.frames[place : place + 3].numpy().reshape(wanted.shape), wanted)


# Bytes in memory


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_pixels_are_the_same_whatever_part_of_the_bytes_is_in_memory(share, index, monkeypatch):
    draw = random.Random(1)
    monkeypatch.setattr(FolderStore, "in_memory", lambda *_: draw.random() < share)
    for place, batch in train(index, 8):
        assert_equal(batch, slow_batch(index, *place), check_dtype=False)


def test_videos_that_are_not_in_memory_are_read_side_by_side(index, monkeypatch):
    """Each read waits until so many others are under way."""
    together, read = threading.Barrier(5, timeout=10), FolderStore.read

    def read_together(store, name, *args):
        if name.endswith(".tar"):
            together.wait()
        return read(store, name, *args)

    monkeypatch.setattr(FolderStore, "in_memory", lambda *_: False)
    monkeypatch.setattr(FolderStore, "read", read_together)
    assert len(train(index, 5, reading=ReadingOptions(requests=5))) == 5


# Spoilt shards


@pytest.fixture
def spoilt(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "spoilt")


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_one_flipped_bit_stops_the_run_with_shard_key_and_offset(share, spoilt):
    index = Index(spoilt, "train")
    sample = index[4]
    flip(spoilt / sample.shard, sample.offset + int(sample.size_bytes * share))
    message = rf"{sample.shard}: the {sample.size_bytes} bytes at offset {sample.offset} are not those of {sample.key}"
    with pytest.raises(BadShards, match=message):
        evaluate(index, global_batch=4)
    with pytest.raises(BadShards, match=message):
        train(index, 40)


def test_a_video_with_fewer_frames_than_the_index_says_is_named(packed, monkeypatch):
    index = Index(packed, "train")
    monkeypatch.setattr(
        "shards.reading.stream.train_clips", lambda frames, *_: [train_clip(100, 32, 32, CLIPS, 0, 0, 0)] * len(frames)
    )
    with pytest.raises(
        BadShards, match=r"train-\d+\.tar: [ab]-video_\d\d at offset \d+: the video ends before frame \d+"
    ):
        train(index, 1)


def test_a_deleted_shard_is_named(spoilt):
    (spoilt / "train-000001.tar").unlink()
    with pytest.raises(
        BadShards, match=r"sample \S+: \S+train-000001\.tar: \d+ bytes at offset \d+: the file is missing"
    ):
        train(Index(spoilt, "train"), 4)


def test_a_shard_that_was_cut_off_is_named(spoilt):
    sample = Index(spoilt, "train")[10]
    with (spoilt / sample.shard).open("r+b") as file:
        file.truncate(sample.offset + 100)
    with pytest.raises(
        BadShards,
        match=rf"sample {sample.key}: \S+{sample.shard}: ends {sample.size_bytes - 100} bytes before the sample at",
    ):
        evaluate(Index(spoilt, "train"), global_batch=4)


# Stages of a user's own


def test_a_users_stages_run_in_their_order_on_each_sample(index):
    def darken(items):
        for item in items:
            yield replace(item, planes=item.planes // 2)

    def negate(items):
        for item in items:
            yield replace(item, planes=255 - item.planes)

    plain = train(index, 3)
    staged = train(index, 3, stages=[darken, negate])
    for (_, batch), (_, other) in zip(plain, staged, strict=True):
        torch.testing.assert_close(other.pop("frames"), 255 - batch.pop("frames") // 2)
        assert_equal(batch, other)


@pytest.mark.parametrize("change", ["left out", "doubled", "swapped"])
def test_a_stage_that_does_not_hand_on_each_sample_once_is_refused(change, index):
    def stage(items):
        held = []
        for place, item in enumerate(items):
            if change == "left out" and place == 2:
                continue
            if change == "doubled" and place == 1:
                yield item
            if change == "swapped" and place in (3, 4):
                held.append(item)
                if len(held) == 2:
                    yield from reversed(held)
                continue
            yield item

    with pytest.raises(ValueError, match="epoch 0, step 0: expected 4 samples of this step, but other ones came"):
        train(index, 3, stages=[stage])


# Threads


@pytest.fixture
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("no_thread_stays")
def test_batches_that_are_no_longer_wanted_leave_no_thread(index):
    batches = train_batches(
        index, CLIPS, order_of(index), rank=0, world_size=1, reading=ReadingOptions(decode_threads=3)
    )
    next(batches)
    assert any(thread.name == "clip-batches-ahead" for thread in threading.enumerate())
    batches.close()


@pytest.mark.usefixtures("no_thread_stays")
def test_a_failed_reading_leaves_no_thread(spoilt):
    (spoilt / "train-000001.tar").unlink()
    with pytest.raises(BadShards):
        evaluate(Index(spoilt, "train"), global_batch=4)


def test_a_clip_batchs_fields_are_tensors(index):
    """What the tests above join by name."""
    [(_, batch)] = islice(train_batches(index, CLIPS, order_of(index), rank=0, world_size=1), 1)
    assert isinstance(batch, ClipBatch)
    assert all(isinstance(value, torch.Tensor) for value in vars(batch).values())
