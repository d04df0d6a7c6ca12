"""Video files that a user names, decoded as make_shards decodes them: in helper processes, within limits, several in parallel."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from shards.packing.annotation_files import VIDEO_SUFFIXES, video_files
from shards.packing.sandbox import Sandbox
from shards.threads import ordered_map
from shards.video import BadVideo, Limits, Packing, Stored

T = TypeVar("T")

MOST_READERS = 4  # videos that are decoded in parallel
STANDARD_INPUT = Path("-")


def find_videos(named: Sequence[Path]) -> list[Path]:
    """The files, and all video files below the folders in order of their names; none twice. "-" stays as it is.

    Raises ValueError if nothing is named, and for a folder without videos.
    """
    found: dict[Path, Path] = {}
    for path in (path.expanduser() for path in named):
        videos = video_files(path) if path.is_dir() else [path]
        if not videos:
            raise ValueError(
                f"{path}: no videos found in this folder and those below it (looked for "
                f"*{{{','.join(sorted(VIDEO_SUFFIXES))}}}); name another, or a file"
            )
        for video in videos:
            found.setdefault(absolute_path(video), video)
    if not found:
        raise ValueError("no videos are named; expected files, or folders of videos")
    return list(found.values())


def absolute_path(path: Path) -> Path:
    """The absolute path without "..", with symbolic links as they are."""
    return Path(os.path.normpath(path.absolute()))


def read_videos(
    videos: Sequence[Path], packing: Packing, limits: Limits, read: Callable[[Stored], T]
) -> Generator[T | str, None, None]:
    """read(video, stored as in a shard) of each video, in order, or why it cannot be read; some are read ahead, in parallel."""
    readers = min(len(videos), MOST_READERS, os.cpu_count() or 1)
    with ExitStack() as helpers:
        free: SimpleQueue[Sandbox] = SimpleQueue()
        for _ in range(readers):
            free.put(helpers.enter_context(Sandbox(limits)))

        def read_one(video: Path) -> T | str:
            packer = free.get()
            try:
                return read(store(video, packer, packing))
            except BadVideo as error:
                return str(error)
            except (FileNotFoundError, PermissionError) as error:
                return f"cannot be read ({error.strerror})"
            finally:
                free.put(packer)

        yield from ordered_map(read_one, videos, readers, readers)


def store(video: Path, packer: Sandbox, packing: Packing) -> Stored:
    """A video, stored as in a shard; "-" is the standard input. Raises BadVideo, or OSError for a file that cannot be read."""
    if video != STANDARD_INPUT:
        return packer.store(video, packing)
    with tempfile.TemporaryDirectory(prefix="grurcn-input-") as folder:
        path = Path(folder) / "standard input"  # reading a container needs seeking, which a pipe does not allow
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return packer.store(path, packing)
