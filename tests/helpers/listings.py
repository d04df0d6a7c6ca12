"""Data sets on disk without their videos' content, and what a source lists of them."""

from collections import defaultdict
from pathlib import Path


def touch(folder: Path, *names: str) -> Path:
    """Empty files: sources read names only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def groups_of(entries):
    """{split: its groups}"""
    groups = defaultdict(set)
    for entry in entries:
        groups[entry.split].add(entry.group)
    return groups


def parts_of(listing):
    """{name: the seconds of its file}"""
    return {entry.name: (entry.start_seconds, entry.end_seconds) for entry in listing.entries}


WHOLE = (None, None)


def table(folder: Path, *lines: str) -> Path:
    path = folder / "videos.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
