"""What a training gives back. Standard library only, as Ray's controller imports this file when a run ends."""

from dataclasses import dataclass
from typing import Any

VALIDATION = "val_"  # how scores of the validation begin in JSON


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run's steps; the same on every rank. scores: of the best validation, as {"loss": ..., ...}."""

    steps: int
    stopped_early: bool
    scores: dict[str, float]
    best_step: int

    def to_dict(self) -> dict[str, Any]:
        """As finished.json holds it."""
        scores = {f"{VALIDATION}{name}": value for name, value in self.scores.items()}
        return {"steps": self.steps, "stopped_early": self.stopped_early, **scores, "best_step": self.best_step}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "RunResult":
        """The result that to_dict wrote as JSON."""
        return RunResult(
            steps=content["steps"],
            stopped_early=content["stopped_early"],
            scores={
                name.removeprefix(VALIDATION): value for name, value in content.items() if name.startswith(VALIDATION)
            },
            best_step=content["best_step"],
        )


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What train() gives back."""

    run: str  # folder or URL of the run
    name: str
    result: RunResult
    finished_before: bool  # there was nothing left to do
    mlflow_run_id: str
    tracking_uri: str
    seconds: float  # of this call

    def to_dict(self) -> dict[str, Any]:
        """As `train --json` writes it."""
        return {
            "run": self.run,
            "name": self.name,
            **self.result.to_dict(),
            "mlflow_run_id": self.mlflow_run_id,
            "tracking_uri": self.tracking_uri,
            "seconds": self.seconds,
        }
