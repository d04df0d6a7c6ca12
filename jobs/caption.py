"""Describe a split's videos with a trained captioning model, and score its captions as the COCO caption scripts do.

    python -m jobs.caption --run runs/caption --shards data/msvd-encoded
    python -m jobs.caption --run runs/caption --shards data/msvd --split val --beam 10 --workers 2

The shards hold videos, or the vectors of the encoder that the run was trained with. Each video counts once over any number of
workers. Captions and their scores go to RUN/captions/SPLIT-beamN/: captions.parquet (a row a video: key, caption, log_prob,
references, and its scores) and result.json; the scores also go to the MLflow run that made the model, with a table of captions.

--json FILE holds: run, checkpoint, step, split, videos, beam, scores {bleu1 ... cider}, captions, mlflow_run_id, tracking_uri,
seconds, and with --decoders decoded_at {address: videos}.
"""

import dataclasses
import json
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from cluster.checkpoints.run_folder import Model, load_best
from cluster.precision import autocast
from cluster.progress import Bar, duration
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.server import check_reachable
from cluster.workers.collectives import all_rows
from cluster.workers.context import WorkerContext
from cluster.workers.events import VideosDone
from cluster.workers.launch import run_workers
from cluster.workers.options import Workers
from grurcn.evaluation.caption_scores import METRICS, CaptionScores, caption_scores, check_installed
from grurcn.evaluation.decode_tasks import check_decoders, decoders_of, in_words, told
from grurcn.evaluation.score_files import RESULT_FILE, copy_into
from grurcn.models.beam_search import beam_search
from grurcn.training.captioning import CAPTION_TABLE, Trained, as_table, check_task, load_captioner, segments_of
from grurcn.training.encoders import check_same
from jobs.command import Command, Flat, finish
from shards.index import Index
from shards.reading.captions import CaptionBatch, evaluation_captions
from shards.reading.stream import Reading
from shards.store import absolute_url

FILE = "captions.parquet"
ROWS_SHOWN = 200  # of the table in MLflow
SHOWN = {"bleu4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
VIDEOS_AT_ONCE = 8  # on each worker


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Options of describing a split."""

    run: str
    """Folder or URL of a captioning run (STORAGE/NAME), whose best model is taken, or one checkpoint in it."""
    shards: str
    """Folder or URL (s3://, gs://, http://) that jobs.make_shards wrote, or jobs.encode."""
    split: str = "test"
    """Which split: test, val or train."""
    beam: int | None = None
    """Captions that the search keeps at each word; 1 takes the likeliest word each time. Default: the recipe's."""
    precision: str = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[Reading, Flat] = field(default_factory=Reading)
    decoders: int = 0
    """Ray tasks, one core each, that read and decode videos for the workers; 0: each worker decodes what it describes, with
    its --decode-threads."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if self.beam is not None and self.beam < 1:
            raise ValueError(f"beam {self.beam}: wanted at least 1 (1 takes the likeliest word each time)")


def main(job: Caption) -> int:
    """Checks, describes, scores, writes and logs; gives back the exit status."""
    started = time.monotonic()
    model, index = load_best(absolute_url(job.run)), Index(job.shards, job.split)
    check(job, model, index)
    check_decoders(job.decoders, job.on)
    beam = job.beam or model.meta["recipe"]["beam"]
    worker_job = {
        "checkpoint": model.checkpoint.url,
        "shards": absolute_url(job.shards),
        "split": job.split,
        "beam": beam,
        "precision": job.precision,
        "reading": dataclasses.asdict(job.reading),
        "decoders": job.decoders,
    }
    with Bar("describing", "videos", len(index)) as bar:
        found = run_workers(caption_worker, worker_job, job.on, bar.listen)
    rows = found.pop("rows")
    scores = caption_scores(
        {row["key"]: row["references"] for row in rows}, {row["key"]: row["caption"] for row in rows}, METRICS
    )
    conclude(job, model, beam, rows, found, scores, time.monotonic() - started)
    return 0


def check(job: Caption, model: Model, index: Index) -> None:
    """Raises OtherTask, BadEncoder, BadShards or ValueError unless the model and the data fit, and can be scored."""
    check_task(model)
    check_installed()
    index.check_captions()
    index.check_files()
    if index.info.encoder is not None:
        check_same(index, model.meta["encoder"])
    check_reachable(model.meta["tracking_uri"])


def caption_worker(job: dict[str, Any], context: WorkerContext) -> dict[str, Any]:
    """This rank's videos -> the captions of all ranks' videos: rows (key, caption, log_prob, references)."""
    trained = load_captioner(job["checkpoint"], context.device)
    index, world_size = Index(job["shards"], job["split"]), dist.get_world_size()
    decoders = decoders_of(job["decoders"], index)
    batches = evaluation_captions(
        index,
        segments_of(trained.meta["encoder"]),
        global_batch=VIDEOS_AT_ONCE * world_size,
        rank=dist.get_rank(),
        world_size=world_size,
        reading=Reading(**job["reading"]),
        elsewhere=decoders,
    )
    rows: list[dict[str, Any]] = []
    with closing(batches):
        for _, batch in batches:
            with autocast(job["precision"], context.device):
                rows += describe(trained, batch.to(context.device), job["beam"])
            context.report(VideosDone(count=int((batch.weight > 0).sum())))
    return {"rows": all_rows(rows), **told(decoders)}


@torch.inference_mode()
def describe(trained: Trained, batch: CaptionBatch, beam: int) -> list[dict[str, Any]]:
    """The likeliest caption found of each video of a batch, padding left out."""
    vectors = trained.model.vectors(batch.seen)
    found = beam_search(trained.model.decoder, vectors, batch.segments, beam, trained.recipe.max_words + 1)
    return [
        {"key": key, "caption": trained.vocabulary.sentence(words), "log_prob": log_prob, "references": list(references)}
        for key, words, log_prob, references, weight in zip(
            batch.keys, found.words[:, 0].tolist(), found.log_prob[:, 0].tolist(), batch.captions, batch.weight.tolist(),
            strict=True,
        )
        if weight
    ]  # fmt: skip


def conclude(
    job: Caption,
    model: Model,
    beam: int,
    rows: list[dict[str, Any]],
    found: dict[str, Any],
    scores: CaptionScores,
    seconds: float,
) -> None:
    """Writes captions and scores, logs to MLflow and says what came out."""
    store = model.checkpoint.store  # of the run
    name = f"captions/{job.split}-beam{beam}"
    result = {
        "run": store.url,
        "checkpoint": model.checkpoint.url,
        "step": model.step,
        "split": job.split,
        "videos": len(rows),
        "beam": beam,
        "scores": scores.total,
        **found,
        "captions": f"{store.url}/{name}/{FILE}",
        "mlflow_run_id": model.meta["mlflow_run_id"],
        "tracking_uri": model.meta["tracking_uri"],
        "seconds": seconds,
    }
    rows = sorted(rows, key=lambda row: row["key"])
    with TemporaryDirectory(prefix="grurcn-") as temporary:
        folder = Path(temporary)
        table = pa.Table.from_pylist([{**row, **scores.each[row["key"]]} for row in rows])
        pq.write_table(table, folder / FILE)
        (folder / RESULT_FILE).write_text(json.dumps(result, indent=1))
        copy_into(store, name, folder, (FILE, RESULT_FILE))
        mlflow_run = MlflowRun(model.meta["tracking_uri"], model.meta["mlflow_run_id"])
        mlflow_run.log_metrics(model.step, {f"{job.split}/{key}": value for key, value in scores.total.items()})
        mlflow_run.log_table(f"{job.split}-captions.json", CAPTION_TABLE, as_table(rows[:ROWS_SHOWN]))
        mlflow_run.log_folder(name, folder)
        if not mlflow_run.close():
            print(
                f"warning: MLflow at {mlflow_run.uri} did not answer; the result is in {store.url}/{name} alone",
                flush=True,
            )
    said = ", ".join(f"{title} {scores.total[key]:.4f}" for key, title in SHOWN.items() if key in scores.total)
    finish(
        f"described {len(rows):,} {job.split} videos with the model of {store.url} (step {model.step:,}), beam {beam}, in "
        f"{duration(seconds)}{in_words(result)}: {said}; captions in {store.url}/{name}",
        result,
        job.json,
    )


COMMAND = Command(Caption, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
