"""A folder of class folders: no annotation files, split here."""

import re
from dataclasses import dataclass
from pathlib import Path

from shards.packing.annotation_files import VIDEO_SUFFIXES, require_folder, video_files
from shards.packing.entries import BadSource, Entry, Listing, hold_out, make_listing


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder with one folder of videos per class."""

    videos: Path
    """Folder with one folder per class."""
    group: str | None = None
    """Regular expression searched in each video's CLASS/FILE path; its first bracket (or the whole match) names the
    group. Videos of one group never land in two splits. Default: each video is a group of its own."""
    val_fraction: float = 0.1
    """Fraction of the groups held out for validation."""
    test_fraction: float = 0.2
    """Fraction of the groups held out for testing."""
    split_seed: int = 0
    """Decides which groups are held out."""

    def entries(self) -> Listing:
        """Every video file below a class folder, split by group."""
        require_folder(self.videos, "--videos")
        folders = sorted(path for path in self.videos.iterdir() if path.is_dir() and not path.name.startswith("."))
        entries = [self.entry(folder.name, path) for folder in folders for path in video_files(folder)]
        if not entries:
            raise BadSource(
                f"--videos {self.videos}: found no videos in {len(folders)} class folders; expected a folder with one folder "
                f"of videos per class, CLASS/*{{{','.join(sorted(VIDEO_SUFFIXES))}}}"
            )
        held_test = hold_out(entries, "test", self.test_fraction, self.split_seed)
        val_fraction_of_rest = self.val_fraction / (1 - self.test_fraction) if self.test_fraction < 1 else 0.0
        return make_listing(
            tuple(sorted({entry.label for entry in entries})),
            hold_out(held_test, "val", val_fraction_of_rest, self.split_seed),
        )

    def entry(self, label: str, path: Path) -> Entry:
        name = path.relative_to(self.videos).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BadSource(f"{self.videos}/{name!r}: the file's name is not UTF-8; rename it") from None
        return Entry(path=path, name=name, label=label, split="train", group=self.group_of(name))

    def group_of(self, name: str) -> str:
        if self.group is None:
            return name
        try:
            match = re.search(self.group, name)
        except re.error as error:
            raise BadSource(f"--group {self.group!r} is not a regular expression: {error}") from None
        if match is None:
            raise BadSource(f"{name}: --group {self.group!r} does not match; every video must have a group")
        group = match[1] if match.re.groups else match[0]
        if not group:
            raise BadSource(f"{name}: --group {self.group!r} matches nothing there; every video must have a group")
        return group
