"""What every listing keeps: a key of its own for each sample, groups in one split, whole groups held out."""

import re
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from listings import groups_of, table, touch

from shards.packing.entries import Entry, hold_out, make_listing
from shards.packing.sources import Csv, Folder


def entry_of(name, *, label="a", split="train", group=None):
    return Entry(path=Path(name), name=name, label=label, split=split, group=group or name)


# Keys


def test_keys_are_the_path_without_dots():
    listing = make_listing(("a",), [entry_of("YoYo/v_YoYo_g01_c01.avi"), entry_of("x/v_1.0_clip.mp4")])
    assert [entry.key for entry in listing.entries] == ["YoYo-v_YoYo_g01_c01", "x-v_1_0_clip"]


def test_names_that_would_share_a_key_get_their_own():
    names = ["x/a.b.avi", "x/a_b.avi", "x-a_b.avi", "x/a_b.mp4", "y/c.avi"]
    keys = [entry.key for entry in make_listing(("a",), map(entry_of, names)).entries]
    assert len(set(keys)) == 5
    assert keys[4] == "y-c"
    assert all(re.fullmatch(r"x-a_b-[0-9a-f]{8}", key) for key in keys[:4])


def test_a_part_and_a_whole_file_of_its_name_get_their_own_keys():
    part = replace(entry_of("x_000001_000002.avi"), path=Path("x.avi"), start_seconds=1.0, end_seconds=2.0)
    keys = [entry.key for entry in make_listing(("a",), [part, entry_of("x_000001_000002.avi")]).entries]
    assert len(set(keys)) == 2
    assert all(re.fullmatch(r"x_000001_000002-[0-9a-f]{8}", key) for key in keys)


@settings(max_examples=50, deadline=None)
@given(
    parts=st.sets(
        st.tuples(
            st.sampled_from(["a.avi", "a_b.mp4", "a.b.avi", "a/b.avi"]), st.integers(0, 2000), st.integers(1, 2000)
        )
    )
)
def test_parts_of_files_have_unique_names_and_keys(parts):
    """Lengths and starts in milliseconds."""
    rows = [f"{path},a,train,{start / 1000},{(start + length) / 1000}" for path, start, length in sorted(parts)]
    with tempfile.TemporaryDirectory() as folder:
        listing = Csv(table=table(Path(folder), "path,label,split,start,end", "a.avi,a,train,,", *rows)).entries()
    assert len({entry.name for entry in listing.entries}) == len(parts) + 1
    assert len({entry.key for entry in listing.entries}) == len(parts) + 1
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", entry.key) for entry in listing.entries)


@settings(deadline=None)
@given(names=st.sets(st.text(st.sampled_from("ab._-/é \n日"), min_size=1, max_size=6), min_size=1, max_size=30))
def test_keys_are_unique_and_hold_nothing_that_a_reader_could_cut_at(names):
    entries = [replace(entry_of(name), path=Path(f"/{number}")) for number, name in enumerate(names)]
    keys = [entry.key for entry in make_listing(("a",), entries).entries]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)


# Holding out


@settings(deadline=None)
@given(
    videos=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=80),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 100),
)
def test_held_out_groups_are_whole_and_about_the_fraction_of_each_stratum(videos, fraction, seed):
    entries = [entry_of(f"{i}.avi", label=label, group=f"g{group}") for i, (label, group) in enumerate(videos)]
    after = hold_out(entries, "val", fraction, seed)

    assert [entry.name for entry in after] == [entry.name for entry in entries]
    groups = groups_of(after)
    assert not groups["train"] & groups["val"]
    classes_of = defaultdict(set)
    for entry in entries:
        classes_of[entry.group].add(entry.label)
    strata = defaultdict(set)
    for group, labels in classes_of.items():
        strata[frozenset(labels)].add(group)
    for labels in [labels for labels in strata if len(labels) > 1 and round(fraction * len(strata[labels])) == 0]:
        strata["several classes"] |= strata.pop(labels)
    for members in strata.values():
        held = members & groups["val"]
        if fraction == 0 or len(members) == 1:
            assert not held
        else:
            assert 1 <= len(held) < len(members)
            assert abs(len(held) - fraction * len(members)) <= 1


def test_groups_of_rare_sets_of_classes_are_drawn_together():
    """As in HMDB-51: hardly two movies show the same actions, and some actions are in movies only."""
    sets = [a + b for a in "abcdefg" for b in "hijklmn"]
    entries = [entry_of(f"{label}{pair}", label=label, group=pair) for pair in sets for label in pair]
    held = groups_of(hold_out(entries, "val", 0.2, seed=0))["val"]
    assert len(held) == 10  # a fifth of 49


def test_videos_outside_training_are_never_held_out():
    entries = [entry_of(f"{i}.avi", split="test") for i in range(10)]
    assert hold_out(entries, "val", 0.5, seed=0) == entries


@settings(max_examples=30, deadline=None)
@given(
    videos=st.sets(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 9), st.integers(0, 3)), min_size=1),
    val_fraction=st.floats(0, 0.4),
    test_fraction=st.floats(0, 0.5),
    seed=st.integers(0, 5),
)
def test_no_group_of_a_folder_is_ever_in_two_splits(videos, val_fraction, test_fraction, seed):
    with tempfile.TemporaryDirectory() as folder:
        touch(Path(folder), *(f"{label}/r{group}_{clip}.avi" for label, group, clip in videos))
        source = Folder(
            videos=Path(folder), group=r"r(\d)", val_fraction=val_fraction, test_fraction=test_fraction, split_seed=seed
        )
        entries = source.entries().entries
    assert len(entries) == len(videos)
    groups = groups_of(entries)
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    assert groups["train"]
