"""Caption a split's videos with a trained captioning model, and score the captions as the COCO caption scripts do.

    python -m jobs.caption --run runs/caption --shards data/msvd-encoded
    python -m jobs.caption --run runs/caption --shards data/msvd --split val --beam 10 --workers 2

The shards hold videos, or the vectors of the encoder that the run was trained with. Each video counts once over any number of
workers. Captions and scores go to RUN/captions/SPLIT-beamN/: captions.parquet (a row per video: key, caption, log_prob,
references, and its scores) and result.json. The scores also go to the MLflow run of the model, with a table of captions.

--json FILE holds: run, checkpoint, step, split, videos, beam, scores {bleu1 ... cider}, captions, mlflow_run_id, tracking_uri,
seconds, and with --decoders decoded_at {address: videos}.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.progress import duration
from grurcn.evaluation.caption import CaptionJob, caption
from grurcn.evaluation.decode_tasks import format_places
from jobs.command import Command, finish

METRICS = {"bleu4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}


@dataclass(frozen=True, kw_only=True)
class Caption(CaptionJob):
    """Options of captioning a split."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(options: Caption) -> int:
    found = caption(options)
    if not found.is_logged:
        print(
            f"warning: MLflow at {found.tracking_uri} did not answer; the result is only in {found.folder}", flush=True
        )
    scores = ", ".join(f"{title} {found.scores[key]:.4f}" for key, title in METRICS.items() if key in found.scores)
    finish(
        f"captioned {found.videos:,} {found.split} videos with the model of {found.run} (step {found.step:,}), beam "
        f"{found.beam}, in {duration(found.seconds)}{format_places(found.decoded_at)}: {scores}; captions in {found.folder}",
        found.to_dict(),
        options.json,
    )
    return 0


COMMAND = Command(Caption, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
