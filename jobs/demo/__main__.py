"""Run everything once on synthetic videos: pack, train on Ray with DeepSpeed, evaluate, track in MLflow.

    make demo
    python -m jobs.demo                                             classify motions: 3 to 5 minutes on two cores
    python -m jobs.demo caption                                     caption videos: 4 minutes on two cores
    python -m jobs.demo videos --out data/videos --per-class 20     only make the videos

The videos show one shape that moves left, right, up, down, grows, shrinks, or turns either way. Its place, size and angle
wrap around, so that each single frame is equally likely in every class: only the order of frames tells them apart. GRU-RCN
sees it; the same trunk on single frames stays near chance.

--json FILE holds (FOLDER/result.json too):
  motions   gru_rcn_top1, single_frame_top1, chance, seconds, peak_memory_bytes, folder
  caption   gru_rcn_motion, single_frame_motion (fraction of unseen videos whose motion is named right), gru_rcn_scores,
            single_frame_scores, chance, classifier_top1, seconds, peak_memory_bytes, folder
  videos    out, classes, videos
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from rich.console import Console

from cluster.checkpoints.run_folder import write_json
from cluster.progress import Bar, duration
from cluster.tracking.server import tracking_uri, ui_command
from jobs.command import Command, finish, subcommands
from jobs.demo.captions import caption_videos
from jobs.demo.motions import classify_motions
from jobs.memory import PeakMemory
from shards.store import open_store
from shards.synthetic import MOTIONS, make_motion_videos


@dataclass(frozen=True, kw_only=True)
class MotionDemo:
    """Classify motions (the default)."""

    folder: Path = Path("demo")
    """Folder of videos, shards and runs. An interrupted demo is resumed; a finished one starts anew."""
    workers: int = 2
    """Ray Train workers."""
    json: Path | None = None
    """Write the result as JSON to this file."""


@dataclass(frozen=True, kw_only=True)
class CaptionDemo:
    """Train GRU-RCN to classify motions, then an attention LSTM over its states to caption them.

    A shape moves in one direction, then in another. Over GRU-RCN the decoder learns to say "a red square moves left, then
    up". Over single frames of the same trunk it learns the colours and shapes, but cannot know the motion.
    """

    folder: Path = Path("demo-caption")
    """Folder of videos, shards and runs. An interrupted demo is resumed; a finished one starts anew."""
    workers: int = 2
    """Ray Train workers."""
    json: Path | None = None
    """Write the result as JSON to this file."""


@dataclass(frozen=True, kw_only=True)
class MakeVideos:
    """Only make videos to try things with: one folder a class. Existing videos are kept."""

    out: Path
    """Folder of the classes' folders."""
    per_class: int = 20
    """Videos of each class."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise ValueError(f"per_class: found {self.per_class}; expected at least 1")


def main(job: MotionDemo | CaptionDemo | MakeVideos) -> int:
    """Returns status 1 if GRU-RCN did not learn the motion, or single frames did."""
    if isinstance(job, MakeVideos):
        return make_videos(job)
    started = time.monotonic()
    folder = job.folder.absolute()
    if (folder / "result.json").exists():
        shutil.rmtree(folder)
    with PeakMemory() as memory:
        demo = classify_motions if isinstance(job, MotionDemo) else caption_videos
        outcome = demo(folder, job.workers)
        ray.shutdown()
    seconds = time.monotonic() - started
    result = {
        **asdict(outcome.scores), "seconds": seconds, "peak_memory_bytes": memory.peak_bytes, "folder": str(folder)
    }  # fmt: skip
    write_json(open_store(folder), "result.json", result)
    Console().print(outcome.table)
    for line in outcome.examples:
        print(line)
    finish(
        f"demo finished in {duration(seconds)}, at most {memory.peak_bytes / 2**30:.1f} GiB of memory; "
        f"result in {folder / 'result.json'}; look at the runs: .venv/bin/{ui_command(tracking_uri(folder / 'runs'))}",
        result,
        job.json,
    )
    return 0 if outcome.has_learned else 1


def make_videos(job: MakeVideos) -> int:
    total = job.per_class * len(MOTIONS)
    with Bar("drawing", "videos", total) as bar:
        make_motion_videos(job.out, job.per_class, bar.advance)
    finish(
        f"made {total:,} videos of {len(MOTIONS)} classes: {job.out}",
        {"out": str(job.out.absolute()), "classes": len(MOTIONS), "videos": total},
        job.json,
    )
    return 0


COMMAND = Command(
    subcommands({"motions": MotionDemo, "caption": CaptionDemo, "videos": MakeVideos}, default="motions"), main, __doc__
)

if __name__ == "__main__":
    COMMAND.run()
