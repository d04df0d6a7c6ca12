"""Trains a recipe: checks what was asked for, opens the MLflow run, runs the workers, and handles the events that they report.

TrainJob ──> validate ──> MLflow run ──> workers (loop.py) ──> TrainResult
                                            │ events
                                            └──> progress bar, MLflow run, pictures
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import assert_never

from cluster.checkpoints.run_folder import Identity, RunFolder
from cluster.progress import Bar
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.provenance import environment, git_diff
from cluster.tracking.server import tracking_uri
from cluster.workers.context import WorkerContext
from cluster.workers.events import (
    CaptionTable,
    Event,
    FirstStep,
    Metrics,
    Notice,
    Progress,
    Saved,
    Stopped,
    Straggler,
    SystemMetrics,
    Validated,
    VideosDone,
    WorkerStarted,
)
from cluster.workers.launch import run_workers
from grurcn.drawing.charts import Painter, pictures
from grurcn.evaluation.confusion import Confusion
from grurcn.inference.mlflow_model import save_pyfunc
from grurcn.inference.model_source import absolute_source
from grurcn.training import captioning, classification
from grurcn.training.caption_recipes import CAPTION_RECIPES, CaptionRecipe
from grurcn.training.job import TrainJob
from grurcn.training.loop import train_worker
from grurcn.training.recipes import RECIPES, Recipe, TrainingRecipe, changed
from grurcn.training.result import RunResult, TrainResult
from grurcn.training.run_identity import ROOT, open_identity
from grurcn.training.task import Prepared, WorkerJob, find_task, register_task
from shards.index import Index
from shards.reading.order import lanes_of
from shards.store import absolute_url

register_task("classification", RECIPES, classification.prepare, classification.Classification)
register_task("captioning", CAPTION_RECIPES, captioning.prepare, captioning.Captioning)

Worker = Callable[[WorkerJob, WorkerContext], RunResult | Stopped]


def train(job: TrainJob, worker: Worker = train_worker) -> TrainResult:
    """Trains, or goes on with a run that was interrupted. worker: what each worker calls.

    Raises ValueError or OSError for what cannot be trained: a damaged data set, another run in the same folder, an MLflow server
    that does not answer, a cluster without room; Diverged for a loss that is not a number; Interrupted after a signal.
    """
    started = time.monotonic()
    # Workers run in other folders, and a run is the same wherever it is started from.
    job = replace(job, recipe=with_absolute_paths(job.recipe))
    run = RunFolder(f"{absolute_url(job.storage)}/{job.name or job.recipe_name}")
    prepared = validate_training(job, fresh=not run.checkpoints())
    index = Index(job.shards, "train")
    identity = open_identity(job, run, index)
    found = run.result()
    with MlflowRun(identity.tracking_uri, identity.mlflow_run_id, run, package=save_pyfunc) as mlflow_run:
        if found is None:
            run.prepare()
            try:
                log_inputs(job, index, prepared, mlflow_run)
                result = run_training(job, run, identity, prepared, mlflow_run, worker)
            except BaseException as error:
                mlflow_run.log_event(mlflow_run.last_step(), f"ended: {type(error).__name__}: {error}".rstrip(": "))
                mlflow_run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
            run.finish(result.to_dict())
            if job.register:
                mlflow_run.register(job.register)
        else:
            result = RunResult.from_dict(found)
        mlflow_run.end()  # also if the run was finished before: open_identity has set it running
    return TrainResult(
        run=run.url,
        name=run.name,
        result=result,
        finished_before=found is not None,
        mlflow_run_id=identity.mlflow_run_id,
        tracking_uri=identity.tracking_uri,
        seconds=time.monotonic() - started,
    )


def with_absolute_paths(recipe: TrainingRecipe) -> TrainingRecipe:
    match recipe:
        case Recipe():
            return changed(recipe, model={"weights": absolute_source(recipe.model.weights)})
        case CaptionRecipe():
            return replace(recipe, encoder=recipe.encoder.absolute())
        case _:
            return recipe


def validate_training(job: TrainJob, fresh: bool) -> Prepared:
    """Raises, before anything is started, what would stop a worker later. fresh: the run has no checkpoint yet."""
    prepared = find_task(job.recipe.task).prepare(job.recipe, job.shards, tracking_uri(job.storage), fresh)
    if not job.on.sizes(partial(divides, job)):
        lanes = lanes_of(0, max(1, job.on.most), job.recipe.global_batch)
        raise ValueError(
            f"accumulation {job.accumulation}: a worker's {len(lanes)} videos of a global batch do not divide into "
            f"{job.accumulation} equal parts; expected an --accumulation that divides {len(lanes)}"
        )
    return prepared


def divides(job: TrainJob, workers: int) -> bool:
    """Whether the global batch divides over so many workers, and each part into its accumulated parts."""
    return job.recipe.global_batch % (workers * job.accumulation) == 0


def log_inputs(job: TrainJob, index: Index, prepared: Prepared, mlflow_run: MlflowRun) -> None:
    """Logs recipe, data set and code as artifacts."""
    texts = {"recipe.json": json.dumps(job.recipe.to_dict(), indent=1), **prepared.artifacts}
    texts |= {"dataset.json": index.info.to_json(), "environment.txt": environment()}
    diff = git_diff(ROOT)
    for name, text in (texts if diff is None else {**texts, "changes.diff": diff}).items():
        mlflow_run.log_text(name, text)


def run_training(
    job: TrainJob, run: RunFolder, identity: Identity, prepared: Prepared, mlflow_run: MlflowRun, worker: Worker
) -> RunResult:
    """Runs the workers, and shows and logs the events that they report."""
    with (
        Bar("training", "steps", job.recipe.num_steps, lines=False) as bar,
        Painter(mlflow_run.log_file, bar.print_line) as painter,
    ):
        mlflow_run.print_line = bar.print_line

        def handle(event: Event) -> None:
            match event:
                case Progress(step=step, line=line):
                    bar.print_line(line)
                    bar.move_to(step)
                case Metrics(step=step, values=values, milliseconds=milliseconds):
                    mlflow_run.log_metrics(step, values, milliseconds)
                case SystemMetrics(host=host, values=values, milliseconds=milliseconds):
                    values = {f"system/{host}/{name}": value for name, value in values.items()}
                    mlflow_run.log_metrics(mlflow_run.last_step(), values, milliseconds)
                case Validated():
                    painter.paint(partial(pictures_of, job, run, event))
                case CaptionTable(name=name, rows=rows):
                    mlflow_run.log_table(name, captioning.CAPTION_TABLE, rows)
                case Saved(checkpoint=checkpoint, keep=keep):
                    mlflow_run.log_checkpoint(checkpoint, keep)
                case Notice(text=text):
                    bar.print_line(text)
                    mlflow_run.log_event(mlflow_run.last_step(), text)
                case WorkerStarted() | FirstStep() | Straggler() | VideosDone():
                    pass  # run_workers handles them, or they are of an evaluation
                case _:
                    assert_never(event)

        return run_workers(worker, worker_job(job, run, identity, prepared), job.on, handle, partial(divides, job))


def worker_job(job: TrainJob, run: RunFolder, identity: Identity, prepared: Prepared) -> WorkerJob:
    return WorkerJob(
        task=find_task(job.recipe.task),
        recipe=job.recipe,
        prepared=prepared,
        shards=absolute_url(job.shards),
        run=run.url,
        tracking_uri=identity.tracking_uri,
        mlflow_run_id=identity.mlflow_run_id,
        reading=job.reading,
        accumulation=job.accumulation,
        zero=job.zero,
        recompute=job.recompute,
        deepspeed=str(job.deepspeed.absolute()) if job.deepspeed else None,
        precision=job.precision,
        log_every=job.log_every,
        save_every=job.save_every or job.recipe.val_every,
        keep=job.keep,
        timeout_minutes=job.on.timeout_minutes,
    )


def pictures_of(job: TrainJob, run: RunFolder, event: Validated) -> dict[str, bytes]:
    """{artifact: PNG} of a validation."""
    assert isinstance(job.recipe, Recipe)
    about = f"{run.name}, step {event.step:,}: the middle clip of each validation video"
    drawn = pictures(Confusion.from_dict(dict(event.confusion)), Index(job.shards, "val"), job.recipe.clips, about)
    return {f"pictures/val/{name}": content for name, content in drawn.items()}
