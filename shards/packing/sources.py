"""Where videos, labels and captions come from: a data set on disk -> entries, one a sample, each in one split.

A source is a frozen dataclass whose `entries()` lists what shall be packed. It reads lists and file names only;
whether a video decodes is found out while packing (pack.py). What every listing keeps is in entries.py.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import tyro

from shards.packing.annotation_files import (
    VIDEO_SUFFIXES,
    Row,
    files_by_stem,
    numbered_lines,
    read_lines,
    read_table,
    read_text,
    require_file,
    require_folder,
    video_files,
)
from shards.packing.entries import SPLITS, BadSource, Entry, Listing, finish, hold_out, official_group, part_name


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
            for where, line in numbered_lines(listing):
                name = line.split()[0]  # a training list has the class number behind the name
                match = re.fullmatch(r"(\w+)/v_\w+_g(\d+)_c\d+\.avi", name)
                if match is None or match[1] not in classes:
                    raise BadSource(f"{where}: {line!r} is not CLASS/v_CLASS_gNN_cMM.avi with a class of classInd.txt")
                label, group = match[1], f"{match[1]}_g{match[2]}"
                entries.append(Entry(path=self.videos / name, name=name, key="", label=label, split=split, group=group))
        return finish(classes, hold_out(entries, "val", self.val_share, self.seed))

    def class_names(self) -> tuple[str, ...]:
        path = self.lists / "classInd.txt"
        lines = numbered_lines(path)
        for where, line in lines:
            if not re.fullmatch(r"\d+\s+\w+", line):
                raise BadSource(f"{where}: {line!r} is not a class's number and name")
        return tuple(line.split()[1] for _, line in lines)


@dataclass(frozen=True, kw_only=True)
class Hmdb51:
    """HMDB-51: a folder of CLASS/MOVIE_CLASS_ATTRIBUTES_N.avi and the official split lists."""

    videos: Path
    """Folder with one folder per class."""
    lists: Path
    """Folder with the official CLASS_test_splitN.txt of all classes."""
    split: int = 1
    """Which of the three official splits."""
    val_share: float = 0.1
    """Share of the training movies held out for validation: each with all its clips, whatever their classes."""
    seed: Annotated[int, tyro.conf.arg(name="split-seed")] = 0
    """Decides which movies are held out."""

    def entries(self) -> Listing:
        """The official lists' videos, present on disk or not, and a validation split held out by movie.

        A list has a few clips more than its split uses: they are marked 0 there and left out here.
        """
        require_folder(self.videos, "--videos")
        require_folder(self.lists, "--lists")
        if self.split not in (1, 2, 3):
            raise BadSource(f"--split {self.split}: HMDB-51 has the splits 1, 2 and 3")
        ending = f"_test_split{self.split}.txt"
        classes = tuple(sorted(path.name.removesuffix(ending) for path in self.lists.glob(f"[!.]*{ending}")))
        if not classes:
            raise BadSource(f"{self.lists}: no CLASS{ending} found; --lists wants the folder with the official lists")
        entries = []
        for label in classes:
            for where, line in numbered_lines(self.lists / f"{label}{ending}"):
                match = re.fullmatch(rf"(([^/]+)_{re.escape(label)}_[^/]+\.avi)\s+([012])", line)
                if match is None:
                    raise BadSource(f"{where}: {line!r} is not MOVIE_{label}_ATTRIBUTES_N.avi and 0, 1 or 2")
                if match[3] == "0":
                    continue
                split, name = ("train" if match[3] == "1" else "test"), f"{label}/{match[1]}"
                group = official_group(split, movie_of(match[2]))
                entries.append(Entry(path=self.videos / name, name=name, key="", label=label, split=split, group=group))
        return finish(classes, hold_out(entries, "val", self.val_share, self.seed))


def movie_of(title: str) -> str:
    """HMDB-51 numbers the parts of a movie and the instalments of a web series: A_Beautiful_Mind_2 -> A_Beautiful_Mind."""
    return re.sub(r"[_\d]+$", "", title) or title


@dataclass(frozen=True, kw_only=True)
class Kinetics:
    """Kinetics-400, -600, -700 and tables like theirs: a folder of YouTube videos, cut or whole."""

    videos: Path
    """Folder with the videos, with or without folders in it.
    Cut already: ID_START_END.mp4, the seconds in six digits. Whole, for packing to cut: ID.mp4. Or another suffix."""
    table: tuple[Path, ...]
    """CSV files with the columns label, youtube_id, time_start, time_end and split, say one file a split.
    Rows without a label are refused: leave out tables whose labels were not published."""
    classes: Path | None = None
    """Text file with one class name a line, in label order. Default: the labels of the training rows, sorted."""

    def entries(self) -> Listing:
        """The tables' rows, in their own splits, found on disk or not; clips of one YouTube video are a group
        within their split (the tables promise different videos within a class only, and stay as they were published).

        Of a clip that is there several times, the file in its class's folder is taken, and a cut one before a whole one.
        A missing one stays in the listing as VIDEOS/ID_START_END.mp4.
        """
        require_folder(self.videos, "--videos")
        if not self.table:
            raise BadSource("--table: no file given; at least one CSV file is wanted")
        columns = ("youtube_id", "time_start", "time_end", "split")
        rows = [row for table in self.table for row in read_table(table, columns)]
        classes = class_names(self.classes, rows)
        files = files_by_stem(self.videos)
        known = frozenset(classes)
        return finish(classes, [self.entry(where, row, known, files) for where, row in rows])

    def entry(self, where: str, row: Row, classes: Collection[str], files: Mapping[str, Sequence[str]]) -> Entry:
        label, video = row.get("label") or "", row["youtube_id"]
        if not label:
            raise BadSource(
                f"{where}: no label; a table whose labels were not published cannot be packed: leave it out of --table"
            )
        require_class(where, label, classes, self.classes)
        if not re.fullmatch(r"[\w-]+", video or ""):
            raise BadSource(f"{where}: youtube_id {video!r} is no YouTube id; wanted letters, digits, - and _")
        split = {"validate": "val", "validation": "val"}.get(row["split"], row["split"])
        require_split(where, split)
        start, end = part_of(where, row, "time_start", "time_end")
        name = part_name(f"{video}.mp4", start, end)
        cut, whole = files.get(PurePosixPath(name).stem), files.get(video)
        if whole and not cut:
            path = in_folder_of(label, whole)
            name, part = part_name(path, start, end), (start, end)
        else:
            path = name = in_folder_of(label, cut or [name])
            part = (None, None)
        return Entry(
            path=self.videos / path,
            name=name,
            key="",
            label=label,
            split=split,
            group=official_group(split, video),
            start_seconds=part[0],
            end_seconds=part[1],
        )


def in_folder_of(label: str, paths: Sequence[str]) -> str:
    """The path in the class's own folder ("air drumming" or "air_drumming") if there is one, or the first."""
    folders = (label, label.replace(" ", "_"))
    return next((path for path in paths if PurePosixPath(path).parent.name in folders), paths[0])


MSVD_NUMBERS = {"train": range(1, 1201), "val": range(1201, 1301), "test": range(1301, 1971)}


@dataclass(frozen=True, kw_only=True)
class Msvd:
    """MSVD (YouTube2Text): a folder of YouTube clips and their captions. There are no classes."""

    videos: Path
    """Folder with the videos, ID_START_END.avi."""
    train: Path | None = None
    """The training videos' captions: a JSON file [{"id": "ID_START_END.avi", "caption": ["...", "..."]}, ...]."""
    val: Path | None = None
    """The validation videos' captions. Default: some of the training videos are held out."""
    test: Path | None = None
    """The test videos' captions."""
    captions: Path | None = None
    """Instead of these: all videos' captions in one such file, to be split by --mapping."""
    mapping: Path | None = None
    """youtube_mapping.txt of lines "ID_START_END vidN", for the standard split: vid1 to vid1200 are for training,
    vid1201 to vid1300 for validation, vid1301 to vid1970 for testing. Videos that it does not name are left out."""
    val_share: float = 0.1
    """Share of the YouTube ids in --train held out for validation, where there is no --val."""
    seed: Annotated[int, tyro.conf.arg(name="split-seed")] = 0
    """Decides which YouTube ids are held out."""

    def entries(self) -> Listing:
        """The listed videos with their captions, present on disk or not; clips of one YouTube video are a group."""
        require_folder(self.videos, "--videos")
        files = {"--train": self.train, "--val": self.val, "--test": self.test}
        standard = {"--captions": self.captions, "--mapping": self.mapping}
        given = [option for option, file in (files | standard).items() if file is not None]
        if self.captions is not None and self.mapping is not None and len(given) == 2:
            return finish((), self.standard_split(self.captions, self.mapping))
        if not given or not set(given) <= files.keys():
            raise BadSource(
                "msvd wants either --train, --val and --test (those that there are) or both --captions and --mapping; "
                f"given: {', '.join(given) or 'none of them'}"
            )
        entries = [
            self.entry(path, video, captions, option.removeprefix("--"))
            for option, path in files.items()
            if path is not None
            for video, captions in read_captions(path, option).items()
        ]
        return finish((), hold_out(entries, "val", 0 if self.val else self.val_share, self.seed))

    def standard_split(self, captions_file: Path, mapping_file: Path) -> list[Entry]:
        splits, captions_of = read_msvd_mapping(mapping_file), read_captions(captions_file, "--captions")
        listed = {PurePosixPath(video).stem: video for video in captions_of}
        bare = [name for name in splits if name not in listed]
        if bare:
            raise BadSource(
                f"{captions_file}: no captions of {bare[0]}, which {mapping_file} lists ({len(bare)} such videos); "
                "the standard split wants all of them"
            )
        videos = [(listed[name], split) for name, split in splits.items()]
        return [self.entry(captions_file, video, captions_of[video], split) for video, split in videos]

    def entry(self, file: Path, video: str, captions: tuple[str, ...], split: str) -> Entry:
        match = re.fullmatch(r"([\w-]+)_\d+_\d+\.\w+", video)
        if match is None:
            raise BadSource(f"{file}: id {video!r} is not ID_START_END.avi, the name of a file in --videos")
        group = official_group(split, match[1])
        return Entry(
            path=self.videos / video, name=video, key="", label="", split=split, group=group, captions=captions
        )


def read_captions(path: Path, option: str) -> dict[str, tuple[str, ...]]:
    """{video: its captions} from a JSON file [{"id": "NAME.avi", "caption": ["...", "..."]}, ...]."""
    require_file(path, option)
    try:
        videos: Any = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BadSource(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(videos, list) or not videos:
        raise BadSource(f'{path}: a list of videos is wanted, [{{"id": ..., "caption": [...]}}, ...]')
    captions_of: dict[str, tuple[str, ...]] = {}
    for number, video in enumerate(videos, start=1):
        name = video.get("id") if isinstance(video, dict) else None
        if not isinstance(name, str):
            raise BadSource(f'{path}: video {number} of {len(videos)} has no "id"; the name of its file is wanted')
        if name in captions_of:
            raise BadSource(f"{path}: id {name!r} is there twice; put all its captions into one list")
        captions_of[name] = checked_captions(f"{path}: id {name!r}", video.get("caption"))
    return captions_of


def checked_captions(where: str, captions: Any) -> tuple[str, ...]:
    """The captions of a video as they are, but for white space around them."""
    if not isinstance(captions, list) or not captions:
        raise BadSource(f'{where}: no captions; its "caption" must be a list of at least one; found {captions!r}')
    for number, caption in enumerate(captions, start=1):
        if not isinstance(caption, str) or not caption.strip():
            raise BadSource(f"{where}: caption {number} of {len(captions)} is {caption!r}; write one, or take it out")
    return tuple(caption.strip() for caption in captions)


def read_msvd_mapping(path: Path) -> dict[str, str]:
    """{ID_START_END: its split} from lines "ID_START_END vidN"."""
    require_file(path, "--mapping")
    splits: dict[str, str] = {}
    seen: set[int] = set()
    for where, line in numbered_lines(path):
        match = re.fullmatch(r"(\S+)\s+vid(\d+)", line)
        number = int(match[2]) if match else 0
        split = next((split for split, numbers in MSVD_NUMBERS.items() if number in numbers), None)
        if match is None or split is None:
            raise BadSource(f"{where}: {line!r} is not ID_START_END and vid1 to vid1970")
        if match[1] in splits or number in seen:
            raise BadSource(
                f"{where}: {line!r} names a video or a number that an earlier line has; take one of them out"
            )
        splits[match[1]] = split
        seen.add(number)
    return splits


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
    """A table with the columns path, label, split and, if wanted, group, start and end."""

    table: Path
    """CSV file with a header line; paths are relative to --root; split is train, val or test.
    Videos of one group are in one split; the default group is the file.
    start and end are seconds, for a sample that is a part of its file."""
    root: Path | None = None
    """Folder that the paths start from. Default: the table's folder."""
    classes: Path | None = None
    """Text file with one class name a line, in label order. Default: the labels of the training rows, sorted."""

    def entries(self) -> Listing:
        """The table's rows, in its own splits."""
        require_file(self.table, "--table")
        root = self.root or self.table.parent
        require_folder(root, "--root")
        rows = read_table(self.table, ("path", "label", "split"))
        classes = class_names(self.classes, rows)
        known = frozenset(classes)
        return finish(classes, [self.entry(where, row, root, known) for where, row in rows])

    def entry(self, where: str, row: Row, root: Path, classes: Collection[str]) -> Entry:
        for column in ("path", "label"):
            if not row[column]:
                raise BadSource(f"{where}: the {column} is empty")
        require_split(where, row["split"])
        require_class(where, row["label"], classes, self.classes)
        name, start, end = row["path"], None, None
        if row.get("start") or row.get("end"):
            start, end = part_of(where, row, "start", "end")
            name = part_name(name, start, end)
        return Entry(
            path=root / row["path"],
            name=name,
            key="",
            label=row["label"],
            split=row["split"],
            group=row.get("group") or PurePosixPath(row["path"]).as_posix(),  # "./1.avi" is "1.avi"
            start_seconds=start,
            end_seconds=end,
        )


Source = (
    Annotated[Ucf101, tyro.conf.subcommand("ucf101")]
    | Annotated[Hmdb51, tyro.conf.subcommand("hmdb51")]
    | Annotated[Kinetics, tyro.conf.subcommand("kinetics")]
    | Annotated[Msvd, tyro.conf.subcommand("msvd")]
    | Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Csv, tyro.conf.subcommand("csv")]
)


def class_names(file: Path | None, rows: Sequence[tuple[str, Row]]) -> tuple[str, ...]:
    """The classes in label order: a file's lines or, without one, the training rows' labels, sorted."""
    if file is not None:
        require_file(file, "--classes")
        return tuple(read_lines(file))
    return tuple(sorted({row["label"] for _, row in rows if row["split"] == "train" and row.get("label")}))


def require_class(where: str, label: str, classes: Collection[str], file: Path | None) -> None:
    if label not in classes:
        origin = file or "the training rows"
        raise BadSource(
            f"{where}: label {label!r} is none of the {len(classes)} classes of {origin}; "
            "--classes FILE can name classes that have no training rows"
        )


def require_split(where: str, split: str) -> None:
    if split not in SPLITS:
        raise BadSource(f"{where}: split {split!r} is none of {', '.join(SPLITS)}")


def part_of(where: str, row: Row, start_column: str, end_column: str) -> tuple[float, float]:
    """(start, end) in seconds, to the millisecond: the part of a file that a row is about."""
    times = []
    for column in (start_column, end_column):
        text = row.get(column) or ""
        try:
            times.append(round(float(text), 3))
        except ValueError:
            times.append(math.nan)
        if not 0 <= times[-1] < math.inf:
            raise BadSource(f"{where}: {column} {text!r} is no time; seconds are wanted, from 0 on")
    start, end = times
    if start >= end:
        raise BadSource(f"{where}: {start_column} {start:g} is not before {end_column} {end:g}")
    return start, end


def search_pattern(pattern: str, name: str) -> re.Match[str]:
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise BadSource(f"--group {pattern!r} is not a regular expression: {error}") from None
    if match is None:
        raise BadSource(f"{name}: --group {pattern!r} does not match; every video must have a group")
    return match
