"""The training loop: what each worker runs, clip batches -> scores -> loss -> step -> report, and its validation."""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from cluster.checkpoint import read_state
from cluster.engine import loss_scale, set_learning_rate, start_engine
from cluster.progress import duration
from cluster.report import Report
from cluster.runs import RunFolder, read_best
from grurcn.loss import Tally, nll_loss
from grurcn.model import build_model, log_mean_vote
from grurcn.optim import build_optimizer, learning_rate
from jobs.inputs import model_input
from jobs.pretrained import first_weights
from jobs.recipes import Recipe
from shards.index import Index
from shards.order import Order
from shards.stream import ClipBatch, Reading, evaluation_batches, train_batches

Batches = Generator[tuple[tuple[int, int], ClipBatch], None, None]


class Diverged(ValueError):
    """The loss is not a number any more."""


def train_worker(job: dict[str, Any], read: Callable[..., Batches] = train_batches) -> dict[str, Any]:
    """What each worker runs. Gives back the run's result; the same on every rank. read: where batches come from."""
    recipe = Recipe.from_dict(job["recipe"])
    run, device, rank, world_size = (
        RunFolder(Path(job["run"])),
        job["device"],
        dist.get_rank(),
        dist.get_world_size(),
    )
    index, reading = Index(job["shards"], "train"), Reading(**job["reading"])
    order = Order([shard.samples for shard in index.shards], recipe.global_batch, recipe.seed)
    report = Report(job["tracking_uri"], job["mlflow_run_id"], rank)
    engine = build_engine(recipe, index, job, fresh=run.newest() is None)
    progress = resume(engine, run, index, job, report)
    start = divmod(progress.step, order.steps_per_epoch)
    batches = read(index, recipe.clips, order, rank=rank, world_size=world_size, start=start, reading=reading)
    tally, watch = Tally(device), Stopwatch(recipe.global_batch)

    while progress.step < recipe.num_steps and not progress.stopped(recipe):
        with watch.waiting():
            _, batch = next(batches)
        rate = learning_rate(progress.step, recipe.num_steps, recipe.optim)
        set_learning_rate(engine, rate)
        for part in batch.to(device).split(job["accumulation"]):
            clips = model_input(part.frames, part.flow_bound, part.box, part.mirror, recipe.clips)
            levels = engine(clips, part.draw)  # (B, L, K)
            engine.backward(nll_loss(levels, part.label, recipe.loss))
            engine.step()
            tally.add(log_mean_vote(levels), part.label)
        progress.step += 1
        watch.steps += 1

        if is_time(progress.step, job["log_every"], recipe.num_steps):
            tell(job, report, progress, recipe, tally.read(), watch.read(), rate, loss_scale(engine))
            tally, watch = Tally(device), Stopwatch(recipe.global_batch)
        best = None
        if is_time(progress.step, recipe.val_every, recipe.num_steps):
            with watch.pausing():
                best = validate(engine, recipe, job, report, progress)
        if best or is_time(progress.step, job["save_every"], recipe.num_steps) or progress.stopped(recipe):
            with watch.pausing():
                save(engine, run, index, job, report, progress, best)
    batches.close()  # its threads end with it
    return progress.result(recipe)


@dataclass
class Progress:
    """Where a run is and the best that it saw: what a restart must know besides the weights."""

    step: int = 0  # steps done
    best: dict[str, float] | None = None  # loss, top1, top5 of the best validation, and its step
    stale: int = 0  # validations since then

    def stopped(self, recipe: Recipe) -> bool:
        """Early stopping on the validation log-probability (paper section 5.1)."""
        return bool(recipe.patience) and self.stale >= recipe.patience

    def result(self, recipe: Recipe) -> dict[str, Any]:
        assert self.best is not None  # the last step is always validated
        names = {"val_loss": "loss", "val_top1": "top1", "val_top5": "top5", "best_step": "step"}
        early = self.step < recipe.num_steps
        return {
            "steps": self.step,
            "stopped_early": early,
            **{name: self.best[key] for name, key in names.items()},
        }


def build_engine(recipe: Recipe, index: Index, job: dict[str, Any], fresh: bool) -> DeepSpeedEngine:
    """The model in its engine; pretrained weights are read for a fresh start only, as a checkpoint has its own."""
    weights = first_weights(recipe.model, job["tracking_uri"]) if fresh else None
    num_classes, channels = len(index.info.classes), recipe.clips.channels
    model = build_model(recipe.model, num_classes, recipe.seed, weights, channels, job["recompute"])
    return start_engine(
        model.to(job["device"]),
        build_optimizer(model.parameters(), recipe.optim),
        zero_stage=job["zero"],
        global_batch=recipe.global_batch,
        accumulation=job["accumulation"],
        precision=job["precision"],
        clip_norm=recipe.optim.clip_norm,
        device=job["device"],
        config_path=job["deepspeed"],
    )


def resume(engine: DeepSpeedEngine, run: RunFolder, index: Index, job: dict[str, Any], report: Report) -> Progress:
    """The newest checkpoint into the engine; a fresh start where there is none."""
    checkpoint = run.newest()
    if checkpoint is None:
        report.text("recipe.json", json.dumps(job["recipe"], indent=1))
        report.text("dataset.json", index.info.to_json())
        return Progress()
    meta = read_state(engine, checkpoint)
    if dist.get_rank() == 0:
        job["tell"]({"step": meta["step"], "line": f"going on after step {meta['step']:,} from {checkpoint}"})
    best = read_best(checkpoint)
    return Progress(step=meta["step"], best=best, stale=meta["stale"])


def save(
    engine: DeepSpeedEngine,
    run: RunFolder,
    index: Index,
    job: dict[str, Any],
    report: Report,
    progress: Progress,
    best: dict[str, float] | None,
) -> None:
    """Weights, optimizer, place and best model -> the run's folder, Ray Train and MLflow."""
    epoch, epoch_step = divmod(progress.step, len(index) // job["recipe"]["global_batch"])
    meta = {
        "step": progress.step,
        "epoch": epoch,
        "epoch_step": epoch_step,
        "stale": progress.stale,
        "recipe": job["recipe"],
        "classes": list(index.info.classes),
        "data_digest": index.info.digest,
        "mlflow_run_id": job["mlflow_run_id"],
        "tracking_uri": job["tracking_uri"],
    }
    checkpoint = run.save(engine, progress.step, meta, best, job["keep"])
    job["report_checkpoint"](checkpoint, {"step": progress.step, **(progress.best or {})})
    report.checkpoint(checkpoint, job["keep"], new_best=best is not None)


def validate(
    engine: DeepSpeedEngine, recipe: Recipe, job: dict[str, Any], report: Report, progress: Progress
) -> dict[str, float] | None:
    """The middle clip of each validation video, centre view. Gives back what it gave if that is the best so far."""
    index = Index(job["shards"], "val")
    tally = Tally(job["device"])
    engine.eval()
    with torch.inference_mode():
        for _, batch in validation_batches(index, recipe, job):
            part = batch.to(job["device"])
            clips = model_input(part.frames, part.flow_bound, part.box, part.mirror, recipe.clips)
            levels = engine(clips, part.draw)
            tally.add(log_mean_vote(levels), part.label, part.weight)
    engine.train()
    values = tally.read()
    better = progress.best is None or values["loss"] < progress.best["loss"]
    progress.stale = 0 if better else progress.stale + 1
    progress.best = {**values, "step": progress.step} if better else progress.best
    report.metrics(progress.step, {f"val/{key}": value for key, value in values.items()})
    if dist.get_rank() == 0:
        mark = "  best so far" if better else ""
        line = f"step {progress.step:>6,}  validation: loss {values['loss']:.4f}  top-1 {values['top1']:.4f}{mark}"
        job["tell"]({"line": line})
    return values if better else None


def validation_batches(
    index: Index, recipe: Recipe, job: dict[str, Any]
) -> Iterator[tuple[tuple[int, int], ClipBatch]]:
    return evaluation_batches(
        index,
        recipe.clips,
        global_batch=recipe.global_batch,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        reading=Reading(**job["reading"]),
    )


def tell(
    job: dict[str, Any],
    report: Report,
    progress: Progress,
    recipe: Recipe,
    train: dict[str, float],
    perf: dict[str, float],
    rate: float,
    scale: dict[str, Any] | None,
) -> None:
    """A line for people, and the same numbers to MLflow. Raises Diverged if the loss is not a number."""
    if not math.isfinite(train["loss"]):
        first = progress.step - job["log_every"] + 1
        raise Diverged(
            f"the loss is {train['loss']} in steps {max(1, first)} to {progress.step}; lower --optim.learning-rate, "
            f"or clip sooner than --optim.clip-norm {recipe.optim.clip_norm:g}"
        )
    values = {f"train/{key}": value for key, value in train.items()} | {"train/learning_rate": rate}
    values |= {f"perf/{key}": value for key, value in perf.items()}
    if scale is not None:
        values["train/loss_scale"] = scale["scale"]
    report.metrics(progress.step, values)
    if dist.get_rank() == 0:
        left = (recipe.num_steps - progress.step) * recipe.global_batch / perf["clips_per_second"]
        line = (
            f"step {progress.step:>6,} of {recipe.num_steps:,}  loss {train['loss']:.4f}  top-1 {train['top1']:.4f}  "
            f"{perf['clips_per_second']:.1f} clips/s  waiting for data {perf['data_wait']:.1%}  {duration(left)} left"
        )
        job["tell"]({"step": progress.step, "line": line})


def is_time(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


class Stopwatch:
    """How fast steps go and how much of the time they wait for data, since it was made; pauses do not count."""

    def __init__(self, clips_per_step: int):
        self.clips_per_step = clips_per_step
        self.started = time.perf_counter()
        self.steps = 0
        self.waited = self.paused = 0.0

    def waiting(self) -> "Span":
        return Span(self, "waited")

    def pausing(self) -> "Span":
        return Span(self, "paused")

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started - self.paused
        return {
            "clips_per_second": self.steps * self.clips_per_step / seconds,
            "data_wait": self.waited / seconds,
        }


class Span:
    """Adds the time that a block takes to one of a stopwatch's sums."""

    def __init__(self, watch: Stopwatch, name: str):
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self.started
        setattr(self.watch, self.name, getattr(self.watch, self.name) + seconds)
