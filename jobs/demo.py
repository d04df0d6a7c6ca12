"""The whole path in a few minutes: make videos, pack them, train on Ray with DeepSpeed, evaluate, track in MLflow.

    make demo

The videos show one shape that moves left, right, up, down, grows, shrinks, or turns either way. Its place, size and angle
wrap around, so that each single frame is equally likely in every class: only the order of frames tells them apart. GRU-RCN
sees it; the same trunk on single frames stays near chance.

FOLDER/result.json and --json FILE hold: gru_rcn_top1, single_frame_top1, chance, seconds, peak_memory_bytes, folder.
"""

import json
import shutil
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from cluster.connect import start_ray
from cluster.launch import Workers
from cluster.progress import Bar, duration
from cluster.report import tracking_uri, ui_command
from cluster.runs import write_json
from jobs import evaluate, make_shards, train
from jobs.command import command_line, finish, run_command
from jobs.memory import PeakMemory
from jobs.recipes import RECIPES
from shards.sources import Folder
from shards.store import open_store
from shards.video import Packing

SIZE = 40  # pixels
NUM_FRAMES = 24
VIDEOS_PER_CLASS = 130
# Which of the shape's (x, y, log size, angle) changes, and in which direction.
MOTIONS = {
    "left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1),
    "shrinking": (2, -1), "growing": (2, 1), "counterclockwise": (3, -1), "clockwise": (3, 1),
}  # fmt: skip
PERIODS = np.array([SIZE, SIZE, np.log(2.2), 2 * np.pi])  # after which each is where it was


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
        make_videos(folder / "videos")
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
        train.Train(recipe=RECIPES[name](), shards=shards, storage=str(runs), experiment="demo", on=on, log_every=40),
    )
    json_file = folder / f"{name}.json"
    evaluate.main(evaluate.Evaluate(run=str(runs / name), shards=shards, clips=3, views=5, json=json_file))
    return json.loads(json_file.read_text())["top1"]


def make_videos(folder: Path, per_class: int = VIDEOS_PER_CLASS) -> None:
    """So many videos of each motion; nothing is done where they are there already."""
    total = per_class * len(MOTIONS)
    if (folder / "complete").exists():
        return
    with Bar("drawing", "videos", total) as bar:
        for motion in MOTIONS:
            (folder / motion).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                rng = np.random.default_rng([list(MOTIONS).index(motion), number])
                write_video(folder / motion / f"{motion}-{number:03}.avi", draw_motion(motion, rng))
                bar.advance()
    (folder / "complete").touch()


def draw_motion(motion: str, rng: np.random.Generator) -> np.ndarray:
    """(T, SIZE, SIZE, 3) uint8 RGB: a shape of some colour before a patchwork, moving at a steady speed of its own.

    The shape starts at a random place, size and angle, and whichever of them changes wraps around. So a frame taken by
    itself has the same distribution in every class.
    """
    axis, direction = MOTIONS[motion]
    start = rng.uniform(0, 1, 4) * PERIODS
    velocity = np.zeros(4)
    velocity[axis] = direction * rng.uniform(1 / 28, 1 / 18) * PERIODS[axis]  # a round in 18 to 28 frames
    patches = np.kron(rng.uniform(20, 110, (4, 4, 3)), np.ones((SIZE // 4, SIZE // 4, 1)))
    colour = rng.uniform(140, 255, 3)
    frames = [
        np.where(shape_at((start + frame * velocity) % PERIODS)[..., None], colour, patches)
        for frame in range(NUM_FRAMES)
    ]
    return np.stack(frames).astype(np.uint8)


def shape_at(state: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: a hook at (x, y, log size, angle), on a picture whose edges meet."""
    x, y, log_size, angle = state
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    right, down = (columns - x + SIZE / 2) % SIZE - SIZE / 2, (rows - y + SIZE / 2) % SIZE - SIZE / 2
    scale = 6 * np.exp(log_size)
    u = (np.cos(angle) * right + np.sin(angle) * down) / scale
    v = (np.cos(angle) * down - np.sin(angle) * right) / scale
    stem, arm = (abs(u) < 0.35) & (abs(v) < 1.2), (v > -1.2) & (v < -0.5) & (u > -0.35) & (u < 1.2)
    return stem | arm


def write_video(path: Path, frames: np.ndarray) -> None:
    """(T, H, W, 3) uint8 RGB -> an AVI at 12 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(12), options={"q": "2"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def show(result: dict[str, Any]) -> None:
    table = Table(title="Accuracy on unseen videos")
    table.add_column("model")
    table.add_column("top-1", justify="right")
    table.add_row("GRU-RCN", f"{result['gru_rcn_top1']:.3f}")
    table.add_row("same trunk, single frames averaged", f"{result['single_frame_top1']:.3f}")
    table.add_row("chance", f"{result['chance']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(lambda: main(command_line(Demo, __doc__ or "")))
