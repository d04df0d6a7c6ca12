"""Train a recipe on packed shards.

    python -m jobs.train gru-rcn-small --shards data/mine                     in this process
    python -m jobs.train gru-rcn-small --shards data/mine --workers 2         two Ray Train workers
    ray job submit --working-dir . -- python -m jobs.train gru-rcn --shards /nfs/ucf101 --storage /nfs/runs --workers 8

The same command resumes an interrupted run at the exact step, on any number of workers that divides the global batch.
With --workers 1:8 a run continues by itself with the workers that are left when machines are lost, and with more when
machines come back. MLflow tracks the run: in STORAGE/mlflow.db, or on the server that MLFLOW_TRACKING_URI names.

Recipes named caption... train captioning, on shards that were packed with captions, or on the vectors that jobs.encode
computed from such shards.

--json FILE holds: run, name, steps, stopped_early, best_step, val_loss, val_top1, val_top5 (of captions: val_loss,
val_perplexity, val_word_accuracy, val_bleu4, ...), mlflow_run_id, tracking_uri, seconds.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from cluster.progress import duration
from cluster.tracking.server import ui_command
from grurcn.training.loop import train_worker
from grurcn.training.recipes import TrainingRecipe
from grurcn.training.reporting import format_scores
from grurcn.training.task import TASKS
from grurcn.training.train import TrainJob, Worker, train
from jobs.command import Command, Configurations, finish, wrapped_help


@dataclass(frozen=True, kw_only=True)
class Train(TrainJob):
    """Options of a training."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(recipe_name: str, job: Train, worker: Worker = train_worker) -> int:
    """Trains, and prints what came out. worker: what each worker calls."""
    done = train(replace(job, recipe_name=recipe_name), worker)
    if done.finished_before:
        print(f"{done.run} was finished before; choose another --name to train anew", flush=True)
    early = " (stopped early)" if done.result.stopped_early else ""
    finish(
        f"trained {done.result.steps:,} steps{early} ({duration(done.seconds)} of it now): best at step "
        f"{done.result.best_step:,} with validation {format_scores(done.result.scores, ', ')}; model and checkpoints in "
        f"{done.run}; see the run: {ui_command(done.tracking_uri)}",
        done.to_dict(),
        job.json,
    )
    return 0


def recipes() -> dict[str, Callable[[], TrainingRecipe]]:
    """{name: recipe} of all tasks, those that plugins have registered among them."""
    return {name: recipe for task in TASKS.values() for name, recipe in task.recipes.items()}


def defaults() -> dict[str, tuple[str, Train]]:
    return {
        name: ((recipe.__doc__ or "").strip(), Train(recipe=recipe(), shards=tyro.MISSING))
        for name, recipe in recipes().items()
    }


@dataclass(frozen=True)
class TrainCommand(Command[tuple[str, Train]]):
    """The command, whose help without a recipe fits on one screen."""

    def parse(self, args: Sequence[str], program: str) -> tuple[str, Train]:
        if {"-h", "--help"}.isdisjoint(args) or not recipes().keys().isdisjoint(args):
            return super().parse(args, program)
        with wrapped_help(program):
            print(overview(program))
        sys.exit(0)


def overview(program: str) -> str:
    """What the command does, and the recipes with a line each."""
    about = (__doc__ or "").partition("--json FILE holds")[0].strip()
    lines = [f"  {name:<22}  {re.split('[,:;(.]', recipe.__doc__ or '')[0]}" for name, recipe in recipes().items()]
    usage = f"usage: {program} RECIPE --shards FOLDER [OPTIONS]"
    return "\n".join([usage, "", about, "", f"recipes (all options: {program} RECIPE --help):", *lines])


COMMAND = TrainCommand(Configurations(defaults), lambda chosen: main(*chosen), __doc__)

if __name__ == "__main__":
    COMMAND.run()
