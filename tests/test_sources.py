"""Data sets on disk -> entries: what is listed, in which split, under which key, and what is refused."""

import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import DATA, needs_data

from shards.sources import BadSource, Csv, Entry, Folder, Ucf101, finish, hold_out


def touch(folder: Path, *names: str) -> Path:
    """Empty files: sources read names only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def groups_of(entries):
    """{split: its groups}"""
    groups = defaultdict(set)
    for entry in entries:
        groups[entry.split].add(entry.group)
    return groups


def entry_of(name, *, label="a", split="train", group=None):
    return Entry(path=Path(name), name=name, key="", label=label, split=split, group=group or name)


# UCF-101


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

    listing = Ucf101(videos=tmp_path, lists=lists, val_share=0.1).entries()

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
        groups_of(Ucf101(videos=tmp_path, lists=lists, seed=seed).entries().entries)["val"] for seed in (0, 0, 1, 2, 3)
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
    with pytest.raises(BadSource, match=r"trainlist02\.txt: a file is wanted, nothing found"):
        Ucf101(videos=tmp_path, lists=lists, split=2).entries()
    with pytest.raises(BadSource, match=r"--lists .*nowhere: a folder is wanted, nothing found"):
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


# A folder of class folders


def test_a_folder_gives_its_folders_as_classes_and_only_its_video_files(tmp_path):
    touch(tmp_path, "run/1.avi", "run/2.MP4", "run/more/3.mkv", "run/notes.txt", "jump/1.avi", ".cache/4.avi", "5.avi")
    listing = Folder(videos=tmp_path, test_share=0, val_share=0).entries()
    assert listing.classes == ("jump", "run")
    assert [(entry.name, entry.label) for entry in listing.entries] == [
        ("jump/1.avi", "jump"),
        ("run/1.avi", "run"),
        ("run/2.MP4", "run"),
        ("run/more/3.mkv", "run"),
    ]
    assert {entry.split for entry in listing.entries} == {"train"}


def test_a_folder_is_split_in_its_shares_class_by_class(tmp_path):
    for label in "abc":
        touch(tmp_path, *(f"{label}/{number}.avi" for number in range(20)))
    listing = Folder(videos=tmp_path, val_share=0.1, test_share=0.2).entries()
    counts = Counter((entry.label, entry.split) for entry in listing.entries)
    for label in "abc":
        assert [counts[label, split] for split in ("train", "val", "test")] == [14, 2, 4]


def test_groups_that_run_through_all_classes_are_never_cut(tmp_path):
    """As in UT-Interaction: IDX_SEQ_K.avi, SEQ is the recording, which shows every class."""
    touch(tmp_path, *(f"{label}/{label}x_{recording}_0.avi" for label in "abc" for recording in range(1, 11)))
    listing = Folder(videos=tmp_path, group=r"_(\d+)_\d+\.avi$", val_share=0.1, test_share=0.2).entries()
    groups = groups_of(listing.entries)
    assert {split: len(groups[split]) for split in groups} == {"train": 7, "val": 1, "test": 2}
    assert set.union(*groups.values()) == {str(recording) for recording in range(1, 11)}


def test_a_group_pattern_without_brackets_names_the_group_by_the_whole_match(tmp_path):
    touch(tmp_path, "a/s1_x.avi", "a/s1_y.avi", "a/s2_x.avi")
    listing = Folder(videos=tmp_path, group=r"s\d").entries()
    assert [entry.group for entry in listing.entries] == ["s1", "s1", "s2"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"g(\d+)", r"a/clip\.avi: --group 'g\(\\\\d\+\)' does not match"),
        (r"clip_?(\d+)?", r"a/clip\.avi: --group .* matches nothing there"),
        (r"x*", r"a/clip\.avi: --group 'x\*' matches nothing there"),
        (r"g(\d+", r"--group 'g\(\\\\d\+' is not a regular expression: .*unterminated"),
    ],
)
def test_a_group_pattern_that_does_not_fit_is_refused(pattern, message, tmp_path):
    touch(tmp_path, "a/clip.avi")
    with pytest.raises(BadSource, match=message):
        Folder(videos=tmp_path, group=pattern).entries()


def test_a_folder_without_videos_is_refused(tmp_path):
    touch(tmp_path, "a/notes.txt", "loose.avi")
    with pytest.raises(BadSource, match=r"no videos found .*1 class folders.*one folder of videos per class"):
        Folder(videos=tmp_path).entries()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadSource, match=r"--videos .*nowhere: a folder is wanted, nothing found"):
        Folder(videos=tmp_path / "nowhere").entries()
    touch(tmp_path, "video.avi")
    with pytest.raises(BadSource, match=r"--videos .*video\.avi: a folder is wanted, a file found"):
        Folder(videos=tmp_path / "video.avi").entries()


@pytest.mark.parametrize(("val_share", "test_share"), [(-0.1, 0.2), (0.1, 1.0), (0.1, -0.5), (0.5, 0.5)])
def test_shares_that_leave_no_training_videos_are_refused(val_share, test_share, tmp_path):
    touch(tmp_path, "a/1.avi", "a/2.avi", "a/3.avi")
    with pytest.raises(BadSource, match=r"a share of .* cannot be held out for (val|test): wanted 0 <= share < 1"):
        Folder(videos=tmp_path, val_share=val_share, test_share=test_share).entries()


def test_a_file_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    touch(tmp_path, "a/1.avi")
    Path(tmp_path / "a" / b"caf\xe9.avi".decode(errors="surrogateescape")).touch()
    with pytest.raises(BadSource, match=r"caf\\udce9\.avi.*not UTF-8; rename it"):
        Folder(videos=tmp_path).entries()


# A table


def table(folder: Path, *lines: str) -> Path:
    path = folder / "videos.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_table_gives_its_rows_in_its_own_splits(tmp_path):
    path = table(
        tmp_path,
        "label,path,split,group,remark",
        "wave,clips/1.avi,train,anna,x",
        '"nod, twice",2.mp4,test,ben,',
        '"nod, twice",3.mp4,train,,',
    )
    listing = Csv(table=path).entries()
    assert listing.classes == ("nod, twice", "wave")
    assert [(entry.label, entry.split, entry.group) for entry in listing.entries] == [
        ("wave", "train", "anna"),
        ("nod, twice", "test", "ben"),
        ("nod, twice", "train", "3.mp4"),
    ]
    assert listing.entries[0].path == tmp_path / "clips/1.avi"


def test_a_table_from_a_spreadsheet_is_read_byte_order_mark_crlf_and_all(tmp_path):
    path = tmp_path / "videos.csv"
    path.write_bytes("\ufeffpath,label,split\r\né.avi,wavé,train\r\n".encode())
    [entry] = Csv(table=path, root=tmp_path).entries().entries
    assert (entry.name, entry.label) == ("é.avi", "wavé")


def test_a_class_file_decides_the_label_order(tmp_path):
    path = table(tmp_path, "path,label,split", "1.avi,b,train", "2.avi,a,val")
    (tmp_path / "classes.txt").write_text("b\na\nc\n")
    assert Csv(table=path, classes=tmp_path / "classes.txt").entries().classes == ("b", "a", "c")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label", "1.avi,a"], r"videos\.csv: no column split; the header has \['path', 'label'\]"),
        (["path;label;split"], r"no column label, path, split"),
        (["path,label,split"], r"videos\.csv: no rows below the header"),
        (
            ["path,label,split", "1.avi,a,train", "2.avi,a,dev"],
            r"videos\.csv:3: split 'dev' is none of train, val, test",
        ),
        (["path,label,split", "1.avi,a,train", "2.avi"], r"videos\.csv:3: the label is empty"),
        (["path,label,split", ",a,train"], r"videos\.csv:2: the path is empty"),
        (["path,label,split", "1.avi,,train"], r"videos\.csv:2: the label is empty"),
        (
            ["path,label,split", "1.avi,a,train", "2.avi,b,test"],
            r"videos\.csv:3: label 'b' is none of the 1 classes of the training rows",
        ),
    ],
)
def test_a_bad_table_is_refused_with_the_line(lines, message, tmp_path):
    with pytest.raises(BadSource, match=message):
        Csv(table=table(tmp_path, *lines)).entries()


def test_a_label_that_the_class_file_lacks_is_refused(tmp_path):
    path = table(tmp_path, "path,label,split", "1.avi,jump,train")
    (tmp_path / "classes.txt").write_text("run\nsit\n")
    with pytest.raises(BadSource, match=r"videos\.csv:2: label 'jump' is none of the 2 classes of .*classes\.txt"):
        Csv(table=path, classes=tmp_path / "classes.txt").entries()


def test_a_table_that_is_missing_or_not_utf8_is_refused(tmp_path):
    with pytest.raises(BadSource, match=r"--table .*nowhere\.csv: a file is wanted, nothing found"):
        Csv(table=tmp_path / "nowhere.csv").entries()
    path = tmp_path / "latin.csv"
    path.write_bytes("path,label,split\né.avi,a,train\n".encode("latin-1"))
    with pytest.raises(BadSource, match=r"latin\.csv: not UTF-8 text .*save it as UTF-8"):
        Csv(table=path).entries()


@pytest.mark.parametrize("again", ["1.avi", "./1.avi"])
def test_a_video_that_is_listed_twice_is_refused(again, tmp_path):
    path = table(tmp_path, "path,label,split", "1.avi,a,train", f"{again},a,test")
    with pytest.raises(BadSource, match=r"1\.avi: listed more than once \(1 such videos\)"):
        Csv(table=path).entries()


def test_a_group_in_two_splits_is_refused(tmp_path):
    path = table(tmp_path, "path,label,split,group", "1.avi,a,train,anna", "2.avi,a,val,ben", "3.avi,a,test,anna")
    with pytest.raises(BadSource, match=r"3\.avi: its group 'anna' is in the splits train and test"):
        Csv(table=path).entries()


# Keys


def test_keys_are_the_path_without_dots():
    listing = finish(("a",), [entry_of("YoYo/v_YoYo_g01_c01.avi"), entry_of("x/v_1.0_clip.mp4")])
    assert [entry.key for entry in listing.entries] == ["YoYo-v_YoYo_g01_c01", "x-v_1_0_clip"]


def test_names_that_would_share_a_key_get_their_own():
    names = ["x/a.b.avi", "x/a_b.avi", "x-a_b.avi", "x/a_b.mp4", "y/c.avi"]
    keys = [entry.key for entry in finish(("a",), map(entry_of, names)).entries]
    assert len(set(keys)) == 5
    assert keys[4] == "y-c"
    assert all(re.fullmatch(r"x-a_b-[0-9a-f]{8}", key) for key in keys[:4])


@settings(deadline=None)
@given(names=st.sets(st.text(st.sampled_from("ab._-/é \n日"), min_size=1, max_size=6), min_size=1, max_size=30))
def test_keys_are_unique_and_hold_nothing_that_a_reader_could_cut_at(names):
    entries = [replace(entry_of(name), path=Path(f"/{number}")) for number, name in enumerate(names)]
    keys = [entry.key for entry in finish(("a",), entries).entries]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)


# Holding out


@settings(deadline=None)
@given(
    videos=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=80),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 100),
)
def test_held_out_groups_are_whole_and_about_the_share_of_each_stratum(videos, share, seed):
    entries = [entry_of(f"{i}.avi", label=label, group=f"g{group}") for i, (label, group) in enumerate(videos)]
    after = hold_out(entries, "val", share, seed)

    assert [entry.name for entry in after] == [entry.name for entry in entries]
    groups = groups_of(after)
    assert not groups["train"] & groups["val"]
    classes_of = defaultdict(set)
    for entry in entries:
        classes_of[entry.group].add(entry.label)
    for stratum in {frozenset(labels) for labels in classes_of.values()}:
        members = {group for group, labels in classes_of.items() if labels == stratum}
        held = members & groups["val"]
        if share == 0 or len(members) == 1:
            assert not held
        else:
            assert 1 <= len(held) < len(members)
            assert abs(len(held) - share * len(members)) <= 1


def test_videos_outside_training_are_never_held_out():
    entries = [entry_of(f"{i}.avi", split="test") for i in range(10)]
    assert hold_out(entries, "val", 0.5, seed=0) == entries


@settings(max_examples=30, deadline=None)
@given(
    videos=st.sets(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 9), st.integers(0, 3)), min_size=1),
    val_share=st.floats(0, 0.4),
    test_share=st.floats(0, 0.5),
    seed=st.integers(0, 5),
)
def test_no_group_of_a_folder_is_ever_in_two_splits(videos, val_share, test_share, seed):
    with tempfile.TemporaryDirectory() as folder:
        touch(Path(folder), *(f"{label}/r{group}_{clip}.avi" for label, group, clip in videos))
        source = Folder(videos=Path(folder), group=r"r(\d)", val_share=val_share, test_share=test_share, seed=seed)
        entries = source.entries().entries
    assert len(entries) == len(videos)
    groups = groups_of(entries)
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    assert groups["train"]
