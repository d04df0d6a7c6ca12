"""What a process logs to MLflow: a closed set of entries, and the JSON line of each."""

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any

from cluster.workers.events import Metrics


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened to the run."""

    step: int
    text: str
    milliseconds: int


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """The end of the run, sent when all else is."""

    status: str
    milliseconds: int


@dataclass(frozen=True, kw_only=True)
class File:
    """A file among the run's artifacts; of the same name, the last one stays. content: its bytes in base64."""

    name: str
    content: str
    is_table: bool = False  # a JSON file that MLflow's pages show as a table


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The files of a folder of this machine, as artifacts under a name."""

    name: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint and the best model so far, as logged models. keep: how many of the newest checkpoints stay."""

    name: str
    keep: int


@dataclass(frozen=True, kw_only=True)
class Register:
    """The best model, as the newest version of a registered model of that name."""

    name: str


Entry = Metrics | RunEvent | RunEnd | File | Folder | SavedCheckpoint | Register
KINDS: dict[str, type[Entry]] = {
    "metrics": Metrics, "event": RunEvent, "end": RunEnd, "file": File, "folder": Folder, "checkpoint": SavedCheckpoint,
    "register": Register,
}  # fmt: skip


def kind_of(entry: Entry) -> str:
    return next(kind for kind, entry_type in KINDS.items() if type(entry) is entry_type)


def to_line(entry: Entry) -> bytes:
    return json.dumps({"kind": kind_of(entry), **asdict(entry)}).encode() + b"\n"


def from_line(line: bytes) -> Entry:
    content = upgraded(json.loads(line))
    return KINDS[content.pop("kind")](**content)


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """An entry of an earlier version as it is written now."""
    match content["kind"]:
        case "text" | "table" as kind:
            data = base64.b64encode(content["content"].encode()).decode()
            return {"kind": "file", "name": content["name"], "content": data, "is_table": kind == "table"}
        case "picture":
            return {**content, "kind": "file"}
        case "checkpoint":
            return {"kind": "checkpoint", "name": content["name"], "keep": content["keep"]}
        case _:
            return content
