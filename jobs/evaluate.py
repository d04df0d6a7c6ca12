"""Evaluate a trained model with the paper's protocol: 25 equally spaced clips x 10 views of every video (section 5.1).

    python -m jobs.evaluate --run runs/gru-rcn --shards data/ucf101
    python -m jobs.evaluate --run runs/gru-rcn --shards data/ucf101 --clips 5 --views 5 --workers 2
    python -m jobs.evaluate --run runs/gru-rcn --shards data/ucf101 --workers 8 --decoders 96

The probabilities of all clips and views of a video are averaged. Each video counts once over any number of workers, and its
frames are decoded once: by the worker that scores it, or, with --decoders, by Ray tasks that take the cores of machines
without GPUs first. Scores go to RUN/evaluations/SPLIT-CLIPSxVIEWS/: scores.parquet (a row a video: key, label, class,
predicted, scores, and those of each level), result.json, and pictures: confusion.png, classes.png, levels.png (what each level
contributes) and mistakes.png (the videos it was most wrong about). All of it also goes to the MLflow run that made the model.
jobs.fuse adds the scores of several models.

--json FILE holds: run, checkpoint, step, split, videos, clips, views, top1, top5, loss, per_class {class: {videos, top1}},
per_level {level: {top1, top1_without, probability}}, decoded_at {address: videos} where --decoders did it, scores, mlflow_run_id,
tracking_uri, seconds.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch.distributed as dist

from cluster.checkpoints.run_folder import Model, load_best
from cluster.progress import Bar, duration
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.server import check_reachable
from cluster.workers.collectives import all_rows
from cluster.workers.context import WorkerContext
from cluster.workers.events import VideosDone
from cluster.workers.launch import run_workers
from cluster.workers.options import Workers
from grurcn.drawing.charts import pictures
from grurcn.evaluation.decode_tasks import check_decoders, decoders_of, in_words, told
from grurcn.evaluation.score_files import RESULT_FILE, SCORES_FILE, Scores, VideoScores, copy_into, write_folder
from grurcn.inference.classifier import OtherTask, Recogniser, level_names
from grurcn.training.losses import Tally
from grurcn.training.recipes import Recipe
from jobs.command import Command, Flat, finish
from shards.index import Index
from shards.reading.clips import Box, evaluation_views
from shards.reading.stream import Reading, evaluation_batches
from shards.store import absolute_url


class OtherData(ValueError):
    """A model was trained for other classes than a data set has."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Options of an evaluation."""

    run: str
    """Folder or URL of a run (STORAGE/NAME), whose best model is taken, or one checkpoint in it."""
    shards: str
    """Folder or URL (s3://, gs://, http://) that jobs.make_shards wrote."""
    split: str = "test"
    """Which split: test, val or train."""
    clips: int = 25
    """Equally spaced clips of each video."""
    views: int = 10
    """Views of each clip: 1 centre, 2 and its mirror, 5 centre and corners, 10 all of them mirrored too."""
    clips_at_once: int = 25
    """Clips in their views that the model computes at once, on each worker; fewer take less memory."""
    precision: str = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[Reading, Flat] = field(default_factory=Reading)
    decoders: int = 0
    """Ray tasks, one core each, that read and decode videos for the workers; 0: each worker decodes what it scores, with its
    --decode-threads."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if self.clips < 1 or self.clips_at_once < 1:
            raise ValueError(f"clips {self.clips}, clips_at_once {self.clips_at_once}: wanted at least 1 of each")


def main(job: Evaluate) -> int:
    """Checks, evaluates, writes and logs; gives back the exit status."""
    started = time.monotonic()
    model, index = load_best(absolute_url(job.run)), Index(job.shards, job.split)
    views = check(job, model, index)
    check_decoders(job.decoders, job.on)
    check_reachable(model.meta["tracking_uri"])
    worker_job = {
        "checkpoint": model.checkpoint.url,
        "shards": absolute_url(job.shards),
        "split": job.split,
        "clips": job.clips,
        "views": views,
        "clips_at_once": job.clips_at_once,
        "precision": job.precision,
        "reading": dataclasses.asdict(job.reading),
        "decoders": job.decoders,
    }
    with Bar("evaluating", "videos", len(index)) as bar:
        result = run_workers(evaluate_worker, worker_job, job.on, bar.listen)
    recipe = Recipe.from_dict(model.meta["recipe"])
    scores = Scores(index.info.classes, result.pop("rows"), level_names(recipe))
    conclude(job, model, index, scores, result, time.monotonic() - started)
    return 0


def check(job: Evaluate, model: Model, index: Index) -> list[tuple[Box, bool]]:
    """The views, once it is sure that the model and the data fit. Raises OtherTask, OtherData, BadShards or ValueError."""
    if "classes" not in model.meta:
        raise OtherTask(
            f"{job.run}: a run of captioning, which knows no classes; its captions are scored by python -m jobs.caption"
        )
    index.check_videos()
    index.check_files()
    classes = tuple(model.meta["classes"])
    if classes != index.info.classes:
        raise OtherData(
            f"{job.shards}: {len(index.info.classes)} classes ({', '.join(index.info.classes[:3])}, ...), but {job.run} was "
            f"trained for {len(classes)} ({', '.join(classes[:3])}, ...); evaluate on shards with the same classes"
        )
    packing, clips = index.info.packing, Recipe.from_dict(model.meta["recipe"]).clips
    index.check_stream(clips.stream)
    return evaluation_views(packing.height, packing.width, job.views, clips)


def evaluate_worker(job: dict[str, Any], context: WorkerContext) -> dict[str, Any]:
    """This rank's videos -> the scores of all ranks' videos: rows (key, label, scores, levels) and sums over them."""
    recogniser = Recogniser.of(load_best(job["checkpoint"]), context.device, job["precision"])
    index = Index(job["shards"], job["split"])
    decoders = decoders_of(job["decoders"], index)
    tally, rows = Tally(context.device), []
    for _, batch in evaluation_batches(
        index,
        recogniser.recipe.clips,
        global_batch=dist.get_world_size(),  # a video a worker
        num_clips=job["clips"],
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        reading=Reading(**job["reading"]),
        elsewhere=decoders,
    ):
        if not batch.weight[0]:
            continue  # padding
        levels = recogniser.votes(batch.frames, batch.flow_bound, job["views"], job["clips_at_once"]).mean(
            dim=0
        )  # (L, K)
        probability = levels.mean(dim=0)  # (K,)
        tally.add(probability.log()[None].to(context.device), batch.label[:1].to(context.device))
        number = int(batch.sample[0])
        rows.append(
            VideoScores(
                key=index[number].key,
                number=number,
                label=int(batch.label[0]),
                scores=probability.tolist(),
                levels=levels.tolist(),
            )
        )
        context.report(VideosDone(count=1))
    rows = all_rows(rows)
    return {**tally.read(), "videos": len(rows), "rows": rows, **told(decoders)}


def conclude(
    job: Evaluate,
    model: Model,
    index: Index,
    scores: Scores,
    result: dict[str, Any],
    seconds: float,
) -> None:
    """Writes the scores, logs to MLflow and says what came out."""
    store = model.checkpoint.store  # of the run
    name = f"evaluations/{job.split}-{job.clips}x{job.views}"
    place = f"{store.url}/{name}"
    judgement = scores.judgement()
    run_name = store.url.rpartition("/")[2]
    about = f"{run_name}, step {model.step:,}: {len(index):,} {job.split} videos, {job.clips} clips x {job.views} views"
    drawn = pictures(judgement, index, Recipe.from_dict(model.meta["recipe"]).clips, about)
    result = {
        "run": store.url,
        "checkpoint": model.checkpoint.url,
        "step": model.step,
        "split": job.split,
        "clips": job.clips,
        "views": job.views,
        **result,
        "per_class": judgement.per_class(),
        "per_level": judgement.per_level(),
        "scores": f"{place}/{SCORES_FILE}",
        "mlflow_run_id": model.meta["mlflow_run_id"],
        "tracking_uri": model.meta["tracking_uri"],
        "seconds": seconds,
    }
    with TemporaryDirectory(prefix="grurcn-") as temporary:
        folder = Path(temporary) / "scores"
        write_folder(folder, scores, result)
        for file, content in drawn.items():
            (folder / file).write_bytes(content)
        copy_into(store, name, folder, (SCORES_FILE, *drawn, RESULT_FILE))
        mlflow_run = MlflowRun(model.meta["tracking_uri"], model.meta["mlflow_run_id"])
        mlflow_run.log_metrics(model.step, {f"{job.split}/{key}": result[key] for key in ("loss", "top1", "top5")})
        mlflow_run.log_folder(name, folder)
        if not mlflow_run.close():
            print(f"warning: MLflow at {mlflow_run.uri} did not answer; the result is in {place} alone", flush=True)
    which = "best model" if model.best else "newest model"
    finish(
        f"evaluated the {which} of {store.url} (step {model.step:,}) on {result['videos']:,} {job.split} videos, {job.clips} "
        f"clips x {job.views} views, in {duration(seconds)}{in_words(result)}: top-1 {result['top1']:.4f}, top-5 "
        f"{result['top5']:.4f}; scores and per-class accuracy in {place}",
        result,
        job.json,
    )


COMMAND = Command(Evaluate, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
