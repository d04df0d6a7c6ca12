"""Clips of packed optical flow: the right fields, whoever reads them, and errors with their place."""

import os
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moving import CLIPS, MOTIONS, SMALL, listing_of_motions, part
from videos import listing_of, pack

from shards.index import Index
from shards.reading import decode
from shards.reading.clips import evaluation_clips, train_clip
from shards.reading.decode import read_flow
from shards.reading.order import Order
from shards.reading.stream import evaluation_batches, train_batches
from shards.store import BadShards, FolderStore


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


NO_FLOW = r"shards: packed without optical flow, which the stream 'flow' needs; .*jobs\.make_shards --flow tvl1"


def test_clips_of_flow_that_was_not_packed_are_refused_before_anything_is_read(tmp_path):
    index = Index(pack(tmp_path / "shards", listing_of(tmp_path / "videos", [8])), "train")
    with pytest.raises(BadShards, match=NO_FLOW):
        train_batches(index, CLIPS, Order([1], 1, seed=0), rank=0, world_size=1)
    with pytest.raises(BadShards, match=NO_FLOW):
        evaluation_batches(index, CLIPS, global_batch=1)


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
