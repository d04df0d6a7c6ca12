"""UCF-101: the official split, whole groups held out, and what is refused."""

import re
from collections import Counter
from pathlib import Path

import pytest
from listings import groups_of, touch
from videos import DATA, needs_data

from shards.packing.entries import BadSource
from shards.packing.sources import Ucf101


def ucf_lists(folder: Path, train: list[str], test: list[str]) -> Path:
    """Official-looking lists, with CRLF line ends and an empty last line."""
    folder.mkdir()
    (folder / "classInd.txt").write_bytes(b"1 Punch\r\n2 YoYo\r\n\r\n")
    classes = {"Punch": 1, "YoYo": 2}
    lines = [f"{name} {classes.get(name.split('/')[0], 3)}\r\n" for name in train]
    (folder / "trainlist01.txt").write_bytes("".join(lines).encode())
    (folder / "testlist01.txt").write_bytes("".join(f"{name}\r\n" for name in test).encode())
    return folder


def ucf_names(label, groups, clips=2):
    return [f"{label}/v_{label}_g{group:02}_c{clip:02}.avi" for group in groups for clip in range(1, clips + 1)]


def test_ucf101_takes_the_official_split_and_holds_out_whole_groups_for_validation(tmp_path):
    train = ucf_names("YoYo", range(8, 26)) + ucf_names("Punch", range(8, 26))
    test = ucf_names("YoYo", range(1, 8)) + ucf_names("Punch", range(1, 8))
    lists = ucf_lists(tmp_path / "lists", train, test)

    listing = Ucf101(videos=tmp_path, lists=lists, val_fraction=0.1).entries()

    assert listing.classes == ("Punch", "YoYo")
    assert {entry.name for entry in listing.entries if entry.split == "test"} == set(test)
    assert {entry.name for entry in listing.entries if entry.split != "test"} == set(train)
    groups = groups_of(listing.entries)
    assert not groups["train"] & groups["val"]
    # A tenth of 18 groups is 2, in each class.
    assert Counter(group.split("_")[0] for group in groups["val"]) == {"YoYo": 2, "Punch": 2}
    assert {entry.label for entry in listing.entries if entry.name.startswith("YoYo/")} == {"YoYo"}


def test_listed_videos_that_are_not_on_disk_stay_in_the_listing(tmp_path):
    lists = ucf_lists(tmp_path / "lists", ucf_names("YoYo", [8, 9]), ucf_names("YoYo", [1]))
    videos = touch(tmp_path / "videos", "YoYo/v_YoYo_g08_c01.avi")
    listing = Ucf101(videos=videos, lists=lists).entries()
    assert len(listing.entries) == 6
    assert [entry.name for entry in listing.entries if entry.path.exists()] == ["YoYo/v_YoYo_g08_c01.avi"]


def test_another_seed_holds_out_other_groups_and_the_same_seed_the_same(tmp_path):
    lists = ucf_lists(tmp_path / "lists", ucf_names("YoYo", range(8, 26)), [])
    held = [
        groups_of(Ucf101(videos=tmp_path, lists=lists, split_seed=seed).entries().entries)["val"]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert held[0] == held[1]
    assert len({frozenset(groups) for groups in held}) > 1


@pytest.mark.parametrize(
    ("name", "number"), [("YoYo/yoyo.avi", 3), ("Juggling/v_Juggling_g01_c01.avi", 3), ("v_YoYo_g01_c01.avi", 3)]
)
def test_a_line_that_is_no_ucf101_video_is_refused_with_its_number(name, number, tmp_path):
    lists = ucf_lists(tmp_path / "lists", [*ucf_names("YoYo", [8]), name], [])
    with pytest.raises(BadSource, match=rf"trainlist01\.txt:{number}: '{re.escape(name)}.*classInd"):
        Ucf101(videos=tmp_path, lists=lists).entries()


def test_a_class_list_without_numbers_is_refused_with_the_line(tmp_path):
    lists = ucf_lists(tmp_path / "lists", [], [])
    (lists / "classInd.txt").write_text("1 Punch\nYoYo\n")
    with pytest.raises(BadSource, match=r"classInd\.txt:2: 'YoYo' is not a class's number and name"):
        Ucf101(videos=tmp_path, lists=lists).entries()


def test_ucf101_has_three_splits_and_its_lists_must_be_there(tmp_path):
    lists = ucf_lists(tmp_path / "lists", [], [])
    with pytest.raises(BadSource, match=r"--split 4: UCF-101 has the splits 1, 2 and 3"):
        Ucf101(videos=tmp_path, lists=lists, split=4).entries()
    with pytest.raises(BadSource, match=r"trainlist02\.txt: found nothing; expected a file"):
        Ucf101(videos=tmp_path, lists=lists, split=2).entries()
    with pytest.raises(BadSource, match=r"--lists .*nowhere: found nothing; expected a folder"):
        Ucf101(videos=tmp_path, lists=tmp_path / "nowhere").entries()


@needs_data
@pytest.mark.parametrize(("split", "num_train", "num_test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_the_real_official_lists_give_all_13320_videos(split, num_train, num_test):
    ucf101 = DATA / "ucf101"
    listing = Ucf101(videos=ucf101 / "videos", lists=ucf101 / "splits", split=split).entries()
    counts = Counter(entry.split for entry in listing.entries)
    assert counts["train"] + counts["val"] == num_train
    assert counts["test"] == num_test
    assert len(listing.classes) == 101
    assert 0.08 < counts["val"] / num_train < 0.12
    assert sum(entry.path.is_file() for entry in listing.entries) == len(list((ucf101 / "videos").rglob("*.avi")))
    assert len({entry.key for entry in listing.entries}) == 13320
