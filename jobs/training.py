"""The training loop: what each worker runs, clip batches -> scores -> loss -> step -> report, and its validation."""

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from cluster.agree import Agreement
from cluster.checkpoint import Checkpoint, read_state
from cluster.engine import loss_scale, set_learning_rate, start_engine
from cluster.progress import duration
from cluster.runs import RunFolder, Saver
from grurcn.loss import Tally, nll_loss
from grurcn.model import build_model, log_mean_vote
from grurcn.optim import build_optimizer, learning_rate
from jobs.inputs import model_input
from jobs.pretrained import first_weights
from jobs.recipes import Recipe
from jobs.stopwatch import Stopwatch
from shards.index import Index
from shards.order import Order, lanes_of
from shards.stream import ClipBatch, Reading, evaluation_batches, train_batches

Batches = Generator[tuple[tuple[int, int], ClipBatch], None, None]


SLOW = 3.0  # times as long as the others: a worker is named
KEYS_NAMED = 8


class Diverged(ValueError):
    """The loss is not a number any more."""


def train_worker(job: dict[str, Any], read: Callable[..., Batches] = train_batches) -> dict[str, Any]:
    """What each worker runs. Gives back the run's result, or {"stopped": step}; the same on every rank. read: batches."""
    recipe, run, device = Recipe.from_dict(job["recipe"]), RunFolder(job["run"]), job["device"]
    index, reading = Index(job["shards"], "train"), Reading(**job["reading"])
    order = Order([shard.samples for shard in index.shards], recipe.global_batch, recipe.seed)
    agreement = Agreement(job["timeout_minutes"])
    checkpoint = newest(run, agreement, job)
    engine = build_engine(recipe, index, job, fresh=checkpoint is None)
    progress, saver = resume(engine, run, checkpoint, job)
    lanes = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    start = divmod(progress.step, order.steps_per_epoch)
    batches = read(index, recipe.clips, order, **lanes, start=start, reading=reading)
    losses, tally, watch = Losses(progress.step), Tally(device), Stopwatch(recipe.global_batch, device)
    stop = False

    while progress.step < recipe.num_steps and not progress.stopped(recipe) and not stop:
        with watch.waiting():
            _, batch = next(batches)
        rate = learning_rate(progress.step, recipe.num_steps, recipe.optim)
        set_learning_rate(engine, rate)
        for part in batch.to(device).split(job["accumulation"]):
            with watch.computing():
                clips = model_input(part.frames, part.flow_bound, part.box, part.mirror, recipe.clips)
                levels = engine(clips, part.draw)  # (B, L, K)
                loss = nll_loss(levels, part.label, recipe.loss)
            engine.backward(loss)
            engine.step()
            losses.add(loss)
            tally.add(log_mean_vote(levels), part.label)
        watch.steps += 1
        stop = step_done(job, agreement, progress)

        is_logged = is_time(progress.step, job["log_every"], recipe.num_steps)
        is_validated = is_time(progress.step, recipe.val_every, recipe.num_steps)
        is_saved = is_validated or stop or is_time(progress.step, job["save_every"], recipe.num_steps)
        if is_logged or is_saved:
            losses = losses.checked(progress.step, agreement, index, order, recipe)
            saver.check()
        if is_logged:
            tell(job, agreement, progress, recipe, tally.read(), watch, rate, loss_scale(engine))
            tally, watch = Tally(device), Stopwatch(recipe.global_batch, device)
        if is_saved:
            with watch.pausing():
                best = validate(engine, recipe, job, progress) if is_validated else None
                save(engine, saver, index, job, progress, best)
    batches.close()  # its threads end with it
    saver.close()
    is_over = progress.step == recipe.num_steps or progress.stopped(recipe)
    return progress.result(recipe) if is_over else {"stopped": progress.step}


@dataclass
class Progress:
    """Where a run is and the best that it saw: what a restart must know besides the weights."""

    step: int = 0  # steps done
    best: dict[str, float] | None = None  # loss, top1, top5 of the best validation, and its step
    stale: int = 0  # validations since then
    begun: bool = False  # a step was done since these workers started
    slow: bool = False  # a worker was much slower than the others when last looked at
    told: list[dict[str, Any]] = field(default_factory=list)  # metrics since the last checkpoint, which keeps them

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


def newest(run: RunFolder, agreement: Agreement, job: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint that is whole, as rank 0 finds it; None for a fresh start."""
    found = None
    if dist.get_rank() == 0:
        found = run.newest_whole(warn=lambda line: job["tell"]({"event": line, "line": line}))
    name = agreement.of_rank_0(found and found.name)
    return Checkpoint(run.store, name) if name else None


def resume(
    engine: DeepSpeedEngine, run: RunFolder, checkpoint: Checkpoint | None, job: dict[str, Any]
) -> tuple[Progress, Saver]:
    """Where the run is, with the checkpoint's state in the engine, and what will write the next ones."""
    if checkpoint is None:
        return Progress(), Saver(run, job["keep"])
    state = read_state(engine, checkpoint)
    meta = state["meta"]
    if dist.get_rank() == 0:
        for metrics in meta["told"]:  # they may have been lost with the worker that told them
            job["tell"](metrics)
        job["tell"]({"step": meta["step"], "line": f"going on after step {meta['step']:,} from {checkpoint.url}"})
    progress = Progress(step=meta["step"], best=state["best"], stale=meta["stale"])
    return progress, Saver(run, job["keep"], state)


def step_done(job: dict[str, Any], agreement: Agreement, progress: Progress) -> bool:
    """Counts a step. Whether all workers should save and stop now."""
    progress.step += 1
    if not progress.begun and dist.get_rank() == 0:
        job["tell"]({"done": progress.step})
    progress.begun = True
    return agreement.any(job["stop_wanted"]())


def save(
    engine: DeepSpeedEngine,
    saver: Saver,
    index: Index,
    job: dict[str, Any],
    progress: Progress,
    best: dict[str, float] | None,
) -> None:
    """Weights, optimizer, place and best model -> the run's folder, while training goes on; then MLflow is told."""
    epoch, epoch_step = divmod(progress.step, len(index) // job["recipe"]["global_batch"])
    meta = {
        "step": progress.step,
        "epoch": epoch,
        "epoch_step": epoch_step,
        "stale": progress.stale,
        "told": progress.told,
        "recipe": job["recipe"],
        "classes": list(index.info.classes),
        "data_digest": index.info.digest,
        "mlflow_run_id": job["mlflow_run_id"],
        "tracking_uri": job["tracking_uri"],
    }
    progress.told = []
    news = {"new_best": best is not None, "keep": job["keep"]}
    saver.save(engine, progress.step, meta, best, lambda checkpoint: job["tell"]({"saved": checkpoint.name, **news}))


def validate(
    engine: DeepSpeedEngine, recipe: Recipe, job: dict[str, Any], progress: Progress
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
    mark = "  best so far" if better else ""
    line = f"step {progress.step:>6,}  validation: loss {values['loss']:.4f}  top-1 {values['top1']:.4f}{mark}"
    tell_metrics(job, progress, {f"val/{key}": value for key, value in values.items()}, line)
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
    agreement: Agreement,
    progress: Progress,
    recipe: Recipe,
    train: dict[str, float],
    watch: Stopwatch,
    rate: float,
    scale: dict[str, Any] | None,
) -> None:
    """A line for people, and the same numbers for MLflow. Every rank calls it."""
    perf = watch.read()
    own = agreement.gather(watch.own_seconds())
    slowest, ratio = slowest_of(own)
    perf |= {"slowest_worker": slowest, "slowest_ratio": ratio}
    values = {f"train/{key}": value for key, value in train.items()} | {"train/learning_rate": rate}
    values |= {f"perf/{key}": value for key, value in perf.items()}
    if scale is not None:
        values["train/loss_scale"] = scale["scale"]
    left = (recipe.num_steps - progress.step) * recipe.global_batch / perf["clips_per_second"]
    line = (
        f"step {progress.step:>6,} of {recipe.num_steps:,}  loss {train['loss']:.4f}  top-1 {train['top1']:.4f}  "
        f"{perf['clips_per_second']:.1f} clips/s  waiting for data {perf['data_wait']:.1%}  {duration(left)} left"
    )
    tell_metrics(job, progress, values, line)
    if ratio > SLOW and not progress.slow and dist.get_rank() == 0:
        text = f"its part of a step takes {own[slowest]:.2f} s, the others' {own[slowest] / ratio:.2f} s"
        job["tell"]({"slow": slowest, "ratio": ratio, "about": text, "at": progress.step})
    progress.slow = ratio > SLOW


def slowest_of(seconds: list[float]) -> tuple[int, float]:
    """The rank whose own part of a step takes longest, and how many times as long as the median of the others."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = [each for rank, each in enumerate(seconds) if rank != slowest]
    return slowest, seconds[slowest] / max(statistics.median(others), 1e-6) if others else 1.0


def tell_metrics(job: dict[str, Any], progress: Progress, values: dict[str, float], line: str) -> None:
    """To the driver, from rank 0; and kept for the next checkpoint, which outlives both."""
    metrics = {"metrics": values, "at": progress.step, "milliseconds": round(time.time() * 1000)}
    progress.told.append(metrics)
    if dist.get_rank() == 0:
        job["tell"]({**metrics, "step": progress.step, "line": line})


class Losses:
    """This rank's losses since they were last checked, on the device: looking at each one would wait for it."""

    def __init__(self, step: int):
        self.first = step  # steps done when it began
        self.values: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self.values.append(loss.detach())

    def checked(self, step: int, agreement: Agreement, index: Index, order: Order, recipe: Recipe) -> "Losses":
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
        epoch, epoch_step = divmod(first, order.steps_per_epoch)
        lanes = lanes_of(rank, len(of_ranks), recipe.global_batch)
        keys = [sample.key for sample in index.samples(order.samples(epoch, epoch_step, lanes).tolist())]
        more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
        raise Diverged(
            f"the loss is not a number, or infinite, at step {first + 1} (seen at step {step}): worker {rank} of "
            f"{len(of_ranks)}, epoch {epoch}, videos {', '.join(keys[:KEYS_NAMED])}{more}; the checkpoints before it are "
            "kept. Look at these videos (python -m jobs.inspect_shards preview), lower --optim.learning-rate, or clip sooner "
            f"than --optim.clip-norm {recipe.optim.clip_norm:g}"
        )


def is_time(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
