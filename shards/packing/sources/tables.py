"""Tables: a CSV file of your own, and those of Kinetics (Kay et al. 2017). A row may be about a part of its video."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards.packing.annotation_files import (
    Row,
    files_by_stem,
    read_lines,
    read_table,
    require_file,
    require_folder,
)
from shards.packing.entries import SPLITS, BadSource, Entry, Listing, make_listing, official_group, part_name


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A table with the columns path, label and split, and optionally group, start and end."""

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
        return make_listing(classes, [self.entry(where, row, root, known) for where, row in rows])

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
            label=row["label"],
            split=row["split"],
            group=row.get("group") or PurePosixPath(row["path"]).as_posix(),  # "./1.avi" is "1.avi"
            start_seconds=start,
            end_seconds=end,
        )


@dataclass(frozen=True, kw_only=True)
class Kinetics:
    """Kinetics-400, -600, -700 and tables like theirs: a folder of YouTube videos, cut or whole."""

    videos: Path
    """Folder with the videos, with or without folders in it.
    Cut already: ID_START_END.mp4, the seconds in six digits. Whole, for packing to cut: ID.mp4. Or another suffix."""
    table: tuple[Path, ...]
    """CSV files with the columns label, youtube_id, time_start, time_end and split, say one file a split.
    A row without a label is an error: leave out tables whose labels were not published."""
    classes: Path | None = None
    """Text file with one class name a line, in label order. Default: the labels of the training rows, sorted."""

    def entries(self) -> Listing:
        """The tables' rows, in their own splits, found on disk or not.

        Clips of one YouTube video are a group within their split: the tables promise different videos within a class only,
        and stay as they were published. If a clip is there several times, the file in its class's folder is taken, and a cut
        one before a whole one. A missing clip stays in the listing as VIDEOS/ID_START_END.mp4.
        """
        require_folder(self.videos, "--videos")
        if not self.table:
            raise BadSource("--table: found no file; expected at least one CSV file")
        columns = ("youtube_id", "time_start", "time_end", "split")
        rows = [row for table in self.table for row in read_table(table, columns)]
        classes = class_names(self.classes, rows)
        files = files_by_stem(self.videos)
        known = frozenset(classes)
        return make_listing(classes, [self.entry(where, row, known, files) for where, row in rows])

    def entry(self, where: str, row: Row, classes: Collection[str], files: Mapping[str, Sequence[str]]) -> Entry:
        label, video = row.get("label") or "", row["youtube_id"]
        if not label:
            raise BadSource(
                f"{where}: no label; a table whose labels were not published cannot be packed: leave it out of --table"
            )
        require_class(where, label, classes, self.classes)
        if not re.fullmatch(r"[\w-]+", video or ""):
            raise BadSource(f"{where}: youtube_id {video!r} is no YouTube id; expected letters, digits, - and _")
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
            raise BadSource(f"{where}: {column} {text!r} is no time; expected seconds, 0 or more")
    start, end = times
    if start >= end:
        raise BadSource(f"{where}: {start_column} {start:g} is not before {end_column} {end:g}")
    return start, end
