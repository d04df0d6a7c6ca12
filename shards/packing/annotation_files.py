"""What sources read: folders, lists and tables, each line with its FILE:LINE for messages."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from shards.packing.entries import BadSource

Row = dict[str, str]  # of a table: {column: text}
VIDEO_SUFFIXES = frozenset(
    {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp"}
)


def video_files(folder: Path) -> list[Path]:
    """The video files anywhere below a folder, by their suffix, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())


def files_by_stem(folder: Path) -> dict[str, list[str]]:
    """{name without suffix: paths below the folder} of all video files; reads each folder once."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        below = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        for name in map(PurePosixPath, sorted(names)):
            if name.suffix.lower() in VIDEO_SUFFIXES:
                files[name.stem].append(str(below / name))
    return dict(files)


def read_table(path: Path, columns: Collection[str]) -> list[tuple[str, Row]]:
    """(FILE:LINE, {column: text}) of each row of a CSV file whose header line has at least these columns."""
    require_file(path, "--table")
    with io.StringIO(read_text(path), newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            header = reader.fieldnames or []
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
        except csv.Error as error:
            raise BadSource(f'{path}:{reader.line_num}: not CSV ({error}); is there a " without its second?') from None
    missing = set(columns) - set(header)
    if missing:
        raise BadSource(f"{path}: no column {', '.join(sorted(missing))}; the header has {list(header)}")
    if not rows:
        raise BadSource(f"{path}: no rows below the header; expected one row a video")
    return rows


def require_folder(path: Path, option: str) -> None:
    if not path.is_dir():
        raise BadSource(f"{option} {path}: found {'a file' if path.exists() else 'nothing'}; expected a folder")


def require_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise BadSource(f"{option} {path}: found {'a folder' if path.exists() else 'nothing'}; expected a file")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, stripped."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """(FILE:LINE, line) of each line of a text file that is not empty."""
    require_file(path, "list")
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(f"{path}:{number}", line.strip()) for number, line in lines if line.strip()]


def read_text(path: Path) -> str:
    """A UTF-8 file's text, its line ends as they are, without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSource(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
