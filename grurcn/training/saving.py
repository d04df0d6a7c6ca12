"""Saves a training, and resumes it from its newest checkpoint."""

from deepspeed import DeepSpeedEngine

from cluster.checkpoints.engine_state import load_state
from cluster.checkpoints.files import Checkpoint
from cluster.checkpoints.run_folder import RunFolder
from cluster.checkpoints.state import Training
from cluster.checkpoints.writer import CheckpointWriter
from cluster.workers.collectives import Collectives
from cluster.workers.context import WorkerContext
from cluster.workers.events import Notice, Progress, Saved
from grurcn.training.state import Scores, TrainingState
from grurcn.training.task import Task, WorkerJob


def newest_checkpoint(run: RunFolder, collectives: Collectives, context: WorkerContext) -> Checkpoint | None:
    """The newest checkpoint that is whole, as rank 0 finds it; None for a fresh start."""
    found = None
    if context.rank == 0:
        found = run.newest_whole(warn=lambda line: context.report(Notice(text=line)))
    name = collectives.from_rank_0(found and found.name)
    return Checkpoint(run.store, name) if name else None


def resume(
    engine: DeepSpeedEngine, run: RunFolder, checkpoint: Checkpoint | None, keep: int, context: WorkerContext
) -> tuple[TrainingState, CheckpointWriter]:
    """Loads a checkpoint into the engine. Returns where the run is, and what writes its next checkpoints."""
    if checkpoint is None:
        return TrainingState(), CheckpointWriter(run, keep)
    content = load_state(engine, checkpoint)
    training, best = content.training, content.best
    if context.rank == 0:
        for metrics in training.metrics:  # they may have been lost with the worker that reported them
            context.report(metrics)
        line = f"going on after step {training.step:,} from {checkpoint.url}"
        context.report(Progress(step=training.step, line=line))
    state = TrainingState(
        step=training.step,
        best=best.scores if best else None,
        best_step=best.step if best else 0,
        lowest_loss=training.lowest_loss,
        validations_since=training.validations_since,
    )
    return state, CheckpointWriter(run, keep, content)


def save(
    engine: DeepSpeedEngine,
    writer: CheckpointWriter,
    task: Task,
    state: TrainingState,
    job: WorkerJob,
    context: WorkerContext,
    best: Scores | None,
) -> None:
    """Begins to write a checkpoint, while training goes on. best: the scores of this step, if they are the best so far."""
    epoch, epoch_step = divmod(state.step, task.order.steps_per_epoch)
    training = Training(
        step=state.step,
        epoch=epoch,
        epoch_step=epoch_step,
        recipe=job.recipe.to_dict(),
        model=task.model_meta,
        data_digest=task.data_digest,
        mlflow_run_id=job.mlflow_run_id,
        tracking_uri=job.tracking_uri,
        lowest_loss=state.lowest_loss,
        validations_since=state.validations_since,
        metrics=state.metrics,
    )
    state.metrics = []

    def report(checkpoint: Checkpoint) -> None:
        context.report(Saved(step=training.step, checkpoint=checkpoint.name, keep=job.keep))

    writer.save(engine, training, best, report)
