"""What a store raises, the messages that every kind of store shares, and any error in one line."""

import errno
from pathlib import Path


class BadShards(ValueError):
    """A packed data set that cannot be read or written. The message names the file, what was found and how to fix it."""


class NoFile(BadShards):
    """The store has no such file."""


class BadUrl(ValueError):
    """A place that is neither a folder nor a store that can be reached."""


def error_line(error: BaseException) -> str:
    """An error in one line: an operating system's reason with its file, any other by the first line of its message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cut_off(place: str, offset: int, missing: int) -> BadShards:
    """The error for a range that reaches `missing` bytes beyond its file's end."""
    return BadShards(
        f"{place}: ends {missing} bytes before the sample at offset {offset} does; the file was cut off: restore it, or "
        "pack again"
    )


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space(path: Path) -> OSError:
    """The error for a full disk."""
    return OSError(errno.ENOSPC, "no space left on the device; make room and run the same again", str(path))
