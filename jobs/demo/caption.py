"""Captioning, the whole path in a few minutes: videos of shapes that move, and what people may say of them.

    python -m jobs.demo caption

A shape moves in one direction, then in another. GRU-RCN learns the motions as classes; then it is kept as it is, and an LSTM with
attention over its states learns to say "a red square moves left, then up". The same decoder over single frames of the same
trunk learns the colours and shapes, but cannot know the motion: the edges of the picture meet, so that each frame by itself is
equally likely whatever the directions.

FOLDER/result.json and --json FILE hold: gru_rcn_motion, single_frame_motion (shares of unseen videos whose motion is named
right), gru_rcn_scores, single_frame_scores, chance, recogniser_top1, seconds, peak_memory_bytes, folder.
"""

import csv
import json
import shutil
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table

from cluster.checkpoints.run_folder import write_json
from cluster.progress import Bar, duration
from cluster.tracking.server import tracking_uri, ui_command
from cluster.workers.connect import start_ray
from cluster.workers.options import Workers
from grurcn.training.caption_recipes import caption_small
from grurcn.training.encoders import EncoderConfig
from grurcn.training.recipes import changed, demo
from jobs import caption, encode, evaluate, make_shards, train
from jobs.bench.memory import PeakMemory
from jobs.command import finish
from jobs.demo.videos import (
    COLOURS,
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    directions_in,
    draw_scene,
    sentences,
    write_video,
)
from shards.packing.sources import Csv, Msvd
from shards.store import open_store
from shards.video import Packing

MOTIONS = list(permutations(DIRECTIONS, 2))
VIDEOS_PER_MOTION = {"train": 64, "val": 6, "test": 10}
CAPTIONED = {"train": 64, "val": 6, "test": 10}  # of these; so the recogniser has seen others too
SEGMENTS = 4
RECOGNISER = "recogniser"
ENCODERS = ("gru-rcn", "single-frame")


@dataclass(frozen=True, kw_only=True)
class CaptionDemo:
    """Options of the captioning demo."""

    folder: Path = Path("demo-caption")
    """Where videos, shards and runs go. An interrupted demo goes on; a finished one starts anew."""
    workers: int = 2
    """Ray Train workers."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: CaptionDemo) -> int:
    """Runs every step and prints what came out; status 1 if the decoder over GRU-RCN did not learn to name the motion."""
    started = time.monotonic()
    folder = job.folder.absolute()
    if (folder / "result.json").exists():
        shutil.rmtree(folder)
    with PeakMemory() as memory:
        print(f"1. Videos of {len(MOTIONS)} motions, and their captions: {folder / 'videos'}", flush=True)
        make_videos(folder)
        print("2. Packing them, with their classes and with their captions", flush=True)
        start_ray()
        pack(folder)
        print("3. Training GRU-RCN to tell the motions apart", flush=True)
        top1 = train_recogniser(folder, job.workers)
        print("4. Encoding the captioned videos, training the decoder, and describing unseen videos", flush=True)
        found = {name: train_decoder(name, folder, job.workers) for name in ENCODERS}
        ray.shutdown()
    result = {
        "gru_rcn_motion": found["gru-rcn"]["motion"],
        "single_frame_motion": found["single-frame"]["motion"],
        "gru_rcn_scores": found["gru-rcn"]["scores"],
        "single_frame_scores": found["single-frame"]["scores"],
        "chance": 1 / len(MOTIONS),
        "recogniser_top1": top1,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": memory.peak_bytes,
        "folder": str(folder),
    }
    write_json(open_store(folder), "result.json", result)
    show(result, found)
    finish(
        f"demo finished in {duration(result['seconds'])}, at most {result['peak_memory_bytes'] / 2**30:.1f} GiB of memory; "
        f"result in {folder / 'result.json'}; look at the runs: .venv/bin/{ui_command(tracking_uri(folder / 'runs'))}",
        result,
        job.json,
    )
    return 0 if result["gru_rcn_motion"] > 0.9 > 0.5 > result["single_frame_motion"] else 1


# Videos


def make_videos(folder: Path) -> None:
    """videos/, and lists of them: classes.csv, and captions of each split in NAME.json. Nothing is done where they are there."""
    videos = folder / "videos"
    if (folder / "complete").exists():
        return
    videos.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    captions: dict[str, list[dict[str, Any]]] = {split: [] for split in VIDEOS_PER_MOTION}
    with Bar("drawing", "videos", len(MOTIONS) * sum(VIDEOS_PER_MOTION.values())) as bar:
        for split, count in VIDEOS_PER_MOTION.items():
            for number, (first, second) in ((n, motion) for n in range(count) for motion in MOTIONS):
                rng = np.random.default_rng(
                    [list(VIDEOS_PER_MOTION).index(split), MOTIONS.index((first, second)), number]
                )
                colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
                name = f"{split}-{first}-{second}-{number:03}_0_{NUM_FRAMES}.avi"
                write_video(videos / name, draw_scene(colour, shape, first, second, rng))
                rows.append({"path": name, "label": f"{first}-{second}", "split": split})
                if number < CAPTIONED[split]:
                    captions[split].append({"id": name, "caption": sentences(colour, shape, first, second)})
                bar.advance()
    with (folder / "classes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    for split, listed in captions.items():
        (folder / f"{split}.json").write_text(json.dumps(listed, indent=1))
    (folder / "complete").touch()


def pack(folder: Path) -> None:
    """The same videos twice: with classes, and with captions."""
    videos, packing = folder / "videos", Packing(width=SIZE, height=SIZE)
    train_list, val_list, test_list = (folder / f"{split}.json" for split in ("train", "val", "test"))
    captioned = Msvd(videos=videos, train=train_list, val=val_list, test=test_list)
    sources = {"classes": Csv(table=folder / "classes.csv", root=videos), "captions": captioned}
    for name, source in sources.items():
        make_shards.main(make_shards.MakeShards(source=source, out=str(folder / name), packing=packing))


# Training


def train_recogniser(folder: Path, workers: int) -> float:
    """Top-1 accuracy of GRU-RCN on the test videos' motions."""
    runs, shards = folder / "runs", str(folder / "classes")
    recipe = changed(demo(), num_steps=480, val_every=240)
    options = {"storage": str(runs), "name": RECOGNISER, "experiment": "demo-caption", "log_every": 40}
    train.main("demo", train.Train(recipe=recipe, shards=shards, on=Workers(workers=workers), **options))
    evaluate.main(
        evaluate.Evaluate(run=str(runs / RECOGNISER), shards=shards, clips=1, views=1, json=folder / "recogniser.json")
    )
    return json.loads((folder / "recogniser.json").read_text())["top1"]


def train_decoder(name: str, folder: Path, workers: int) -> dict[str, Any]:
    """Encodes, trains and describes the test videos: the share of them whose motion is named right, the scores, some captions."""
    runs, shards = folder / "runs", folder / f"vectors-{name}"
    recogniser = str(runs / RECOGNISER)
    # What single frames show stands beside the states, as the paper joins an "entity" encoder.
    states = recogniser if name == "gru-rcn" else None
    encoder = EncoderConfig(segments=SEGMENTS, frame=recogniser, states=states)
    encode.main(encode.Encode(shards=str(folder / "captions"), out=str(shards), encoder=encoder, storage=str(runs)))
    options = {"storage": str(runs), "name": f"caption-{name}", "experiment": "demo-caption", "log_every": 100}
    recipe = changed(caption_small(), encoder={"segments": SEGMENTS})
    train.main(
        "caption-small", train.TrainCaptions(recipe=recipe, shards=str(shards), on=Workers(workers=workers), **options)
    )
    file = folder / f"caption-{name}.json"
    caption.main(caption.Caption(run=str(runs / f"caption-{name}"), shards=str(shards), json=file))
    result = json.loads(file.read_text())
    rows = pq.read_table(result["captions"]).to_pylist()
    right = [directions_in(row["caption"]) == directions_in(row["references"][0]) for row in rows]
    return {"motion": sum(right) / len(right), "scores": result["scores"], "rows": rows[:: len(rows) // 3][:3]}


def show(result: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Captions of unseen videos")
    for column in ("decoder over", "motion named right", "BLEU-4", "CIDEr"):
        table.add_column(column, justify="left" if column == "decoder over" else "right")
    for title, name in (("GRU-RCN + single frames", "gru-rcn"), ("single frames", "single-frame")):
        scores = found[name]["scores"]
        table.add_row(title, f"{found[name]['motion']:.3f}", f"{scores['bleu4']:.3f}", f"{scores['cider']:.3f}")
    table.add_row("chance", f"{result['chance']:.3f}", "", "")
    Console().print(table)
    for row, other in zip(found["gru-rcn"]["rows"], found["single-frame"]["rows"], strict=True):
        print(f"{row['references'][0]}\n    GRU-RCN:       {row['caption']}\n    single frames: {other['caption']}")
