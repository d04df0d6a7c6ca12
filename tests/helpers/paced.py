"""python -m jobs.train ..., at a steady pace, on any machine: each step waits a while, and leaves the cores to others.

A fault then hits in the middle of a run that is short all the same.
"""

import time
from typing import Any

from cluster.workers.context import WorkerContext
from cluster.workers.events import Stopped
from grurcn.training.classification import Batches
from grurcn.training.loop import train_worker
from grurcn.training.result import RunResult
from grurcn.training.task import WorkerJob
from jobs.command import Command
from jobs.train import COMMAND, Train, main
from shards.reading.stream import train_batches

STEP_SECONDS = 0.25


def paced_batches(*args: Any, **options: Any) -> Batches:
    for batch in train_batches(*args, **options):
        time.sleep(STEP_SECONDS)
        yield batch


def paced_worker(job: WorkerJob, context: WorkerContext) -> RunResult | Stopped:
    return train_worker(job, context, paced_batches)


if __name__ == "__main__":
    Command[tuple[str, Train]](COMMAND.options, lambda chosen: main(*chosen, paced_worker), COMMAND.description).run()
