"""Send to MLflow what a run could not tell it, because the server was away until after the run's end.

    python -m jobs.sync_mlflow --run runs/gru-rcn-small

While a run is training it does so itself, as soon as the server answers. What is sent twice is told once.

--json FILE holds: run, entries (that were sent), mlflow_run_id, tracking_uri.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cluster.checkpoints.run_folder import IDENTITY, Identity, RunFolder
from cluster.progress import first_line
from cluster.tracking.mlflow_run import UNSENT, MlflowRun, read_entries
from cluster.tracking.server import NoTracking, check_reachable, ui_command
from grurcn.inference.mlflow_model import save_pyfunc
from jobs.command import Command, finish
from shards.store import absolute_url


@dataclass(frozen=True, kw_only=True)
class SyncMlflow:
    """Options of sending."""

    run: str
    """Folder or URL (s3://, gs://) of the run, STORAGE/NAME."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: SyncMlflow) -> int:
    """Sends what waits, and says how much that was; gives back the exit status. Raises NoTracking, with all that is left kept."""
    run = RunFolder(absolute_url(job.run.rstrip("/")))
    identity = run.identity()
    if identity is None:
        raise ValueError(f"{run.url}: no {IDENTITY} in it; wanted a run's folder (STORAGE/NAME)")
    entries = len(read_entries(run))
    if entries:
        send(run, identity, entries)
    done = f"sent {entries:,} entries of {run.url} to MLflow" if entries else f"{run.url}: nothing to send"
    result = {
        "run": run.url,
        "entries": entries,
        "mlflow_run_id": identity.mlflow_run_id,
        "tracking_uri": identity.tracking_uri,
    }
    finish(f"{done}; see the run: {ui_command(identity.tracking_uri)}", result, job.json)
    return 0


def send(run: RunFolder, identity: Identity, entries: int) -> None:
    uri, run_id = identity.tracking_uri, identity.mlflow_run_id
    kept = f"entries are kept in {run.url}/{UNSENT}"
    check_reachable(uri, f"start it, and run the same command again; {entries:,} {kept}")
    try:
        MlflowClient(uri).get_run(run_id)
    except MlflowException as error:
        raise NoTracking(
            f"MLflow at {uri} does not tell of run {run_id} ({first_line(error)}); start it on the database that has the run; "
            f"{entries:,} {kept}"
        ) from None
    mlflow_run = MlflowRun(uri, run_id, run, is_over=True, package=save_pyfunc)
    if not mlflow_run.close(math.inf):
        raise NoTracking(
            f"MLflow at {uri} took {entries - len(mlflow_run.kept):,} of {entries:,} entries and then answered no more; run the "
            f"same command again once it does: {len(mlflow_run.kept):,} {kept}"
        )


COMMAND = Command(SyncMlflow, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
