"""HMDB-51 (Kuehne et al. 2011): 6,766 videos of 51 classes, three official splits."""

import re
from dataclasses import dataclass
from pathlib import Path

from shards.packing.annotation_files import numbered_lines, require_folder
from shards.packing.entries import BadSource, Entry, Listing, hold_out, make_listing, official_group


@dataclass(frozen=True, kw_only=True)
class Hmdb51:
    """HMDB-51: a folder of CLASS/MOVIE_CLASS_ATTRIBUTES_N.avi and the official split lists."""

    videos: Path
    """Folder with one folder per class."""
    lists: Path
    """Folder with the official CLASS_test_splitN.txt of all classes."""
    split: int = 1
    """Which of the three official splits."""
    val_fraction: float = 0.1
    """Fraction of the training movies held out for validation: each with all its clips, whatever their classes."""
    split_seed: int = 0
    """Decides which movies are held out."""

    def entries(self) -> Listing:
        """The official lists' videos, present on disk or not, and a validation split held out by movie.

        A list names a few clips that its split does not use: it marks them 0, and they are left out.
        """
        require_folder(self.videos, "--videos")
        require_folder(self.lists, "--lists")
        if self.split not in (1, 2, 3):
            raise BadSource(f"--split {self.split}: HMDB-51 has the splits 1, 2 and 3")
        ending = f"_test_split{self.split}.txt"
        classes = tuple(sorted(path.name.removesuffix(ending) for path in self.lists.glob(f"[!.]*{ending}")))
        if not classes:
            raise BadSource(
                f"--lists {self.lists}: found no CLASS{ending}; expected the folder with the official lists"
            )
        lines = ((label, *line) for label in classes for line in numbered_lines(self.lists / f"{label}{ending}"))
        entries = [entry for line in lines if (entry := self.entry(*line)) is not None]
        return make_listing(classes, hold_out(entries, "val", self.val_fraction, self.split_seed))

    def entry(self, label: str, where: str, line: str) -> Entry | None:
        match = re.fullmatch(rf"(([^/]+)_{re.escape(label)}_[^/]+\.avi)\s+([012])", line)
        if match is None:
            raise BadSource(f"{where}: {line!r} is not MOVIE_{label}_ATTRIBUTES_N.avi and 0, 1 or 2")
        if match[3] == "0":
            return None
        split, name = ("train" if match[3] == "1" else "test"), f"{label}/{match[1]}"
        group = official_group(split, movie_of(match[2]))
        return Entry(path=self.videos / name, name=name, label=label, split=split, group=group)


def movie_of(title: str) -> str:
    """A title without the number of a part: A_Beautiful_Mind_2 -> A_Beautiful_Mind."""
    return re.sub(r"[_\d]+$", "", title) or title
