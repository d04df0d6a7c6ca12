"""A checkpoint's files: the whole state by parameter name, for any world size and any ZeRO stage.

    STORE/frozen.safetensors                        NAME                weights that are not trained: once for all checkpoints
    STORE/checkpoint-00000120/model.safetensors     NAME                the other weights (float32), and buffers, whole
                              optimizer.safetensors NAME/exp_avg, ...   optimizer state, whole, of the same shape as its parameter
                              state.json            format, step counts, loss scale, the caller's meta, the best model so far,
                                                    and the SHA-256 of each file that belongs to it

state.json is written last and is what makes a checkpoint of its folder, in a folder and in an object store alike. state.py takes
a snapshot of an engine and puts one back; here is no DeepSpeed, so that a model can be read where there is none.
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

from cluster.checkpoints.upgrade import upgrade_state
from shards.store import NoFile, Store, open_store

FORMAT = 2
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

    def state(self) -> dict[str, Any]:
        """state.json. Raises ValueError if it is missing, no JSON, or of another format."""
        path = f"{self.url}/{STATE}"
        try:
            state = json.loads(self.store.read_file(self.place(STATE)))
            found = state["format"]
        except NoFile:
            raise ValueError(
                f"{path}: no such file, so this is no complete checkpoint; name a folder that has one"
            ) from None
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: not a checkpoint's state ({error!r}); resume from an earlier checkpoint"
            ) from error
        if found != FORMAT:
            raise ValueError(f"{path}: format {found} found, {FORMAT} wanted; read it with the version that wrote it")
        return upgrade_state(state)

    @contextmanager
    def fetched(self, file: str, wanted: str) -> Iterator[Path]:
        """The file on this machine's disk. Raises ValueError if it is missing or its SHA-256 is not `wanted`."""
        path = f"{self.store.url}/{self.place(file)}"
        try:
            with self.store.fetched(self.place(file)) as local:
                found = file_sha256(local)
                if found != wanted:
                    raise ValueError(
                        f"{path}: SHA-256 {found[:12]}... found, {wanted[:12]}... wanted: the file has changed since it "
                        "was written; copy it again or resume from an earlier checkpoint"
                    )
                yield local
        except NoFile:
            raise ValueError(f"{path}: no such file, but {STATE} names it; copy it again or take another") from None

    def check(self) -> None:
        """Raises ValueError unless all files of the checkpoint are there and as they were written."""
        for file, wanted in self.state()["sha256"].items():
            with self.fetched(file, wanted):
                pass

    def copy_to(self, folder: Path, with_shared: bool) -> None:
        """Copies its folder into another one; also, if wanted, the file that it shares with others. Raises ValueError."""
        state = self.state()
        (folder / self.name).mkdir(parents=True)
        for file, wanted in state["sha256"].items():
            if with_shared or "/" not in file:
                with self.fetched(file, wanted) as local:
                    shutil.copyfile(local, folder / self.place(file))
        (folder / self.place(STATE)).write_text(json.dumps(state, indent=1))

    def weight_files(self, best: bool = False) -> dict[str, str]:
        """The files that make the model, each with its SHA-256: of the checkpoint itself, or of the best model so far."""
        state = self.state()
        files = {file: state["sha256"][file] for file in state["weights"]}
        if best and state["best"]["sha256"] != files[MODEL]:
            del files[MODEL]
            files[f"../{checkpoint_name(state['best']['step'])}/{MODEL}"] = state["best"]["sha256"]
        return files

    def weights(self, best: bool = False) -> dict[str, Tensor]:
        """The model's state_dict, on the CPU: of the checkpoint itself, or of the best model so far. Raises ValueError."""
        weights: dict[str, Tensor] = {}
        for file, wanted in self.weight_files(best).items():
            with self.fetched(file, wanted) as local:
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
    about: dict[str, Any]  # of the optimizer and the loss scale, for state.json


def write_frozen(snapshot: Snapshot, store: Store) -> str | None:
    """Writes the weights that are not trained beside the checkpoints, and gives back their SHA-256; None if all are trained."""
    assert snapshot.frozen is not None
    return write_tensors(store, FROZEN, snapshot.frozen) if snapshot.frozen else None


def write_snapshot(
    snapshot: Snapshot,
    checkpoint: Checkpoint,
    frozen_sha256: str | None,
    meta: dict[str, Any],
    best: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint; gives back its state, which is there, as state.json, once all else is.

    meta: what JSON can hold, "step" among it. best: what is known of the best model so far, "step" among it, and its
    "sha256" where it is another checkpoint's.
    """
    store, shared = checkpoint.store, f"../{FROZEN}"
    store.delete([checkpoint.place(STATE)])  # a step done again, after a restart from an older checkpoint
    sha256 = {
        MODEL: write_tensors(store, checkpoint.place(MODEL), snapshot.weights),
        OPTIMIZER: write_tensors(store, checkpoint.place(OPTIMIZER), snapshot.moments),
        **({shared: frozen_sha256} if frozen_sha256 else {}),
    }
    state = {
        "format": FORMAT,
        **snapshot.about,
        "meta": meta,
        "best": best and {"sha256": sha256[MODEL], **best},
        "weights": [MODEL, *([shared] if frozen_sha256 else [])],
        "sha256": sha256,
    }
    with store.written(checkpoint.place(STATE)) as file:
        file.write(json.dumps(state, indent=1).encode())
    return state


def write_tensors(store: Store, name: str, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file; gives back its SHA-256."""
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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
