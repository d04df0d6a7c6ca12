"""What evaluating and captioning the videos of a split share: options, the result's common part, and where results go."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.checkpoints.run_folder import Model
from cluster.tracking.mlflow_run import MlflowRun
from cluster.workers.options import Workers
from grurcn.evaluation.score_files import RESULT_FILE, copy_into
from shards.reading.stages import ReadingOptions

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class SplitJob:
    """A trained model and the videos of a split."""

    run: str
    """Folder or URL of a run (STORAGE/NAME), for its best model, or of one of its checkpoints."""
    shards: str
    """Folder or URL (s3://, gs://, http://) of the data set."""
    split: str = "test"
    """test, val or train."""
    precision: str = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[ReadingOptions, Flat] = field(default_factory=ReadingOptions)
    decoders: int = 0
    """Ray tasks of one core each that read and decode videos for the workers. 0: each worker decodes its own videos, with its
    --decode-threads."""


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """The common part of a result."""

    run: str  # folder or URL
    checkpoint: str
    step: int
    split: str
    videos: int
    mlflow_run_id: str
    tracking_uri: str
    seconds: float
    folder: str  # of the result's files, in the run
    decoded_at: dict[str, int] | None  # {address: videos}, if --decoders did it
    is_best: bool  # the run's best model
    is_logged: bool  # in MLflow, which did not answer otherwise

    def to_dict(self) -> dict[str, Any]:
        """As result.json and --json hold it."""
        left_out = {"folder", "is_best", "is_logged"} | ({"decoded_at"} if self.decoded_at is None else set())
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def publish(model: Model, name: str, folder: Path, files: Sequence[str], run: MlflowRun) -> bool:
    """Copies a local folder's files, then its result.json, into the folder `name` of the model's run, and to MLflow.

    Returns whether MLflow got everything.
    """
    copy_into(model.checkpoint.store, name, folder, (*files, RESULT_FILE))
    run.log_folder(name, folder)
    return run.close()
