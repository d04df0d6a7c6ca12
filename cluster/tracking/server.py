"""Where MLflow is, and how a run begins there.

Without MLFLOW_TRACKING_URI the runs are in an sqlite file in the storage folder.
"""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from shards.store import absolute_url
from shards.store.credentials import has_credentials, without_credentials

# MLflow's own client would try for minutes; here what fails is sent again. A server may take long over a large file, once
# it has it, to put it into its own store.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # at each end of a run
# They would log a line for each table of a new database, and for each attempt at a server that is away.
for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

CONNECT_SECONDS = 5.0
TRAINING = {
    "mlflow.experimentKind": "custom_model_development"
}  # so that its pages are those of training, not of chats
LONGEST_PARAMETER = 6000  # characters MLflow stores


class NoTracking(OSError):
    """The MLflow server cannot be reached."""


def tracking_uri(storage: str | Path) -> str:
    """MLFLOW_TRACKING_URI, or an sqlite file in the storage folder. Raises NoTracking for an object store without the former,
    ValueError for a URI with a password in it: it would be in the run's folder, and in every line that names the server."""
    uri, place = os.environ.get("MLFLOW_TRACKING_URI"), absolute_url(storage)
    if uri and has_credentials(uri):
        raise ValueError(
            f"MLFLOW_TRACKING_URI {without_credentials(uri)}: the URI holds credentials (not shown), and it is written into each "
            "run's folder; give the bare URI, and credentials by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (a "
            "database's by PGPASSWORD)"
        )
    if not uri and "://" in place:
        raise NoTracking(
            f"{place}: MLflow's database cannot lie in an object store; start a server (mlflow server), and name it by "
            "MLFLOW_TRACKING_URI"
        )
    return uri or f"sqlite:///{place}/mlflow.db"


def ui_command(uri: str) -> str:
    """The line that shows the runs in a browser."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {uri}  (then http://127.0.0.1:5000)"
    return f"open {uri}"


def open_run(
    uri: str,
    storage: str | Path,
    experiment: str,
    name: str,
    run_id: str | None,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    datasets: Mapping[str, Dataset],
) -> str:
    """The id of the run: `run_id` set running again, or a new run with these parameters, tags and data (training: ...).

    Raises NoTracking if the server does not answer, ValueError if `run_id` is not there.
    """
    check_reachable(uri)
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise ValueError(
                f"MLflow at {uri} has no run {run_id} ({error.message}); use the server that it began on"
            ) from None
        return run_id
    run = client.create_run(experiment_of(uri, storage, experiment), run_name=name)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in parameters.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    client.log_inputs(
        run.info.run_id,
        [DatasetInput(data, [InputTag(MLFLOW_DATASET_CONTEXT, use)]) for use, data in datasets.items()],
    )
    return run.info.run_id


def experiment_of(uri: str, storage: str | Path, name: str) -> str:
    """The id of an experiment, which is created if there is none of that name; not for several processes at once."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A local database would put artifacts into the working directory.
    place = (Path(absolute_url(storage)) / "mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=place, tags=TRAINING)


def check_reachable(uri: str, advice: str = "start it, or unset MLFLOW_TRACKING_URI to track in a file") -> None:
    """MLflow's own client tries for minutes; a server that is away is to be found out now. Raises NoTracking."""
    if not uri.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answered, if only to ask who we are
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise NoTracking(f"no MLflow server at {uri} ({reason}); {advice}") from None
