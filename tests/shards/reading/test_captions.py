"""Pairs -> bytes -> caption batches: the same whoever reads them, of videos and of vectors, and errors with their place."""

import json
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
from captioned import (
    SEGMENTS,
    captioned,
    captioned_set,
    captions_of,
    encode,
    flip,
    mean_luma,
    npy_of,
    number_in,
    reindex,
    rewrite_member,
    wanted_frames,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from videos import TINY, frame_numbers, listing_of, pack

from shards.index import Index
from shards.packing.transcode import store_video
from shards.reading.captions import Segments, evaluation_captions, read_captions, train_captions
from shards.reading.decode import read_frames
from shards.reading.order import CAPTION_OF_PAIR, BadBatch, Order, random_bits
from shards.reading.stages import ReadingOptions
from shards.store import BadShards, FolderStore

FRAMES = [8, 9, 3, 10, 2, 12, 9]  # two of these videos have fewer frames than segments are wanted
COUNTS = [2, 1, 4, 3, 1, 5, 2]  # 18 pairs: in batches of 4, four steps and two pairs left over
GLOBAL_BATCH, SEED = 4, 7


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Shards of 3, 3 and 1 videos. Video n's frame f is grey at the level of n + f."""
    return captioned_set(tmp_path_factory.mktemp("data"), FRAMES, COUNTS)


@pytest.fixture(scope="module")
def vectors(packed, tmp_path_factory):
    """The same as vectors: each frame's brightness."""
    folder = tmp_path_factory.mktemp("encoded")
    encode(packed, folder)
    return folder


@pytest.fixture(scope="module", params=["videos", "vectors"])
def index(request, packed, vectors):
    return Index(packed if request.param == "videos" else vectors, "train")


def order_of(index, global_batch=GLOBAL_BATCH, seed=SEED):
    return Order([shard.captions for shard in index.shards], global_batch, seed)


def train(index, num_batches, *, workers=1, order=None, **options):
    """The global batches: each rank's parts, joined."""
    parts, order = [], order or order_of(index)
    for rank in range(workers):
        with closing(train_captions(index, SEGMENTS, order, rank=rank, world_size=workers, **options)) as batches:
            parts.append(list(islice(batches, num_batches)))
    return [joined(step) for step in zip(*parts, strict=True)]


def evaluate(index, *, workers=1, **options):
    """Each rank's batches of one pass."""
    return [
        [batch for _, batch in evaluation_captions(index, SEGMENTS, rank=rank, world_size=workers, **options)]
        for rank in range(workers)
    ]


def bytes_of(store, sample):
    return (Path(store.url) / sample.shard).read_bytes()[sample.offset :][: sample.size_bytes]


def slow_seen(videos, sample):
    """(what is seen of a video, of its vectors, which segments it has), frame by frame."""
    frames = wanted_frames(sample.num_frames, SEGMENTS)
    own = [True] * len(frames) + [False] * (SEGMENTS.num_segments - len(frames))
    last = [[sample.num_frames - 1] * len(SEGMENTS.offsets)]
    flat = [frame for segment in frames + last * (len(own) - len(frames)) for frame in segment]
    [row] = [number for number in range(len(videos)) if videos[number].key == sample.key]
    planes = read_frames(bytes_of(videos.store, videos[row]), flat, videos.info.packing)
    planes = torch.from_numpy(planes).unflatten(0, (SEGMENTS.num_segments, -1))
    means = mean_luma(planes[None], torch.tensor([own]))[0] * torch.tensor(own)[:, None]
    return planes, means, own


def slow_batch(index, videos, place, order, counts):
    """A global batch of pairs by the definition, one pair after the other."""
    samples = [index[number] for number in range(len(index))]
    pairs = [(sample, caption) for sample in samples for caption in range(counts[sample.key])]
    epoch, step = place
    columns = defaultdict(list)
    for number in order.samples(epoch, step, range(order.global_batch)).tolist():
        sample, caption = pairs[number]
        planes, means, own = slow_seen(videos, sample)
        columns["seen"].append(planes if index.info.encoder is None else means)
        columns["segments"].append(torch.tensor(own))
        columns["captions"].append((captions_of(sample.key, counts[sample.key])[caption],))
        columns["weight"].append(torch.tensor(1.0))
        bits = int(random_bits(1, order.seed, epoch, CAPTION_OF_PAIR, number)[0])
        columns["draw"].append(torch.tensor(bits // 2))
        columns["sample"].append(torch.tensor(sample.number))
        columns["keys"].append(sample.key)
    are_tensors = {name: isinstance(column[0], torch.Tensor) for name, column in columns.items()}
    return {name: torch.stack(column) if are_tensors[name] else tuple(column) for name, column in columns.items()}


def counts_of(listing_of_keys=FRAMES, counts=COUNTS):
    return {f"{'ab'[number % 2]}-video_{number:02}": counts[number] for number in range(len(listing_of_keys))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_segments": 0, "offsets": (0,)}, r"num_segments 0: expected at least 1"),
        ({"num_segments": 2, "offsets": ()}, r"offsets \(\): expected at least one, and none below 0"),
        ({"num_segments": 2, "offsets": (0, -1)}, r"offsets \(0, -1\): expected"),
    ],
)
def test_segments_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Segments(**options)


# Training


@settings(max_examples=20)
@given(
    workers=st.sampled_from([1, 2, 4]),
    decode_threads=st.integers(1, 4),
    batches_ahead=st.integers(1, 3),
    requests=st.integers(1, 5),
    epoch=st.integers(0, 3),
    step=st.integers(0, 3),
)
def test_global_batches_are_those_of_the_definition_whoever_reads_them(
    index, packed, workers, decode_threads, batches_ahead, requests, epoch, step
):
    reading = ReadingOptions(decode_threads=decode_threads, batches_ahead=batches_ahead, requests=requests)
    found = train(index, 3, workers=workers, start=(epoch, step), reading=reading)
    assert [place for place, _ in found] == [divmod(4 * epoch + step + number, 4) for number in range(3)]
    for place, batch in found:
        assert_equal(batch, slow_batch(index, Index(packed, "train"), place, order_of(index), counts_of()))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Nine stored videos, to be packed as they are: a packing of any of them takes little time."""
    folder = tmp_path_factory.mktemp("stored")
    entries = listing_of(folder / "videos", [2 + number % 7 for number in range(9)]).entries
    listed = []
    for entry in entries:
        path = folder / f"{entry.key}.mp4"
        path.write_bytes(store_video(entry.path, TINY).data)
        listed.append(replace(entry, path=path, name=path.name))
    return listed


def drawn_set(data, stored, tmp_path):
    """A random data set, of videos or of vectors: its index, that of its videos, and each key's number of captions."""
    entries = stored[: data.draw(st.integers(1, 9), "videos")]
    counts = [data.draw(st.integers(1, 5), "captions") for _ in entries]
    folder, copied = Path(tempfile.mkdtemp(dir=tmp_path)), replace(TINY, copy=True)
    pack(folder / "videos", captioned(entries, counts), copied, data.draw(st.integers(1, 4), "videos a shard"))
    videos = Index(folder / "videos", "train")
    by_key = {entry.key: count for entry, count in zip(entries, counts, strict=True)}
    if data.draw(st.booleans(), "as videos"):
        return videos, videos, by_key
    encode(folder / "videos", folder / "vectors", batch_size=data.draw(st.integers(1, 4), "encoded together"))
    return Index(folder / "vectors", "train"), videos, by_key


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_data_set_gives_the_same_pairs_to_any_workers_and_after_any_interruption(stored, tmp_path, data):
    """Random numbers of videos, captions, shards, lanes, workers, threads, epochs and seeds, beside the definition."""
    index, videos, counts = drawn_set(data, stored, tmp_path)
    num_pairs = sum(counts.values())
    workers = data.draw(st.sampled_from([1, 2, 3]), "workers")
    global_batch = workers * data.draw(st.integers(1, max(1, num_pairs // workers)), "lanes of a worker")
    assume(global_batch <= num_pairs)
    seed, epoch = data.draw(st.integers(0, 2**32), "seed"), data.draw(st.integers(0, 5), "epoch")
    reading = ReadingOptions(
        decode_threads=data.draw(st.integers(1, 3), "decode threads"),
        batches_ahead=data.draw(st.integers(1, 3), "batches ahead"),
        requests=data.draw(st.integers(1, 5), "requests"),
    )
    order = order_of(index, global_batch, seed)
    steps = order.steps_per_epoch
    start = epoch * steps + data.draw(st.integers(0, steps - 1), "step")
    read = data.draw(st.integers(1, min(8, 2 * steps + 1)), "steps")
    broken_off = data.draw(st.integers(0, read), "interrupted after")

    def batches_from(place, number):
        return train(index, number, workers=workers, order=order, start=divmod(place, steps), reading=reading)

    found = batches_from(start, broken_off) + batches_from(start + broken_off, read - broken_off)

    assert [place for place, _ in found] == [divmod(start + number, steps) for number in range(read)]
    shown = defaultdict(list)
    for place, batch in found:
        assert_equal(batch, slow_batch(index, videos, place, order, counts))
        shown[place[0]] += zip(batch["keys"], batch["captions"], strict=True)
    for pairs in shown.values():  # each at most once an epoch; of whole epochs all but the remainder
        assert len(set(pairs)) == len(pairs) <= steps * global_batch
    for of, pairs in shown.items():
        if start <= of * steps and (of + 1) * steps <= start + read:
            assert len(pairs) == steps * global_batch > num_pairs - global_batch


def test_an_epoch_shows_each_pair_once_but_for_the_remainder(index):
    left_out = set()
    everything = {(key, caption) for key, count in counts_of().items() for caption in captions_of(key, count)}
    batches = train(index, 4 * 8)
    for epoch in range(8):
        shown = [
            (key, caption)
            for (of, _), batch in batches
            if of == epoch
            for key, [caption] in zip(batch["keys"], batch["captions"], strict=True)
        ]
        assert len(set(shown)) == len(shown) == 16
        left_out |= {frozenset(everything - set(shown))}
    assert len(left_out) > 1  # others in other epochs


def test_a_batchs_shapes_types_and_values(packed, vectors):
    for folder, seen in [(packed, ((4, 4, 3, 48, 32), torch.uint8)), (vectors, ((4, 4, 3), torch.float32))]:
        [(_, batch)] = train(Index(folder, "train"), 1)
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if hasattr(value, "dtype")}
        assert shapes == {
            "seen": seen,
            "segments": ((4, 4), torch.bool),
            "weight": ((4,), torch.float32),
            "draw": ((4,), torch.int64),
            "sample": ((4,), torch.int64),
        }
        assert all(0 <= draw < 2**63 for draw in batch["draw"].tolist())
        assert len(set(batch["draw"].tolist())) == 4


def test_the_frames_of_a_batch_are_those_of_its_segments(packed):
    for _, batch in train(Index(packed, "train"), 4):
        for planes, own, key in zip(batch["seen"], batch["segments"], batch["keys"], strict=True):
            number = number_in(key)
            wanted = wanted_frames(FRAMES[number], SEGMENTS)
            found = [[frame - number for frame in frame_numbers(segment.numpy())] for segment in planes[own]]
            assert found == wanted
            assert all(frame_numbers(segment.numpy()) == [number + FRAMES[number] - 1] * 3 for segment in planes[~own])


def test_vectors_are_zeros_where_a_video_has_no_segment(vectors):
    batches = [batch for _, batch in train(Index(vectors, "train"), 8)]
    of_short = [batch for batch in batches if not batch["segments"].all()]
    assert of_short
    for batch in of_short:
        assert not batch["seen"][~batch["segments"]].any()
        assert batch["seen"][batch["segments"]].all()


def test_a_pair_is_drawn_anew_in_each_epoch_and_otherwise_than_other_pairs(index):
    draws = defaultdict(set)
    for _, batch in train(index, 4 * 6):
        for key, caption, draw in zip(batch["keys"], batch["captions"], batch["draw"].tolist(), strict=True):
            draws[key, caption].add(draw)
    assert len(set.union(*draws.values())) == sum(map(len, draws.values())) == 4 * 4 * 6


def test_the_pairs_first_draws_never_change():
    """A resumed run drops the same units whatever the versions of this program and of NumPy."""
    assert int(random_bits(1, 1, 2, CAPTION_OF_PAIR, 3)[0]) >> 1 == 5079820991156909679


def test_a_resumed_reading_goes_on_as_if_it_had_not_stopped(index):
    uninterrupted = train(index, 9)
    for num_read, workers in [(1, 2), (2, 4), (5, 1)]:
        resumed = train(index, 9 - num_read, workers=workers, start=divmod(num_read, 4))
        for (place, batch), (other_place, other) in zip(uninterrupted[num_read:], resumed, strict=True):
            assert place == other_place
            assert_equal(batch, other)


def test_workers_that_do_not_divide_the_batch_are_refused_before_anything_is_read(index):
    with pytest.raises(BadBatch, match="global batch of 4 cannot be shared evenly by 3 workers"):
        train_captions(index, SEGMENTS, order_of(index), rank=0, world_size=3)


def test_a_batch_is_cut_into_equal_parts_for_accumulation_and_moves_whole(index):
    with closing(train_captions(index, SEGMENTS, order_of(index), rank=0, world_size=1)) as batches:
        _, batch = next(batches)
    assert len(batch) == 4
    first, second = batch.split(2)
    assert (len(first), len(second)) == (2, 2)
    assert torch.cat([first.seen, second.seen]).equal(batch.seen)
    assert first.captions + second.captions == batch.captions
    assert first.keys + second.keys == batch.keys
    moved = batch.to(torch.device("meta"))
    devices = {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)}
    assert (devices, moved.captions, moved.keys) == ({"meta"}, batch.captions, batch.keys)


def test_no_thread_stays_when_reading_ends(index):
    before = set(threading.enumerate())
    train(index, 3)
    evaluate(index, global_batch=2)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_batches_are_the_same_whatever_part_of_the_bytes_is_in_memory(share, index, monkeypatch):
    wanted, draw = train(index, 6), random.Random(1)
    monkeypatch.setattr(FolderStore, "in_memory", lambda *_: draw.random() < share)
    for (_, batch), (_, other) in zip(wanted, train(index, 6), strict=True):
        assert_equal(batch, other)


# Evaluation


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_evaluation_of_any_data_set_by_any_workers_shows_each_video_once(stored, tmp_path, data):
    index, videos, counts = drawn_set(data, stored, tmp_path)
    workers = data.draw(st.sampled_from([1, 2, 3, 5]), "workers")
    global_batch = workers * data.draw(st.integers(1, 4), "lanes of a worker")
    ranks = evaluate(index, global_batch=global_batch, workers=workers)
    assert len({len(batches) for batches in ranks}) == 1
    shown = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        assert len(batch) == global_batch // workers
        for place in batch.weight.nonzero().flatten().tolist():
            key, number = batch.keys[place], int(batch.sample[place])
            shown[number] += 1
            assert (key, batch.captions[place]) == (index[number].key, captions_of(key, counts[key]))
            planes, means, own = slow_seen(videos, index[number])
            assert batch.segments[place].tolist() == own
            assert batch.seen[place].equal(planes if index.info.encoder is None else means)
    assert shown == dict.fromkeys(range(len(index)), 1)


def test_an_evaluation_is_padded_with_the_first_video_at_weight_0(index):
    [batches] = evaluate(index, global_batch=4)
    assert [batch.weight.tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batches[1].sample.tolist() == [1, 3, 5, 0]  # 4 lanes of 2 steps
    assert batches[1].keys[3] == index[0].key
    assert not batches[1].draw.any()


def test_videos_without_captions_are_evaluated_too(tmp_path):
    listing = listing_of(tmp_path / "videos", [5, 6, 7])
    index = Index(pack(tmp_path / "shards", listing), "train")
    [[batch]] = evaluate(index, global_batch=3)
    assert batch.captions == ((), (), ())
    assert batch.keys == tuple(index[number].key for number in range(3))


# Captions


def test_captions_are_read_as_they_were_packed(packed, vectors):
    for folder in (packed, vectors):
        index = Index(folder, "train")
        for sample in index.samples(range(len(index))):
            assert read_captions(index, sample) == captions_of(sample.key, counts_of()[sample.key])


@pytest.fixture
def spoilt(index, tmp_path):
    """A copy of each kind that may be spoilt."""
    return Path(shutil.copytree(index.url, tmp_path / "spoilt"))


def rewrite_json(folder, number, change):
    """Puts another JSON in a sample's place, blanks behind it."""
    sample = Index(folder, "train")[number]
    path = folder / sample.shard
    content = bytearray(path.read_bytes())
    start, end = sample.json_offset, sample.json_offset + sample.json_size_bytes
    changed = change(bytes(content[start:end]))
    assert len(changed) <= end - start
    content[start:end] = changed.ljust(end - start)
    path.write_bytes(content)
    return sample


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: json.dumps({**json.loads(data), "captions": ["one"]}).encode(), r"1 captions, the index says \d"),
        (lambda data: json.dumps({**json.loads(data), "captions": None}).encode(), r"0 captions, the index says \d"),
        (lambda data: json.dumps({**json.loads(data), "captions": [1, 2]}).encode(), r"expected a text, or a list of"),
        (lambda data: b"[" + data[1:], "is not JSON"),
        (lambda data: data[:40], "is not JSON"),
        (lambda data: b"\xff" + data[1:], "is not JSON"),
    ],
)
def test_a_json_that_is_not_the_one_that_was_packed_is_named_with_shard_key_and_offset(change, message, spoilt):
    number = max(range(len(FRAMES)), key=lambda number: Index(spoilt, "train")[number].num_captions)
    sample = rewrite_json(spoilt, number, change)
    index = Index(spoilt, "train")
    place = rf"{sample.shard}: the JSON of {sample.key} at offset {sample.json_offset} is not the one that was packed"
    with pytest.raises(BadShards, match=rf"{place} \(.*{message}.*\); restore"):
        train(index, 20)
    with pytest.raises(BadShards, match=place):
        evaluate(index, global_batch=4)


def test_a_json_of_one_caption_that_is_damaged_is_not_taken_for_its_caption(spoilt):
    """As a line of a text is, in tars of others."""
    index = Index(spoilt, "train")
    [number, *_] = [number for number in range(len(FRAMES)) if index[number].num_captions == 1]
    sample = rewrite_json(spoilt, number, lambda data: b"[" + data[1:])
    with pytest.raises(BadShards, match=r"is not JSON"):
        evaluate(index, global_batch=4)
    with pytest.raises(BadShards, match=r"is not JSON"):
        read_captions(index, sample)


# Spoilt shards


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_one_flipped_bit_stops_the_run_with_shard_key_and_offset(share, spoilt):
    index = Index(spoilt, "train")
    sample = index[4]
    flip(spoilt / sample.shard, sample.offset + int(sample.size_bytes * share))
    message = rf"{sample.shard}: the {sample.size_bytes} bytes at offset {sample.offset} are not those of {sample.key}"
    with pytest.raises(BadShards, match=message):
        evaluate(index, global_batch=4)
    with pytest.raises(BadShards, match=message):
        train(index, 20)


def test_a_deleted_shard_is_named(spoilt):
    (spoilt / "train-000001.tar").unlink()
    message = r"sample \S+: \S+train-000001\.tar: \d+ bytes at offset \d+: the file is missing"
    with pytest.raises(BadShards, match=message):
        train(Index(spoilt, "train"), 8)


def test_a_video_with_fewer_frames_than_the_index_says_is_named(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "spoilt"))
    sample = Index(folder, "train")[2]
    reindex(folder, "train", {sample.key: {"num_frames": 90}})
    message = rf"{sample.shard}: {sample.key} at offset {sample.offset}: the video ends before frame \d+"
    with pytest.raises(BadShards, match=message):
        evaluate(Index(folder, "train"), global_batch=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 3), np.nan, np.float32), "vectors that are not finite numbers"),
        (np.zeros((3, 3), np.float32), r"an array \(3, 3\) of float32; expected \(4, 3\) of float32"),
        (np.zeros((4, 3), np.float16), r"an array \(4, 3\) of float16; expected"),
    ],
)
def test_vectors_that_no_such_encoder_gives_are_named_with_shard_key_and_offset(values, message, vectors, tmp_path):
    folder = Path(shutil.copytree(vectors, tmp_path / "spoilt"))
    samples = Index(folder, "train").samples(range(len(FRAMES)))
    sample = next(sample for sample in samples if sample.num_frames >= 4)
    rewrite_member(folder, "train", sample.number, npy_of(values))
    place = rf"{sample.shard}: {sample.key} at offset {sample.offset}: "
    with pytest.raises(BadShards, match=place + message):
        evaluate(Index(folder, "train"), global_batch=4)
