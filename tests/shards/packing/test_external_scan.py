"""What may stand in an external tar: labels, classes and captions; what cannot be used is named and harms nothing."""

import json
import pickle
import re
import tarfile
from typing import Any

import pytest
from external_tars import SMALL, header, index, link, rejected, samples, video, write_tar

from shards.index import Index
from shards.packing.external import (
    classes_from,
    plan_external,
    tars_to_scan,
)
from shards.sample_json import parse_captions
from shards.store import BadShards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the videos of these tests lie, each made once."""
    return tmp_path_factory.mktemp("videos")


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


def test_a_data_set_of_which_nothing_is_left_is_an_error_that_names_the_list_of_reasons(tmp_path):
    write_tar(tmp_path / "train.tar", ("0.avi", b"x"), ("0.cls", b"0"))
    for _ in range(2):  # and again, when run again
        with pytest.raises(BadShards, match=r"none of the 1 videos can be used; the reasons are in .*rejected\.jsonl"):
            index(tmp_path)
    assert not (tmp_path / "dataset.json").exists()
