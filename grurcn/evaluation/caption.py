"""Captions a split's videos with a trained captioning model, and scores the captions as the COCO caption scripts do.

CaptionJob ──> validate ──> workers: videos -> captions ──> scores ──> caption files, MLflow ──> Captioned
"""

import dataclasses
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from cluster.checkpoints.run_folder import Model, load_best, write_json
from cluster.progress import Bar
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.server import check_reachable
from cluster.workers.collectives import all_rows
from cluster.workers.context import WorkerContext
from cluster.workers.events import VideosDone
from cluster.workers.launch import run_workers
from grurcn.evaluation.caption_scores import METRICS, CaptionScores, caption_scores, check_installed
from grurcn.evaluation.decode_tasks import check_decoders, count_places, decoders_of
from grurcn.evaluation.score_files import RESULT_FILE
from grurcn.evaluation.split_job import SplitJob, SplitResult, publish
from grurcn.inference.captioner import VideoCaptioner
from grurcn.inference.meta import check_task
from grurcn.training.captioning import CAPTION_TABLE, as_table
from grurcn.training.encoders import check_same
from shards.index import Index
from shards.reading.captions import CaptionBatch, evaluation_captions
from shards.store import absolute_url, open_store

CAPTIONS_FILE = "captions.parquet"
ROWS_IN_MLFLOW = 200  # of the table of captions
VIDEOS_AT_ONCE = 8  # on each worker


@dataclass(frozen=True, kw_only=True)
class CaptionJob(SplitJob):
    """Captions of a split's videos."""

    beam: int | None = None
    """Captions that the beam search keeps at each word; 1 takes the most likely word each time. Default: the recipe's."""

    def __post_init__(self) -> None:
        if self.beam is not None and self.beam < 1:
            raise ValueError(f"beam {self.beam}: expected at least 1 (1 takes the most likely word each time)")


@dataclass(frozen=True, kw_only=True)
class CaptionWork:
    """What each worker gets."""

    job: CaptionJob
    checkpoint: str
    beam: int


@dataclass(frozen=True, kw_only=True)
class VideoCaption:
    """A row of captions.parquet, where the video's scores follow."""

    key: str
    caption: str
    log_prob: float
    references: list[str]


@dataclass(frozen=True, kw_only=True)
class WorkersCaptions:
    """What the workers computed together."""

    videos: list[VideoCaption]
    decoded_at: dict[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Captioned(SplitResult):
    """The captions of a split, scored."""

    beam: int
    scores: dict[str, float]  # bleu1 ... cider
    captions: str  # the file of all captions


def caption(job: CaptionJob) -> Captioned:
    """Captions a split's videos with a run's best model, or with one of its checkpoints.

    Raises OtherTask, BadEncoder, BadShards or ValueError for a model that does not fit the data.
    """
    started = time.monotonic()
    model, index = load_best(absolute_url(job.run)), Index(job.shards, job.split)
    validate_captioning(job, model, index)
    beam = job.beam or model.training.recipe["beam"]
    # Workers run in other folders.
    work = CaptionWork(
        job=dataclasses.replace(job, shards=absolute_url(job.shards)), checkpoint=model.checkpoint.url, beam=beam
    )
    with Bar("captioning", "videos", len(index)) as bar:
        found = run_workers(caption_worker, work, job.on, bar.listen)
    videos = sorted(found.videos, key=lambda video: video.key)
    scores = caption_scores(
        {video.key: video.references for video in found.videos},
        {video.key: video.caption for video in found.videos},
        METRICS,
    )
    store, name = model.checkpoint.store, f"captions/{job.split}-beam{beam}"
    captioned = Captioned(
        run=store.url,
        checkpoint=model.checkpoint.url,
        step=model.step,
        split=job.split,
        videos=len(videos),
        beam=beam,
        scores=scores.total,
        captions=f"{store.url}/{name}/{CAPTIONS_FILE}",
        decoded_at=found.decoded_at,
        mlflow_run_id=model.training.mlflow_run_id,
        tracking_uri=model.training.tracking_uri,
        seconds=time.monotonic() - started,
        folder=f"{store.url}/{name}",
        is_best=model.best,
        is_logged=True,
    )
    with TemporaryDirectory(prefix="grurcn-") as temporary:
        folder = Path(temporary)
        pq.write_table(caption_table(videos, scores), folder / CAPTIONS_FILE)
        write_json(open_store(folder), RESULT_FILE, captioned.to_dict())
        mlflow_run = MlflowRun(captioned.tracking_uri, captioned.mlflow_run_id)
        mlflow_run.log_metrics(model.step, {f"{job.split}/{key}": value for key, value in scores.total.items()})
        rows = [vars(video) for video in videos[:ROWS_IN_MLFLOW]]
        mlflow_run.log_table(f"{job.split}-captions.json", CAPTION_TABLE, as_table(rows))
        is_logged = publish(model, name, folder, (CAPTIONS_FILE,), mlflow_run)
    return dataclasses.replace(captioned, is_logged=is_logged)


def validate_captioning(job: CaptionJob, model: Model, index: Index) -> None:
    """Raises OtherTask, BadEncoder, BadShards or ValueError if model and data do not fit, or captions cannot be scored."""
    check_task(model.training, "captioning", job.run)
    check_installed()
    index.check_captions()
    index.check_files()
    if index.info.encoder is not None:
        check_same(index, model.training.model["encoder"])
    check_decoders(job.decoders, job.on)
    check_reachable(model.training.tracking_uri)


def caption_worker(work: CaptionWork, context: WorkerContext) -> WorkersCaptions:
    """Captions this rank's videos, and returns the captions of all ranks."""
    job = work.job
    captioner = VideoCaptioner.of(load_best(work.checkpoint), context.device, job.precision, work.beam)
    index, world_size = Index(job.shards, job.split), dist.get_world_size()
    decoders = decoders_of(job.decoders, index)
    batches = evaluation_captions(
        index,
        captioner.segments,
        global_batch=VIDEOS_AT_ONCE * world_size,
        rank=dist.get_rank(),
        world_size=world_size,
        reading=job.reading,
        remote=decoders,
    )
    videos: list[VideoCaption] = []
    with closing(batches):
        for _, batch in batches:
            videos += caption_batch(captioner, batch)
            context.report(VideosDone(count=int((batch.weight > 0).sum())))
    return WorkersCaptions(videos=all_rows(videos), decoded_at=count_places(decoders))


def caption_batch(captioner: VideoCaptioner, batch: CaptionBatch) -> list[VideoCaption]:
    """The most likely caption of each video of a batch, without padding."""
    found = captioner.captions(batch.seen, batch.segments)
    return [
        VideoCaption(key=key, caption=best.sentence, log_prob=best.log_prob, references=list(references))
        for key, [best, *_], references, weight in zip(
            batch.keys, found, batch.captions, batch.weight.tolist(), strict=True
        )
        if weight
    ]


def caption_table(videos: list[VideoCaption], scores: CaptionScores) -> pa.Table:
    rows: list[dict[str, Any]] = [{**vars(video), **scores.each[video.key]} for video in videos]
    return pa.Table.from_pylist(rows)
