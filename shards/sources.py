"""Where videos and labels come from: a data set on disk -> entries, one a video, each in one split.

A source is a frozen dataclass whose `entries()` lists what shall be packed. It reads lists and folder names only;
whether a video decodes is found out while packing (pack.py).
"""

import csv
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

SPLITS = ("train", "val", "test")
VIDEO_SUFFIXES = frozenset(
    {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp"}
)


class BadSource(ValueError):
    """A folder, list or table that cannot become entries. The message names the file, the line and the way out."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One video that shall become one sample."""

    path: Path  # where the video is, or would be
    name: str  # its path inside the source, with "/", as people know it
    key: str  # its WebDataset key: no dots, unique in the data set
    label: str  # class name
    split: str  # one of SPLITS
    group: str  # videos of one group are cut from one recording: never in two splits


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source lists: the classes in label order, and the videos."""

    classes: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Ucf101:
    """UCF-101: a folder of CLASS/v_CLASS_gNN_cMM.avi and the official split lists."""

    videos: Path
    """Folder with one folder per class."""
    lists: Path
    """Folder with classInd.txt, trainlist0N.txt and testlist0N.txt."""
    split: int = 1
    """Which of the three official splits."""
    val_share: float = 0.1
    """Share of each class's training groups (g01..g25) held out for validation."""
    seed: Annotated[int, tyro.conf.arg(name="split-seed")] = 0
    """Decides which groups are held out."""

    def entries(self) -> Listing:
        """The official lists' videos, present on disk or not, and a validation split held out by group."""
        require_folder(self.videos, "--videos")
        require_folder(self.lists, "--lists")
        if self.split not in (1, 2, 3):
            raise BadSource(f"--split {self.split}: UCF-101 has the splits 1, 2 and 3")
        classes = self.class_names()
        entries = []
        for split in ("train", "test"):
            listing = self.lists / f"{split}list{self.split:02}.txt"
            for number, line in enumerate(read_lines(listing), start=1):
                name = line.split()[0]  # a training list has the class number behind the name
                match = re.fullmatch(r"(\w+)/v_\w+_g(\d+)_c\d+\.avi", name)
                if match is None or match[1] not in classes:
                    raise BadSource(
                        f"{listing}:{number}: {line!r} is not CLASS/v_CLASS_gNN_cMM.avi with a class of classInd.txt"
                    )
                label, group = match[1], f"{match[1]}_g{match[2]}"
                entries.append(Entry(path=self.videos / name, name=name, key="", label=label, split=split, group=group))
        return finish(classes, hold_out(entries, "val", self.val_share, self.seed))

    def class_names(self) -> tuple[str, ...]:
        path = self.lists / "classInd.txt"
        lines = read_lines(path)
        for number, line in enumerate(lines, start=1):
            if not re.fullmatch(r"\d+\s+\w+", line):
                raise BadSource(f"{path}:{number}: {line!r} is not a class's number and name")
        return tuple(line.split()[1] for line in lines)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder with one folder of videos per class."""

    videos: Path
    """Folder with one folder per class."""
    group: str | None = None
    """Regular expression searched in each video's CLASS/FILE path; its first bracket (or the whole match) names the
    group. Videos of one group never land in two splits. Default: each video is a group of its own."""
    val_share: float = 0.1
    """Share of the groups held out for validation."""
    test_share: float = 0.2
    """Share of the groups held out for testing."""
    seed: Annotated[int, tyro.conf.arg(name="split-seed")] = 0
    """Decides which groups are held out."""

    def entries(self) -> Listing:
        """Every video file below a class folder, split by group."""
        require_folder(self.videos, "--videos")
        folders = sorted(path for path in self.videos.iterdir() if path.is_dir() and not path.name.startswith("."))
        entries = [self.entry(folder.name, path) for folder in folders for path in video_files(folder)]
        if not entries:
            raise BadSource(
                f"{self.videos}: no videos found (looked for CLASS/*{{{','.join(sorted(VIDEO_SUFFIXES))}}} in "
                f"{len(folders)} class folders); --videos wants a folder with one folder of videos per class"
            )
        held_test = hold_out(entries, "test", self.test_share, self.seed)
        val_share_of_rest = self.val_share / (1 - self.test_share) if self.test_share < 1 else 0.0
        return finish(
            tuple(sorted({entry.label for entry in entries})),
            hold_out(held_test, "val", val_share_of_rest, self.seed),
        )

    def entry(self, label: str, path: Path) -> Entry:
        name = path.relative_to(self.videos).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BadSource(f"{self.videos}/{name!r}: the file's name is not UTF-8; rename it") from None
        return Entry(path=path, name=name, key="", label=label, split="train", group=self.group_of(name))

    def group_of(self, name: str) -> str:
        if self.group is None:
            return name
        match = search_pattern(self.group, name)
        group = match[1] if match.re.groups else match[0]
        if not group:
            raise BadSource(f"{name}: --group {self.group!r} matches nothing there; every video must have a group")
        return group


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A table with the columns path, label, split and, if wanted, group."""

    table: Path
    """CSV file with a header line; paths are relative to --root; split is train, val or test."""
    root: Path | None = None
    """Folder that the paths start from. Default: the table's folder."""
    classes: Path | None = None
    """Text file with one class name a line, in label order. Default: the labels of the training rows, sorted."""

    def entries(self) -> Listing:
        """The table's rows, in its own splits."""
        require_file(self.table, "--table")
        root = self.root or self.table.parent
        require_folder(root, "--root")
        with io.StringIO(read_text(self.table), newline="") as lines:
            reader = csv.DictReader(lines)
            missing = {"path", "label", "split"} - set(reader.fieldnames or ())
            if missing:
                raise BadSource(
                    f"{self.table}: no column {', '.join(sorted(missing))}; the header has {reader.fieldnames}"
                )
            rows = [(reader.line_num, row) for row in reader]
        if not rows:
            raise BadSource(f"{self.table}: no rows below the header; one row a video is wanted")
        classes = self.class_names(rows)
        return finish(classes, [self.entry(line, row, root, classes) for line, row in rows])

    def class_names(self, rows: Sequence[tuple[int, dict[str, str]]]) -> tuple[str, ...]:
        if self.classes is not None:
            require_file(self.classes, "--classes")
            return tuple(read_lines(self.classes))
        return tuple(sorted({row["label"] for _, row in rows if row["split"] == "train"}))

    def entry(self, line: int, row: dict[str, str], root: Path, classes: Sequence[str]) -> Entry:
        where = f"{self.table}:{line}"
        for column in ("path", "label"):
            if not row[column]:
                raise BadSource(f"{where}: the {column} is empty")
        if row["split"] not in SPLITS:
            raise BadSource(f"{where}: split {row['split']!r} is none of {', '.join(SPLITS)}")
        if row["label"] not in classes:
            origin = self.classes or "the training rows"
            raise BadSource(f"{where}: label {row['label']!r} is none of the {len(classes)} classes of {origin}")
        group = row.get("group") or row["path"]
        return Entry(
            path=root / row["path"],
            name=row["path"],
            key="",
            label=row["label"],
            split=row["split"],
            group=group,
        )


Source = (
    Annotated[Ucf101, tyro.conf.subcommand("ucf101")]
    | Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Csv, tyro.conf.subcommand("csv")]
)


def hold_out(entries: Sequence[Entry], split: str, share: float, seed: int) -> list[Entry]:
    """Moves whole groups of the training entries into `split`, about `share` of them, at least one where share > 0.

    Groups are stratified by the set of classes that they hold: groups of one class are drawn class by class (UCF-101,
    or each video a group of its own), groups that run through all classes are drawn among themselves. A stratum of
    one group stays in training. Which groups go depends on the seed and on the groups' names alone.
    """
    if not 0 <= share < 1:
        raise BadSource(f"a share of {share:g} cannot be held out for {split}: wanted 0 <= share < 1")
    classes_of_group: defaultdict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.split == "train":
            classes_of_group[entry.group].add(entry.label)
    strata: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for group, labels in classes_of_group.items():
        strata[tuple(sorted(labels))].append(group)

    held: set[str] = set()
    for groups in strata.values():
        groups.sort(key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
        wanted = max(1, round(share * len(groups))) if share > 0 else 0
        held.update(groups[: min(wanted, len(groups) - 1)])
    return [
        replace(entry, split=split) if entry.split == "train" and entry.group in held else entry for entry in entries
    ]


def finish(classes: tuple[str, ...], entries: Iterable[Entry]) -> Listing:
    """Gives each entry its key, and checks what every source must keep: unique videos, groups in one split."""
    entries = tuple(entries)
    double = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if double:
        raise BadSource(f"{double[0]}: listed more than once ({len(double)} such videos); list each video once")
    split_of_group: dict[str, str] = {}
    for entry in entries:
        other = split_of_group.setdefault(entry.group, entry.split)
        if other != entry.split:
            raise BadSource(
                f"{entry.name}: its group {entry.group!r} is in the splits {other} and {entry.split}; clips of one "
                "recording in two splits make test scores too good: put the whole group into one split"
            )
    keys = Counter(key_of(entry.name) for entry in entries)
    keyed = []
    for entry in entries:
        key = key_of(entry.name)
        if keys[key] > 1:  # "a.b" and "a_b" fall together
            key = f"{key}-{hashlib.sha256(entry.name.encode()).hexdigest()[:8]}"
        keyed.append(replace(entry, key=key))
    return Listing(classes=classes, entries=tuple(keyed))


def key_of(name: str) -> str:
    """A WebDataset key for a path: readers cut file names at the first dot, so a key holds none.

    YoYo/v_YoYo_g01_c01.avi -> YoYo-v_YoYo_g01_c01
    """
    stem = name.removesuffix(Path(name).suffix).replace("/", "-")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)


def video_files(folder: Path) -> list[Path]:
    """The video files anywhere below a folder, by their suffix, in order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())


def search_pattern(pattern: str, name: str) -> re.Match[str]:
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise BadSource(f"--group {pattern!r} is not a regular expression: {error}") from None
    if match is None:
        raise BadSource(f"{name}: --group {pattern!r} does not match; every video must have a group")
    return match


def require_folder(path: Path, option: str) -> None:
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise BadSource(f"{option} {path}: a folder is wanted, {found} found")


def require_file(path: Path, option: str) -> None:
    if not path.is_file():
        found = "a folder" if path.exists() else "nothing"
        raise BadSource(f"{option} {path}: a file is wanted, {found} found")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without their ends (LF or CRLF)."""
    require_file(path, "list")
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_text(path: Path) -> str:
    """A UTF-8 file's text, its line ends as they are, without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSource(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
