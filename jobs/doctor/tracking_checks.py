"""Checks of MLflow: whether it answers, lets us in, and whom else it lets in. They ask nothing of any server."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from jobs.doctor.access_checks import check_port, is_loopback
from jobs.doctor.facts import MachineFacts, TrackingFacts
from jobs.doctor.findings import Finding, error, ok, warning

LOGIN_FIX = (
    "pip install 'mlflow[auth]', then: MLFLOW_AUTH_ADMIN_PASSWORD=... MLFLOW_FLASK_SERVER_SECRET_KEY=... mlflow server "
    "--app-name basic-auth ...  (docs/security.md)"
)
CREDENTIALS_FIX = "export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=...  # where the command runs"
ARTIFACTS_FIX = "start the server with --artifacts-destination FOLDER_OR_URL (and without --no-serve-artifacts)"
TLS_FIX = "put a proxy with TLS in front of it, and use https:// (docs/security.md)"


def check_tracking(tracking: TrackingFacts, machines: Sequence[MachineFacts]) -> list[Finding]:
    """machines: the first one is where this command runs."""
    uri, parts = tracking.uri, urlsplit(tracking.uri)
    if tracking.access_denied:
        return [error("MLflow", f"{uri} denies access", CREDENTIALS_FIX)]
    if tracking.error:
        return [error("MLflow", f"{uri}: {tracking.error}", tracking_fix(uri, tracking.error))]
    found = []
    is_elsewhere = tracking.address is not None and not is_loopback(tracking.address)
    if tracking.artifacts_error:
        found.append(error("MLflow", f"{uri}: {tracking.artifacts_error}", ARTIFACTS_FIX))
    if tracking.open_to_all and is_elsewhere:
        text = f"{uri} requires no password: who reaches it can read, change and delete runs and models"
        found.append(warning("MLflow", text, LOGIN_FIX))
    elif tracking.open_to_all and tracking.address:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        fix = f"mlflow server --host 127.0.0.1 --port {port} ...; or a login: {LOGIN_FIX}"
        here = check_port("MLflow", "the server, which requires no password,", port, machines[0], fix)
        found += [each for each in here if each.level != "ok"]
    if tracking.password_sent and parts.scheme == "http" and is_elsewhere:
        found.append(warning("MLflow", f"{uri} gets our password unencrypted", TLS_FIX))
    return found or [ok("MLflow", f"{uri} ({state_of(uri)})")]


def state_of(uri: str) -> str:
    if not uri.startswith("sqlite:"):
        return "answers"
    if Path(uri.removeprefix("sqlite:///")).exists():
        return "an sqlite file that can be read"
    return "an sqlite file, made by the first run"


def tracking_fix(uri: str, reason: str) -> str:
    if "CERTIFICATE" in reason:
        return "export SSL_CERT_FILE=/ABS/cert.pem MLFLOW_TRACKING_SERVER_CERT_PATH=/ABS/cert.pem  # of who signed it"
    if "db upgrade" in reason or "out-of-date" in reason:
        return f"mlflow db upgrade {uri}  # after a copy of the file was made"
    if uri.startswith("http"):
        server = "mlflow server --backend-store-uri sqlite:////ABS/mlflow.db --artifacts-destination /ABS/artifacts"
        return f"{server}  # or unset MLFLOW_TRACKING_URI to track in a file"
    if uri.startswith("sqlite:"):
        return "restore the file, or choose another --storage"
    return "start a server (mlflow server), and set MLFLOW_TRACKING_URI"
