"""A run's folder in the storage: who it is, its checkpoints, and which is the newest that is whole.

    STORAGE/NAME/run.json                the run's identity: recipe, data, MLflow run; written once
    STORAGE/NAME/checkpoint-00000120/     model.safetensors, optimizer.safetensors, state.json (checkpoint.py)
                         best.safetensors, best.json        the weights of the best validation so far, and what it gave
    STORAGE/NAME/finished.json           what came out; there once the run has ended

A checkpoint is written into a hidden folder and renamed. It holds all that is needed to go on or to evaluate, so keeping the
newest few keeps the best model too. Ray Train uses the same folder as its own storage for the run.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file
from torch import Tensor, distributed

from cluster.checkpoint import MODEL, STATE, file_sha256, read_meta, read_weights, write_state

BEST, BEST_ABOUT = "best.safetensors", "best.json"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


class OtherRun(ValueError):
    """A run's folder belongs to another recipe or other data."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must be the same for a run to be gone on with."""

    recipe_digest: str
    data_digest: str
    recipe: dict[str, Any]
    tracking_uri: str
    mlflow_run_id: str


@dataclass(frozen=True)
class RunFolder:
    """The folder STORAGE/NAME."""

    path: Path

    def identity(self) -> Identity | None:
        """None for a run that has not begun."""
        content = read_json(self.path / "run.json")
        return None if content is None else Identity(**content)

    def begin(self, identity: Identity) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", asdict(identity))

    def prepare(self) -> None:
        """Clears away what a killed run left half-written."""
        for leftover in self.path.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        # Ray would insist on every checkpoint that it ever knew; the folder itself says which there are.
        (self.path / RAY_SNAPSHOT).unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """What finished.json says; None for a run that is not finished."""
        return read_json(self.path / "finished.json")

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.path / "finished.json", result)

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(path for path in self.path.glob("checkpoint-*") if (path / STATE).is_file())

    def newest(self) -> Path | None:
        return next(reversed(self.checkpoints()), None)

    def save(
        self, engine: DeepSpeedEngine, step: int, meta: dict[str, Any], best: dict[str, Any] | None, keep: int
    ) -> Path:
        """Writes the checkpoint of a step and drops all but the newest `keep`. Every rank calls it.

        best: what validation gave, if these weights are the best so far; else the best are those of the checkpoint before.
        Raises OSError, with nothing left under a final name, if the disk is full.
        """
        final = self.path / f"checkpoint-{step:08}"
        partial = self.path / f".{final.name}.partial"
        write_state(engine, partial, meta)
        if distributed.get_rank() == 0:
            before = self.newest()
            if best is not None:
                link_or_copy(partial / MODEL, partial / BEST)
                write_json(partial / BEST_ABOUT, {**best, "step": step, "sha256": file_sha256(partial / MODEL)})
            elif before is not None and read_best(before) is not None:
                link_or_copy(before / BEST, partial / BEST)
                link_or_copy(before / BEST_ABOUT, partial / BEST_ABOUT)
            if final.exists():  # a step done again after a restart from an older checkpoint
                shutil.rmtree(final)
            partial.rename(final)
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)
        distributed.barrier()
        return final


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, as it lies in a checkpoint."""

    weights: dict[str, Tensor]
    meta: dict[str, Any]  # what the training wrote beside them: recipe, classes, data
    step: int  # the step whose weights they are
    best: bool  # the weights of the best validation, not simply the newest
    checkpoint: Path


def load_best(folder: Path) -> Model:
    """The best model of a run's folder, or of one checkpoint of it; the newest where nothing was validated yet.

    Raises ValueError if there is no checkpoint, or its file of weights has changed since it was written.
    """
    checkpoint = folder if (folder / STATE).is_file() else RunFolder(folder).newest()
    if checkpoint is None:
        found = "no such folder" if not folder.is_dir() else "no checkpoint in it"
        raise ValueError(f"{folder}: {found}; wanted a run's folder (STORAGE/NAME) or one of its checkpoints")
    meta, best = read_meta(checkpoint), read_best(checkpoint)
    if best is None:
        return Model(weights=read_weights(checkpoint), meta=meta, step=meta["step"], best=False, checkpoint=checkpoint)
    found = file_sha256(checkpoint / BEST)
    if found != best["sha256"]:
        raise ValueError(
            f"{checkpoint / BEST}: SHA-256 {found[:12]}... found, {best['sha256'][:12]}... wanted: the file has changed "
            "since it was written; name another checkpoint of the run"
        )
    return Model(weights=load_file(checkpoint / BEST), meta=meta, step=best["step"], best=True, checkpoint=checkpoint)


def read_best(checkpoint: Path) -> dict[str, Any] | None:
    """What the best validation before a checkpoint gave; None if there was none."""
    return read_json(checkpoint / BEST_ABOUT)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); it was changed by hand or belongs to something else") from None


def write_json(path: Path, content: Any) -> None:
    """Appears under its name only when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
