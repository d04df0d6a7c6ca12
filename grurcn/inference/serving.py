"""A classification model as MLflow serves it: rows of videos -> rows of labels and probabilities.

    mlflow models serve -m models:/actions/1 --env-manager local --port 5001
    curl localhost:5001/invocations -H 'Content-Type: application/json' \\
        -d '{"dataframe_records": [{"video": "'$(base64 -w0 video.mp4)'"}], "params": {"top": 3}}'

mlflow_model.py wraps it: MLflow imports this module and calls _load_pyfunc, so that nothing of ours is pickled. It imports no ray
and no deepspeed.
"""

import tempfile
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException

from cluster.checkpoints.run_folder import load_best
from grurcn.inference.classifier import Classifier, Sampling, top_classes
from grurcn.inference.served_input import PARAMETERS, PATH, VIDEO
from shards.packing.sandbox import Sandbox
from shards.video import BadVideo, Limits, Stored


class Served:
    """A model in memory. Videos are decoded in a helper process, within limits, because strangers send them."""

    def __init__(self, folder: str | Path):
        """folder: what cluster.checkpoints.run_folder.export_best wrote."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier = Classifier.of(load_best(folder), device)
        self.packer, self.lock = Sandbox(Limits()), threading.Lock()  # requests come in threads

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row for each video, with its path or its bytes -> a row each: label, probability, and the `top` likeliest classes
        with their probabilities. params: clips and views of each video, and top.

        Raises MlflowException (status 400) for a video that cannot be read, with the number of its row.
        """
        options = {**PARAMETERS, **(params or {})}
        if min(options.values()) < 1:
            raise bad_request(f"params {options}: expected at least 1 of each")
        try:
            classifier = self.classifier.with_sampling(Sampling(clips=options["clips"], views=options["views"]))
        except ValueError as error:
            raise bad_request(str(error)) from None
        rows = enumerate(model_input.to_dict("records"))
        return pd.DataFrame([self.answer(classifier, self.stored(number, row), options["top"]) for number, row in rows])

    def answer(self, classifier: Classifier, video: Stored, top: int) -> dict[str, Any]:
        """The row of the answer for a video."""
        found = top_classes(classifier.predict(classifier.read(video)).probability, top)
        names = [classifier.classes[label] for label, _ in found]
        return {
            "label": names[0],
            "probability": found[0][1],
            "labels": names,
            "probabilities": [probability for _, probability in found],
        }

    def stored(self, number: int, row: dict[Any, Any]) -> Stored:
        """The video of a row, stored as in a shard."""
        given = {name: row[name] for name in (PATH, VIDEO) if isinstance(row.get(name), str | bytes) and row[name]}
        if len(given) != 1:
            raise bad_request(
                f"row {number}: {' and '.join(given) or 'neither path nor video'} given; expected one of path, video (bytes)"
            )
        try:
            if PATH in given:
                return self.store(Path(given[PATH]))
            with tempfile.NamedTemporaryFile(prefix="grurcn-served-") as file:
                file.write(given[VIDEO])
                file.flush()
                return self.store(Path(file.name))
        except BadVideo as error:
            raise bad_request(f"row {number}: {str(error).replace(tempfile.gettempdir(), '')}") from None
        except OSError as error:
            raise bad_request(f"row {number}: cannot be read ({error.strerror})") from None

    def store(self, path: Path) -> Stored:
        with self.lock:
            return self.packer.store(path, self.classifier.packing)


def bad_request(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)


def _load_pyfunc(folder: str) -> Served:
    """MLflow's name for what loads a model."""
    return Served(folder)
