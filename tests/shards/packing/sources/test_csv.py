"""A table of one's own: its splits, parts of files, and what is refused."""

import pytest
from listings import WHOLE, parts_of, table

from shards.packing.entries import BadSource
from shards.packing.sources import Csv


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
