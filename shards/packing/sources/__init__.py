"""Where videos, labels and captions come from: a data set on disk -> entries, one a sample, each in one split.

A source is a frozen dataclass. Its fields are the options of `jobs.make_shards NAME`; `entries()` lists the videos. It reads
annotation files and file names only: whether a video decodes is found out while packing (pack.py).

To pack a data set of your own, write such a class and register it:

    @dataclass(frozen=True, kw_only=True)
    class Mine:
        '''Our lab's recordings.'''
        videos: Path
        '''Folder with the videos.'''

        def entries(self) -> Listing:
            found = [Entry(path=..., name=..., label=..., split="train", group=...) for ... in ...]
            return make_listing(classes, hold_out(found, "val", fraction=0.1, seed=0))

    register_source("mine", Mine)
"""

import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.packing.entries import Listing
from shards.packing.sources.folder import Folder
from shards.packing.sources.hmdb51 import Hmdb51
from shards.packing.sources.msvd import Msvd
from shards.packing.sources.tables import Csv, Kinetics
from shards.packing.sources.ucf101 import Ucf101


class Source(Protocol):
    """A data set on disk, as a frozen dataclass of where it lies and how it is split."""

    def entries(self) -> Listing:
        """The videos, present on disk or not; ends with make_listing. Raises BadSource."""
        ...


SOURCES: dict[str, type[Source]] = {
    "ucf101": Ucf101,
    "hmdb51": Hmdb51,
    "kinetics": Kinetics,
    "msvd": Msvd,
    "folder": Folder,
    "csv": Csv,
}

# dataset.json keeps the names that options had in its first data sets: its bytes are the data set's digest.
WRITTEN_AS = {"val_fraction": "val_share", "test_fraction": "test_share", "split_seed": "seed"}


def register_source(name: str, source: type[Source]) -> None:
    """Makes a source a subcommand of jobs.make_shards.

    Raises ValueError for a name that cannot be typed or is taken, and for anything but a dataclass with `entries`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"source name {name!r}: expected lower-case letters, digits, - and _, a letter first")
    if SOURCES.get(name, source) is not source:
        raise ValueError(f"source {name!r}: the name is taken by {SOURCES[name].__name__}; choose another one")
    if not is_dataclass(source) or not callable(getattr(source, "entries", None)):
        raise ValueError(f"source {name!r}: {source!r} is not a dataclass with a method entries()")
    SOURCES[name] = source


def describe_source(source: Source) -> dict[str, Any]:
    """The source's name and options as JSON, for dataset.json."""
    name = next((name for name, kind in SOURCES.items() if kind is type(source)), type(source).__name__.lower())
    options: dict[str, Any] = asdict(source)  # pyright: ignore[reportArgumentType]  # every source is a dataclass
    return {"kind": name, **{WRITTEN_AS.get(option, option): as_json(value) for option, value in options.items()}}


def as_json(value: Any) -> Any:
    """Paths, and tuples of them, as text."""
    if isinstance(value, tuple):
        return [as_json(each) for each in value]
    return str(value) if isinstance(value, Path) else value
