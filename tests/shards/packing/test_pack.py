"""Packing: the same bytes every time, whatever interrupts it, and nothing left out without a word."""

import errno
import hashlib
import json
import os
import random
import subprocess
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from packers import WebDataset, contents, plan_of, run, start_packer
from videos import TINY, frame_numbers, lavfi_video, listing_of, numbered_planes, pack, write_video

from shards.dataset import read_dataset
from shards.index import Index
from shards.packing.entries import SPLITS, Listing
from shards.packing.pack import finish_packing, pack_shard, shards_to_pack
from shards.packing.records import record_path
from shards.reading.decode import read_frames
from shards.store import BadShards, FolderStore, open_store
from shards.video import Limits, Packing

FRAMES = [8, 9, 10, 11, 12, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    """Nine videos: five in train, four in test."""
    return listing_of(tmp_path_factory.mktemp("videos"), FRAMES, splits=("train", "test"))


@pytest.fixture(scope="module")
def packed(listing, tmp_path_factory):
    """The undisturbed packing that others are held against."""
    return pack(tmp_path_factory.mktemp("data") / "shards", listing, videos_per_shard=2)


# What comes out


def test_any_webdataset_reader_reads_the_shards_as_the_index_does(packed):
    for split in ("train", "test"):
        index = Index(packed, split)
        paths = [str(packed / shard.name) for shard in index.shards]
        read = list(WebDataset(paths, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in read] == [index[number].key for number in range(len(index))]
        for number, sample in enumerate(read):
            row = index[number]
            data = (packed / row.shard).read_bytes()[row.offset : row.offset + row.size_bytes]
            assert sample["mp4"] == data
            assert set(sample) - {"mp4", "json"} == {"__key__", "__url__", "__local_path__"}
            about = json.loads(sample["json"])
            assert about == {
                "key": row.key,
                "label": row.label,
                "class": "ab"[row.label],
                "group": row.group,
                "num_frames": row.num_frames,
                "fps": row.fps,
                "source": row.group,
            }


def test_the_index_gives_the_place_of_the_json_too(packed):
    index = Index(packed, "train")
    for sample in index.samples(range(len(index))):
        data = (packed / sample.shard).read_bytes()
        about = json.loads(data[sample.json_offset : sample.json_offset + sample.json_size_bytes])
        assert about["key"] == sample.key


def test_every_video_is_in_one_shard_and_no_shard_holds_one_class(tmp_path):
    listing = listing_of(tmp_path, [1] * 40)
    plan = plan_of(tmp_path, listing, videos_per_shard=10)
    keys = Counter(entry.key for shard in plan.shards for entry in shard.entries)
    assert keys == Counter(entry.key for entry in listing.entries)
    assert [len(shard.entries) for shard in plan.shards] == [10, 10, 10, 10]
    for shard in plan.shards:
        assert len({entry.label for entry in shard.entries}) == 2
        assert [entry.key for entry in shard.entries] == sorted(entry.key for entry in shard.entries)


def test_splits_have_shards_of_their_own(packed):
    info = read_dataset(open_store(packed))
    assert {split: sum(shard.samples for shard in info.splits[split]) for split in SPLITS} == {
        "train": 5,
        "val": 0,
        "test": 4,
    }
    assert [shard.name for shard in info.splits["train"]] == [f"train-{number:06}.tar" for number in range(3)]
    for split in SPLITS:
        for shard in info.splits[split]:
            data = (packed / shard.name).read_bytes()
            assert (shard.size_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert not list(packed.glob(".*"))


def test_a_long_name_is_kept_whole(tmp_path):
    listing = listing_of(tmp_path / "videos", [8])
    key = "k" * 180  # a tar header holds 100 characters
    folder = pack(tmp_path / "shards", replace(listing, entries=(replace(listing.entries[0], key=key),)))
    sample = Index(folder, "train")[0]
    [read] = WebDataset(str(folder / sample.shard), shardshuffle=False)
    assert sample.key == read["__key__"] == key
    data = (folder / sample.shard).read_bytes()
    assert data[sample.offset : sample.offset + sample.size_bytes] == read["mp4"]


def test_a_copied_video_keeps_its_bytes_and_its_suffix(listing, tmp_path):
    folder = pack(tmp_path / "shards", listing, Packing(width=32, height=32, copy=True))
    index = Index(folder, "test")
    source = {entry.key: entry.path for entry in listing.entries}
    for sample in WebDataset([str(folder / shard.name) for shard in index.shards], shardshuffle=False):
        assert sample["avi"] == source[sample["__key__"]].read_bytes()


# The same bytes again


def test_packing_again_elsewhere_gives_the_same_bytes(listing, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    time.sleep(1.1)  # another second: a date in the bytes would show
    run(plan_of(tmp_path / "elsewhere", replace(listing, entries=listing.entries[::-1])))
    assert contents(tmp_path / "elsewhere") == contents(packed)


def test_another_seed_spreads_the_videos_otherwise(listing, packed, tmp_path):
    spread = [
        [[entry.key for entry in shard.entries] for shard in plan_of(tmp_path, listing, seed=seed).shards]
        for seed in range(4)
    ]
    assert len({str(shards) for shards in spread}) > 1
    assert spread[0] == [[entry.key for entry in shard.entries] for shard in plan_of(packed, listing).shards]


def test_finished_shards_are_skipped(listing, packed, tmp_path):
    plan = plan_of(tmp_path / "shards", listing)
    first, *others = shards_to_pack(plan)
    assert len(list(pack_shard(plan.url, first, plan.classes))) == len(first.entries)
    written_at = (Path(plan.url) / first.name).stat().st_mtime_ns

    assert run(plan) == [shard.name for shard in others]

    assert (Path(plan.url) / first.name).stat().st_mtime_ns == written_at
    assert contents(Path(plan.url)) == contents(packed)
    assert run(plan) == []
    assert contents(Path(plan.url)) == contents(packed)


def test_a_packing_that_is_given_up_within_a_shard_leaves_nothing_half_written(listing, packed, tmp_path):
    plan = plan_of(tmp_path / "shards", listing)
    videos = pack_shard(plan.url, shards_to_pack(plan)[0], plan.classes)
    next(videos)
    videos.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert set(contents(Path(plan.url))) == {".packing/plan"}
    run(plan)
    assert contents(Path(plan.url)) == contents(packed)


def assert_whole(folder: Path) -> None:
    """Every file under a final name is complete."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            if path.suffix == ".tar":
                with tarfile.open(path) as tar:
                    names = tar.getnames()
                assert len(names) == 4 or path.name == "train-000004.tar"
                assert path.read_bytes().endswith(bytes(1024))
            elif path.suffix == ".json":
                json.loads(path.read_text())


@pytest.mark.parametrize(
    ("kills", "videos"), [(4, len(FRAMES)), pytest.param(20, 60, marks=[pytest.mark.nightly, pytest.mark.timeout(900)])]
)
def test_a_packing_that_is_killed_again_and_again_ends_with_the_same_bytes(kills, videos, tmp_path):
    listing = listing_of(tmp_path / "videos", [8 + number % 4 for number in range(videos)])
    packed = pack(tmp_path / "undisturbed", listing, videos_per_shard=2)
    plan = plan_of(tmp_path / "shards", listing)
    unfinished = 0
    for _ in range(kills):
        process = start_packer(plan, tmp_path / "temporary")
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0, 0.12 if kills < 20 else 0.4))
        process.kill()
        process.wait()
        process.stdout.close()
        unfinished += not (Path(plan.url) / "dataset.json").exists()
        if Path(plan.url).exists():
            assert_whole(Path(plan.url))
    last = start_packer(plan, tmp_path / "temporary")
    assert last.communicate()[0].startswith(b"ready\n")
    assert last.returncode == 0
    assert contents(Path(plan.url)) == contents(packed)
    assert unfinished > kills // 4  # that it was still packing


def test_a_packing_that_was_killed_in_its_last_moment_is_tidied_up(packed, listing, tmp_path):
    """After dataset.json, while the records were being deleted."""
    plan = plan_of(tmp_path / "shards", listing)
    run(plan)
    (Path(plan.url) / ".packing").mkdir()
    (Path(plan.url) / ".packing" / "train-000001.tar.json").write_text("{}")
    assert run(plan) == []
    assert contents(Path(plan.url)) == contents(packed)


# Another packing in the same folder


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", ["crf", "videos", "spread", "classes", "size"])
def test_a_folder_of_another_packing_is_refused(other, finished, listing, tmp_path):
    listing = replace(listing, entries=listing.entries[:4])
    plan = plan_of(tmp_path / "shards", listing)
    shards_to_pack(plan)
    if finished:
        run(plan)
    before = contents(Path(plan.url))
    others = {
        "crf": lambda: plan_of(Path(plan.url), listing, replace(TINY, crf=30)),
        "videos": lambda: plan_of(Path(plan.url), replace(listing, entries=listing.entries[1:])),
        "spread": lambda: plan_of(Path(plan.url), listing, videos_per_shard=1),
        "classes": lambda: plan_of(Path(plan.url), replace(listing, classes=("a", "b", "c"))),
        "size": lambda: plan_of(Path(plan.url), replace(listing, entries=resized(listing, tmp_path))),
    }
    with pytest.raises(BadShards, match=r"shards: holds shards of other videos or other settings .* choose another"):
        shards_to_pack(others[other]())
    assert contents(Path(plan.url)) == before


def resized(listing, folder):
    """The first video has other content now."""
    path = write_video(folder / "other.avi", numbered_planes(20))
    return (replace(listing.entries[0], path=path), *listing.entries[1:])


# Videos that cannot be stored


def test_missing_and_broken_videos_are_left_out_with_the_reason(tmp_path):
    listing = listing_of(tmp_path / "videos", [8] * 6)
    paths = [entry.path for entry in listing.entries]
    paths[1].unlink()
    paths[2].write_bytes(b"")
    paths[3].write_text("not a video")
    cut = paths[4].read_bytes()
    paths[4].write_bytes(cut[: len(cut) // 2])
    plan = plan_of(tmp_path / "shards", listing, videos_per_shard=6)

    [shard] = shards_to_pack(plan)
    progress = {video.name: video.rejected for video in pack_shard(plan.url, shard, plan.classes)}
    info = finish_packing(plan)

    lines = [json.loads(line) for line in (Path(plan.url) / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["reason"] for line in lines}
    names = [entry.name for entry in listing.entries]
    assert sorted(reasons) == sorted(names[1:5])
    assert reasons[names[2]] == "the file is empty"
    assert "not a video that ffmpeg reads" in reasons[names[3]]
    assert reasons[names[4]]
    assert {line["split"] for line in lines} == {"train"}
    missing = {names[1]: reasons.pop(names[1])}  # known before packing: takes no place in a shard
    assert missing == {names[1]: "listed, but there is no such file"}
    assert progress == dict.fromkeys([names[0], names[5]]) | reasons
    assert info.rejected == 4
    assert len(Index(Path(plan.url), "train")) == 2
    Index(Path(plan.url), "train").check_files()


def test_missing_videos_take_no_place_in_shards(tmp_path):
    """As with a part of UCF-101: shards are as full as with a list of that part alone."""
    listing = listing_of(tmp_path / "videos", [8] * 8)
    gone, there = listing.entries[::2], listing.entries[1::2]
    for entry in gone:
        entry.path.unlink()
    run(plan_of(tmp_path / "shards", listing))
    run(plan_of(tmp_path / "part", replace(listing, entries=there)))
    assert [shard.samples for shard in read_dataset(open_store(tmp_path / "shards")).splits["train"]] == [2, 2]
    assert read_dataset(open_store(tmp_path / "shards")).rejected == 4
    for name in ("train-000000.tar", "train-000001.tar", "train.index.arrow"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()


def test_a_video_that_is_deleted_while_packing_is_left_out_with_the_reason(tmp_path):
    listing = listing_of(tmp_path / "videos", [8, 8])
    plan = plan_of(tmp_path / "shards", listing)
    [shard] = shards_to_pack(plan)
    shard.entries[1].path.unlink()
    progress = [video.rejected for video in pack_shard(plan.url, shard, plan.classes)]
    assert progress == [None, "listed, but there is no such file"]


def test_a_shard_of_refused_videos_only_is_not_written(tmp_path):
    listing = listing_of(tmp_path / "videos", [8] * 6)
    plan = plan_of(tmp_path / "shards", listing)
    for entry in plan.shards[1].entries:
        entry.path.write_text("not a video")
    plan = plan_of(tmp_path / "shards", listing)  # the sizes have changed
    run(plan)
    index = Index(Path(plan.url), "train")
    assert [shard.name for shard in index.shards] == ["train-000000.tar", "train-000002.tar"]
    assert not (Path(plan.url) / "train-000001.tar").exists()
    assert index[2].shard == "train-000002.tar"


def test_refusing_all_videos_is_an_error_that_names_the_list_of_reasons(tmp_path):
    listing = listing_of(tmp_path / "videos", [8, 8])
    for entry in listing.entries:
        entry.path.unlink()
    plan = plan_of(tmp_path / "shards", listing)
    for _ in range(2):  # and again, when run again
        with pytest.raises(BadShards, match=r"none of the 2 videos can be used; the reasons are in .*rejected\.jsonl"):
            run(plan)
    assert len((Path(plan.url) / "rejected.jsonl").read_text().splitlines()) == 2
    assert not (Path(plan.url) / "dataset.json").exists()


def test_a_part_of_a_video_and_its_captions_are_stored(tmp_path):
    """Frames 3 to 7 of the second video, at 25 frames a second; a data set of captions has no classes."""
    entries = listing_of(tmp_path / "videos", [8, 20]).entries
    captions = ("a shade of grey", "grey, then lighter")
    part = replace(entries[1], start_seconds=0.12, end_seconds=0.32, captions=captions, label="")
    folder = pack(tmp_path / "shards", Listing(classes=(), entries=(part,)))

    [sample] = [Index(folder, "train")[0]]
    data = (folder / sample.shard).read_bytes()
    about = json.loads(data[sample.json_offset :][: sample.json_size_bytes])
    assert (sample.label, sample.num_frames, sample.num_captions) == (-1, 5, 2)
    assert about["captions"] == list(captions)
    assert "label" not in about
    assert Index(folder, "train").shards[0].captions == 2
    planes = read_frames(data[sample.offset :][: sample.size_bytes], range(5), TINY)
    assert frame_numbers(planes) == [4, 5, 6, 7, 8]  # its levels begin at 1
    with pytest.raises(BadShards, match="packed with captions and without classes; expected videos with classes"):
        Index(folder, "train").check_classes()


def test_other_captions_and_other_parts_are_another_packing(tmp_path):
    listing = listing_of(tmp_path / "videos", [8])
    [entry] = listing.entries
    changes = [{}, {"captions": ("one",)}, {"captions": ("two",)}, {"start_seconds": 0.1, "end_seconds": 0.2}]
    plans = [plan_of(tmp_path, replace(listing, entries=(replace(entry, **change),))) for change in changes]
    assert len({plan.digest for plan in plans}) == 4


def test_a_video_that_takes_too_long_is_left_out_and_the_next_one_is_packed(tmp_path):
    listing = listing_of(tmp_path / "videos", [8, 8])
    lavfi_video(listing.entries[0].path, "-c:v", "mpeg4", source="testsrc2=size=640x480:rate=25", num_frames=3000)
    plan = plan_of(tmp_path / "shards", listing, Packing(width=640, height=480, preset="slower"))
    progress = [
        video.rejected
        for shard in shards_to_pack(plan)
        for video in pack_shard(plan.url, shard, plan.classes, Limits(time_limit=3))
    ]
    assert [refused is None for refused in progress] == [False, True]
    assert "time" in str(progress[0])


def test_a_video_that_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    """Tests may run as root, who may read everything: the open call refuses instead."""
    listing = listing_of(tmp_path / "videos", [8, 8])

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shards.packing.sandbox.Sandbox.store", refuse)
    plan = plan_of(tmp_path / "shards", listing)
    [progress, _] = pack_shard(plan.url, shards_to_pack(plan)[0], plan.classes)
    assert progress.rejected == "cannot be read (Permission denied)"


@pytest.mark.parametrize("videos_per_shard", [0, -1])
def test_shards_of_no_videos_are_refused(videos_per_shard, listing, tmp_path):
    with pytest.raises(ValueError, match=rf"{videos_per_shard} videos per shard; expected at least 1"):
        plan_of(tmp_path, listing, videos_per_shard=videos_per_shard)


# Disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_stops_the_packing_with_a_clear_error_and_the_next_run_goes_on(listing, packed, tmp_path):
    """The temporary file leads to /dev/full, on which every write fails as on a full disk."""
    plan = plan_of(tmp_path / "shards", listing)
    first, second, *_ = shards_to_pack(plan)
    list(pack_shard(plan.url, first, plan.classes))
    (Path(plan.url) / f".{second.name}.{os.getpid()}.partial").symlink_to("/dev/full")

    with pytest.raises(OSError, match="no space left on the device; make room and run the same again") as caught:
        list(pack_shard(plan.url, second, plan.classes))

    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(Path(plan.url) / second.name)
    assert set(contents(Path(plan.url))) == {".packing/plan", first.name, f".packing/{first.name}.json"}
    assert second.name in run(plan)
    assert contents(Path(plan.url)) == contents(packed)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk wants root")
def test_a_disk_that_is_really_full_is_said_and_the_packing_goes_on_after_room_was_made(listing, packed, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        plan = plan_of(disk / "shards", listing)
        with pytest.raises(OSError, match="no space left on the device; make room and run the same again"):
            run(plan)
        finished = {name: digest for name, digest in contents(Path(plan.url)).items() if name.endswith(".tar")}
        assert finished.items() < contents(packed).items()
        assert not [name for name in contents(Path(plan.url)) if "partial" in name]
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        run(plan)
        assert contents(Path(plan.url)) == contents(packed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_an_error_before_any_video_is_read(listing, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "shards", Path("/proc/shards")):
        with pytest.raises(OSError, match=r"exists|Not a directory|No such file|denied|not permitted"):
            shards_to_pack(plan_of(folder, listing))


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), FolderStore(tmp_path).written("file") as file:
        file.write(b"half" * (1 // 0))
    assert contents(tmp_path) == {"file": hashlib.sha256(b"before").hexdigest()}
    with FolderStore(tmp_path).written("file") as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert len(contents(tmp_path)) == 1


def test_a_packing_that_an_older_version_began_goes_on(listing, packed, tmp_path):
    """Its records name a class "class" and the split of what was left out."""
    plan = plan_of(tmp_path / "shards", listing)
    first = shards_to_pack(plan)[0]
    list(pack_shard(plan.url, first, plan.classes))
    path = Path(plan.url) / record_path(first.name)
    record = json.loads(path.read_text())
    for sample in record["samples"]:
        del sample["class_name"], sample["flow_offset"]
        sample["class"] = None
    record["rejected"] = [{"path": "a", "split": first.name.split("-")[0], "reason": "old"}]
    path.write_text(json.dumps(record))
    assert first.name not in run(plan)
    assert read_dataset(open_store(plan.url)).splits["train"][0].name == "train-000000.tar"
    assert '"reason": "old"' in (Path(plan.url) / "rejected.jsonl").read_text()
