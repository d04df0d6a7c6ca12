"""Finds and reads a trained model by its name.

runs/gru-rcn          the best model in a run's folder or s3:// URL (STORAGE/NAME), or one of its checkpoints
runs:/0f3a...         the best model of an MLflow run
models:/actions/1     a registered model of MLflow, also models:/actions/latest and models:/actions@champion
models:/m-0f3a...     a logged model of MLflow
"""

import re
import tempfile
from pathlib import Path

from cluster.checkpoints.run_folder import Model, load_best
from cluster.tracking.models import download_best, download_model
from cluster.tracking.server import tracking_uri

MLFLOW = ("runs:", "models:")  # how the name of a model in MLflow begins


def find_model(source: str, storage: str) -> Model:
    """Reads the model that `source` names. MLflow is the server of MLFLOW_TRACKING_URI, else the database of the storage.

    Raises ValueError if there is no such model, NoTracking if MLflow does not answer.
    """
    return read_model(source, tracking_uri(storage) if source.startswith(MLFLOW) else "")


def read_model(source: str, tracking_uri: str) -> Model:
    """Reads the model that `source` names; tracking_uri is needed for names of MLflow. Raises as find_model does."""
    if not source.startswith(MLFLOW):
        return load_best(source if "://" in source else Path(source).expanduser())
    with tempfile.TemporaryDirectory(prefix="grurcn-") as folder:
        if source.startswith("models:"):
            return load_best(download_model(tracking_uri, source, Path(folder)))
        match = re.fullmatch(r"runs:/(?P<run_id>[0-9a-f]{32})", source)
        if match is None:
            raise ValueError(
                f"{source}: expected runs:/ID, with the 32 hexadecimal digits that MLflow shows as the run's id"
            )
        return load_best(download_best(tracking_uri, match["run_id"], Path(folder)))


def is_run(source: str) -> bool:
    """Whether a source names a model of a run: a folder, an s3:// or gs:// URL, or a model in MLflow."""
    return source.startswith((*MLFLOW, "s3://", "gs://")) or Path(source).expanduser().is_dir()


def absolute_source(source: str | None) -> str | None:
    """The same source, with a path as seen from any folder. "imagenet" and names of MLflow stay as they are."""
    if source is None or source == "imagenet" or source.startswith(MLFLOW) or "://" in source:
        return source
    return str(Path(source).expanduser().absolute())
