"""Data sets on disk -> entries: what is listed, in which split, under which key, and what is refused."""

import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import DATA, needs_data

from grurcn.data import source_type
from shards.packing.entries import BadSource
from shards.packing.sources import Csv, Folder, Hmdb51, Kinetics, Msvd, Ucf101


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


def parts_of(listing):
    """{name: the seconds of its file}"""
    return {entry.name: (entry.start_seconds, entry.end_seconds) for entry in listing.entries}


WHOLE = (None, None)


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


# HMDB-51


def hmdb_lists(folder: Path, lists: dict[str, list[str]], split: int = 1) -> Path:
    """{class: lines} as the official lists are, with a space at the end of each line."""
    folder.mkdir(exist_ok=True)
    for label, lines in lists.items():
        (folder / f"{label}_test_split{split}.txt").write_text("".join(f"{line} \n" for line in lines))
    return folder


def hmdb_file(movie, label, number=0):
    return f"{movie}_{label}_f_cm_np1_fr_med_{number}.avi"


def test_hmdb51_takes_the_official_split_and_leaves_out_what_is_marked_0(tmp_path):
    lists = hmdb_lists(
        tmp_path / "lists",
        {
            "climb_stairs": ["BIG_FISH_climb_stairs_f_nm_np1_fr_med_1.avi 2"],
            "climb": [
                "(Rad)_Schlag!_climb_f_cm_np1_ba_bad_1.avi 1",
                "rope_climb_climb_f_cm_np6_le_goo_0.avi 0",
                "Rock_-_Joshua_Tree_climb_f_nm_np1_ba_goo_0.avi 2",
            ],
        },
    )
    hmdb_lists(lists, {"climb": ["other_climb_f_cm_np6_le_goo_0.avi 1"]}, split=2)

    listing = Hmdb51(videos=tmp_path, lists=lists, val_fraction=0).entries()

    assert listing.classes == ("climb", "climb_stairs")
    assert [(entry.name, entry.split) for entry in listing.entries] == [
        ("climb/(Rad)_Schlag!_climb_f_cm_np1_ba_bad_1.avi", "train"),
        ("climb/Rock_-_Joshua_Tree_climb_f_nm_np1_ba_goo_0.avi", "test"),
        ("climb_stairs/BIG_FISH_climb_stairs_f_nm_np1_fr_med_1.avi", "test"),
    ]
    assert listing.entries[0].path == tmp_path / "climb/(Rad)_Schlag!_climb_f_cm_np1_ba_bad_1.avi"


@pytest.mark.parametrize(
    ("file", "group"),
    [
        ("A_Beautiful_Mind_2_wave_f_cm_np1_fr_med_3.avi", "A_Beautiful_Mind"),
        ("A_Beautiful_Mind_10_wave_u_nm_np2_le_goo_0.avi", "A_Beautiful_Mind"),
        ("Final_Battle_1_3_wave_u_cm_np2_fr_bad_3.avi", "Final_Battle"),
        ("50_FIRST_DATES_wave_f_cm_np1_fr_med_3.avi", "50_FIRST_DATES"),
        ("How_to_wave_wave_f_cm_np1_fr_med_3.avi", "How_to_wave"),
        ("300_wave_f_cm_np1_fr_med_3.avi", "300"),
    ],
)
def test_the_group_of_an_hmdb51_video_is_its_movie_without_the_number_of_the_part(file, group, tmp_path):
    lists = hmdb_lists(tmp_path / "lists", {"wave": [f"{file} 1"]})
    [entry] = Hmdb51(videos=tmp_path, lists=lists).entries().entries
    assert entry.group == group


def test_a_movie_in_an_official_train_and_test_list_stays_in_both_as_two_groups(tmp_path):
    movies = [f"Movie_{letter}" for letter in "abcdefghij"]
    train, test = ([f"{hmdb_file(movie, 'run', number)} {number}" for movie in movies] for number in (1, 2))
    lists = hmdb_lists(tmp_path / "lists", {"run": train + test})

    groups = groups_of(Hmdb51(videos=tmp_path, lists=lists, val_fraction=0.2).entries().entries)

    assert {split: len(groups[split]) for split in groups} == {"train": 8, "val": 2, "test": 10}
    assert groups["train"] | groups["val"] == set(movies)
    assert groups["test"] == {f"test/{movie}" for movie in movies}


@settings(max_examples=30, deadline=None)
@given(
    videos=st.sets(st.tuples(st.sampled_from("ABCDEF"), st.sampled_from(["run", "sit", "walk"]), st.integers(0, 2))),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_no_movie_is_ever_in_train_and_val(videos, fraction, seed):
    lists = defaultdict(list, {"run": [hmdb_file("Z", "run") + " 1"]})
    for number, (movie, label, part) in enumerate(sorted(videos)):
        lists[label].append(f"{hmdb_file(f'{movie}_{part}', label, number)} {number % 2 + 1}")
    with tempfile.TemporaryDirectory() as folder:
        hmdb_lists(Path(folder), lists)
        entries = (
            Hmdb51(videos=Path(folder), lists=Path(folder), val_fraction=fraction, split_seed=seed).entries().entries
        )
    assert len(entries) == len(videos) + 1
    movies = {
        split: {entry.name.split("/")[1][0] for entry in entries if entry.split == split} for split in ("train", "val")
    }
    assert movies["train"]
    assert not movies["train"] & movies["val"]


@pytest.mark.parametrize(
    "line",
    [
        "Movie_run_f_cm_np1_fr_med_0.avi",
        "Movie_run_f_cm_np1_fr_med_0.avi 3",
        "Movie_sit_f_cm_np1_fr_med_0.avi 1",
        "run/Movie_run_f_cm_np1_fr_med_0.avi 1",
        "Movie_run_f_cm_np1_fr_med_0.mp4 1",
    ],
)
def test_a_line_that_is_no_hmdb51_video_is_refused_with_its_number(line, tmp_path):
    lists = hmdb_lists(tmp_path / "lists", {"run": [hmdb_file("Movie", "run") + " 1", "", line]})
    with pytest.raises(BadSource, match=rf"run_test_split1\.txt:3: '{re.escape(line)}' is not MOVIE_run_ATTRIBUTES_N"):
        Hmdb51(videos=tmp_path, lists=lists).entries()


def test_hmdb51_has_three_splits_and_its_lists_must_be_there(tmp_path):
    lists = hmdb_lists(tmp_path / "lists", {"run": [hmdb_file("Movie", "run") + " 1"]})
    with pytest.raises(BadSource, match=r"--split 0: HMDB-51 has the splits 1, 2 and 3"):
        Hmdb51(videos=tmp_path, lists=lists, split=0).entries()
    with pytest.raises(BadSource, match=r"lists: found no CLASS_test_split2\.txt; expected the folder"):
        Hmdb51(videos=tmp_path, lists=lists, split=2).entries()
    with pytest.raises(BadSource, match=r"--lists .*nowhere: found nothing; expected a folder"):
        Hmdb51(videos=tmp_path, lists=tmp_path / "nowhere").entries()


# Kinetics

HEADER = "label,youtube_id,time_start,time_end,split"


def kinetics(folder: Path, *rows: str, files: tuple[str, ...] = (), header: str = HEADER) -> Kinetics:
    """A table of the rows and a folder of the files."""
    videos = folder / "videos"
    videos.mkdir()
    return Kinetics(videos=touch(videos, *files), table=(table(folder, header, *rows),))


def test_kinetics_gives_the_rows_of_all_tables_in_their_splits(tmp_path):
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text(
        f'{HEADER},is_cc\n"mountain climber (exercise)",-3B32lodo2M,59,69,train,0\nyoga,_dbcJuKJQNs,0,10,train,1\n'
    )
    val.write_text(f"{HEADER}\nyoga,---QUuC4vJs,84,94,validate\nyoga,aaaaaaaaaaa,1,2,val\nyoga,bbbbbbbbbbb,1,2,test\n")

    listing = Kinetics(videos=tmp_path, table=(train, val)).entries()

    assert listing.classes == ("mountain climber (exercise)", "yoga")
    assert [(entry.label, entry.group, entry.split) for entry in listing.entries] == [
        ("mountain climber (exercise)", "-3B32lodo2M", "train"),
        ("yoga", "_dbcJuKJQNs", "train"),
        ("yoga", "val/---QUuC4vJs", "val"),
        ("yoga", "val/aaaaaaaaaaa", "val"),
        ("yoga", "test/bbbbbbbbbbb", "test"),
    ]


def test_kinetics_finds_cut_and_whole_videos_with_and_without_class_folders(tmp_path):
    source = kinetics(
        tmp_path,
        "air drumming,cut,12,22,train",
        "air drumming,spaced,1,11,train",
        "yoga,deep,100,110,train",
        "air drumming,whole,12,22,train",
        "air drumming,whole,5,12.5,train",
        "yoga,both,3,13,train",
        "yoga,missing,3,13,train",
        files=(
            *("cut_000012_000022.mp4", "air_drumming/spaced_000001_000011.mp4", "train/yoga/deep_000100_000110.webm"),
            *("air drumming/whole.mkv", "whole.txt", "yoga/both.mp4", "._both_000003_000013.mp4", "missing_3_13.mp4"),
            *("both_000003_000013.mp4",),
        ),
    )

    listing = source.entries()

    assert parts_of(listing) == {
        "cut_000012_000022.mp4": WHOLE,
        "air_drumming/spaced_000001_000011.mp4": WHOLE,
        "train/yoga/deep_000100_000110.webm": WHOLE,
        "air drumming/whole_000012_000022.mkv": (12, 22),
        "air drumming/whole_000005_000012.5.mkv": (5, 12.5),
        "both_000003_000013.mp4": WHOLE,
        "missing_000003_000013.mp4": WHOLE,
    }
    paths = [entry.path.relative_to(source.videos).as_posix() for entry in listing.entries]
    assert paths[3] == paths[4] == "air drumming/whole.mkv"
    assert [name for name in paths if not (source.videos / name).exists()] == ["missing_000003_000013.mp4"]
    assert [entry.key for entry in listing.entries][2:5] == [
        "train-yoga-deep_000100_000110",
        "air_drumming-whole_000012_000022",
        "air_drumming-whole_000005_000012_5",
    ]


def test_a_clip_of_two_classes_is_found_in_each_class_folder(tmp_path):
    files = ("yoga/x_000001_000011.mp4", "air_drumming/x_000001_000011.mp4")
    listing = kinetics(tmp_path, "yoga,x,1,11,train", "air drumming,x,1,11,train", files=files).entries()
    assert [entry.name for entry in listing.entries] == list(files)


def test_kinetics_reads_the_folder_once_however_many_rows_there_are(tmp_path, monkeypatch):
    rows = [f"yoga,video{number},0,10,train" for number in range(50)]
    source = kinetics(tmp_path, *rows, files=tuple(f"yoga/video{number}.mp4" for number in range(50)))
    reads = Counter()

    def counted(folder, **options):
        reads[str(folder)] += 1
        return walk(folder, **options)

    walk = os.walk
    monkeypatch.setattr("os.walk", counted)
    assert sum(entry.path.is_file() for entry in source.entries().entries) == 50
    assert reads == {str(source.videos): 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ",x,1,11,test",
            r"videos\.csv:3: no label; a table whose labels were not published .* leave it out of --table",
        ),
        ("yoga,x,1,11,dev", r"videos\.csv:3: split 'dev' is none of train, val, test"),
        ("sit,x,1,11,val", r"videos\.csv:3: label 'sit' is none of the 1 classes of the training rows; --classes FILE"),
        ("yoga,#NAME?,1,11,train", r"videos\.csv:3: youtube_id '#NAME\?' is no YouTube id; expected letters"),
        ("yoga,,1,11,train", r"videos\.csv:3: youtube_id '' is no YouTube id"),
        ("yoga,x,1,,train", r"videos\.csv:3: time_end '' is no time; expected seconds, 0 or more"),
        ("yoga,x,0:01,11,train", r"videos\.csv:3: time_start '0:01' is no time"),
        ("yoga,x,-1,11,train", r"videos\.csv:3: time_start '-1' is no time"),
        ("yoga,x,1,nan,train", r"videos\.csv:3: time_end 'nan' is no time"),
        ("yoga,x,11,1.5,train", r"videos\.csv:3: time_start 11 is not before time_end 1\.5"),
        ("yoga,ok,0.0,10,train", r"ok_000000_000010\.mp4: listed more than once \(1 such videos\)"),
    ],
)
def test_a_bad_kinetics_row_is_refused_with_the_line(row, message, tmp_path):
    with pytest.raises(BadSource, match=message):
        kinetics(tmp_path, "yoga,ok,0,10,train", row).entries()


def test_a_published_table_with_one_youtube_video_in_two_splits_stays_as_it_is(tmp_path):
    listing = kinetics(tmp_path, "yoga,x,0,10,train", "yoga,x,20,30,val").entries()
    assert [(entry.split, entry.group) for entry in listing.entries] == [("train", "x"), ("val", "val/x")]


def test_a_kinetics_test_table_without_a_label_column_is_refused(tmp_path):
    source = kinetics(tmp_path, "x,1,11,test", header="youtube_id,time_start,time_end,split")
    with pytest.raises(BadSource, match=r"videos\.csv:2: no label; .*leave it out of --table"):
        source.entries()


def test_kinetics_wants_a_table_with_its_columns(tmp_path):
    with pytest.raises(BadSource, match=r"--table: found no file; expected at least one CSV file"):
        Kinetics(videos=tmp_path, table=()).entries()
    with pytest.raises(BadSource, match=r"videos\.csv: no column time_end, youtube_id; the header has \['label', 'id'"):
        kinetics(tmp_path, "yoga,x,1,train", header="label,id,time_start,split").entries()


def test_a_class_file_lets_kinetics_do_without_training_rows(tmp_path):
    source = kinetics(tmp_path, "yoga,x,1,11,val")
    (tmp_path / "classes.txt").write_text("yoga\nair drumming\n")
    assert replace(source, classes=tmp_path / "classes.txt").entries().classes == ("yoga", "air drumming")


# MSVD


def labels(path: Path, captions_of: dict[str, list[str]]) -> Path:
    path.write_text(json.dumps([{"caption": captions, "id": name} for name, captions in captions_of.items()]))
    return path


def test_msvd_gives_videos_with_their_captions_and_no_classes(tmp_path):
    train = labels(
        tmp_path / "train.json", {"a-b_c_1_15.avi": ["A horse runs.", " Ein Pferd läuft\n", "A horse runs."]}
    )
    val = labels(tmp_path / "val.json", {"x_27_33.avi": ["Someone cooks"]})
    test = labels(tmp_path / "test.json", {"a-b_c_20_25.avi": ["a dog"]})

    listing = Msvd(videos=tmp_path, train=train, val=val, test=test).entries()

    assert listing.classes == ()
    assert [(entry.name, entry.label, entry.split, entry.group, entry.captions) for entry in listing.entries] == [
        ("a-b_c_1_15.avi", "", "train", "a-b_c", ("A horse runs.", "Ein Pferd läuft", "A horse runs.")),
        ("x_27_33.avi", "", "val", "val/x", ("Someone cooks",)),
        ("a-b_c_20_25.avi", "", "test", "test/a-b_c", ("a dog",)),
    ]
    assert [entry.key for entry in listing.entries] == ["a-b_c_1_15", "x_27_33", "a-b_c_20_25"]
    assert listing.entries[0].path == tmp_path / "a-b_c_1_15.avi"
    assert set(parts_of(listing).values()) == {WHOLE}


def test_msvd_without_a_validation_file_holds_out_whole_youtube_videos(tmp_path):
    train = {f"video_{number}_{start}_{start + 9}.avi": ["text"] for number in range(20) for start in (0, 10)}
    files = {
        "train": labels(tmp_path / "train.json", train),
        "test": labels(tmp_path / "test.json", {"t_1_2.avi": ["x"]}),
    }
    counts = []
    for seed in (0, 0, 1):
        groups = groups_of(Msvd(videos=tmp_path, **files, val_fraction=0.1, split_seed=seed).entries().entries)
        assert not groups["train"] & groups["val"]
        assert (len(groups["train"]), len(groups["val"]), groups["test"]) == (18, 2, {"test/t"})
        counts.append(groups["val"])
    assert counts[0] == counts[1] != counts[2]


def test_the_mapping_gives_the_standard_split_of_msvd(tmp_path):
    numbers = {"a_1_2": 1, "b_1_2": 1200, "c_1_2": 1201, "d_1_2": 1300, "e_1_2": 1301, "a_3_4": 1970}
    mapping = tmp_path / "youtube_mapping.txt"
    mapping.write_text("".join(f"{name} vid{number}\n" for name, number in numbers.items()))
    captions = labels(tmp_path / "all.json", {f"{name}.avi": [f"of {name}"] for name in [*numbers, "unnumbered_1_2"]})

    listing = Msvd(videos=tmp_path, captions=captions, mapping=mapping).entries()

    assert [(entry.name, entry.split, entry.captions[0]) for entry in listing.entries] == [
        ("a_1_2.avi", "train", "of a_1_2"),
        ("b_1_2.avi", "train", "of b_1_2"),
        ("c_1_2.avi", "val", "of c_1_2"),
        ("d_1_2.avi", "val", "of d_1_2"),
        ("e_1_2.avi", "test", "of e_1_2"),
        ("a_3_4.avi", "test", "of a_3_4"),
    ]


def test_a_video_of_the_mapping_without_captions_is_refused(tmp_path):
    (tmp_path / "map.txt").write_text("a_1_2 vid1\nb_1_2 vid2\n")
    captions = labels(tmp_path / "all.json", {"a_1_2.avi": ["text"]})
    with pytest.raises(BadSource, match=r"all\.json: no captions of b_1_2, which .*map\.txt lists \(1 such videos\)"):
        Msvd(videos=tmp_path, captions=captions, mapping=tmp_path / "map.txt").entries()


@pytest.mark.parametrize("line", ["b_1_2", "b_1_2 1201", "vid2 b_1_2", "b_1_2 vid0", "b_1_2 vid1971"])
def test_a_line_that_is_no_mapping_is_refused_with_its_number(line, tmp_path):
    (tmp_path / "map.txt").write_text(f"a_1_2 vid1\n\n{line}\n")
    captions = labels(tmp_path / "all.json", {"a_1_2.avi": ["text"]})
    with pytest.raises(BadSource, match=rf"map\.txt:3: '{line}' is not ID_START_END and vid1 to vid1970"):
        Msvd(videos=tmp_path, captions=captions, mapping=tmp_path / "map.txt").entries()


@pytest.mark.parametrize("line", ["a_1_2 vid2", "b_1_2 vid1"])
def test_a_mapping_that_names_something_twice_is_refused(line, tmp_path):
    (tmp_path / "map.txt").write_text(f"a_1_2 vid1\n{line}\n")
    captions = labels(tmp_path / "all.json", {"a_1_2.avi": ["text"]})
    with pytest.raises(BadSource, match=rf"map\.txt:2: '{line}' names a video or a number that an earlier line has"):
        Msvd(videos=tmp_path, captions=captions, mapping=tmp_path / "map.txt").entries()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"id": "a_1_2.avi",\n]', r"train\.json:3: not JSON \("),
        ("{}", r"train\.json: expected a list of videos"),
        ("[]", r"train\.json: expected a list of videos"),
        ('["a_1_2.avi"]', r'train\.json: video 1 of 1 has no "id"'),
        ('[{"id": 7, "caption": ["x"]}]', r'train\.json: video 1 of 1 has no "id"'),
        ('[{"id": "a_1_2.avi"}]', r"train\.json: id 'a_1_2\.avi': no captions; .*found None"),
        ('[{"id": "a_1_2.avi", "caption": []}]', r"id 'a_1_2\.avi': no captions; .* at least one; found \[\]"),
        ('[{"id": "a_1_2.avi", "caption": "one"}]', r"id 'a_1_2\.avi': no captions; .*must be a list.*found 'one'"),
        ('[{"id": "a_1_2.avi", "caption": ["x", " "]}]', r"id 'a_1_2\.avi': caption 2 of 2 is ' '; write one, or take"),
        ('[{"id": "a_1_2.avi", "caption": [3]}]', r"train\.json: id 'a_1_2\.avi': caption 1 of 1 is 3;"),
        ('[{"id": "vid12", "caption": ["x"]}]', r"train\.json: id 'vid12' is not ID_START_END\.avi"),
        ('[{"id": "../a_1_2.avi", "caption": ["x"]}]', r"train\.json: id '\.\./a_1_2\.avi' is not ID_START_END\.avi"),
        (
            '[{"id": "a_1_2.avi", "caption": ["x"]}, {"id": "a_1_2.avi", "caption": ["y"]}]',
            r"train\.json: id 'a_1_2\.avi' is there twice; put all its captions into one list",
        ),
    ],
)
def test_a_bad_caption_file_is_refused_with_the_video(content, message, tmp_path):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(BadSource, match=message):
        Msvd(videos=tmp_path, train=tmp_path / "train.json").entries()


def test_a_video_in_two_caption_files_is_refused(tmp_path):
    file = labels(tmp_path / "all.json", {"a_1_2.avi": ["text"]})
    with pytest.raises(BadSource, match=r"a_1_2\.avi: listed more than once"):
        Msvd(videos=tmp_path, train=file, test=file).entries()


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ((), "no captions"),
        (("captions",), "--captions"),
        (("mapping",), "--mapping"),
        (("train", "mapping"), "--train, --mapping"),
        (("val", "captions", "mapping"), "--val, --captions, --mapping"),
    ],
)
def test_msvd_wants_its_splits_in_one_of_two_ways(options, given, tmp_path):
    with pytest.raises(
        BadSource, match=rf"msvd: found {given}; expected either --train, .* or both --captions and --mapping"
    ):
        replace(Msvd(videos=tmp_path), **dict.fromkeys(options, tmp_path / "file")).entries()


@needs_data
def test_the_real_msvd_labels_give_1550_videos_and_25906_captions():
    folder = DATA / "captions" / "msvd"
    listing = Msvd(videos=folder, train=folder / "train_labels.json", test=folder / "test_labels.json").entries()
    videos, captions = Counter(), Counter()
    for entry in listing.entries:
        videos[entry.split] += 1
        captions[entry.split] += len(entry.captions)
    assert (videos["train"] + videos["val"], videos["test"]) == (1450, 100)
    assert (captions["train"] + captions["val"], captions["test"]) == (24232, 1674)
    assert 0.08 < videos["val"] / 1450 < 0.12
    assert sum(entry.path.is_file() for entry in listing.entries) == 4
    assert listing.entries[0].name == "xBePrplM4OA_6_18.avi"
    assert listing.entries[0].captions[0] == "A woman goes under a horse."
    groups = groups_of(listing.entries)
    assert not groups["train"] & groups["val"]
    assert len({entry.key for entry in listing.entries}) == 1550


# A folder of class folders


def test_a_folder_gives_its_folders_as_classes_and_only_its_video_files(tmp_path):
    touch(tmp_path, "run/1.avi", "run/2.MP4", "run/more/3.mkv", "run/notes.txt", "jump/1.avi", ".cache/4.avi", "5.avi")
    listing = Folder(videos=tmp_path, test_fraction=0, val_fraction=0).entries()
    assert listing.classes == ("jump", "run")
    assert [(entry.name, entry.label) for entry in listing.entries] == [
        ("jump/1.avi", "jump"),
        ("run/1.avi", "run"),
        ("run/2.MP4", "run"),
        ("run/more/3.mkv", "run"),
    ]
    assert {entry.split for entry in listing.entries} == {"train"}


def test_a_folder_is_split_in_its_fractions_class_by_class(tmp_path):
    for label in "abc":
        touch(tmp_path, *(f"{label}/{number}.avi" for number in range(20)))
    listing = Folder(videos=tmp_path, val_fraction=0.1, test_fraction=0.2).entries()
    counts = Counter((entry.label, entry.split) for entry in listing.entries)
    for label in "abc":
        assert [counts[label, split] for split in ("train", "val", "test")] == [14, 2, 4]


def test_groups_that_run_through_all_classes_are_never_cut(tmp_path):
    """As in UT-Interaction: IDX_SEQ_K.avi, SEQ is the recording, which shows every class."""
    touch(tmp_path, *(f"{label}/{label}x_{recording}_0.avi" for label in "abc" for recording in range(1, 11)))
    listing = Folder(videos=tmp_path, group=r"_(\d+)_\d+\.avi$", val_fraction=0.1, test_fraction=0.2).entries()
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
    with pytest.raises(BadSource, match=r"found no videos in 1 class folders.*one folder of videos per class"):
        Folder(videos=tmp_path).entries()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadSource, match=r"--videos .*nowhere: found nothing; expected a folder"):
        Folder(videos=tmp_path / "nowhere").entries()
    touch(tmp_path, "video.avi")
    with pytest.raises(BadSource, match=r"--videos .*video\.avi: found a file; expected a folder"):
        Folder(videos=tmp_path / "video.avi").entries()


@pytest.mark.parametrize(("val_fraction", "test_fraction"), [(-0.1, 0.2), (0.1, 1.0), (0.1, -0.5), (0.5, 0.5)])
def test_fractions_that_leave_no_training_videos_are_refused(val_fraction, test_fraction, tmp_path):
    touch(tmp_path, "a/1.avi", "a/2.avi", "a/3.avi")
    with pytest.raises(BadSource, match=r"(val|test) fraction .*: expected at least 0 and below 1"):
        Folder(videos=tmp_path, val_fraction=val_fraction, test_fraction=test_fraction).entries()


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
    with pytest.raises(BadSource, match=r"--table .*nowhere\.csv: found nothing; expected a file"):
        Csv(table=tmp_path / "nowhere.csv").entries()
    path = tmp_path / "latin.csv"
    path.write_bytes("path,label,split\né.avi,a,train\n".encode("latin-1"))
    with pytest.raises(BadSource, match=r"latin\.csv: not UTF-8 text .*save it as UTF-8"):
        Csv(table=path).entries()


def test_rows_with_start_and_end_are_parts_of_a_file_and_one_group(tmp_path):
    path = table(
        tmp_path,
        "path,label,split,start,end",
        "clips/1.avi,a,train,12,22",
        "clips/1.avi,a,train,0.5,3",
        "./clips/1.avi,a,train,,",
        "2.avi,a,test,,",
    )
    listing = Csv(table=path).entries()
    assert parts_of(listing) == {
        "clips/1_000012_000022.avi": (12, 22),
        "clips/1_000000.5_000003.avi": (0.5, 3),
        "./clips/1.avi": WHOLE,
        "2.avi": WHOLE,
    }
    assert [entry.group for entry in listing.entries] == ["clips/1.avi"] * 3 + ["2.avi"]
    assert {entry.path for entry in listing.entries} == {tmp_path / "clips/1.avi", tmp_path / "2.avi"}
    assert listing.entries[0].key == "clips-1_000012_000022"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1.avi,a,train,3,", r"videos\.csv:3: end '' is no time; expected seconds, 0 or more"),
        ("1.avi,a,train,,3", r"videos\.csv:3: start '' is no time"),
        ("1.avi,a,train,one,3", r"videos\.csv:3: start 'one' is no time"),
        ("1.avi,a,train,3,3.0004", r"videos\.csv:3: start 3 is not before end 3$"),
        ("1.avi,a,train,1.0,2", r"1\.avi, 1\.0 to 2\.0 s: listed more than once \(1 such videos\)"),
        ("1.avi,a,val,1.5,3", r"1_000001\.5_000003\.avi: its group '1\.avi' is in the splits train and val"),
    ],
)
def test_a_bad_part_of_a_file_is_refused(row, message, tmp_path):
    with pytest.raises(BadSource, match=message):
        Csv(table=table(tmp_path, "path,label,split,start,end", "1.avi,a,train,1,2", row)).entries()


def test_a_table_with_an_open_quote_is_refused_with_the_line(tmp_path):
    path = table(tmp_path, "path,label,split", '1.avi,"a,train', *["2.avi,b,train"] * 10_000)
    with pytest.raises(BadSource, match=r"videos\.csv:\d+: not CSV \(field larger .* without its second"):
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


# The command line


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("hmdb51 --videos v --lists l --split 2", Hmdb51(videos=Path("v"), lists=Path("l"), split=2)),
        ("kinetics --videos v --table a.csv b.csv", Kinetics(videos=Path("v"), table=(Path("a.csv"), Path("b.csv")))),
        ("msvd --videos v --train t --split-seed 3", Msvd(videos=Path("v"), train=Path("t"), split_seed=3)),
    ],
)
def test_a_source_is_a_subcommand(command, source):
    assert tyro.cli(source_type(), args=command.split()) == source
