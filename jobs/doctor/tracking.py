"""Facts about MLflow, as the driver of a run would find it. No run is made."""

import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from jobs.doctor.facts import TrackingFacts
from shards.store import error_line
from shards.store.credentials import without_credentials

ANSWER_SECONDS = 10.0
EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts?path="


def gather_tracking(storage: str) -> TrackingFacts:
    """Asks the place where runs of this storage would be tracked."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from cluster.tracking.server import NoTracking, check_reachable, tracking_uri

    try:
        uri = tracking_uri(storage)
    except (NoTracking, ValueError) as error:
        return TrackingFacts(uri="MLFLOW_TRACKING_URI", error=str(error))
    shown = without_credentials(uri)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return TrackingFacts(uri=shown)  # the first run makes it; looking must not
    try:
        check_reachable(uri)
        MlflowClient(uri).search_experiments(max_results=1)
    except NoTracking as error:
        reason = re.search(r"\((.+)\)", str(error))
        return TrackingFacts(uri=shown, error=f"no server answers there ({reason[1] if reason else error})")
    except MlflowException as error:
        denied = error.get_http_status_code() in (401, 403)
        return TrackingFacts(uri=shown, error=None if denied else error_line(error), access_denied=denied)
    except Exception as error:  # errors of databases, for a file that is none or of another version
        return TrackingFacts(uri=shown, error=error_line(error))
    if not uri.startswith("http"):
        return TrackingFacts(uri=shown)
    has_password = bool(os.environ.get("MLFLOW_TRACKING_PASSWORD") or os.environ.get("MLFLOW_TRACKING_TOKEN"))
    is_open = status_without_credentials(f"{uri.rstrip('/')}{EXPERIMENTS}") == 200
    return TrackingFacts(
        uri=shown,
        open_to_all=is_open,
        artifacts_error=find_artifacts_error(uri, MlflowClient(uri), is_open),
        password_sent=has_password,
        address=address_of(uri),
    )


def find_artifacts_error(uri: str, client: object, is_open: bool) -> str | None:
    """Why files of runs could not be sent: the server takes none, or keeps them in a folder that is not here."""
    from mlflow import MlflowClient

    assert isinstance(client, MlflowClient)
    experiments = client.search_experiments(max_results=1)
    location = experiments[0].artifact_location if experiments else None
    if location is None:
        return None
    if location.startswith("mlflow-artifacts:"):
        answer = status_without_credentials(f"{uri.rstrip('/')}{ARTIFACTS}") if is_open else 200
        return None if answer in (200, 403) else f"the server takes no files (status {answer} of {ARTIFACTS})"
    folder = location.removeprefix("file://")
    if "://" in folder:
        return None  # an object store; the environment has its credentials
    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        return f"the server keeps files in its folder {folder}, which cannot be written from here"
    return None


def status_without_credentials(url: str) -> int | str:
    """The status of a request without credentials, or why there was no answer."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return str(getattr(error, "reason", error))


def address_of(uri: str) -> str | None:
    try:
        return socket.gethostbyname(urlsplit(uri).hostname or "")
    except OSError:
        return None
