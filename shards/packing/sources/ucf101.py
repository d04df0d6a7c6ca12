"""UCF-101 (Soomro et al. 2012): 13,320 videos of 101 classes, three official splits."""

import re
from dataclasses import dataclass
from pathlib import Path

from shards.packing.annotation_files import numbered_lines, require_folder
from shards.packing.entries import BadSource, Entry, Listing, hold_out, make_listing


@dataclass(frozen=True, kw_only=True)
class Ucf101:
    """UCF-101: a folder of CLASS/v_CLASS_gNN_cMM.avi and the official split lists."""

    videos: Path
    """Folder with one folder per class."""
    lists: Path
    """Folder with classInd.txt, trainlist0N.txt and testlist0N.txt."""
    split: int = 1
    """Which of the three official splits."""
    val_fraction: float = 0.1
    """Fraction of each class's training groups (g01..g25) held out for validation."""
    split_seed: int = 0
    """Decides which groups are held out."""

    def entries(self) -> Listing:
        """The official lists' videos, present on disk or not, and a validation split held out by group."""
        require_folder(self.videos, "--videos")
        require_folder(self.lists, "--lists")
        if self.split not in (1, 2, 3):
            raise BadSource(f"--split {self.split}: UCF-101 has the splits 1, 2 and 3")
        classes = self.class_names()
        entries = [
            self.entry(split, where, line, classes)
            for split in ("train", "test")
            for where, line in numbered_lines(self.lists / f"{split}list{self.split:02}.txt")
        ]
        return make_listing(classes, hold_out(entries, "val", self.val_fraction, self.split_seed))

    def entry(self, split: str, where: str, line: str, classes: tuple[str, ...]) -> Entry:
        name = line.split()[0]  # a training list has the class number behind the name
        match = re.fullmatch(r"(\w+)/v_\w+_g(\d+)_c\d+\.avi", name)
        if match is None or match[1] not in classes:
            raise BadSource(f"{where}: {line!r} is not CLASS/v_CLASS_gNN_cMM.avi with a class of classInd.txt")
        label, group = match[1], f"{match[1]}_g{match[2]}"
        return Entry(path=self.videos / name, name=name, label=label, split=split, group=group)

    def class_names(self) -> tuple[str, ...]:
        lines = numbered_lines(self.lists / "classInd.txt")
        for where, line in lines:
            if not re.fullmatch(r"\d+\s+\w+", line):
                raise BadSource(f"{where}: {line!r} is not a class's number and name")
        return tuple(line.split()[1] for _, line in lines)
