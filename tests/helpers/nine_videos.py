"""Nine videos of two classes, six in train and three in val, and their shards of two videos each."""

from dataclasses import replace
from pathlib import Path

from videos import TINY, listing_of, pack

from shards.packing.entries import Listing

FRAMES = [8, 9, 10, 11, 12, 8, 9, 10, 11]
SPLITS = ("train", "train", "val")


def list_nine(folder: Path) -> Listing:
    return listing_of(folder / "videos", FRAMES, splits=SPLITS)


def pack_nine(folder: Path) -> Path:
    """Three shards of train, two of val."""
    return pack(folder / "shards", list_nine(folder), videos_per_shard=2)


def pack_with_flow(folder: Path) -> Path:
    """Three videos of train, with flow, in one shard."""
    listing = list_nine(folder)
    entries = tuple(entry for entry in listing.entries if entry.split == "train")[:3]
    return pack(folder / "shards", replace(listing, entries=entries), replace(TINY, flow="dis"))
