"""Send to MLflow what a run could not send, because the server was away until after the run's end.

    python -m jobs.sync_mlflow --run runs/gru-rcn-small

A run that is training does so itself, as soon as the server answers. What is sent twice is there once.

--json FILE holds: run, entries (how many were sent), mlflow_run_id, tracking_uri.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.tracking.mlflow_run import send_unsent
from cluster.tracking.server import ui_command
from grurcn.inference.mlflow_model import save_pyfunc
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class SyncMlflow:
    """Options of sending."""

    run: str
    """Folder or URL (s3://, gs://) of the run, STORAGE/NAME."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: SyncMlflow) -> int:
    """Sends what waits and prints how much that was; returns the exit status."""
    sent = send_unsent(job.run, save_pyfunc)
    done = f"sent {sent.entries:,} entries of {sent.run} to MLflow" if sent.entries else f"{sent.run}: nothing to send"
    finish(f"{done}; see the run: {ui_command(sent.tracking_uri)}", asdict(sent), job.json)
    return 0


COMMAND = Command(SyncMlflow, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
