"""What a source lists: entries, one a sample, each in one split.

A source (sources/) makes entries, may hold some out, and ends with `make_listing`, which gives each its key.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SPLITS = ("train", "val", "test")


class BadSource(ValueError):
    """A folder, list or table that cannot become entries. The message names the file, the line and how to fix it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One video, or a part of one, that is to become one sample."""

    path: Path  # where the video is, or would be
    name: str  # its path inside the source, with "/"; a part's name has its seconds in it
    key: str = ""  # its WebDataset key, which make_listing gives it: no dots, unique in the data set
    label: str  # class name; empty where a data set has captions and no classes
    split: str  # one of SPLITS
    group: str  # videos of one group are cut from one recording: never in two splits
    captions: tuple[str, ...] = ()  # sentences that describe the video
    start_seconds: float | None = None  # the sample is the part [start, end) of the file; None: the whole file
    end_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source lists: the classes in label order (none where there are captions), and the videos."""

    classes: tuple[str, ...]
    entries: tuple[Entry, ...]


def official_group(split: str, recording: str) -> str:
    """The group of a video that an official list puts into `split`.

    Some official lists have clips of one recording in train and in test (HMDB-51 and MSVD do). Published scores are
    measured on these lists, so they stay as they are: "test/RECORDING" is another group than "RECORDING". What we hold out
    of the training videos ourselves never cuts a recording.
    """
    return recording if split == "train" else f"{split}/{recording}"


def hold_out(entries: Sequence[Entry], split: str, fraction: float, seed: int) -> list[Entry]:
    """Moves whole groups of the training entries into `split`: about a fraction of them, at least one if fraction > 0.

    Groups are stratified by the set of classes that they hold. Groups of one class are drawn class by class (UCF-101,
    or each video a group of its own). Groups that run through all classes are drawn among themselves. Sets of several
    classes that are too rare to give a whole group (the movies of HMDB-51) are drawn together. A stratum of
    one group stays in training. Which groups go depends on the seed and on the groups' names alone.

    Raises BadSource unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise BadSource(f"{split} fraction {fraction:g}: expected at least 0 and below 1")
    classes_of_group: defaultdict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.split == "train":
            classes_of_group[entry.group].add(entry.label)
    strata: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for group, labels in classes_of_group.items():
        strata[tuple(sorted(labels))].append(group)
    rare = [labels for labels, groups in strata.items() if len(labels) > 1 and round(fraction * len(groups)) == 0]
    strata[()] = [group for labels in rare for group in strata.pop(labels)]

    held: set[str] = set()
    for groups in strata.values():
        groups.sort(key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
        count = max(1, round(fraction * len(groups))) if fraction > 0 else 0
        held.update(groups[: max(0, min(count, len(groups) - 1))])
    return [
        replace(entry, split=split) if entry.split == "train" and entry.group in held else entry for entry in entries
    ]


def make_listing(classes: tuple[str, ...], entries: Iterable[Entry]) -> Listing:
    """Gives each entry its key. Raises BadSource for a sample that is there twice, or a group in two splits."""
    entries = tuple(entries)
    parts = Counter((entry.path, entry.start_seconds, entry.end_seconds) for entry in entries)
    double = [part for part, count in parts.items() if count > 1]
    if double:
        path, start, end = double[0]
        part = "" if start is None else f", {start} to {end} s"
        raise BadSource(f"{path}{part}: listed more than once ({len(double)} such videos); list each video once")
    split_of_group: dict[str, str] = {}
    torn: dict[str, tuple[Entry, str]] = {}
    for entry in entries:
        other = split_of_group.setdefault(entry.group, entry.split)
        if other != entry.split:
            torn.setdefault(entry.group, (entry, other))
    if torn:
        entry, other = next(iter(torn.values()))
        raise BadSource(
            f"{entry.name}: its group {entry.group!r} is in the splits {other} and {entry.split} ({len(torn)} such "
            "groups); clips of one recording in two splits make test scores too good: put the whole group into one split"
        )
    keys = [key_of(entry.name) for entry in entries]
    entries_of_key = Counter(keys)
    keyed = []
    for entry, key in zip(entries, keys, strict=True):
        if entries_of_key[key] > 1:  # "a.b" and "a_b" fall together, and a part of "a" with a whole "a_000012_000022"
            whole = entry.start_seconds is None
            identity = entry.name if whole else f"{entry.name} {entry.start_seconds} {entry.end_seconds}"
            key = f"{key}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        keyed.append(replace(entry, key=key))
    return Listing(classes=classes, entries=tuple(keyed))


def key_of(name: str) -> str:
    """A WebDataset key for a path: readers cut file names at the first dot, so a key holds none.

    YoYo/v_YoYo_g01_c01.avi -> YoYo-v_YoYo_g01_c01
    """
    stem = name.removesuffix(Path(name).suffix).replace("/", "-")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)


def part_name(name: str, start_seconds: float, end_seconds: float) -> str:
    """The name of a part of a video, as Kinetics names its clips.

    clips/1.mp4, 12, 22.5 -> clips/1_000012_000022.5.mp4
    """
    suffix = Path(name).suffix
    return f"{name.removesuffix(suffix)}_{six_digits(start_seconds)}_{six_digits(end_seconds)}{suffix}"


def six_digits(seconds: float) -> str:
    """12 -> 000012, 22.5 -> 000022.5; to the millisecond."""
    whole, _, fraction = f"{seconds:.3f}".rstrip("0").partition(".")
    return whole.zfill(6) + (f".{fraction}" if fraction else "")
