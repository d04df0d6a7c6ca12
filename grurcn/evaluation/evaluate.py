"""Evaluates a trained model by the paper's protocol: equally spaced clips of every video, in several views (section 5.1).

EvaluateJob ──> validate ──> workers: videos -> scores ──> score files, pictures, MLflow ──> Evaluation
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from cluster.checkpoints.run_folder import Model, load_best
from cluster.progress import Bar
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.server import check_reachable
from cluster.workers.collectives import all_rows
from cluster.workers.context import WorkerContext
from cluster.workers.events import VideosDone
from cluster.workers.launch import run_workers
from grurcn.drawing.charts import pictures
from grurcn.evaluation.decode_tasks import check_decoders, count_places, decoders_of
from grurcn.evaluation.score_files import SCORES_FILE, Scores, VideoScores, write_folder
from grurcn.evaluation.split_job import SplitJob, SplitResult, publish
from grurcn.inference.classifier import Classifier, View, level_names
from grurcn.inference.meta import check_task
from grurcn.training.losses import Tally
from grurcn.training.recipes import Recipe
from shards.index import Index
from shards.reading.clips import evaluation_views
from shards.reading.stream import evaluation_batches
from shards.store import absolute_url


class OtherData(ValueError):
    """A model was trained for other classes than a data set has."""


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(SplitJob):
    """An evaluation."""

    clips: int = 25
    """Equally spaced clips of each video."""
    views: int = 10
    """Views of each clip: 1 centre, 2 and its mirror, 5 centre and corners, 10 all of them mirrored too."""
    clips_at_once: int = 25
    """Clips that each worker computes at once, in all views; fewer need less memory."""

    def __post_init__(self) -> None:
        if self.clips < 1 or self.clips_at_once < 1:
            raise ValueError(f"clips {self.clips}, clips_at_once {self.clips_at_once}: expected at least 1 of each")


@dataclass(frozen=True, kw_only=True)
class EvaluationWork:
    """What each worker gets."""

    job: EvaluateJob
    checkpoint: str
    views: list[View]


@dataclass(frozen=True, kw_only=True)
class WorkersScores:
    """What the workers computed together."""

    videos: list[VideoScores]
    metrics: dict[str, float]  # loss, top1, top5
    decoded_at: dict[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(SplitResult):
    """The result of an evaluation."""

    clips: int
    views: int
    loss: float
    top1: float
    top5: float
    per_class: dict[str, dict[str, float]]
    per_level: dict[str, dict[str, float]]
    scores: str  # the file of all scores


def evaluate(job: EvaluateJob) -> Evaluation:
    """Evaluates a run's best model, or one of its checkpoints, on a split.

    Raises OtherTask or OtherData for a model that does not fit the data, ValueError and OSError for what cannot be read.
    """
    started = time.monotonic()
    model, index = load_best(absolute_url(job.run)), Index(job.shards, job.split)
    views = validate_evaluation(job, model, index)
    # Workers run in other folders.
    work = EvaluationWork(
        job=dataclasses.replace(job, shards=absolute_url(job.shards)), checkpoint=model.checkpoint.url, views=views
    )
    with Bar("evaluating", "videos", len(index)) as bar:
        found = run_workers(evaluate_worker, work, job.on, bar.listen)
    store, name = model.checkpoint.store, f"evaluations/{job.split}-{job.clips}x{job.views}"
    recipe = Recipe.from_dict(model.training.recipe)
    scores = Scores(index.info.classes, found.videos, level_names(recipe))
    confusion = scores.confusion()
    evaluation = Evaluation(
        run=store.url,
        checkpoint=model.checkpoint.url,
        step=model.step,
        split=job.split,
        videos=len(found.videos),
        clips=job.clips,
        views=job.views,
        **found.metrics,
        per_class=confusion.per_class(),
        per_level=confusion.per_level(),
        scores=f"{store.url}/{name}/{SCORES_FILE}",
        decoded_at=found.decoded_at,
        mlflow_run_id=model.training.mlflow_run_id,
        tracking_uri=model.training.tracking_uri,
        seconds=time.monotonic() - started,
        folder=f"{store.url}/{name}",
        is_best=model.best,
        is_logged=True,
    )
    run_name = store.url.rpartition("/")[2]
    title = f"{run_name}, step {model.step:,}: {len(index):,} {job.split} videos, {job.clips} clips x {job.views} views"
    drawn = pictures(confusion, index, recipe.clips, title)
    with TemporaryDirectory(prefix="grurcn-") as temporary:
        folder = Path(temporary) / "scores"
        write_folder(folder, scores, evaluation.to_dict())
        for file, content in drawn.items():
            (folder / file).write_bytes(content)
        mlflow_run = MlflowRun(evaluation.tracking_uri, evaluation.mlflow_run_id)
        mlflow_run.log_metrics(
            model.step, {f"{job.split}/{key}": found.metrics[key] for key in ("loss", "top1", "top5")}
        )
        is_logged = publish(model, name, folder, (SCORES_FILE, *drawn), mlflow_run)
    return dataclasses.replace(evaluation, is_logged=is_logged)


def validate_evaluation(job: EvaluateJob, model: Model, index: Index) -> list[View]:
    """The views of a clip. Raises OtherTask, OtherData, BadShards or ValueError if model and data do not fit."""
    check_task(model.training, "classification", job.run)
    index.check_videos()
    index.check_files()
    classes, found = tuple(model.training.model["classes"]), index.info.classes
    if classes != found:
        raise OtherData(
            f"{job.shards}: {len(found)} classes ({', '.join(found[:3])}, ...), but {job.run} was trained for {len(classes)} "
            f"({', '.join(classes[:3])}, ...); evaluate on shards with the same classes"
        )
    packing, clips = index.info.packing, Recipe.from_dict(model.training.recipe).clips
    index.check_stream(clips.stream)
    check_decoders(job.decoders, job.on)
    check_reachable(model.training.tracking_uri)
    return evaluation_views(packing.height, packing.width, job.views, clips)


def evaluate_worker(work: EvaluationWork, context: WorkerContext) -> WorkersScores:
    """Scores this rank's videos, and returns those of all ranks."""
    job = work.job
    classifier = Classifier.of(load_best(work.checkpoint), context.device, job.precision)
    index = Index(job.shards, job.split)
    decoders = decoders_of(job.decoders, index)
    tally, videos = Tally(context.device), []
    for _, batch in evaluation_batches(
        index,
        classifier.recipe.clips,
        global_batch=dist.get_world_size(),  # one video per worker
        num_clips=job.clips,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        reading=job.reading,
        remote=decoders,
    ):
        if not batch.weight[0]:
            continue  # padding
        votes = classifier.votes(batch.frames, batch.flow_bound, work.views, job.clips_at_once)
        levels = votes.mean(dim=0)  # (L, K)
        probability = levels.mean(dim=0)  # (K,)
        tally.add(probability.log()[None].to(context.device), batch.label[:1].to(context.device))
        number = int(batch.sample[0])
        videos.append(
            VideoScores(
                key=index[number].key,
                number=number,
                label=int(batch.label[0]),
                scores=probability.tolist(),
                levels=levels.tolist(),
            )
        )
        context.report(VideosDone(count=1))
    return WorkersScores(videos=all_rows(videos), metrics=tally.read(), decoded_at=count_places(decoders))
