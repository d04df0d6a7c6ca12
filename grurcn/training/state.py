"""Where a run is, besides its weights: what is saved with them, and how a restart finds it again."""

import dataclasses
from dataclasses import dataclass, field

from deepspeed import DeepSpeedEngine

from cluster.checkpoints.engine_state import read_state
from cluster.checkpoints.files import Checkpoint
from cluster.checkpoints.run_folder import RunFolder
from cluster.checkpoints.writer import CheckpointWriter
from cluster.workers.collectives import Collectives
from cluster.workers.context import WorkerContext
from cluster.workers.events import Metrics, Notice, Progress, Saved
from grurcn.training.recipes import TrainingRecipe
from grurcn.training.result import RunResult
from grurcn.training.task import Task, WorkerJob

Scores = dict[str, float]


@dataclass
class TrainingState:
    """The step that a run is at, and its best validation."""

    step: int = 0  # steps done
    best: Scores | None = None  # the scores of the best validation, and its step
    lowest_loss: float | None = None  # of the validations
    validations_since: int = 0  # the one with the lowest loss
    metrics: list[Metrics] = field(default_factory=list)  # since the last checkpoint, which keeps them

    def is_over(self, recipe: TrainingRecipe) -> bool:
        """Whether all steps are done, or early stopping ends the run."""
        return self.step >= recipe.num_steps or self.is_stopped_early(recipe)

    def is_stopped_early(self, recipe: TrainingRecipe) -> bool:
        """Early stopping on the validation log-probability (paper section 5.1)."""
        return bool(recipe.patience) and self.validations_since >= recipe.patience

    def add_validation(self, scores: Scores, select: str) -> bool:
        """Notes a validation. Returns whether it is the best: the lowest loss, or the highest of any other score."""
        if self.lowest_loss is None or scores["loss"] < self.lowest_loss:
            self.lowest_loss, self.validations_since = scores["loss"], 0
        else:
            self.validations_since += 1
        if self.best is None:
            is_best = True
        elif select == "loss":
            is_best = scores["loss"] < self.best["loss"]
        else:
            is_best = scores[select] > self.best[select]
        if is_best:
            self.best = {**scores, "step": self.step}
        return is_best

    def result(self, recipe: TrainingRecipe) -> RunResult:
        assert self.best is not None  # the last step is always validated
        return RunResult(
            steps=self.step,
            stopped_early=self.step < recipe.num_steps,
            scores={name: value for name, value in self.best.items() if name not in ("step", "sha256")},
            best_step=int(self.best["step"]),
        )


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
    content = read_state(engine, checkpoint)
    meta = content["meta"]
    if context.rank == 0:
        for metrics in meta["metrics"]:  # they may have been lost with the worker that reported them
            context.report(Metrics(**metrics))
        line = f"going on after step {meta['step']:,} from {checkpoint.url}"
        context.report(Progress(step=meta["step"], line=line))
    state = TrainingState(
        step=meta["step"], best=content["best"], lowest_loss=meta["lowest"], validations_since=meta["stale"]
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
    meta = {
        "step": state.step,
        "epoch": epoch,
        "epoch_step": epoch_step,
        "lowest": state.lowest_loss,
        "stale": state.validations_since,
        "metrics": [dataclasses.asdict(metrics) for metrics in state.metrics],
        "recipe": job.recipe.to_dict(),
        **task.model_meta,
        "data_digest": task.data_digest,
        "mlflow_run_id": job.mlflow_run_id,
        "tracking_uri": job.tracking_uri,
    }
    state.metrics = []
    step = state.step

    def report(checkpoint: Checkpoint) -> None:
        context.report(Saved(step=step, checkpoint=checkpoint.name, keep=job.keep))

    writer.save(engine, step, meta, best, report)
