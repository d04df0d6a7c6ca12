"""An attention LSTM over GRU-RCN learns to caption motions; over single frames of the same trunk it cannot."""

import csv
import json
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table

from cluster.progress import Bar
from cluster.workers.connect import start_ray
from cluster.workers.options import Workers
from grurcn.training.caption_recipes import caption_small
from grurcn.training.encoders import EncoderConfig
from grurcn.training.recipes import changed, demo
from jobs import caption, encode, evaluate, make_shards, train
from jobs.demo.outcome import Outcome
from shards.packing.sources import Csv, Msvd
from shards.synthetic import (
    COLOURS,
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    directions_in,
    draw_scene,
    scene_captions,
    write_video,
)
from shards.video import Packing

MOTIONS = list(permutations(DIRECTIONS, 2))
VIDEOS_PER_MOTION = {"train": 64, "val": 6, "test": 10}
SEGMENTS = 4
CLASSIFIER = "classifier"  # name of its run


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Scores of both decoders on unseen videos. motion: fraction of the videos whose motion is named right."""

    gru_rcn_motion: float
    single_frame_motion: float
    gru_rcn_scores: dict[str, float]
    single_frame_scores: dict[str, float]
    chance: float = 1 / len(MOTIONS)
    classifier_top1: float


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Captions of the test videos by one decoder."""

    motion: float  # fraction of the videos whose motion is named right
    scores: dict[str, float]
    examples: tuple[tuple[str, str], ...]  # (reference, caption)


def caption_videos(folder: Path, workers: int) -> Outcome:
    """Makes videos and captions in the folder, packs them, trains a classifier and two decoders, and scores these."""
    print(f"1. Videos of {len(MOTIONS)} motions, and their captions: {folder / 'videos'}", flush=True)
    make_videos(folder)
    print("2. Packing them, with their classes and with their captions", flush=True)
    start_ray()
    pack(folder)
    print("3. Training GRU-RCN to classify the motions", flush=True)
    top1 = train_classifier(folder, workers)
    print("4. Encoding the captioned videos, training the decoders, and captioning unseen videos", flush=True)
    gru_rcn, single_frame = (train_decoder(name, folder, workers) for name in ("gru-rcn", "single-frame"))
    scores = CaptionScores(
        gru_rcn_motion=gru_rcn.motion,
        single_frame_motion=single_frame.motion,
        gru_rcn_scores=gru_rcn.scores,
        single_frame_scores=single_frame.scores,
        classifier_top1=top1,
    )
    return Outcome(
        scores=scores,
        has_learned=gru_rcn.motion > 0.9 > 0.5 > single_frame.motion,
        table=table_of(gru_rcn, single_frame, scores.chance),
        examples=tuple(
            f"{reference}\n    GRU-RCN:       {caption}\n    single frames: {other}"
            for (reference, caption), (_, other) in zip(gru_rcn.examples, single_frame.examples, strict=True)
        ),
    )


# Videos


def make_videos(folder: Path) -> None:
    """Writes videos/, classes.csv and the captions of each split in SPLIT.json, unless they are complete."""
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
                captions[split].append({"id": name, "caption": scene_captions(colour, shape, first, second)})
                bar.advance()
    with (folder / "classes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    for split, listed in captions.items():
        (folder / f"{split}.json").write_text(json.dumps(listed, indent=1))
    (folder / "complete").touch()


def pack(folder: Path) -> None:
    """Packs the same videos twice: with classes, and with captions."""
    videos, packing = folder / "videos", Packing(width=SIZE, height=SIZE)
    train_list, val_list, test_list = (folder / f"{split}.json" for split in ("train", "val", "test"))
    captioned = Msvd(videos=videos, train=train_list, val=val_list, test=test_list)
    sources = {"classes": Csv(table=folder / "classes.csv", root=videos), "captions": captioned}
    for name, source in sources.items():
        make_shards.main(make_shards.MakeShards(source=source, out=str(folder / name), packing=packing))


# Training


def train_classifier(folder: Path, workers: int) -> float:
    """Top-1 accuracy of GRU-RCN on the test videos' motions."""
    runs, shards = folder / "runs", str(folder / "classes")
    recipe = changed(demo(), num_steps=480, val_every=240)
    options = {"storage": str(runs), "name": CLASSIFIER, "experiment": "demo-caption", "log_every": 40}
    train.main("demo", train.Train(recipe=recipe, shards=shards, on=Workers(workers=workers), **options))
    json_file = folder / f"{CLASSIFIER}.json"
    evaluate.main(evaluate.Evaluate(run=str(runs / CLASSIFIER), shards=shards, clips=1, views=1, json=json_file))
    return json.loads(json_file.read_text())["top1"]


def train_decoder(name: str, folder: Path, workers: int) -> Decoded:
    """Encodes the videos, trains a decoder and captions the test videos."""
    runs, shards = folder / "runs", folder / f"vectors-{name}"
    classifier = str(runs / CLASSIFIER)
    # GRU-RCN's states stand beside the vectors of single frames, as the paper joins an "entity" encoder.
    states = classifier if name == "gru-rcn" else None
    encoder = EncoderConfig(segments=SEGMENTS, frame=classifier, states=states)
    encode.main(encode.Encode(shards=str(folder / "captions"), out=str(shards), encoder=encoder, storage=str(runs)))
    options = {"storage": str(runs), "name": f"caption-{name}", "experiment": "demo-caption", "log_every": 100}
    recipe = changed(caption_small(), encoder={"segments": SEGMENTS})
    train.main("caption-small", train.Train(recipe=recipe, shards=str(shards), on=Workers(workers=workers), **options))
    file = folder / f"caption-{name}.json"
    caption.main(caption.Caption(run=str(runs / f"caption-{name}"), shards=str(shards), json=file))
    result = json.loads(file.read_text())
    rows = pq.read_table(result["captions"]).to_pylist()
    right = [directions_in(row["caption"]) == directions_in(row["references"][0]) for row in rows]
    examples = tuple((row["references"][0], row["caption"]) for row in rows[:: len(rows) // 3][:3])
    return Decoded(motion=sum(right) / len(right), scores=result["scores"], examples=examples)


def table_of(gru_rcn: Decoded, single_frame: Decoded, chance: float) -> Table:
    table = Table(title="Captions of unseen videos")
    for column in ("decoder over", "motion named right", "BLEU-4", "CIDEr"):
        table.add_column(column, justify="left" if column == "decoder over" else "right")
    for title, decoded in (("GRU-RCN + single frames", gru_rcn), ("single frames", single_frame)):
        scores = decoded.scores
        table.add_row(title, f"{decoded.motion:.3f}", f"{scores['bleu4']:.3f}", f"{scores['cider']:.3f}")
    table.add_row("chance", f"{chance:.3f}", "", "")
    return table
