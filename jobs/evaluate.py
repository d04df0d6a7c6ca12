"""Evaluate a trained model with the paper's protocol: 25 equally spaced clips x 10 views of every video (section 5.1).

    python -m jobs.evaluate --run runs/gru-rcn --shards data/ucf101
    python -m jobs.evaluate --run runs/gru-rcn --shards data/ucf101 --clips 5 --views 5 --workers 2
    python -m jobs.evaluate --run runs/gru-rcn --shards data/ucf101 --workers 8 --decoders 96

The probabilities of all clips and views of a video are averaged. Each video counts once over any number of workers, and its
frames are decoded once: by the worker that scores it, or, with --decoders, by Ray tasks, which use machines without GPUs first.
Scores go to RUN/evaluations/SPLIT-CLIPSxVIEWS/: scores.parquet (a row per video: key, label, class, predicted, scores, and those
of each level), result.json, and pictures: confusion.png, classes.png, levels.png (what each level contributes) and mistakes.png
(the videos with the largest errors). All of it also goes to the MLflow run of the model. jobs.fuse adds the scores of several
models.

--json FILE holds: run, checkpoint, step, split, videos, clips, views, top1, top5, loss, per_class {class: {videos, top1}},
per_level {level: {top1, top1_without, probability}}, decoded_at {address: videos} with --decoders, scores, mlflow_run_id,
tracking_uri, seconds.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.progress import duration
from grurcn.evaluation.decode_tasks import format_places
from grurcn.evaluation.evaluate import EvaluateJob, evaluate
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluateJob):
    """Options of an evaluation."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(options: Evaluate) -> int:
    found = evaluate(options)
    if not found.is_logged:
        print(
            f"warning: MLflow at {found.tracking_uri} did not answer; the result is only in {found.folder}", flush=True
        )
    finish(
        f"evaluated the {'best' if found.is_best else 'newest'} model of {found.run} (step {found.step:,}) on {found.videos:,} "
        f"{found.split} videos, {found.clips} clips x {found.views} views, in {duration(found.seconds)}"
        f"{format_places(found.decoded_at)}: top-1 {found.top1:.4f}, top-5 {found.top5:.4f}; scores and per-class accuracy in "
        f"{found.folder}",
        found.to_dict(),
        options.json,
    )
    return 0


COMMAND = Command(Evaluate, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
