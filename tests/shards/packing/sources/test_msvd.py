"""MSVD: captions, its splits, and what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from listings import WHOLE, groups_of, parts_of
from videos import DATA, needs_data

from shards.packing.entries import BadSource
from shards.packing.sources import Msvd


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
