"""A folder of class folders: split by group, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
from listings import groups_of, touch

from shards.packing.entries import BadSource
from shards.packing.sources import Folder


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
