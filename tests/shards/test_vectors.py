"""Encoding: the same vectors every time, whatever interrupts it, of captions and of classes, wherever the shards lie."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from captioned import (
    ENCODER,
    SEGMENTS,
    captioned_set,
    captions_of,
    encode,
    flip,
    mean_luma,
    reindex,
    rewrite_member,
    wanted_frames,
)
from servers import s3_server
from videos import listing_of, pack

from jobs.commands import load
from jobs.inspect_shards.index import MakeIndex
from jobs.inspect_shards.info import Info
from jobs.inspect_shards.preview import Preview
from jobs.inspect_shards.verify import Verify
from shards.dataset import read_dataset
from shards.index import Index
from shards.reading.captions import evaluation_captions, train_captions
from shards.reading.clips import ClipConfig
from shards.reading.decode import read_frames
from shards.reading.order import Order
from shards.reading.stages import ReadingOptions
from shards.reading.stream import evaluation_batches, train_batches
from shards.reading.vector_files import BadVectors
from shards.store import BadShards, open_store
from shards.vectors import encode_shard, finish_encoding, open_encoding
from shards.verify import Fault

inspect_shards = load("inspect_shards")

WebDataset: Any = wds.WebDataset  # pyright: ignore[reportAttributeAccessIssue]  # looked up when asked for
FRAMES, COUNTS = [8, 9, 3, 10, 2, 12, 9], [2, 1, 4, 3, 1, 5, 2]
SPLITS = ("train", "train", "test")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Five captioned videos in train (shards of 2, 2, 1), two in test."""
    return captioned_set(tmp_path_factory.mktemp("data"), FRAMES, COUNTS, SPLITS, videos_per_shard=2)


@pytest.fixture(scope="module")
def vectors(packed, tmp_path_factory) -> Path:
    """The undisturbed encoding that others are held against."""
    folder = tmp_path_factory.mktemp("encoded") / "shards"
    encode(packed, folder)
    return folder


@pytest.fixture
def folder(vectors, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(vectors, tmp_path / "spoilt"))


def contents(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of everything in a folder, hidden files too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wanted_vectors(videos: Index, number: int) -> np.ndarray:
    """The brightness of each frame of each of a video's own segments, frame by frame."""
    sample = videos[number]
    data = videos.shard_store.read(sample.shard, sample.offset, sample.size_bytes)
    means = []
    for frames in wanted_frames(sample.num_frames, SEGMENTS):
        planes = [read_frames(data, [frame], videos.info.packing)[0] for frame in frames]
        means.append([np.float32(plane[:32].astype(np.float64).mean()) for plane in planes])
    return np.array(means, np.float32)


# What comes out


def test_every_shard_becomes_one_of_vectors_with_the_json_as_it_was(packed, vectors):
    for split in ("train", "test"):
        videos, index = Index(packed, split), Index(vectors, split)
        assert [shard.name for shard in index.shards] == [shard.name for shard in videos.shards]
        for shard, other in zip(videos.shards, index.shards, strict=True):
            read = list(WebDataset(str(packed / shard.name), shardshuffle=False))
            encoded = list(WebDataset(str(vectors / other.name), shardshuffle=False))
            assert [set(sample) for sample in encoded] == [
                {"npy", "json", "__key__", "__url__", "__local_path__"} for _ in encoded
            ]
            for one, two in zip(read, encoded, strict=True):
                assert (one["__key__"], one["json"]) == (two["__key__"], two["json"])
        for number in range(len(videos)):
            sample = index[number]
            data = (vectors / sample.shard).read_bytes()[sample.offset :][: sample.size_bytes]
            found = np.load(io.BytesIO(data), allow_pickle=False)
            assert found.dtype == np.float32
            assert found.flags.c_contiguous
            np.testing.assert_array_equal(found, wanted_vectors(videos, number))
            assert len(found) == min(sample.num_frames, SEGMENTS.num_segments)


def test_the_rows_of_the_index_are_those_of_the_videos_but_for_the_places(packed, vectors):
    places = {"offset", "size_bytes", "crc32", "json_offset"}
    for split in ("train", "test"):
        videos, index = Index(packed, split), Index(vectors, split)
        assert (len(index), index.num_captions) == (len(videos), videos.num_captions)
        for number in range(len(videos)):
            row, other = videos[number]._asdict(), index[number]._asdict()
            assert {name for name in row if row[name] != other[name]} <= places
    Index(vectors, "train").check_files()
    Index(vectors, "train").check_captions()


def test_the_description_says_of_what_and_by_what(packed, vectors):
    info, videos = read_dataset(open_store(vectors)), read_dataset(open_store(packed))
    assert info.encoder == ENCODER
    assert (info.classes, info.packing, info.rejected) == (videos.classes, videos.packing, 0)
    assert info.source == {
        "kind": "encoded", "of": str(packed), "digest": videos.digest, "source": videos.source,
    }  # fmt: skip
    assert list(info.splits) == list(videos.splits)
    assert not info.splits["val"]
    for shards in info.splits.values():
        for shard in shards:
            data = (vectors / shard.name).read_bytes()
            assert (shard.size_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert not list(vectors.glob(".*"))


def test_members_have_no_dates_and_no_owners(vectors):
    for path in vectors.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_videos_with_classes_are_encoded_too_and_without_their_flow(tmp_path):
    listing = listing_of(tmp_path / "videos", [5, 6, 3])
    packing = replace(Index(pack(tmp_path / "plain", listing), "train").info.packing, flow="dis")
    videos = Index(pack(tmp_path / "shards", listing, packing), "train")
    encode(tmp_path / "shards", tmp_path / "vectors")
    index = Index(tmp_path / "vectors", "train")
    index.check_classes()
    assert index.info.classes == ("a", "b")
    assert index.info.packing.flow == "none"
    for number, sample in enumerate(index.samples(range(3))):
        assert (sample.label, sample.flow) == (videos[number].label, None)
        about = json.loads(index.store.read(sample.shard, sample.json_offset, sample.json_size_bytes))
        assert about["class"] == "ab"[sample.label]
    assert faults(tmp_path / "vectors") == []


@pytest.mark.parametrize("labels", [True, False])
def test_tars_that_others_wrote_are_encoded_with_their_captions_from_text(labels, packed, tmp_path):
    """Two folders that use the same keys, the index elsewhere; with labels, one video has no caption."""
    first = 0 if labels else 1

    def said(part: str, number: int) -> tuple[str, ...]:
        return tuple(f"{part} {number} {line}" for line in range(first + number))

    videos, tars = Index(packed, "train"), tmp_path / "tars"
    for part in ("one", "two"):
        (tars / part).mkdir(parents=True)
        with tarfile.open(tars / part / "train.tar", "w") as tar:
            for number, sample in enumerate(videos.samples(range(3))):
                data = videos.store.read(sample.shard, sample.offset, sample.size_bytes)
                add(tar, f"{number}.mp4", data)
                if labels:
                    add(tar, f"{number}.cls", b"%d" % number)
                if said(part, number):
                    add(tar, f"{number}.txt", "\n".join(said(part, number)).encode())
    index_job = MakeIndex(url=(str(tars),), out=str(tmp_path / "index"), width=32, height=32, workers=0)
    assert inspect_shards.main(index_job) == 0

    encode(tmp_path / "index", tmp_path / "vectors", batch_size=2)

    index = Index(tmp_path / "vectors", "train")
    assert [shard.name for shard in index.shards] == ["one/train.tar", "two/train.tar"]
    assert index.info.shards_at is None
    assert not list((tmp_path / "vectors").glob(".*"))
    assert faults(tmp_path / "vectors") == []
    batches = [batch for _, batch in evaluation_captions(index, SEGMENTS, global_batch=6)]
    assert batches[0].keys == tuple(f"{part}/train/{number}" for part in ("one", "two") for number in range(3))
    assert batches[0].captions == tuple(said(part, number) for part in ("one", "two") for number in range(3))
    [(_, as_they_are)] = evaluation_captions(Index(tmp_path / "index", "train"), SEGMENTS, global_batch=6)
    assert (as_they_are.keys, as_they_are.captions) == (batches[0].keys, batches[0].captions)
    assert [index[number].label for number in range(3)] == ([0, 1, 2] if labels else [-1] * 3)
    order = Order([shard.captions for shard in index.shards], 1, 0)
    with closing(train_captions(index, SEGMENTS, order, rank=0, world_size=1)) as pairs:
        shown = {(batch.keys[0], *batch.captions[0]) for _, batch in islice(pairs, order.steps_per_epoch)}
    assert shown == {
        (f"{part}/train/{number}", line)
        for part in ("one", "two")
        for number in range(3)
        for line in said(part, number)
    }
    for number in range(6):
        own = batches[0].segments[number]
        np.testing.assert_array_equal(batches[0].seen[number][own], wanted_vectors(videos, number % 3))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_a_bucket_holds_the_same_bytes(packed, vectors):
    with s3_server() as bucket:
        out = f"{bucket}/vectors"
        encoding = open_encoding(packed, out, ENCODER)
        for shard in encoding.left[1:]:  # interrupted
            assert sum(encode_shard(packed, out, shard, SEGMENTS, 3, mean_luma)) == shard.videos
        assert encode(packed, out) == [encoding.left[0].name]
        store = open_store(out)
        assert {name: hashlib.sha256(store.read_file(name)).hexdigest() for name in store.names()} == contents(vectors)
        [batch] = [batch for _, batch in evaluation_captions(Index(out, "test"), SEGMENTS, global_batch=2)]
        assert batch.captions == tuple(captions_of(key, COUNTS[int(key[-2:])]) for key in batch.keys)


# The same bytes again


def test_encoding_again_elsewhere_gives_the_same_bytes(packed, vectors, tmp_path):
    time.sleep(1.1)  # another second: a date in the bytes would show
    reading = ReadingOptions(decode_threads=3, requests=1)
    encode(packed, tmp_path / "elsewhere", batch_size=3, reading=reading)
    assert contents(tmp_path / "elsewhere") == contents(vectors)


def test_finished_shards_are_skipped(packed, vectors, tmp_path):
    out = tmp_path / "shards"
    encoding = open_encoding(packed, out, ENCODER)
    assert (encoding.videos, encoding.videos_left) == (7, 7)
    first, *others = encoding.left
    assert list(encode_shard(packed, out, first, SEGMENTS, 3, mean_luma, batch_size=1)) == [1, 1]
    written_at = (out / first.name).stat().st_mtime_ns
    assert (open_encoding(packed, out, ENCODER).videos, open_encoding(packed, out, ENCODER).videos_left) == (7, 5)

    assert encode(packed, out) == [shard.name for shard in others]

    assert (out / first.name).stat().st_mtime_ns == written_at
    assert contents(out) == contents(vectors)
    assert encode(packed, out) == []
    assert contents(out) == contents(vectors)


def test_an_encoding_that_is_given_up_within_a_shard_leaves_nothing_half_written(packed, vectors, tmp_path):
    out = tmp_path / "shards"
    videos = encode_shard(
        packed, out, open_encoding(packed, out, ENCODER).left[0], SEGMENTS, 3, mean_luma, batch_size=1
    )
    next(videos)
    videos.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert set(contents(out)) == {".packing/plan"}
    encode(packed, out)
    assert contents(out) == contents(vectors)


ENCODE = """
import sys
sys.path[:0] = sys.argv[3:]
import time
from captioned import encode, mean_luma
def slowly(planes, segments):
    print("batch", flush=True)
    time.sleep(0.05)
    return mean_luma(planes, segments)
print("ready", flush=True)
encode(sys.argv[1], sys.argv[2], network=slowly, batch_size=1)
"""


def start_encoder(source: Path, out: Path, folder: Path) -> "subprocess.Popen[bytes]":
    """Encodes in a process of its own, which says when it is ready to start."""
    folder.mkdir(exist_ok=True)
    root = Path(__file__).parents[2]
    paths = [str(root / "tests" / "helpers"), str(root)]
    return subprocess.Popen(
        [sys.executable, "-c", ENCODE, str(source), str(out), *paths],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def test_an_encoding_that_is_killed_again_and_again_ends_with_the_same_bytes(packed, vectors, tmp_path):
    out, unfinished = tmp_path / "shards", 0
    for _ in range(4):
        process = start_encoder(packed, out, tmp_path / "temporary")
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.wait()
        process.stdout.close()
        unfinished += not (out / "dataset.json").exists()
        for path in out.glob("*.tar"):  # every file under a final name is complete
            with tarfile.open(path) as tar:
                assert len(tar.getnames()) in (2, 4)
            assert contents(out)[path.name] == contents(vectors)[path.name]
    last = start_encoder(packed, out, tmp_path / "temporary")
    assert last.communicate()[0].startswith(b"ready\n")
    assert last.returncode == 0
    assert contents(out) == contents(vectors)
    assert unfinished > 1  # that it was still encoding


def test_an_encoding_that_was_killed_in_its_last_moment_is_tidied_up(packed, vectors, folder):
    """After dataset.json, while the records were being deleted."""
    (folder / ".packing").mkdir()
    (folder / ".packing" / "train-000001.tar.json").write_text("{}")
    assert encode(packed, folder) == []
    assert contents(folder) == contents(vectors)


# Other shards in the same place


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", ["videos", "encoder", "segments", "size"])
def test_a_place_of_another_encoding_is_refused(other, finished, packed, tmp_path):
    out = tmp_path / "shards"
    if finished:
        encode(packed, out)
    else:
        open_encoding(packed, out, ENCODER)
    before = contents(out)
    source, encoder = packed, ENCODER
    if other == "videos":
        source = captioned_set(tmp_path / "others", FRAMES[:3], COUNTS[:3])
    else:
        encoder = {**ENCODER, **{"encoder": {"digest": "x"}, "segments": {"segments": 5}, "size": {"size": 4}}[other]}
    with pytest.raises(
        BadShards, match=r"shards: holds other shards, or vectors of other videos or by another encoder"
    ):
        open_encoding(source, out, encoder)
    assert contents(out) == before


def test_what_is_only_said_of_an_encoder_makes_it_no_other(packed, vectors):
    assert open_encoding(packed, vectors, {**ENCODER, "parts": [], "note": "moved"}).left == ()


def test_the_place_of_the_videos_themselves_is_refused(packed):
    before = contents(packed)
    with pytest.raises(BadShards, match="holds other shards"):
        open_encoding(packed, packed, ENCODER)
    assert contents(packed) == before


def test_vectors_are_not_encoded_again(vectors, tmp_path):
    with pytest.raises(
        BadShards, match=r"holds vectors that an encoder computed \(python -m jobs\.encode\), no videos"
    ):
        open_encoding(vectors, tmp_path / "out", ENCODER)
    assert not (tmp_path / "out").exists()


def test_videos_that_were_packed_anew_meanwhile_are_refused(tmp_path):
    videos = captioned_set(tmp_path / "one", FRAMES[:2], COUNTS[:2])
    [shard] = open_encoding(videos, tmp_path / "out", ENCODER).left
    shutil.rmtree(videos)
    shutil.move(captioned_set(tmp_path / "two", FRAMES[:3], COUNTS[:3]), videos)
    with pytest.raises(BadShards, match="was packed again after its encoding had started; start the encoding again"):
        next(encode_shard(videos, tmp_path / "out", shard, SEGMENTS, 3, mean_luma))


@pytest.mark.parametrize(
    "changes", [{"segments": None}, {"segments": 0}, {"size": 2.0}, {"size": True}, {"digest": None}, {"digest": 5}]
)
def test_an_encoder_of_which_something_is_missing_is_refused(changes, packed, tmp_path):
    encoder = {name: value for name, value in {**ENCODER, **changes}.items() if value is not None}
    with pytest.raises(
        ValueError, match=r"an encoder with segments .*, size .* and digest .*; expected two numbers of at l"
    ):
        open_encoding(packed, tmp_path / "out", encoder)
    assert not (tmp_path / "out").exists()


# What cannot be encoded


def one_shard(packed: Path, out: Path, network: Any, **options: Any) -> list[int]:
    return list(encode_shard(packed, out, open_encoding(packed, out, ENCODER).left[0], SEGMENTS, 3, network, **options))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda planes, _: mean_luma(planes, _)[:, :, :2], r"vectors \(2, 4, 2\) of 2 videos; expected \(2, 4, 3\)"),
        (lambda planes, _: mean_luma(planes, _)[:1], r"vectors \(1, 4, 3\) of 2 videos; expected \(2, 4, 3\)"),
        (lambda planes, _: mean_luma(planes, _) * np.inf, r"[ab]-video_\d\d: vectors that are not finite numbers"),
    ],
)
def test_vectors_that_an_encoder_may_not_give_are_refused_and_nothing_is_written(network, message, packed, tmp_path):
    with pytest.raises(BadVectors, match=message):
        one_shard(packed, tmp_path / "out", network)
    assert set(contents(tmp_path / "out")) == {".packing/plan"}


def test_whatever_an_encoder_makes_of_segments_that_a_video_does_not_have_is_left_out(packed, vectors, tmp_path):
    def network(planes, segments):
        found = mean_luma(planes, segments).bfloat16().float()
        return torch.where(segments[..., None], mean_luma(planes, segments), found * torch.nan)

    encode(packed, tmp_path / "out", network=network)
    assert contents(tmp_path / "out") == contents(vectors)


def test_half_precision_is_stored_as_float32(packed, tmp_path):
    encode(packed, tmp_path / "out", network=lambda planes, segments: mean_luma(planes, segments).bfloat16())
    index = Index(tmp_path / "out", "train")
    [batch] = [batch for _, batch in evaluation_captions(index, SEGMENTS, global_batch=5)]
    assert batch.seen.dtype == torch.float32
    assert batch.seen.bfloat16().float().equal(batch.seen)
    assert batch.seen.any()


@pytest.mark.parametrize("part", ["video", "json"])
def test_damaged_shards_are_named_with_key_and_offset_and_nothing_is_written(part, packed, tmp_path):
    videos = Path(shutil.copytree(packed, tmp_path / "videos"))
    sample = Index(videos, "train")[1]
    flip(videos / sample.shard, sample.offset + 300 if part == "video" else sample.json_offset)
    message = (
        rf"{sample.shard}: .*{sample.key}.* at offset {sample.json_offset}" if part == "json" else "CRC-32 differs"
    )
    with pytest.raises(BadShards, match=message):
        one_shard(videos, tmp_path / "out", mean_luma)
    assert set(contents(tmp_path / "out")) == {".packing/plan"}


def test_the_index_is_not_written_before_all_shards_are(packed, tmp_path):
    one_shard(packed, tmp_path / "out", mean_luma)
    with pytest.raises(BadShards, match=r"\.packing/train-000001\.tar\.json: the file is missing"):
        finish_encoding(open_encoding(packed, tmp_path / "out", ENCODER))
    assert not (tmp_path / "out" / "dataset.json").exists()


# Readers of videos, and the inspection


def test_clips_cannot_be_read_from_vectors(vectors):
    index = Index(vectors, "train")
    message = r"holds vectors that an encoder computed .* name the shards that jobs\.make_shards wrote"
    with pytest.raises(BadShards, match=message):
        index.check_videos()
    with pytest.raises(BadShards, match=message):
        train_batches(index, ClipConfig(), Order([2, 2, 1], 1, 0), rank=0, world_size=1)
    with pytest.raises(BadShards, match=message):
        evaluation_batches(index, ClipConfig(), global_batch=1)


def run(job: Any, tmp_path: Path) -> tuple[int, dict[str, Any]]:
    status = inspect_shards.main(replace(job, json=tmp_path / "result.json"))
    return status, json.loads((tmp_path / "result.json").read_text())


def faults(folder: Path, quick: bool = False) -> list[str]:
    """What verify finds, each as a line."""
    status, result = run(Verify(url=str(folder), workers=0, quick=quick), folder.parent)
    assert (status, result["decoded"]) == (min(1, result["faults"]), False)
    return [str(Fault(**fault)) for fault in result["fault_list"]]


@pytest.mark.parametrize("quick", [True, False])
def test_vectors_as_they_were_encoded_have_no_fault(quick, vectors, capsys):
    assert faults(vectors, quick) == []
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("no faults in 7 videos (train 5, test 2) of 4 shards, ")
    assert "all bytes, rows, JSON and vectors (" in line


def test_a_flipped_byte_of_vectors_is_found_by_its_sample_and_its_shard(folder):
    sample = Index(folder, "train")[1]
    flip(folder / sample.shard, sample.offset + sample.size_bytes - 1)
    assert faults(folder) == [
        f"train-000000.tar: {sample.key} at offset {sample.offset}: vectors: its {sample.size_bytes} bytes are not those "
        "that were encoded (CRC-32 differs)",
        "train-000000.tar: its bytes are not those that dataset.json describes (SHA-256 differs); restore it, or pack again",
    ]


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 3), np.inf, np.float32), "vectors: vectors that are not finite numbers"),
        (np.zeros((4, 2), np.float32), "vectors: an array (4, 2) of float32; expected (4, 3) of float32"),
        (np.zeros((4, 3), np.int32), "vectors: an array (4, 3) of int32; expected"),
    ],
)
def test_vectors_that_the_encoder_cannot_have_given_are_found(values, message, folder):
    sample = next(sample for sample in Index(folder, "train").samples(range(5)) if sample.num_frames > 3)
    rewrite_member(folder, "train", sample.number, npy_of(values))
    found = "\n".join(faults(folder))
    assert f"{sample.shard}: {sample.key} at offset {sample.offset}: {message}" in found


def test_rows_that_do_not_fit_their_vectors_are_found(folder):
    index = Index(folder, "train")
    [first, second] = [sample for sample in index.samples(range(5)) if sample.num_frames > 3][:2]
    reindex(folder, "train", {first.key: {"num_frames": 3}, second.key: {"video_size": 0}})
    found = "\n".join(faults(folder))
    assert f"{first.key} at offset {first.offset}: vectors: an array (4, 3) of float32; expected (3, 3)" in found
    assert f"{first.key} at offset {first.json_offset}: json: num_frames {first.num_frames}, its row says 3" in found
    row = f"its row has vectors of 0 bytes and a JSON of {second.json_size_bytes}"
    assert f"{second.key} at offset {second.offset}: {row}" in found


def test_vectors_much_longer_than_they_can_be_are_not_read_into_memory(folder):
    """A member of another kind, as long as a video, where its row leads to vectors."""
    sample = Index(folder, "train")[0]
    content = (folder / sample.shard).read_bytes()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        add(file, f"{sample.key}.npy", bytes(5000))
    (folder / sample.shard).write_bytes(tar.getvalue() + content[len(tar.getvalue()) :])
    reindex(folder, "train", {sample.key: {"video_size": 5000}})
    assert f"{sample.key} at offset 512: vectors: 5,000 bytes; expected 48 behind a header" in "\n".join(faults(folder))


def test_info_says_that_these_are_vectors_and_by_what(vectors, packed, tmp_path, capsys):
    _, result = run(Info(url=str(vectors)), tmp_path)
    out = capsys.readouterr().out
    assert "vectors       of at most 4 segments a video, 3 numbers each; there are no videos here" in out
    assert "encoder       frame of runs/x + digest abc" in out
    assert result["encoder"] == ENCODER
    assert result["splits"]["train"]["captions"] == sum(COUNTS[number] for number in (0, 1, 3, 4, 6))
    assert run(Info(url=str(packed)), tmp_path)[1]["encoder"] is None


def test_a_preview_of_vectors_is_refused_in_one_line(vectors, tmp_path):
    with pytest.raises(BadShards, match=r"holds vectors that an encoder computed .*, no videos; name the shards"):
        inspect_shards.main(Preview(url=str(vectors), out=tmp_path / "p.html"))
    assert not list(tmp_path.iterdir())
