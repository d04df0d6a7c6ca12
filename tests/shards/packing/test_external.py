"""External tars: read as they are, to the pixel, wherever they lie."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from external_tars import SMALL, index, samples, video, write_tar
from s3fs import S3FileSystem
from servers import RangeServer, s3_server
from videos import frame_numbers

from shards.dataset import read_dataset
from shards.index import Index
from shards.packing.decode_source import decode_source
from shards.packing.external import (
    find_tars,
    finish_external,
    parse_rules,
    plan_external,
    split_of,
    tars_to_scan,
)
from shards.packing.external_scan import scan_tar
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stream import evaluation_batches, train_batches
from shards.store import BadShards, BadUrl, open_store
from shards.video import Limits

ShardWriter: Any = wds.ShardWriter  # pyright: ignore[reportAttributeAccessIssue]  # looked up when asked for
TarWriter: Any = wds.TarWriter  # pyright: ignore[reportAttributeAccessIssue]
CLIPS = ClipConfig(num_frames=3, size=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the videos of these tests lie, each made once."""
    return tmp_path_factory.mktemp("videos")


def made_of(folder: Path, number: int) -> bytes:
    return video(folder, number, num_frames=8 + number % 3)


@pytest.fixture(scope="module")
def tars(made, tmp_path_factory):
    """Nine samples of train in three tars, four of val in a folder of their own, by webdataset's own writers."""
    folder = tmp_path_factory.mktemp("data") / "tars"
    (folder / "val").mkdir(parents=True)
    with ShardWriter(str(folder / "train-%06d.tar"), maxcount=3, verbose=0) as shards:
        for number in range(9):
            data, about = made_of(made, number), {"class": ("walk", "run")[number % 2], "group": f"film {number // 3}"}
            shards.write({"__key__": f"clips/{number:04}", "avi": data, "cls": number % 2, "json": about})
    with TarWriter(str(folder / "val" / "000.tar")) as tar:
        for number in range(4):
            tar.write({"__key__": f"v{number}", "mp4": video(made, 20 + number, "mp4"), "cls": number % 2})
    return folder


@pytest.fixture(scope="module")
def indexed(tars):
    status, result = index(tars)
    assert status == 0
    assert result["videos"] == {"train": 9, "val": 4, "test": 0}
    return tars


# Reading what was indexed


def test_a_training_batch_has_the_pixels_of_the_files_themselves(indexed, made):
    train = Index(indexed, "train")
    train.check_files()
    order = Order([shard.samples for shard in train.shards], 9, seed=0)
    batch = next(train_batches(train, CLIPS, order, rank=0, world_size=1))[1]
    assert sorted(batch.sample.tolist()) == list(range(9))
    assert batch.label.tolist() == [number % 2 for number in batch.sample.tolist()]
    for number, frames in zip(batch.sample.tolist(), batch.frames.numpy(), strict=True):
        [path] = made.glob(f"{number}-{8 + number % 3}.avi")
        whole = np.stack(list(decode_source(path, SMALL)))
        start = frame_numbers(frames)[0] - number
        np.testing.assert_array_equal(frames, whole[start : start + 3])


def test_an_evaluation_sees_each_video_once_with_the_pixels_of_the_file(indexed, made):
    val = Index(indexed, "val")
    batches = [batch for _, batch in evaluation_batches(val, CLIPS, global_batch=2)]
    assert [number for batch in batches for number in batch.sample.tolist()] == [0, 2, 1, 3]
    for batch in batches:
        for number, frames in zip(batch.sample.tolist(), batch.frames.numpy(), strict=True):
            whole = np.stack(list(decode_source(made / f"{20 + number}-8.mp4", SMALL)))
            np.testing.assert_array_equal(frames, whole[2:5])


def test_the_index_says_what_is_in_the_tars(indexed, made):
    info = read_dataset(open_store(indexed))
    assert info.classes == ("walk", "run")
    assert (info.packing, info.shards_at, info.rejected) == (SMALL, None, 0)
    assert [shard.name for shard in info.splits["train"]] == [f"train-{number:06}.tar" for number in range(3)]
    assert [shard.name for shard in info.splits["val"]] == ["val/000.tar"]
    for shard in (*info.splits["train"], *info.splits["val"]):
        data = (indexed / shard.name).read_bytes()
        assert (shard.size_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    train = Index(indexed, "train")
    for number, sample in enumerate(train.samples(range(9))):
        assert (sample.key, sample.group, sample.label) == (f"clips/{number:04}", f"film {number // 3}", number % 2)
        assert (sample.num_frames, sample.fps) == (8 + number % 3, 25)
        data = (indexed / sample.shard).read_bytes()
        end = sample.offset + sample.size_bytes
        assert data[sample.offset : end] == made_of(made, number)
        assert (
            json.loads(data[sample.json_offset : sample.json_offset + sample.json_size_bytes])["group"] == sample.group
        )


def test_indexing_changes_no_tar_and_leaves_no_records(tars, indexed, made, tmp_path):
    before = {path.name: path.read_bytes() for path in tars.glob("*.tar")}
    copy = shutil.copytree(tars, tmp_path / "tars", ignore=shutil.ignore_patterns("*.arrow", "*.json*", ".packing"))
    index(copy)
    assert {path.name: path.read_bytes() for path in copy.glob("*.tar")} == before
    for name in ("dataset.json", "train.index.arrow", "val.index.arrow", "rejected.jsonl"):
        content = (indexed / name).read_text(errors="replace").replace(str(indexed), str(copy))
        assert (copy / name).read_text(errors="replace") == content
    assert not list(copy.rglob(".*"))


def test_the_last_line_says_what_reading_costs_and_where_val_is(made, tmp_path, capsys):
    write_tar(tmp_path / "train-0.tar", *samples(made, 0))
    write_tar(tmp_path / "train-1.tar", *samples(made, 1))
    assert index(tmp_path)[0] == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("indexed 2 videos with 2 classes (train 2, val 0, test 0) in 2 tars")
    assert "no tar is in val, which jobs.train needs: use --val-shards N or --split-of" in last
    assert "a random clip of 10 frames decodes 8 frames of these videos, about 18 if jobs.make_shards" in last
    with pytest.raises(BadShards, match=r"holds a packing, or an index of other tars or settings .* --out, or delete"):
        index(tmp_path, val_shards=1)
    (tmp_path / "dataset.json").unlink()
    assert index(tmp_path, val_shards=1)[1]["videos"] == {"train": 1, "val": 1, "test": 0}
    assert Index(tmp_path, "val")[0].shard == "train-1.tar"
    assert "which jobs.train needs" not in capsys.readouterr().out


def test_an_index_elsewhere_finds_the_tars_where_they_are(tars, indexed, tmp_path):
    _, result = index(tars, out=str(tmp_path / "index"))
    assert read_dataset(open_store(tmp_path / "index")).shards_at == str(tars)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "dataset.json", "rejected.jsonl", "test.index.arrow", "train.index.arrow", "val.index.arrow",
    ]  # fmt: skip
    assert result["tars_at"] == str(tars)
    here, there = Index(indexed, "train"), Index(tmp_path / "index", "train")
    assert here.samples(range(9)) == there.samples(range(9))
    _, batch = next(evaluation_batches(there, CLIPS, global_batch=9))
    assert [frame_numbers(frames)[0] - number for number, frames in enumerate(batch.frames.numpy())] == [2, 3, 3] * 3


def same_as_in_the_folder(there: str, indexed: Path) -> None:
    """The index of a store leads to the same samples and the same pixels as that of the folder."""
    for split, count in (("train", 9), ("val", 4)):
        here, away = Index(indexed, split), Index(there, split)
        away.check_files()
        assert here.samples(range(count)) == away.samples(range(count))
        [(_, one)], [(_, other)] = (evaluation_batches(each, CLIPS, global_batch=count) for each in (here, away))
        np.testing.assert_array_equal(one.frames.numpy(), other.frames.numpy())


def test_tars_of_a_web_server_are_indexed_by_their_names(tars, indexed, tmp_path):
    with RangeServer(tars) as server:
        names = (f"{server.url}/train-{{000000..000002}}.tar", f"{server.url}/val/000.tar")
        assert index(*names, out=str(tmp_path / "index"))[1]["tars_at"] == server.url
        same_as_in_the_folder(str(tmp_path / "index"), indexed)
        with pytest.raises(BadUrl, match=r"a web server cannot be written to; name a place for the index with --out"):
            index(*names)
        with pytest.raises(BadUrl, match=r"a web server lists no files; name the tars, as in 'http://.*train-\{000000"):
            index(server.url)
        with pytest.raises(BadShards, match=r"2 of 4 tars are missing, the first: train-000003\.tar"):
            index(f"{server.url}/train-{{000001..000004}}.tar", out=str(tmp_path / "other"))


def test_tars_of_a_bucket_are_indexed_in_it(tars, indexed):
    with s3_server() as bucket:
        S3FileSystem.clear_instance_cache()  # it remembers the servers of other tests
        store = open_store(f"{bucket}/tars")
        for path in tars.rglob("*.tar"):
            with store.written(path.relative_to(tars).as_posix()) as file:
                file.write(path.read_bytes())
        assert index(store.url)[0] == 0
        same_as_in_the_folder(store.url, indexed)
        assert not [name for name in store.names() if name.startswith(".packing")]
    S3FileSystem.clear_instance_cache()


# Which tars, which split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000.tar", "train"), ("train.tar", "train"), ("valid_3.tar", "val"), ("validation0.tar", "val"),
        ("val/000.tar", "val"), ("a/test/b/000.tar", "test"), ("train/test-0.tar", "test"), ("trainer-0.tar", None),
        ("000.tar", None), ("my-train-0.tar", None), ("evaluation/0.tar", None), ("testing.tar", None),
    ],
)  # fmt: skip
def test_the_split_of_a_tar_is_the_word_that_its_name_begins_with(name, split):
    assert split_of(name, []) == split


def test_rules_come_before_names_and_the_first_one_that_fits_counts():
    rules = parse_rules(["*9.tar=none", "train-*=test", "a=b/*=val"])
    assert [split_of(name, rules) for name in ("train-9.tar", "train-8.tar", "val-1.tar", "a=b/1.tar")] == [
        "none", "test", "val", "val",
    ]  # fmt: skip
    for wrong in ("train", "=train", "x=dev", ""):
        with pytest.raises(ValueError, match=r"expected PATTERN=train, val, test or none"):
            parse_rules([wrong])


def test_tars_are_found_by_folder_pattern_and_name(tmp_path, monkeypatch):
    for name in ("b/train-0.tar", "b/train-1.tar", "val.tar", "notes.txt", ".hidden.tar", ".packing/x.tar"):
        write_tar(tmp_path / name)
    everything = ["b/train-0.tar", "b/train-1.tar", "val.tar"]
    assert find_tars([str(tmp_path)]) == (str(tmp_path), everything)
    assert find_tars([f"{tmp_path}/b/train-{{0..1}}.tar", f"{tmp_path}/val.tar"]) == (str(tmp_path), everything)
    assert find_tars([f"{tmp_path}/b/train-{{0..1}}.tar"]) == (f"{tmp_path}/b", ["train-0.tar", "train-1.tar"])
    monkeypatch.chdir(tmp_path / "b")
    assert find_tars(["train-0.tar"]) == (f"{tmp_path}/b", ["train-0.tar"])
    assert find_tars(["s3://bucket/{a,b}/train.tar"]) == ("s3://bucket", ["a/train.tar", "b/train.tar"])
    assert find_tars(["http://host/train.tar"]) == ("http://host", ["train.tar"])


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["pipe:cat train.tar"], r"pipe:\.\.\.: not a place for shards"),
        (["pipe:curl -s http://host/train-{0..9}.tar"], r"pipe:\.\.\.: not a place for shards"),
        (["http://a/train.tar", "http://b/train.tar"], "expected tars of one server or bucket"),
        (["http://a/train.tar", "s3://a/train.tar"], "expected tars of one server or bucket"),
        (["http://a/train.tar?token=secret"], r"http://a/train\.tar: the URL holds credentials"),
        (["/data/a.tar", "/data/folder"], r"/data/folder: expected one folder, or files that end in \.tar"),
        (["/data/a.tar.gz", "/data/b.tar.gz"], r"expected one folder, or files that end in \.tar"),
    ],
)
def test_places_that_are_none_are_refused(urls, message):
    with pytest.raises(BadUrl, match=message):
        find_tars(urls)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "found no tars; expected a folder of tars"),
        (["train.tar.gz"], {}, "found 1 compressed tars; unpack them to .tar"),
        (["000.tar", "train.tar"], {}, r"1 of 2 tars have no split, the first: 000\.tar; begin their names"),
        (["train.tar"], {"val_shards": 1}, "--val-shards 1: expected fewer than the 1 tars of train"),
        (["train.tar"], {"val_shards": -1}, "--val-shards -1: expected"),
        (["train.tar"], {"rules": [("*", "none")]}, "no tars"),
    ],
)
def test_tars_of_which_no_data_set_can_be_made_are_refused(names, options, message, tmp_path):
    for name in names:
        write_tar(tmp_path / name)
    with pytest.raises(BadShards, match=message):
        plan_external([str(tmp_path)], None, SMALL, **options)


def test_a_place_that_holds_a_packing_is_left_as_it_is(shards):
    before = {path: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(BadShards, match="holds a packing, or an index of other tars"):
        index(shards)
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


# Interruptions


def test_an_interrupted_indexing_goes_on_where_it_was(tars, indexed, tmp_path):
    copy = shutil.copytree(tars, tmp_path / "tars", ignore=shutil.ignore_patterns("*.arrow", "*.json*"))
    (copy / "other.partial").touch()  # somebody's own
    plan = plan_external([str(copy)], None, SMALL)
    first, *others = tars_to_scan(plan)
    list(scan_tar(plan.tars_at, plan.out, first, plan.packing, Limits()))
    stopped = scan_tar(plan.tars_at, plan.out, others[0], plan.packing, Limits())
    next(stopped)
    stopped.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert tars_to_scan(plan) == others
    index(copy)
    assert Index(copy, "train").samples(range(9)) == Index(indexed, "train").samples(range(9))
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        [*(path.name for path in indexed.iterdir()), "other.partial"]
    )
    assert finish_external(plan) == read_dataset(open_store(copy))
    assert tars_to_scan(plan) == []


def test_tars_that_have_changed_since_are_not_mixed_with_what_was_read(made, tmp_path):
    write_tar(tmp_path / "train-0.tar", *samples(made, 0))
    tars_to_scan(plan_external([str(tmp_path)], None, SMALL))
    write_tar(tmp_path / "train-0.tar", *samples(made, 0, 1, 2, 3, 4, 5, 6))
    with pytest.raises(BadShards, match=r"index of other tars .* delete dataset\.json and \.packing there"):
        index(tmp_path)
