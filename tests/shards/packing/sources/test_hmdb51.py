"""HMDB-51: the official split, whole movies held out, and what is refused."""

import re
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listings import groups_of

from shards.packing.entries import BadSource
from shards.packing.sources import Hmdb51


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
