"""GRU-RCN learns to tell motions apart; the same trunk on single frames cannot."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from cluster.progress import Bar
from cluster.workers.connect import start_ray
from cluster.workers.options import Workers
from grurcn.training.recipes import RECIPES
from jobs import evaluate, make_shards, train
from jobs.demo.outcome import Outcome
from shards.packing.sources import Folder
from shards.synthetic import MOTIONS, SIZE, make_motion_videos
from shards.video import Packing

VIDEOS_PER_CLASS = 130


@dataclass(frozen=True, kw_only=True)
class MotionScores:
    """Top-1 accuracies on unseen videos."""

    gru_rcn_top1: float
    single_frame_top1: float
    chance: float = 1 / len(MOTIONS)


def classify_motions(folder: Path, workers: int) -> Outcome:
    """Makes videos in the folder, packs them, trains both models and evaluates them."""
    print(f"1. Videos of {len(MOTIONS)} motions that no single frame tells apart: {folder / 'videos'}", flush=True)
    with Bar("drawing", "videos", VIDEOS_PER_CLASS * len(MOTIONS)) as bar:
        make_motion_videos(folder / "videos", VIDEOS_PER_CLASS, bar.advance)
    print("2. Packing them into WebDataset shards", flush=True)
    start_ray()
    source, packing = Folder(videos=folder / "videos"), Packing(width=SIZE, height=SIZE)
    make_shards.main(make_shards.MakeShards(source=source, out=str(folder / "shards"), packing=packing))
    print("3. Training GRU-RCN, then the same trunk on single frames", flush=True)
    scores = MotionScores(
        gru_rcn_top1=train_and_evaluate("demo", folder, workers),
        single_frame_top1=train_and_evaluate("demo-frames", folder, workers),
    )
    return Outcome(
        scores=scores, has_learned=scores.gru_rcn_top1 > 0.9 > 0.5 > scores.single_frame_top1, table=table_of(scores)
    )


def train_and_evaluate(name: str, folder: Path, workers: int) -> float:
    """Top-1 accuracy of a recipe on the test videos."""
    shards, runs, json_file = str(folder / "shards"), folder / "runs", folder / f"{name}.json"
    options = {"storage": str(runs), "experiment": "demo", "log_every": 40, "register": f"grurcn-{name}"}
    train.main(name, train.Train(recipe=RECIPES[name](), shards=shards, on=Workers(workers=workers), **options))
    evaluate.main(evaluate.Evaluate(run=str(runs / name), shards=shards, clips=3, views=5, json=json_file))
    return json.loads(json_file.read_text())["top1"]


def table_of(scores: MotionScores) -> Table:
    table = Table(title="Accuracy on unseen videos")
    table.add_column("model")
    table.add_column("top-1", justify="right")
    table.add_row("GRU-RCN", f"{scores.gru_rcn_top1:.3f}")
    table.add_row("same trunk, single frames averaged", f"{scores.single_frame_top1:.3f}")
    table.add_row("chance", f"{scores.chance:.3f}")
    return table
