"""Reports a training to its driver: metrics, the same as a line for people, and workers that are slow."""

import time
from collections.abc import Mapping

from deepspeed import DeepSpeedEngine

from cluster.engine import loss_scale
from cluster.progress import duration
from cluster.workers.collectives import Collectives
from cluster.workers.context import WorkerContext
from cluster.workers.events import FirstStep, Metrics, Progress, Straggler
from grurcn.training.performance import performance
from grurcn.training.state import TrainingState
from grurcn.training.stopwatch import Stopwatch
from grurcn.training.task import Task, WorkerJob

STRAGGLER_RATIO = 3.0  # a worker that takes so many times as long as the others is named
TITLES = {
    "loss": "loss",
    "top1": "top-1",
    "word_accuracy": "next word",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "cider": "CIDEr",
}


class Reporter:
    """Reports what one worker's loop does. Rank 0 alone sends anything."""

    def __init__(self, job: WorkerJob, context: WorkerContext, collectives: Collectives, state: TrainingState):
        self.job, self.context, self.collectives, self.state = job, context, collectives, state
        self.is_started = False  # a step was done since these workers started
        self.had_straggler = False  # when last looked at

    def step_done(self) -> None:
        if not self.is_started and self.context.rank == 0:
            self.context.report(FirstStep(step=self.state.step))
        self.is_started = True

    def training(
        self, task: Task, scores: Mapping[str, float], watch: Stopwatch, rate: float, engine: DeepSpeedEngine
    ) -> None:
        """Scores, learning rate and performance since the last call. Every rank calls it."""
        recipe, step = self.job.recipe, self.state.step
        perf, own = performance(self.collectives, watch, task.flops_per_clip, self.context.device, self.job.precision)
        values = {f"train/{name}": value for name, value in scores.items()} | {"train/learning_rate": rate}
        values |= {f"perf/{name}": value for name, value in perf.items()}
        scale = loss_scale(engine)
        if scale is not None:
            values["train/loss_scale"] = scale["scale"]
        left = (recipe.num_steps - step) * recipe.global_batch / perf["clips_per_second"]
        self.metrics(
            values,
            f"step {step:>6,} of {recipe.num_steps:,}  {format_scores(scores)}  {perf['clips_per_second']:.1f} clips/s  "
            f"waiting for data {perf['data_wait_fraction']:.1%}  {duration(left)} left",
        )
        self.straggler(int(perf["slowest_worker"]), perf["slowest_ratio"], own)

    def straggler(self, rank: int, ratio: float, seconds: list[float]) -> None:
        """Names a worker that has become much slower than the others. seconds: of each rank's own part of a step."""
        is_straggler = ratio > STRAGGLER_RATIO
        if is_straggler and not self.had_straggler and self.context.rank == 0:
            text = f"its part of a step takes {seconds[rank]:.2f} s, the others' {seconds[rank] / ratio:.2f} s"
            self.context.report(Straggler(step=self.state.step, rank=rank, ratio=ratio, description=text))
        self.had_straggler = is_straggler

    def validation(self, scores: Mapping[str, float], is_best: bool) -> None:
        mark = "  best so far" if is_best else ""
        line = f"step {self.state.step:>6,}  validation: {format_scores(scores)}{mark}"
        self.metrics({f"val/{name}": value for name, value in scores.items()}, line)

    def metrics(self, values: Mapping[str, float], line: str) -> None:
        """Sends values and a line; the next checkpoint keeps the values too, and outlives workers and driver."""
        metrics = Metrics(step=self.state.step, values=values, milliseconds=round(time.time() * 1000))
        self.state.metrics.append(metrics)
        if self.context.rank == 0:
            self.context.report(Progress(step=self.state.step, line=line))
            self.context.report(metrics)


def format_scores(scores: Mapping[str, float], between: str = "  ") -> str:
    """loss 0.1234  top-1 0.9000"""
    return between.join(f"{TITLES[name]} {value:.4f}" for name, value in scores.items() if name in TITLES)
