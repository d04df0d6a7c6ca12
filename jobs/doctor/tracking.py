"""MLflow, as a run's driver meets it: whether it answers, lets us in, and whom else it lets in. No run is made."""

import os
import re
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster.progress import first_line
from jobs.doctor.access import is_loopback, open_port
from jobs.doctor.findings import Finding, ok, warning, wrong
from jobs.doctor.machine import Facts

ANSWER_SECONDS = 10.0
LIST = "/api/2.0/mlflow/experiments/search?max_results=1"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts?path="
LOGIN = (
    "pip install 'mlflow[auth]', then: MLFLOW_AUTH_ADMIN_PASSWORD=... MLFLOW_FLASK_SERVER_SECRET_KEY=... mlflow server "
    "--app-name basic-auth ...  (docs/security.md)"
)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """What is known of the place that tracks runs."""

    uri: str
    error: str | None = None  # why it cannot be used
    refused: bool = False  # it answers, and does not let us in
    open_to_all: bool = False  # it lets in who does not say who he is
    artifacts_error: str | None = None  # why files cannot be sent there
    password_sent: bool = False  # by us, with each request
    address: str | None = None  # of the server


def ask_tracking(storage: str) -> Tracking:
    """Asks the place where runs of this storage would be tracked."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from cluster.tracking.server import NoTracking, check_reachable, tracking_uri

    try:
        uri = tracking_uri(storage)
    except (NoTracking, ValueError) as error:
        return Tracking(uri="MLFLOW_TRACKING_URI", error=str(error))
    shown = without_password(uri)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Tracking(uri=shown)  # made by the first run; nothing is left behind by a look
    try:
        check_reachable(uri)
        MlflowClient(uri).search_experiments(max_results=1)
    except NoTracking as error:
        reason = re.search(r"\((.+)\)", str(error))
        return Tracking(uri=shown, error=f"no server answers there ({reason[1] if reason else error})")
    except MlflowException as error:
        refused = error.get_http_status_code() in (401, 403)
        return Tracking(uri=shown, error=None if refused else first_line(error), refused=refused)
    except Exception as error:  # a database's own kinds, of a file that is none, or is not as this MLflow wants it
        return Tracking(uri=shown, error=first_line(error))
    if not uri.startswith("http"):
        return Tracking(uri=shown)
    has_password = bool(os.environ.get("MLFLOW_TRACKING_PASSWORD") or os.environ.get("MLFLOW_TRACKING_TOKEN"))
    is_open = status(f"{uri.rstrip('/')}{LIST}") == 200
    return Tracking(
        uri=shown,
        open_to_all=is_open,
        artifacts_error=ask_artifacts(uri, MlflowClient(uri), is_open),
        password_sent=has_password,
        address=address_of(uri),
    )


def ask_artifacts(uri: str, client: object, is_open: bool) -> str | None:
    """Why files of runs could not be sent: a server that takes none and names a folder that is not here."""
    from mlflow import MlflowClient

    assert isinstance(client, MlflowClient)
    experiments = client.search_experiments(max_results=1)
    place = experiments[0].artifact_location if experiments else None
    if place is None:
        return None
    if place.startswith("mlflow-artifacts:"):
        answer = status(f"{uri.rstrip('/')}{ARTIFACTS}") if is_open else 200
        return None if answer in (200, 403) else f"the server takes no files (status {answer} of {ARTIFACTS})"
    folder = place.removeprefix("file://")
    if "://" in folder:
        return None  # a store of its own, whose credentials the environment holds
    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        return f"the server keeps files in its folder {folder}, which cannot be written from here"
    return None


def status(url: str) -> int | str:
    """A server's answer to who does not say who he is; in words if there was none."""
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


def without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def judge_tracking(tracking: Tracking, machines: list[Facts]) -> list[Finding]:
    """machines: those that the server may be one of."""
    uri, parts = tracking.uri, urlsplit(tracking.uri)
    if tracking.refused:
        way = "export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=...  # where the command runs"
        return [wrong("MLflow", f"{uri} does not let us in", way)]
    if tracking.error:
        return [wrong("MLflow", f"{uri}: {tracking.error}", way_out(uri, tracking.error))]
    found = []
    if tracking.artifacts_error:
        way = "start the server with --artifacts-destination FOLDER_OR_URL (and without --no-serve-artifacts)"
        found.append(wrong("MLflow", f"{uri}: {tracking.artifacts_error}", way))
    if tracking.open_to_all and tracking.address:
        if not is_loopback(tracking.address):
            text = f"{uri} asks nobody for a password: whoever reaches it reads, changes and deletes runs and models"
            found.append(warning("MLflow", text, LOGIN))
        else:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            for machine in machines[:1]:
                way = f"mlflow server --host 127.0.0.1 --port {port} ...; or a login: {LOGIN}"
                here = open_port("MLflow", "the server, which asks for no password,", port, machine, way)
                found += [each for each in here if each.level != "ok"]
    if tracking.password_sent and parts.scheme == "http" and tracking.address and not is_loopback(tracking.address):
        text = f"{uri} gets our password unencrypted"
        found.append(
            warning("MLflow", text, "put a proxy with TLS before it, and name it by https:// (docs/security.md)")
        )
    where = "an sqlite file, made by the first run" if uri.startswith("sqlite:") else "answers"
    if uri.startswith("sqlite:") and Path(uri.removeprefix("sqlite:///")).exists():
        where = "an sqlite file that can be read"
    return found or [ok("MLflow", f"{uri} ({where})")]


def way_out(uri: str, error: str) -> str:
    if "CERTIFICATE" in error:
        return "export SSL_CERT_FILE=/ABS/cert.pem MLFLOW_TRACKING_SERVER_CERT_PATH=/ABS/cert.pem  # of who signed it"
    if "db upgrade" in error or "out-of-date" in error:
        return f"mlflow db upgrade {uri}  # after a copy of the file was made"
    if uri.startswith("http"):
        server = "mlflow server --backend-store-uri sqlite:////ABS/mlflow.db --artifacts-destination /ABS/artifacts"
        return f"{server}  # or unset MLFLOW_TRACKING_URI to track in a file"
    if uri.startswith("sqlite:"):
        return "restore the file, or name another --storage"
    return "start a server (mlflow server), and name it by MLFLOW_TRACKING_URI"
