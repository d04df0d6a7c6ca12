"""A small data set's packing, as several tests do it."""

from pathlib import Path

from jobs import make_shards
from shards.packing.sources import Folder
from shards.synthetic import SIZE
from shards.video import FlowMethod, Packing

SCENES = {"train": 12, "val": 4, "test": 5}  # captioned videos of each split


def packing_job(
    videos: Path, out: str | Path, workers: int = 0, flow: FlowMethod = "none", **options
) -> make_shards.MakeShards:
    return make_shards.MakeShards(
        source=Folder(videos=videos, val_fraction=0.17, test_fraction=0.17),
        out=str(out),
        packing=Packing(width=SIZE, height=SIZE, flow=flow),
        videos_per_shard=5,
        workers=workers,
        **options,
    )
