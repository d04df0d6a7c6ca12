"""Kinetics: rows of all tables, cut and whole videos, and what is refused."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from listings import WHOLE, parts_of, table, touch

from shards.packing.entries import BadSource
from shards.packing.sources import Kinetics

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
