"""The whole path in a few minutes: make videos, pack them, train on Ray with DeepSpeed, evaluate, track in MLflow.

    make demo
    python -m jobs.demo caption         captioning instead: python -m jobs.demo caption --help

The videos show one shape that moves left, right, up, down, grows, shrinks, or turns either way. Its place, size and angle
wrap around, so that each single frame is equally likely in every class: only the order of frames tells them apart. GRU-RCN
sees it; the same trunk on single frames stays near chance.

FOLDER/result.json and --json FILE hold: gru_rcn_top1, single_frame_top1, chance, seconds, peak_memory_bytes, folder.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from cluster.checkpoints.run_folder import write_json
from cluster.progress import duration
from cluster.tracking.server import tracking_uri, ui_command
from cluster.workers.connect import start_ray
from cluster.workers.options import Workers
from grurcn.training.recipes import RECIPES
from jobs import evaluate, make_shards, train
from jobs.bench.memory import PeakMemory
from jobs.command import command_line, finish, run_command
from jobs.demo import caption as demo_caption
from jobs.demo.videos import MOTIONS, SIZE, make_videos
from shards.packing.sources import Folder
from shards.store import open_store
from shards.video import Packing

VIDEOS_PER_CLASS = 130


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Options of the demo."""

    folder: Path = Path("demo")
    """Where videos, shards and runs go. An interrupted demo goes on; a finished one starts anew."""
    workers: int = 2
    """Ray Train workers."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: Demo) -> int:
    """Runs every step and prints what came out; status 1 if GRU-RCN did not learn the motion."""
    started = time.monotonic()
    folder = job.folder.absolute()
    if (folder / "result.json").exists():
        shutil.rmtree(folder)
    with PeakMemory() as memory:
        print(
            f"1. Videos of {len(MOTIONS)} motions that no single frame tells apart: {folder / 'videos'}",
            flush=True,
        )
        make_videos(folder / "videos", VIDEOS_PER_CLASS)
        print("2. Packing them into WebDataset shards", flush=True)
        start_ray()
        make_shards.main(
            make_shards.MakeShards(
                source=Folder(videos=folder / "videos"),
                out=str(folder / "shards"),
                packing=Packing(width=SIZE, height=SIZE),
            )
        )
        print("3. Training GRU-RCN, then the same trunk on single frames", flush=True)
        accuracy = {name: train_and_evaluate(name, folder, job.workers) for name in ("demo", "demo-frames")}
        ray.shutdown()
    result = {
        "gru_rcn_top1": accuracy["demo"],
        "single_frame_top1": accuracy["demo-frames"],
        "chance": 1 / len(MOTIONS),
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": memory.peak_bytes,
        "folder": str(folder),
    }
    write_json(open_store(folder), "result.json", result)
    show(result)
    finish(
        f"demo finished in {duration(result['seconds'])}, at most {result['peak_memory_bytes'] / 2**30:.1f} GiB of memory; "
        f"result in {folder / 'result.json'}; look at the runs: .venv/bin/{ui_command(tracking_uri(folder / 'runs'))}",
        result,
        job.json,
    )
    return 0 if result["gru_rcn_top1"] > 0.9 > 0.5 > result["single_frame_top1"] else 1


def train_and_evaluate(name: str, folder: Path, workers: int) -> float:
    """Top-1 accuracy of a recipe on the test videos."""
    shards, runs = str(folder / "shards"), folder / "runs"
    on = Workers(workers=workers)
    train.main(
        name,
        train.Train(
            recipe=RECIPES[name](),
            shards=shards,
            storage=str(runs),
            experiment="demo",
            on=on,
            log_every=40,
            register=f"grurcn-{name}",
        ),
    )
    json_file = folder / f"{name}.json"
    evaluate.main(evaluate.Evaluate(run=str(runs / name), shards=shards, clips=3, views=5, json=json_file))
    return json.loads(json_file.read_text())["top1"]


def show(result: dict[str, Any]) -> None:
    table = Table(title="Accuracy on unseen videos")
    table.add_column("model")
    table.add_column("top-1", justify="right")
    table.add_row("GRU-RCN", f"{result['gru_rcn_top1']:.3f}")
    table.add_row("same trunk, single frames averaged", f"{result['single_frame_top1']:.3f}")
    table.add_row("chance", f"{result['chance']:.3f}")
    Console().print(table)


def run() -> int:
    """The demo that the command line names."""
    if sys.argv[1:2] == ["caption"]:
        about = demo_caption.__doc__ or ""
        return demo_caption.main(command_line(demo_caption.CaptionDemo, about, sys.argv[2:], subcommand="caption"))
    return main(command_line(Demo, __doc__ or ""))


if __name__ == "__main__":
    run_command(run)
