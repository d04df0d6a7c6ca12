"""Sources by name: the command line, one's own, and what dataset.json says of them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro
from videos import listing_of

from grurcn import data
from grurcn.data import pack, source_type
from jobs import make_shards
from shards.dataset import read_dataset
from shards.packing import sources
from shards.packing.annotation_files import video_files
from shards.packing.entries import Entry, Listing, hold_out, make_listing
from shards.packing.sources import SOURCES, Folder, Hmdb51, Kinetics, Msvd, describe_source, register_source
from shards.store import open_store


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("hmdb51 --videos v --lists l --split 2", Hmdb51(videos=Path("v"), lists=Path("l"), split=2)),
        ("kinetics --videos v --table a.csv b.csv", Kinetics(videos=Path("v"), table=(Path("a.csv"), Path("b.csv")))),
        ("msvd --videos v --train t --split-seed 3", Msvd(videos=Path("v"), train=Path("t"), split_seed=3)),
    ],
)
def test_a_source_is_a_subcommand(command, source):
    assert tyro.cli(source_type(), args=command.split()) == source


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Our lab's recordings."""

    videos: Path
    """Folder with the videos."""
    val_fraction: float = 0.1
    """Fraction of the videos held out."""

    def entries(self) -> Listing:
        found = [
            Entry(path=path, name=path.name, label="move", split="train", group=path.name)
            for path in video_files(self.videos)
        ]
        return make_listing(("move",), hold_out(found, "val", self.val_fraction, seed=0))


def test_a_source_of_your_own_is_a_subcommand_and_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(SOURCES))
    monkeypatch.setattr(data, "SOURCES", sources.SOURCES)
    register_source("recordings", Recordings)
    videos = listing_of(tmp_path / "videos", [8, 9, 10]).entries[0].path.parents[1]
    words = ["--out", str(tmp_path / "out"), "--workers", "0", "--width", "32", "--height", "32", "recordings"]
    packed = pack(make_shards.COMMAND.parse([*words, "--videos", str(videos)], "test"))
    assert packed.videos == {"train": 2, "val": 1, "test": 0}
    info = read_dataset(open_store(tmp_path / "out"))
    assert info.source == {"kind": "recordings", "videos": str(videos), "val_share": 0.1}


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("folder", Recordings, "source 'folder': the name is taken by Folder; choose another one"),
        ("Lab 1", Recordings, "source name 'Lab 1': expected lower-case letters"),
        ("other", Path, "is not a dataclass with a method entries"),
    ],
)
def test_a_name_or_a_class_that_cannot_be_a_source_is_refused(name, source, message):
    with pytest.raises(ValueError, match=message):
        register_source(name, source)


def test_a_data_set_keeps_the_names_that_options_had_first(tmp_path):
    """Its digest is that of the same videos packed before."""
    assert describe_source(Folder(videos=Path("v"), group="g", split_seed=3)) == {
        "kind": "folder", "videos": "v", "group": "g", "val_share": 0.1, "test_share": 0.2, "seed": 3,
    }  # fmt: skip
    assert describe_source(Kinetics(videos=Path("v"), table=(Path("a"), Path("b")))) == {
        "kind": "kinetics", "videos": "v", "table": ["a", "b"], "classes": None,
    }  # fmt: skip
