"""The training loop: what each worker runs, batches -> loss -> step -> report, and when it validates and saves.

What is learned is a task (recognition.py, captioning.py): its batches, its model, its loss, its validation.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from cluster.checkpoints.engine_state import read_state
from cluster.checkpoints.files import Checkpoint
from cluster.checkpoints.run_folder import RunFolder
from cluster.checkpoints.writer import CheckpointWriter
from cluster.engine import loss_scale, set_learning_rate, start_engine
from cluster.progress import duration
from cluster.workers.collectives import Agreement
from cluster.workers.context import WorkerContext
from cluster.workers.events import FirstStep, Metrics, Notice, Saved, Stopped, Straggler, Validated
from cluster.workers.events import Progress as ProgressEvent
from grurcn.training.caption_recipes import CaptionRecipe
from grurcn.training.captioning import Captioning
from grurcn.training.classification import Recognition
from grurcn.training.optim import build_optimizer, learning_rate
from grurcn.training.performance import performance
from grurcn.training.recipes import Learning, Recipe
from grurcn.training.stopwatch import Stopwatch
from shards.reading.order import Order, lanes_of

SLOW = 3.0  # times as long as the others: a worker is named
KEYS_NAMED = 8
SHOWN = {
    "loss": "loss",
    "top1": "top-1",
    "word_accuracy": "next word",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "cider": "CIDEr",
}


class Diverged(ValueError):
    """The loss is not a number any more."""


class Task(Protocol):
    """What is learned, on one worker."""

    @property
    def recipe(self) -> Learning: ...

    @property
    def order(self) -> Order: ...

    @property
    def data_digest(self) -> str: ...

    @property
    def select(self) -> str:
        """The validation score that makes a model the best: the highest, of "loss" the lowest."""
        ...

    @property
    def flops_per_clip(self) -> int | None:
        """Floating-point operations of the model in a step, forward and backward; None where they are not counted."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that its model can be used without the data."""
        ...

    @property
    def judged(self) -> dict[str, Any] | None:
        """What the last validation says of classes, levels and videos, to be drawn (judgement.py); None: nothing."""
        ...

    def build(self, fresh: bool) -> nn.Module:
        """The model; of a fresh start with all that it begins with, else a checkpoint will fill it."""
        ...

    def batches(self, *, rank: int, world_size: int, start: tuple[int, int]) -> Generator[Any, None, None]:
        """((epoch, step), this rank's part of the global batch), for ever."""
        ...

    def keys(self, numbers: list[int]) -> list[str]:
        """The names of the order's samples."""
        ...

    def tally(self) -> Any:
        """Of the training scores: read() gives them, the same on every rank."""
        ...

    def loss(self, model: Callable[..., Any], batch: Any, tally: Any) -> Tensor:
        """The loss of a part of a batch, a scalar; its scores go to the tally."""
        ...

    def validate(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """ "loss" and other scores of the validation videos. Every rank calls it, with the engine in evaluation mode."""
        ...


def train_worker(
    job: dict[str, Any], context: WorkerContext, read: Callable[..., Any] | None = None
) -> dict[str, Any] | Stopped:
    """What each worker runs. Gives back the run's result, or Stopped; the same on every rank. read: batches."""
    run, agreement = RunFolder(job["run"]), Agreement(job["timeout_minutes"])
    checkpoint = newest(run, agreement, context)
    task = task_of(job, context, checkpoint, read)
    recipe, order = task.recipe, task.order
    engine = build_engine(task, job, context, fresh=checkpoint is None)
    progress, writer = resume(engine, run, checkpoint, job, context)
    start = divmod(progress.step, order.steps_per_epoch)
    batches = task.batches(rank=context.rank, world_size=context.world_size, start=start)
    losses, tally, watch = Losses(progress.step), task.tally(), Stopwatch(recipe.global_batch, context.device)
    stop = False

    while progress.step < recipe.num_steps and not progress.stopped(recipe) and not stop:
        with watch.waiting():
            _, batch = next(batches)
        rate = learning_rate(progress.step, recipe.num_steps, recipe.optim)
        set_learning_rate(engine, rate)
        for part in batch.to(context.device).split(job["accumulation"]):
            with watch.computing():
                loss = task.loss(engine, part, tally)
            engine.backward(loss)
            engine.step()
            losses.add(loss)
        watch.step_done()
        stop = step_done(context, agreement, progress)

        is_logged = is_time(progress.step, job["log_every"], recipe.num_steps)
        is_validated = is_time(progress.step, recipe.val_every, recipe.num_steps)
        is_saved = is_validated or stop or is_time(progress.step, job["save_every"], recipe.num_steps)
        if is_logged or is_saved:
            losses = losses.checked(progress.step, agreement, task)
            writer.check()
        if is_logged:
            tell(job, context, agreement, progress, task, tally.read(), watch, rate, loss_scale(engine))
            tally, watch = task.tally(), Stopwatch(recipe.global_batch, context.device)
        if is_saved:
            with watch.pausing():
                best = validate(engine, task, context, progress) if is_validated else None
                save(engine, writer, task, job, context, progress, best)
    batches.close()  # its threads end with it
    writer.close()
    is_over = progress.step == recipe.num_steps or progress.stopped(recipe)
    return progress.result(recipe) if is_over else Stopped(step=progress.step)


def task_of(
    job: dict[str, Any], context: WorkerContext, checkpoint: Checkpoint | None, read: Callable[..., Any] | None
) -> Task:
    """The task of a job, as its checkpoint, if there is one, has begun it."""
    reader = {} if read is None else {"read": read}
    if "decoder" in job["recipe"]:
        known = checkpoint.state()["meta"] if checkpoint else job
        return Captioning(CaptionRecipe.from_dict(job["recipe"]), job, context, known, **reader)
    return Recognition(Recipe.from_dict(job["recipe"]), job, context, **reader)


@dataclass
class Progress:
    """Where a run is and the best that it saw: what a restart must know besides the weights."""

    step: int = 0  # steps done
    best: dict[str, float] | None = None  # the scores of the best validation, and its step
    lowest: float | None = None  # the lowest validation loss
    stale: int = 0  # validations since then
    begun: bool = False  # a step was done since these workers started
    slow: bool = False  # a worker was much slower than the others when last looked at
    told: list[Metrics] = field(default_factory=list)  # since the last checkpoint, which keeps them

    def stopped(self, recipe: Learning) -> bool:
        """Early stopping on the validation log-probability (paper section 5.1)."""
        return bool(recipe.patience) and self.stale >= recipe.patience

    def is_best(self, values: dict[str, float], select: str) -> bool:
        """Whether a validation gave the best score so far: the lowest loss, or the highest of any other."""
        if self.best is None:
            return True
        if select == "loss":
            return values["loss"] < self.best["loss"]
        return values[select] > self.best[select]

    def result(self, recipe: Learning) -> dict[str, Any]:
        assert self.best is not None  # the last step is always validated
        values = {key: value for key, value in self.best.items() if key not in ("step", "sha256")}
        return {
            "steps": self.step,
            "stopped_early": self.step < recipe.num_steps,
            **{f"val_{key}": value for key, value in values.items()},
            "best_step": self.best["step"],
        }


def build_engine(task: Task, job: dict[str, Any], context: WorkerContext, fresh: bool) -> DeepSpeedEngine:
    """The task's model in its engine."""
    recipe, model = task.recipe, task.build(fresh)
    return start_engine(
        model.to(context.device),
        build_optimizer(model.parameters(), recipe.optim),
        zero_stage=job["zero"],
        global_batch=recipe.global_batch,
        accumulation=job["accumulation"],
        precision=job["precision"],
        clip_norm=recipe.optim.clip_norm,
        device=context.device,
        config_path=job["deepspeed"],
    )


def newest(run: RunFolder, agreement: Agreement, context: WorkerContext) -> Checkpoint | None:
    """The newest checkpoint that is whole, as rank 0 finds it; None for a fresh start."""
    found = None
    if context.rank == 0:
        found = run.newest_whole(warn=lambda line: context.report(Notice(text=line)))
    name = agreement.of_rank_0(found and found.name)
    return Checkpoint(run.store, name) if name else None


def resume(
    engine: DeepSpeedEngine, run: RunFolder, checkpoint: Checkpoint | None, job: dict[str, Any], context: WorkerContext
) -> tuple[Progress, CheckpointWriter]:
    """Where the run is, with the checkpoint's state in the engine, and what will write the next ones."""
    if checkpoint is None:
        return Progress(), CheckpointWriter(run, job["keep"])
    state = read_state(engine, checkpoint)
    meta = state["meta"]
    if context.rank == 0:
        for each in meta["told"]:  # they may have been lost with the worker that reported them
            context.report(Metrics(step=each["at"], values=each["metrics"], milliseconds=each["milliseconds"]))
        line = f"going on after step {meta['step']:,} from {checkpoint.url}"
        context.report(ProgressEvent(step=meta["step"], line=line))
    progress = Progress(step=meta["step"], best=state["best"], lowest=meta["lowest"], stale=meta["stale"])
    return progress, CheckpointWriter(run, job["keep"], state)


def step_done(context: WorkerContext, agreement: Agreement, progress: Progress) -> bool:
    """Counts a step. Whether all workers should save and stop now."""
    progress.step += 1
    if not progress.begun and context.rank == 0:
        context.report(FirstStep(step=progress.step))
    progress.begun = True
    return agreement.any(context.stop_requested())


def save(
    engine: DeepSpeedEngine,
    writer: CheckpointWriter,
    task: Task,
    job: dict[str, Any],
    context: WorkerContext,
    progress: Progress,
    best: dict[str, float] | None,
) -> None:
    """Weights, optimizer, place and best model -> the run's folder, while training goes on; then MLflow is told."""
    epoch, epoch_step = divmod(progress.step, task.order.steps_per_epoch)
    meta = {
        "step": progress.step,
        "epoch": epoch,
        "epoch_step": epoch_step,
        "lowest": progress.lowest,
        "stale": progress.stale,
        "told": [{"metrics": m.values, "at": m.step, "milliseconds": m.milliseconds} for m in progress.told],
        "recipe": job["recipe"],
        **task.about,
        "data_digest": task.data_digest,
        "mlflow_run_id": job["mlflow_run_id"],
        "tracking_uri": job["tracking_uri"],
    }
    progress.told = []
    step, keep = progress.step, job["keep"]

    def report(checkpoint: Checkpoint) -> None:
        context.report(Saved(step=step, checkpoint=checkpoint.name, keep=keep))

    writer.save(engine, step, meta, best, report)


def validate(
    engine: DeepSpeedEngine, task: Task, context: WorkerContext, progress: Progress
) -> dict[str, float] | None:
    """The scores of the validation videos, told. Gives them back if they are the best so far."""
    engine.eval()
    values = task.validate(engine)
    engine.train()
    lower = progress.lowest is None or values["loss"] < progress.lowest
    progress.lowest = values["loss"] if lower else progress.lowest
    progress.stale = 0 if lower else progress.stale + 1
    better = progress.is_best(values, task.select)
    progress.best = {**values, "step": progress.step} if better else progress.best
    mark = "  best so far" if better else ""
    line = f"step {progress.step:>6,}  validation: {in_words(values)}{mark}"
    tell_metrics(context, progress, {f"val/{key}": value for key, value in values.items()}, line)
    if better and task.judged and context.rank == 0:
        context.report(Validated(step=progress.step, confusion=task.judged))
    return values if better else None


def in_words(values: dict[str, float], between: str = "  ") -> str:
    """loss 0.1234  top-1 0.9000"""
    return between.join(f"{SHOWN[key]} {value:.4f}" for key, value in values.items() if key in SHOWN)


def tell(
    job: dict[str, Any],
    context: WorkerContext,
    agreement: Agreement,
    progress: Progress,
    task: Task,
    train: dict[str, float],
    watch: Stopwatch,
    rate: float,
    scale: dict[str, Any] | None,
) -> None:
    """A line for people, and the same numbers for MLflow. Every rank calls it."""
    perf, own = performance(agreement, watch, task.flops_per_clip, context.device, job["precision"])
    recipe, slowest, ratio = task.recipe, int(perf["slowest_worker"]), perf["slowest_ratio"]
    values = {f"train/{key}": value for key, value in train.items()} | {"train/learning_rate": rate}
    values |= {f"perf/{key}": value for key, value in perf.items()}
    if scale is not None:
        values["train/loss_scale"] = scale["scale"]
    left = (recipe.num_steps - progress.step) * recipe.global_batch / perf["clips_per_second"]
    line = (
        f"step {progress.step:>6,} of {recipe.num_steps:,}  {in_words(train)}  "
        f"{perf['clips_per_second']:.1f} clips/s  waiting for data {perf['data_wait']:.1%}  {duration(left)} left"
    )
    tell_metrics(context, progress, values, line)
    if ratio > SLOW and not progress.slow and context.rank == 0:
        text = f"its part of a step takes {own[slowest]:.2f} s, the others' {own[slowest] / ratio:.2f} s"
        context.report(Straggler(step=progress.step, rank=slowest, ratio=ratio, description=text))
    progress.slow = ratio > SLOW


def tell_metrics(context: WorkerContext, progress: Progress, values: dict[str, float], line: str) -> None:
    """To the driver, from rank 0; and kept for the next checkpoint, which outlives both."""
    metrics = Metrics(step=progress.step, values=values, milliseconds=round(time.time() * 1000))
    progress.told.append(metrics)
    if context.rank == 0:
        context.report(ProgressEvent(step=progress.step, line=line))
        context.report(metrics)


class Losses:
    """This rank's losses since they were last checked, on the device: looking at each one would wait for it."""

    def __init__(self, step: int):
        self.first = step  # steps done when it began
        self.values: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self.values.append(loss.detach())

    def checked(self, step: int, agreement: Agreement, task: Task) -> "Losses":
        """An empty one to go on with. Raises Diverged, on every rank, if a loss of any rank is not a number or infinite."""
        values = torch.stack(self.values).double().cpu()
        bad = (~values.isfinite()).nonzero()
        parts = len(values) // (step - self.first)
        first_bad = self.first + int(bad[0]) // parts if len(bad) else -1
        of_ranks = agreement.gather(first_bad)
        if max(of_ranks) < 0:
            return Losses(step)
        first = int(min(each for each in of_ranks if each >= 0))
        rank = of_ranks.index(first)
        recipe, order = task.recipe, task.order
        epoch, epoch_step = divmod(first, order.steps_per_epoch)
        lanes = lanes_of(rank, len(of_ranks), recipe.global_batch)
        keys = task.keys(order.samples(epoch, epoch_step, lanes).tolist())
        more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
        raise Diverged(
            f"the loss is not a number, or infinite, at step {first + 1} (seen at step {step}): worker {rank} of "
            f"{len(of_ranks)}, epoch {epoch}, videos {', '.join(keys[:KEYS_NAMED])}{more}; the checkpoints before it are "
            "kept. Look at these videos (python -m jobs.inspect_shards preview), lower --optim.learning-rate, or clip sooner "
            f"than --optim.clip-norm {recipe.optim.clip_norm:g}"
        )


def is_time(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
