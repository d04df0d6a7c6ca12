"""Trainings and evaluations of a tiny recipe, by the jobs' own functions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from grurcn.models.config import ModelConfig
from grurcn.training.optim import OptimConfig
from grurcn.training.recipes import Recipe, TrainingRecipe
from grurcn.training.task import Prepared, WorkerJob, find_task
from jobs import evaluate, train
from shards.reading.clips import ClipConfig
from shards.reading.stages import ReadingOptions

ROOT = Path(__file__).parents[2]

OPTIONS = ["--clips.size", "20", "--num-steps", "12", "--val-every", "4", "--global-batch", "8", "--log-every", "1"]

TINY = Recipe(
    model=ModelConfig(taps=("pool2", "pool3"), hidden=(4, 6), width=0.0625, dropout=0.2),
    clips=ClipConfig(num_frames=4, size=16, mirror=False),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=2, schedule="cosine"),
    global_batch=8,
    num_steps=6,
    val_every=3,
)


def job(shards: str | Path, storage: str | Path, name: str, recipe: Recipe = TINY, **options) -> train.Train:
    return train.Train(shards=str(shards), recipe=recipe, storage=str(storage), name=name, log_every=1, **options)


def run_train(shards: str | Path, storage: Path, name: str, **options) -> dict:
    json_file = storage / f"{name}.json"
    assert train.main("tiny", job(shards, storage, name, json=json_file, **options)) == 0
    return json.loads(json_file.read_text())


def losses(result: dict) -> dict[int, float]:
    """step -> training loss, as MLflow has it."""
    history = MlflowClient(result["tracking_uri"]).get_metric_history(result["mlflow_run_id"], "train/loss")
    return {metric.step: metric.value for metric in history}


def run_evaluate(run: Path, shards: Path, **options) -> dict:
    json_file = run.parent / "evaluation.json"
    assert evaluate.main(evaluate.Evaluate(run=str(run), shards=str(shards), json=json_file, **options)) == 0
    return json.loads(json_file.read_text())


STEPS = 18  # of four batches an epoch

LONG = dataclasses.replace(TINY, global_batch=4, num_steps=STEPS, val_every=6)


def worker_job(shards: Path, folder: Path, recipe: TrainingRecipe = LONG, **options: Any) -> WorkerJob:
    """What train() would give each worker."""
    values: dict[str, Any] = {
        "prepared": Prepared(), "tracking_uri": "", "mlflow_run_id": "", "reading": ReadingOptions(), "accumulation": 1,
        "zero": 0, "recompute": False, "deepspeed": None, "precision": "fp32", "log_every": 1, "save_every": 2, "keep": 2,
        "timeout_minutes": 5.0, **options,
    }  # fmt: skip
    return WorkerJob(task=find_task(recipe.task), recipe=recipe, shards=str(shards), run=str(folder / "run"), **values)
