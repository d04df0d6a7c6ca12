"""A run's folder in the storage: who it is, its checkpoints, and which is the newest that is whole.

    STORAGE/NAME/run.json                the run's identity: recipe, data, MLflow run; written once
                 frozen.safetensors      the weights that are not trained
                 checkpoint-00000120/    model.safetensors, optimizer.safetensors, state.json (files.py)
                 checkpoint-00000080/    model.safetensors alone, if that is the best model so far and its step is an old one
                 finished.json           what came out; there once the run has ended

STORAGE is a folder or the URL of an object store. A checkpoint holds, or names, all that is needed to go on or to evaluate.
"""

import json
import posixpath
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.checkpoints.files import STATE, Checkpoint, write_json
from cluster.checkpoints.state import Identity, Training
from shards.store import NoFile, Store, has_file, open_store

IDENTITY, RESULT = "run.json", "finished.json"


class OtherRun(ValueError):
    """A run's folder belongs to another recipe or other data."""


@dataclass(frozen=True)
class RunFolder:
    """STORAGE/NAME, by its path or URL."""

    url: str

    @cached_property
    def store(self) -> Store:
        return open_store(self.url)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def identity(self) -> Identity | None:
        """None for a run that has not started."""
        content = read_json(self.store, IDENTITY)
        return None if content is None else Identity.from_json(content)

    def begin(self, identity: Identity) -> None:
        write_json(self.store, IDENTITY, asdict(identity))

    def prepare(self) -> None:
        """Clears away what a killed run left half-written."""
        self.store.delete([name for name in self.store.names() if name.endswith(".partial")])

    def result(self) -> dict[str, Any] | None:
        """What finished.json says; None for a run that is not finished."""
        return read_json(self.store, RESULT)

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.store, RESULT, result)

    def checkpoints(self) -> list[Checkpoint]:
        """The complete ones, oldest first."""
        names = [name.removesuffix(f"/{STATE}") for name in self.store.names() if name.endswith(f"/{STATE}")]
        return [Checkpoint(self.store, name) for name in sorted(names, key=step_of) if step_of(name) >= 0]

    def newest(self) -> Checkpoint | None:
        return next(reversed(self.checkpoints()), None)

    def newest_whole(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint of which every file is there and as it was written; damaged ones are warned of and passed over.

        Raises ValueError if there are checkpoints and all are damaged: a run does not silently start again.
        """
        damaged = []
        for checkpoint in reversed(self.checkpoints()):
            try:
                checkpoint.check()
            except ValueError as error:
                damaged.append(str(error))
                warn(f"warning: a damaged checkpoint is passed over: {error}")
            else:
                return checkpoint
        if damaged:
            raise ValueError(
                f"{self.url}: every checkpoint is damaged (the newest: {damaged[0]}); restore one, or begin anew under "
                "another --name"
            )
        return None


def step_of(name: str) -> int:
    """The step of a checkpoint's folder, or of a file in it; -1 of anything else."""
    match = re.fullmatch(r"checkpoint-(\d{8,})(/.*)?", name)
    return int(match[1]) if match else -1


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, as it lies in a checkpoint."""

    weights: dict[str, Tensor]
    training: Training  # what made it
    step: int  # the step whose weights they are
    best: bool  # the weights of the best validation, not simply the newest
    checkpoint: Checkpoint


def load_best(url: str | Path) -> Model:
    """The best model of a run's folder or URL, or of one checkpoint of it; the newest where nothing was validated yet.

    Raises ValueError if there is no checkpoint, or its file of weights has changed since it was written.
    """
    url = str(url).rstrip("/")
    run = RunFolder(url)
    checkpoint = Checkpoint.at(url) if has_file(run.store, STATE) else run.newest()
    if checkpoint is None:
        raise ValueError(
            f"{url}: no checkpoint in it; expected a run's folder (STORAGE/NAME) or one of its checkpoints"
        )
    state = checkpoint.state()
    return Model(
        weights=checkpoint.weights(best=state.best is not None),
        training=state.training,
        step=state.best.step if state.best else state.training.step,
        best=state.best is not None,
        checkpoint=checkpoint,
    )


def export_best(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the best model so far into a folder of its own, from where load_best reads it."""
    files = checkpoint.weight_files(best=True)
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in files.items():
        with checkpoint.fetched(file, sha256) as local:
            shutil.copyfile(local, folder / posixpath.basename(file))
    sha256 = {posixpath.basename(file): digest for file, digest in files.items()}
    state = replace(checkpoint.state(), weights=list(sha256), sha256=sha256)
    write_json(open_store(folder), STATE, state.to_json())


def read_json(store: Store, name: str) -> Any:
    """None if there is no such file."""
    try:
        return json.loads(store.read_file(name))
    except NoFile:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{store.url}/{name}: not JSON ({error}); it was changed by hand or belongs to something else"
        ) from None
