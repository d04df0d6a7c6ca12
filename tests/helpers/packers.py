"""Packing in this process and in one that a test can kill, and what a data set's folder holds."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import webdataset as wds
from videos import TINY

from shards.packing.entries import Listing
from shards.packing.pack import Plan, finish_packing, pack_shard, plan_packing, shards_to_pack
from shards.video import Packing

WebDataset: Any = wds.WebDataset  # pyright: ignore[reportAttributeAccessIssue]  # looked up when asked for


def plan_of(folder: Path, listing: Listing, packing: Packing = TINY, videos_per_shard: int = 2, seed: int = 0) -> Plan:
    return plan_packing(folder, listing, packing, videos_per_shard, seed, source={"kind": "tests"})


def contents(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of everything in a folder, hidden files too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(plan: Plan) -> list[str]:
    """Packs what is still to be packed; the names of those shards."""
    waiting = shards_to_pack(plan)
    for shard in waiting:
        for _ in pack_shard(plan.url, shard, plan.classes):
            pass
    finish_packing(plan)
    return [shard.name for shard in waiting]


PACKER = """
import pickle, sys
from shards.packing.pack import finish_packing, shards_to_pack, pack_shard
with open(sys.argv[1], "rb") as file:
    plan = pickle.load(file)
print("ready", flush=True)
for shard in shards_to_pack(plan):
    for video in pack_shard(plan.url, shard, plan.classes):
        print(video.name, flush=True)
finish_packing(plan)
"""


def start_packer(plan: Plan, folder: Path) -> "subprocess.Popen[bytes]":
    """Packs in a process of its own, which says when it is ready to start."""
    folder.mkdir(exist_ok=True)
    (folder / "plan").write_bytes(pickle.dumps(plan))
    return subprocess.Popen(
        [sys.executable, "-c", PACKER, str(folder / "plan")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder)},
    )
