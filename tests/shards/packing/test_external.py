"""Tars that others wrote: read as they are, to the pixel, and whatever is wrong with them is said and harms nothing."""

import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs import S3FileSystem
from servers import RangeServer, s3_server
from videos import frame_numbers, numbered_planes, write_video
from webdataset.tariterators import base_plus_ext

from jobs.commands import load
from jobs.inspect_shards.index import MakeIndex
from shards.dataset import read_dataset
from shards.index import Index
from shards.packing.decode_source import decode_source
from shards.packing.duplicates import Duplicates
from shards.packing.external import (
    classes_from,
    find_tars,
    finish_external,
    parse_rules,
    plan_external,
    split_of,
    tars_to_scan,
)
from shards.packing.external_scan import scan_tar
from shards.packing.tar_reader import BadTar, TarReader, key_and_suffix
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stream import evaluation_batches, train_batches
from shards.sample_json import BadSample, parse_captions
from shards.store import BadShards, BadUrl, FolderStore, open_store
from shards.video import Limits, Packing

inspect_shards = load("inspect_shards")

ShardWriter: Any = wds.ShardWriter  # pyright: ignore[reportAttributeAccessIssue]  # looked up when asked for
TarWriter: Any = wds.TarWriter  # pyright: ignore[reportAttributeAccessIssue]
SMALL = Packing(width=32, height=32, copy=True)
CLIPS = ClipConfig(num_frames=3, size=16)


def video(folder: Path, number: int, suffix: str = "avi", num_frames: int = 8) -> bytes:
    """A video of grey frames, the first of that number."""
    path = folder / f"{number}-{num_frames}.{suffix}"
    if not path.exists():
        codec = {"webm": "libvpx"}.get(suffix, "mpeg4")
        write_video(path, numbered_planes(num_frames, first=number), codec=codec)
    return path.read_bytes()


def index(*urls: Path | str, **options: Any) -> tuple[int, dict[str, Any]]:
    """Runs the job in this process: its status and its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        job = MakeIndex(url=tuple(map(str, urls)), width=32, height=32, workers=0, json=file, **options)
        status = inspect_shards.main(job)
        return status, json.loads(file.read_text())


def rejected(folder: Path) -> dict[str, str]:
    lines = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    return {line["path"]: line["reason"] for line in lines}


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def samples(folder: Path, *numbers: int) -> list[tuple[str, bytes]]:
    """Members of so many good samples."""
    return [
        member
        for number in numbers
        for member in ((f"{number:03}.avi", video(folder, number)), (f"{number:03}.cls", str(number % 2).encode()))
    ]


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


# Labels, classes and captions


def test_videos_of_all_kinds_with_labels_in_json_are_read(made, tmp_path):
    members = []
    for number, (suffix, about) in enumerate([
        ("mp4", {"label": "run"}), ("avi", {"class": "walk"}), ("webm", {"class_name": "run", "label": None}),
        ("mkv", {"label": "jump "}), ("MOV", {"label": "run", "class": "ignored"}),
    ]):  # fmt: skip
        members += [
            (f"{number}.{suffix}", video(made, number, suffix.lower())),
            (f"{number}.json", json.dumps(about).encode()),
        ]
    write_tar(tmp_path / "train.tar", *members)
    index(tmp_path)
    train = Index(tmp_path, "train")
    assert train.info.classes == ("jump", "run", "walk")
    assert [sample.label for sample in train.samples(range(5))] == [1, 2, 1, 0, 1]
    assert train[0].group == "0"  # nothing is known of recordings


def test_captions_are_read_from_text_or_json_and_are_no_classes(made, tmp_path, capsys):
    about = [
        ("0.txt", b"a man runs\n\n he is fast \r\n"), ("1.json", b'{"captions": ["a dog", "a cat "]}'),
        ("2.json", b'{"caption": "one"}'), ("2.txt", b"not this one"), ("3.json", b'{"fps": 25}'), ("3.txt", "läuft".encode()),
    ]  # fmt: skip
    members = [(f"{number}.mp4", video(made, number, "mp4")) for number in range(4)]
    write_tar(tmp_path / "train.tar", *sorted(members + about))
    _, result = index(tmp_path)
    assert (result["classes"], result["captions"]) == (0, 6)
    assert "indexed 4 videos with 6 captions" in capsys.readouterr().out
    train = Index(tmp_path, "train")
    said = []
    for sample in train.samples(range(4)):
        assert sample.label == -1
        said.append(parse_captions(train.store.read(sample.shard, sample.json_offset, sample.json_size_bytes)))
        assert len(said[-1]) == sample.num_captions
    assert said == [("a man runs", "he is fast"), ("a dog", "a cat"), ("one",), ("läuft",)]


@pytest.mark.parametrize(
    ("names_of", "names", "classes"),
    [
        ({}, set(), ()),
        ({}, {"b", "a"}, ("a", "b")),
        ({0: set(), 2: set()}, set(), ("0", "1", "2")),
        ({0: {"z"}, 2: {"a"}}, set(), ("z", "1", "a")),
        ({0: {"z"}, 1: {"a", "b"}}, set(), ("0", "1")),  # two names for one
        ({0: {"z"}, 1: {"z"}}, set(), ("0", "1")),  # one for two
        ({0: {"z"}, 1: set()}, set(), ("0", "1")),
        ({0: {"1"}, 2: {"x"}}, set(), ("0", "1", "2")),  # the number that has none would be called as another
    ],
)
def test_classes_are_called_by_their_names_where_each_has_one_of_its_own(names_of, names, classes):
    assert classes_from("here", names_of, names) == classes


def test_numbers_and_names_together_want_a_list_and_what_was_read_is_kept(made, tmp_path):
    folder, file = tmp_path / "tars", tmp_path / "classes.txt"
    named = [
        ("5.avi", video(made, 5)),
        ("5.json", b'{"label": "fly"}'),
        ("6.avi", video(made, 6)),
        ("6.json", b'{"label": "no"}'),
    ]
    write_tar(folder / "train.tar", *samples(made, 0, 1), *named)
    with pytest.raises(
        BadShards, match=r"some labels are numbers \(such as 0\), some are names \(such as fly\); use --classes"
    ):
        index(folder)
    file.write_text("fly\r\nrun\n")
    plan = plan_external([str(folder)], None, SMALL, classes=("fly", "run"))
    assert tars_to_scan(plan) == []
    index(folder, classes=file)
    train = Index(folder, "train")
    assert train.info.classes == ("fly", "run")
    assert [sample.label for sample in train.samples(range(3))] == [0, 1, 0]
    [(name, reason)] = rejected(folder).items()
    assert name == "train.tar/6"
    assert re.fullmatch(r"at offset \d+: no is none of the 2 classes in --classes", reason)


def test_a_list_that_names_a_class_twice_is_refused(made, tmp_path):
    write_tar(tmp_path / "tars" / "train.tar", *samples(made, 0, 1))
    (tmp_path / "classes.txt").write_text("walk\nwalk\n")
    with pytest.raises(ValueError, match=r"classes\.txt: a class is listed twice"):
        index(tmp_path / "tars", classes=tmp_path / "classes.txt")


def test_keys_that_tars_share_are_told_apart_by_the_tar(made, tmp_path):
    for name in ("train/a", "train/b", "val/a"):
        write_tar(tmp_path / f"{name}.tar", *samples(made, 0, 1))
    index(tmp_path)
    train, val = Index(tmp_path, "train"), Index(tmp_path, "val")
    assert [sample.key for sample in train.samples(range(4))] == [
        "train/a/000",
        "train/a/001",
        "train/b/000",
        "train/b/001",
    ]
    assert train[2].group == "train/b/000"
    assert [sample.key for sample in val.samples(range(2))] == ["000", "001"]


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"", ()), (b"a\n b \n\n", ("a", "b")), (b'{"captions": "x"}', ("x",)), (b'{"captions": null, "caption": "x"}', ()),
        (b'{"caption": ["x", " "]}', ("x",)), (b'"quoted"', ('"quoted"',)), (b"42", ("42",)), (b"\xef\xbb\xbfa", ("a",)),
        (b"[" * 100_000, ("[" * 100_000,)),
    ],
)  # fmt: skip
def test_captions_of_each_form(data, captions):
    assert parse_captions(data) == captions


@pytest.mark.parametrize("data", [b'{"captions": [1]}', b'{"caption": {"en": "x"}}', b"\xff\xfe"])
def test_captions_that_are_none_are_refused(data):
    with pytest.raises(BadSample, match="captions"):
        parse_captions(data)


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


# Samples that cannot be used


def test_samples_that_cannot_be_used_are_left_out_with_the_reason(made, tmp_path, capsys):
    whole, good = video(made, 3), samples(made, 0)
    write_tar(
        tmp_path / "train.tar",
        *good,
        ("cut.avi", whole[: len(whole) // 2]), ("cut.cls", b"0"),
        ("text.mp4", b"not a video"), ("text.cls", b"0"),
        ("empty.mp4", b""), ("empty.cls", b"0"),
        ("bare.cls", b"1"), ("bare.npy", b"x"),
        ("mute.avi", whole),
        ("two.avi", whole), ("two.mp4", whole), ("two.cls", b"0"),
        ("word.avi", whole), ("word.cls", b"run"),
        ("negative.avi", whole), ("negative.cls", b"-1"),
        ("huge.avi", whole), ("huge.cls", b"123456789"),
        ("list.avi", whole), ("list.json", b"[1]"),
        ("json.avi", whole), ("json.json", b"{"),
        ("deep.avi", whole), ("deep.json", b"[" * 100_000),
        ("true.avi", whole), ("true.json", b'{"label": true}'),
        ("long.avi", whole), ("long.cls", b"0"), ("long.json", b" " * (2**20 + 1)),
        ("bell.avi", whole), ("bell.json", b'{"class": "ding\\u0007"}'),
        ("half.avi", whole), ("half.json", b'{"class": "\\ud800"}'),
        ("latin.avi", whole), ("latin.txt", b"\xff"),
        ("caption.avi", whole), ("caption.txt", b"a caption, and no label"),
        ("000.avi", whole), ("000.cls", b"0"),
        ("last.avi", whole), ("last.cls", b"1"),
    )  # fmt: skip
    status, result = index(tmp_path, strict=True)
    assert (status, result["videos"]["train"], result["rejected"]) == (1, 2, 19)
    assert [sample.key for sample in Index(tmp_path, "train").samples(range(2))] == ["000", "last"]
    reasons = {path.removeprefix("train.tar/"): reason for path, reason in rejected(tmp_path).items()}
    wanted = {
        "cut": "header promises|does not decode|not a video",
        "text": "not a video that ffmpeg reads",
        "empty": ".mp4 has 0 bytes; expected at least 1",
        "bare": r"no video among its members \(.cls .npy\); expected one of .mp4 .avi",
        "mute": "neither a label nor a caption",
        "two": r"two videos, the second at offset \d+",
        "word": ".cls holds 'run'; expected a number",
        "negative": ".cls holds '-1'; expected a number",
        "huge": "label 123456789; expected 0 to 99999",
        "list": ".json holds a list; expected an object",
        "json": ".json is not JSON",
        "deep": ".json is not JSON",
        "true": ".json has the label true; expected a number or a class's name",
        "long": r".json has 1048577 bytes; expected at most 1048576",
        "bell": r".json has the class 'ding\\x07'; expected a name without control characters",
        "half": r".json has the class '\\ud800'; expected a name",
        "latin": "captions are not UTF-8",
        "caption": "no label, where others have one",
        "000": "this key was there before; the members of a sample must lie together",
    }
    assert reasons.keys() == wanted.keys()
    for key, reason in wanted.items():
        assert re.search(reason, reasons[key]), f"{key}: {reasons[key]}"
        assert re.match(r"at offset \d+: ", reasons[key])
    assert "left out train.tar/text: at offset" in capsys.readouterr().out


class Trap:
    """A pickle that says so when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle was loaded",)


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_hostile_names_links_devices_and_pickles_harm_nothing(made, tmp_path, capsys):
    whole, trap = video(made, 3), pickle.dumps(Trap())
    folder = tmp_path / "a" / "b" / "tars"
    write_tar(
        folder / "train.tar",
        ("../../up.avi", whole), ("../../up.cls", b"0"),
        ("/root.avi", whole), ("/root.cls", b"0"),
        ("x\x1b[2Jy.avi", whole), ("x\x1b[2Jy.cls", b"0"),
        ("new\nline.avi", whole), ("new\nline.cls", b"0"),
        (b"latin\xe9.avi".decode("utf-8", "surrogateescape"), whole),
        ("l" * 2000 + ".avi", whole),
        ("a/" * 20_000 + "b", b"slashes and no dot"),
        link("soft.avi", tarfile.SYMTYPE), ("soft.cls", b"0"),
        link("hard.avi", tarfile.LNKTYPE, "000.avi"), ("hard.cls", b"0"),
        link("device.avi", tarfile.CHRTYPE), ("device.cls", b"0"),
        link("fifo.avi", tarfile.FIFOTYPE), ("fifo.cls", b"0"),
        link("folder.avi", tarfile.DIRTYPE),
        ("trap.avi", whole), ("trap.cls", b"0"), ("trap.pyd", trap), ("trap.pkl", trap), ("trap.pickle", trap),
        ("same.avi", whole), ("same.avi", whole), ("same.cls", b"0"),
        ("__meta__/x.avi", whole), ("._mac.avi", whole), ("README", b"hello"),
        ("./dot/good.avi", whole), ("./dot/good.cls", b"0"),
        format=tarfile.GNU_FORMAT,
    )  # fmt: skip
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    index(folder)
    out = capsys.readouterr().out
    assert "a pickle was loaded" not in out
    assert "\x1b" not in out
    assert r"x\x1b[2Jy" in out
    new = {path for path in tmp_path.rglob("*") if path not in before}
    assert {path.name for path in new} == {
        "dataset.json",
        "rejected.jsonl",
        *(f"{s}.index.arrow" for s in ("train", "val", "test")),
    }
    assert [sample.key for sample in Index(folder, "train").samples(range(2))] == ["trap", "./dot/good"]
    reasons = [reason.split(": ", 1)[1] for reason in rejected(folder).values()]
    leads = "leads out of its folder; expected one without .. and without / at its beginning"
    assert reasons == [
        f"the name ../../up.avi {leads}",
        f"the name /root.avi {leads}",
        r"the name x\x1b[2Jy.avi has control characters in it",
        r"the name new\nline.avi has control characters in it",
        r"the name latin\udce9.avi is not UTF-8",
        "a name of 2004 characters; expected at most 1000",
        ".avi is a link; expected a file",
        ".avi is a link; expected a file",
        ".avi is a special file; expected a file",
        ".avi is a special file; expected a file",
        reasons[10],
    ]
    assert reasons[10].startswith("two videos, the second at offset")


@pytest.mark.parametrize(
    ("fault", "kept", "lost", "message"),
    [
        ("cut in a video", ["000", "001"], "/002", r"claims \d+ bytes, 100 are left: the tar was cut off"),
        ("cut after a video", ["000", "001"], "/002", "without the zeros that end a tar: it was cut off"),
        ("cut between samples", ["000"], "/001", "without the zeros"),  # of which more may have been there
        ("a damaged header", ["000"], "/001", r"the bytes at offset \d+ are no tar header \(bad checksum\)"),
        ("a size that is wrong", ["000", "001"], "/002", rf"claims {2**62} bytes, \d+ are left"),
        ("nothing", [], "", "ends at offset 0 without the zeros"),
        ("text", [], "", "the bytes at offset 0 are no tar header"),
    ],
)
def test_of_a_tar_that_is_cut_off_or_damaged_the_whole_samples_before_are_kept(
    fault, kept, lost, message, made, tmp_path
):
    path = write_tar(tmp_path / "train-1.tar", *samples(made, 0, 1, 2))
    write_tar(tmp_path / "train-0.tar", *samples(made, 5))
    with tarfile.open(path) as tar:
        member = tar.getmember("002.avi")
    data, at, start = path.read_bytes(), member.offset, member.offset_data
    contents = {
        "cut in a video": data[: start + 100],
        "cut after a video": data[: start + member.size],
        "cut between samples": data[:at],
        "a damaged header": data[: at + 10] + b"\xff" + data[at + 11 :],
        "a size that is wrong": data[:at] + header("002.avi", 2**62) + data[start:],
        "nothing": b"",
        "text": b"not a tar at all" * 100,
    }
    path.write_bytes(contents[fault])
    _, result = index(tmp_path)
    found = Index(tmp_path, "train").samples(range(result["videos"]["train"]))
    assert [sample.key for sample in found] == ["005", *kept]
    [(name, reason)] = rejected(tmp_path).items()
    assert name == f"train-1.tar{lost}"
    assert re.search(message, reason), reason
    assert reason.endswith("this sample and what comes after it are left out")


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_data_set_of_which_nothing_is_left_is_an_error_that_names_the_list_of_reasons(tmp_path):
    write_tar(tmp_path / "train.tar", ("0.avi", b"x"), ("0.cls", b"0"))
    for _ in range(2):  # and again, when run again
        with pytest.raises(BadShards, match=r"none of the 1 videos can be used; the reasons are in .*rejected\.jsonl"):
            index(tmp_path)
    assert not (tmp_path / "dataset.json").exists()


# Walking a tar


def members_of(folder: Path, name: str) -> list[tuple[str, str, int, int]]:
    path = folder / name
    with closing(TarReader(FolderStore(folder), name, path.stat().st_size)) as shard:
        found = []
        while (member := shard.next_member()) is not None:
            found.append((member.name, member.kind, member.offset, member.size_bytes))
            shard.skip_to(min(member.end, shard.size_bytes))
        assert shard.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(
        st.tuples(st.lists(NAMES, min_size=1, max_size=4).map("/".join), st.integers(0, 1500)), max_size=6
    ),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_lie_where_the_standard_library_finds_them(tmp_path_factory, members, kind):
    folder = tmp_path_factory.mktemp("tar")
    path = write_tar(folder / "t.tar", *((name, bytes(size)) for name, size in members), format=kind)
    with tarfile.open(path) as tar:
        wanted = [(info.name, "file", info.offset_data, info.size) for info in tar]
    assert members_of(folder, "t.tar") == wanted


def test_members_of_other_kinds_and_odd_headers_are_walked_over(tmp_path):
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        odd = tarfile.TarInfo("unknown")
        odd.type, odd.size = b"Z", 700
        members = [
            ("d" * 90 + "/" + "n" * 90, b"x" * 600),
            link("soft", tarfile.SYMTYPE, "t" * 90), link("hard", tarfile.LNKTYPE), link("folder/", tarfile.DIRTYPE),
            link("device", tarfile.BLKTYPE), ("after", b"y"),
        ]  # fmt: skip
        path = write_tar(tmp_path / f"{kind}.tar", *members, format=kind, pax_headers={"comment": "c" * 600})
        with tarfile.open(path) as tar:
            wanted = [(info.name, info.offset_data, info.size) for info in tar]
        found = members_of(tmp_path, path.name)
        assert [(name, offset, size) for name, _, offset, size in found] == wanted
        assert [member[1] for member in found] == ["file", "link", "link", "folder", "special file", "file"]


def pax(*records: bytes) -> bytes:
    content = b"".join(records)
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def extension(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (extension(tarfile.GNUTYPE_LONGNAME, 2**40), "claims a name or fields of 1099511627776 bytes"),
        (extension(tarfile.XHDTYPE, 2**21) + bytes(2**21), "claims a name or fields of 2097152 bytes"),
        (header("a.mp4", -5), "claims -5 bytes"),
        (pax(b"18 size=-99999999\n") + header("a.mp4", 5), "claims '-99999999' bytes"),
        (pax(b"9999 path=a\n") + header("a.mp4", 5), "the extended header at offset 0 is damaged"),
        (pax(b"0 path=a\n") + header("a.mp4", 5), "the extended header at offset 0 is damaged"),
        (pax(b"nonsense") + header("a.mp4", 5), "the extended header at offset 0 is damaged"),
        (pax(b"22 GNU.sparse.major=1\n") + header("a.mp4", 5), "a sparse file"),
        (extension(tarfile.GNUTYPE_SPARSE, 0), "a sparse file"),
    ],
)
def test_headers_that_lie_are_refused(content, message, tmp_path):
    (tmp_path / "t.tar").write_bytes(content + bytes(1024))
    with pytest.raises(BadTar, match=message):
        members_of(tmp_path, "t.tar")


@given(st.text(st.sampled_from("ab./_"), min_size=1, max_size=12))
def test_keys_are_those_of_webdataset_but_for_hidden_files(name):
    key, suffix = key_and_suffix(name)
    if key:
        assert (key, suffix) == base_plus_ext(name)
    else:
        file = name.rpartition("/")[2]
        assert file.startswith(".") or "." not in file or name.startswith("__")


# Texts that come more than once


@given(texts=st.lists(st.text(st.sampled_from("abc"), max_size=3), max_size=60), cut=st.integers(0, 60))
def test_duplicates_are_found_as_by_counting(texts, cut):
    with Duplicates() as duplicates:
        duplicates.add(texts[:cut], range(len(texts[:cut])))
        duplicates.add(texts[cut:], np.arange(len(texts[:cut]), len(texts)))
        found = sorted(duplicates.found())
    places = {text: [number for number, each in enumerate(texts) if each == text] for text in texts}
    assert found == sorted(numbers for numbers in places.values() if len(numbers) > 1)
