"""A checkpoint's files: the whole state by parameter name, for any world size and any ZeRO stage.

    STORE/frozen.safetensors                        NAME                weights that are not trained: once for all checkpoints
    STORE/checkpoint-00000120/model.safetensors     NAME                the other weights (float32), and buffers, whole
                              optimizer.safetensors NAME/exp_avg, ...   optimizer state, whole, of the same shape as its parameter
                              state.json            where the training is, the best validation so far, the optimizer's counts,
                                                    and the SHA-256 of each file that belongs to it (state.py)

state.json is written last: it makes a folder a checkpoint, on a disk and in an object store alike. engine_state.py takes a
snapshot of an engine and loads one; no DeepSpeed is imported here, so that a model can be read where there is none.
"""

import hashlib
import json
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from cluster.checkpoints.state import Best, CheckpointState, Optimizer, OtherFormat, Training
from shards.store import NoFile, Store, open_store

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FROZEN = "frozen.safetensors"  # beside the checkpoints' folders


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder in a store. Files are named as seen from it: model.safetensors, ../frozen.safetensors."""

    store: Store
    name: str

    @classmethod
    def at(cls, url: str | Path) -> "Checkpoint":
        """The checkpoint in the folder of that path or URL."""
        parent, _, name = str(url).rstrip("/").rpartition("/")
        return cls(open_store(parent or "."), name)

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.name}"

    def place(self, file: str) -> str:
        """A file's name in the store."""
        return posixpath.normpath(f"{self.name}/{file}")

    def state(self) -> CheckpointState:
        """state.json. Raises ValueError if it is missing, no JSON, or of another format."""
        path = f"{self.url}/{STATE}"
        try:
            return CheckpointState.from_json(json.loads(self.store.read_file(self.place(STATE))))
        except NoFile:
            raise ValueError(
                f"{path}: no such file, so this is no complete checkpoint; name a folder that has one"
            ) from None
        except OtherFormat as error:
            raise ValueError(f"{path}: {error}") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: not a checkpoint's state ({error!r}); resume from an earlier checkpoint"
            ) from error

    @contextmanager
    def fetched(self, file: str, sha256: str) -> Iterator[Path]:
        """The file on this machine's disk. Raises ValueError if it is missing or has another SHA-256."""
        path = f"{self.store.url}/{self.place(file)}"
        try:
            with self.store.fetched(self.place(file)) as local:
                found = file_sha256(local)
                if found != sha256:
                    raise ValueError(
                        f"{path}: SHA-256 {found[:12]}... found, {sha256[:12]}... expected: the file has changed since it "
                        "was written; copy it again or resume from an earlier checkpoint"
                    )
                yield local
        except NoFile:
            raise ValueError(f"{path}: no such file, but {STATE} names it; copy it again or take another") from None

    def check(self) -> None:
        """Raises ValueError unless all files of the checkpoint are there and as they were written."""
        for file, sha256 in self.state().sha256.items():
            with self.fetched(file, sha256):
                pass

    def copy_to(self, folder: Path, with_shared: bool) -> None:
        """Copies its folder into another one, with or without the file that it shares with others. Raises ValueError."""
        state = self.state()
        (folder / self.name).mkdir(parents=True)
        for file, sha256 in state.sha256.items():
            if with_shared or "/" not in file:
                with self.fetched(file, sha256) as local:
                    shutil.copyfile(local, folder / self.place(file))
        write_json(open_store(folder), self.place(STATE), state.to_json())

    def weight_files(self, best: bool = False) -> dict[str, str]:
        """The files that make the model, each with its SHA-256: of the checkpoint itself, or of the best model so far."""
        state = self.state()
        files = {file: state.sha256[file] for file in state.weights}
        if best and state.best and state.best.sha256 != files[MODEL]:
            del files[MODEL]
            files[f"../{checkpoint_name(state.best.step)}/{MODEL}"] = state.best.sha256
        return files

    def weights(self, best: bool = False) -> dict[str, Tensor]:
        """The model's state_dict, on the CPU: of the checkpoint itself, or of the best model so far. Raises ValueError."""
        weights: dict[str, Tensor] = {}
        for file, sha256 in self.weight_files(best).items():
            with self.fetched(file, sha256) as local:
                weights |= load_file(local)
        return weights


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:08}"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a training at one moment, whole, on rank 0's CPU."""

    weights: dict[str, Tensor]  # trainable ones and buffers
    frozen: dict[str, Tensor] | None  # None: they are in the store already
    moments: dict[str, Tensor]
    optimizer: Optimizer


def write_frozen(snapshot: Snapshot, store: Store) -> str | None:
    """Writes the weights that are not trained beside the checkpoints. Returns their SHA-256; None if all are trained."""
    assert snapshot.frozen is not None
    return write_tensors(store, FROZEN, snapshot.frozen) if snapshot.frozen else None


def write_snapshot(
    snapshot: Snapshot,
    checkpoint: Checkpoint,
    frozen_sha256: str | None,
    training: Training,
    best: Best | Mapping[str, float] | None = None,
) -> CheckpointState:
    """Writes a checkpoint, its state.json last, and returns its state.

    best: the best validation of a checkpoint before, or the scores of this one, if it is the best so far.
    """
    store, shared = checkpoint.store, f"../{FROZEN}"
    store.delete([checkpoint.place(STATE)])  # a step done again, after a restart from an older checkpoint
    sha256 = {
        MODEL: write_tensors(store, checkpoint.place(MODEL), snapshot.weights),
        OPTIMIZER: write_tensors(store, checkpoint.place(OPTIMIZER), snapshot.moments),
        **({shared: frozen_sha256} if frozen_sha256 else {}),
    }
    state = CheckpointState(
        training=training,
        best=Best(step=training.step, sha256=sha256[MODEL], scores=dict(best)) if isinstance(best, Mapping) else best,
        optimizer=snapshot.optimizer,
        weights=[MODEL, *([shared] if frozen_sha256 else [])],
        sha256=sha256,
    )
    write_json(store, checkpoint.place(STATE), state.to_json())
    return state


def write_tensors(store: Store, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file and returns its SHA-256."""
    data = save(
        dict(tensors)
    )  # not save_file, which puts another file, for this user alone, into the place of the one given
    with store.written(name) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(store: Store, name: str) -> dict[str, Tensor]:
    """What write_tensors wrote. Raises NoFile if it is missing, ValueError if it is no safetensors file."""
    try:
        return load(store.read_file(name))
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from None


def write_json(store: Store, name: str, content: Any) -> None:
    with store.written(name) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
