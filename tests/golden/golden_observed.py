"""What lies in a folder after some commands -> {name: value}, to be compared one by one.

A name is a file's path and what leads to a value in it, between " > ":

    runs/x/finished.json > val_top1                                 a value of JSON
    runs/x/evaluations/test-3x5/scores.parquet > 4 > scores > 0     a value of a table's row
    runs/x/checkpoint-00000020/model.safetensors > heads.0.weight   type, shape and SHA-256 of a tensor
    runs/mlflow.db > x > metrics > train/loss > 3                   what MLflow has of the run x, of its step 3
    out/shards/train-000000.tar                                     SHA-256 of any other file

MLflow's random ids, in paths and in values, become the names of their runs and models.
"""

import contextlib
import filecmp
import hashlib
import io
import json
import math
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image
from safetensors import safe_open

Value = str | int | float | bool | None
Values = dict[str, Value]
SEPARATOR = " > "
DATABASE = "mlflow.db"
NOT_READ = re.compile(
    r"/artifacts/code/|/environment\.txt$|/changes\.diff$|\.(pt2|onnx)$"
)  # source, packages, programs
LONGEST_TEXT = 2000  # characters; of longer ones the SHA-256


def observe(folder: Path, before: Path) -> Values:
    """Everything in the folder that is not in the folder `before`, or is not the same there."""
    ids = Ids(folder)
    found: Values = {}
    paths = {path.relative_to(folder) for path in files_in(folder)}
    for path in sorted(paths):
        now, then = folder / path, before / path
        if then.is_file() and filecmp.cmp(now, then, shallow=False):
            continue
        values = dict(read_file(now, ids))
        if path.name == DATABASE and then.is_file():
            known = dict(read_file(then, ids))
            values = {name: value for name, value in values.items() if name not in known or known[name] != value}
        for name, value in values.items():
            place = ids.named(path.as_posix())
            found[f"{place}{SEPARATOR}{name}" if name else place] = ids.named(value)
    for path in sorted(path.relative_to(before) for path in files_in(before)):
        if path not in paths:
            found[f"{ids.named(path.as_posix())}{SEPARATOR}removed"] = True
    return found


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("mlflow.db-"))


class Ids:
    """The names of MLflow's random ids."""

    def __init__(self, folder: Path):
        self.names: dict[str, str] = {}
        for path in folder.rglob(DATABASE):
            with reading(path) as rows:
                runs = dict(rows("select run_uuid, name from runs"))
                self.names |= {run: f"{{run {name}}}" for run, name in runs.items()}
                for model, name, run in rows("select model_id, name, source_run_id from logged_models"):
                    self.names[model] = f"{{model {runs.get(run)} {name}}}"
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    def named(self, value: Any) -> Any:
        """A text with names in the place of ids; other values as they are."""
        return self.pattern.sub(lambda match: self.names[match[0]], value) if isinstance(value, str) else value


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Callable[[str], list[Any]]]:
    """A function that gives an SQL query's rows."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        yield lambda query: connection.execute(query).fetchall()
    finally:
        connection.close()


def read_file(path: Path, ids: Ids) -> Iterable[tuple[str, Value]]:
    """(name within the file, value) of everything in it; the name of a file that is one value is empty."""
    if NOT_READ.search(path.as_posix()):
        return [("", "there")]
    reader = READERS.get("MLmodel" if path.name == "MLmodel" else path.suffix)
    if reader is None:
        return [("", sha256(path.read_bytes()))]
    return ((SEPARATOR.join(map(str, keys)), value) for keys, value in reader(path, ids))


Found = Iterable[tuple[tuple[Any, ...], Value]]


def flat(content: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Value]]:
    """{"a": {"b": [1, 2]}} -> ("a", "b", 0): 1, ("a", "b", 1): 2; the length of each list, and that a dictionary is empty."""
    if isinstance(content, Mapping):
        if not content:
            yield keys, "{}"
        for key, value in content.items():
            yield from flat(value, (*keys, key))
    elif isinstance(content, list | tuple):
        yield (*keys, "length"), len(content)
        for place, value in enumerate(content):
            yield from flat(value, (*keys, place))
    else:
        yield keys, content if isinstance(content, str | int | float | bool | None) else repr(content)


def read_json(path: Path, _: Ids) -> Found:
    return flat(json.loads(path.read_text()))


def read_lines(path: Path, _: Ids) -> Found:
    return flat([json.loads(line) for line in path.read_text().splitlines()])


def read_yaml(path: Path, _: Ids) -> Found:
    return flat(yaml.safe_load(path.read_text()))


def read_text(path: Path, ids: Ids) -> Found:
    text = ids.named(path.read_text())
    return [((), text if len(text) <= LONGEST_TEXT else sha256(text.encode()))]


def read_table(path: Path, _: Ids) -> Found:
    table = pq.read_table(path)
    for column in table.schema:
        yield ("schema", column.name), f"{column.type}{'' if column.nullable else ' not null'}"
    for key, value in (table.schema.metadata or {}).items():
        yield ("metadata", key.decode()), value.decode()
    yield from flat(table.to_pylist())


def read_tensors(path: Path, _: Ids) -> Found:
    with safe_open(path, "numpy") as file:
        for key, value in (file.metadata() or {}).items():
            yield ("metadata", key), value
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            tensor: np.ndarray = file.get_tensor(name)
            yield (name,), f"{tensor.dtype} {tensor.shape} {sha256(np.ascontiguousarray(tensor).tobytes())}"


def read_picture(path: Path, _: Ids) -> Found:
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    return [((), f"{pixels.shape[1]} x {pixels.shape[0]} {sha256(pixels.tobytes())}")]


def read_database(path: Path, ids: Ids) -> Found:
    """What MLflow's database has of each run."""
    with reading(path) as rows:
        names = dict(rows("select run_uuid, name from runs"))
        for run, status, experiment in rows(
            "select run_uuid, status, experiments.name from runs join experiments using (experiment_id)"
        ):
            yield (names[run], "status"), status
            yield (names[run], "experiment"), experiment
        for table in ("params", "tags"):
            for run, key, value in rows(f"select run_uuid, key, value from {table}"):
                yield (names[run], table, key), value
        metrics: dict[tuple[str, str, int], set[float]] = {}
        for run, key, step, value, is_nan in rows("select run_uuid, key, step, value, is_nan from metrics"):
            metrics.setdefault((names[run], key, step), set()).add(math.nan if is_nan else value)
        for (name, key, step), values in metrics.items():
            for number, value in enumerate(sorted(values)):  # the same value that was told twice counts once
                yield (name, "metrics", key, step, *([number] if number else [])), value
        for run, name, digest, source, profile, context in rows(
            "select destination_id, datasets.name, digest, dataset_source, dataset_profile, input_tags.value from inputs "
            "join datasets on datasets.dataset_uuid = inputs.source_id "
            "left join input_tags on input_tags.input_uuid = inputs.input_uuid"
        ):
            about = {"digest": digest, "source": source, "profile": profile}
            yield from flat(about, (names[run], "data", context, name))
        yield from read_models(rows, ids)


def read_models(rows: Callable[[str], list[Any]], ids: Ids) -> Found:
    """Logged models and registered ones."""
    for model, kind, status, stage in rows("select model_id, model_type, status, lifecycle_stage from logged_models"):
        yield from flat({"type": kind, "status": status, "stage": stage}, ("models", ids.named(model)))
    for table in ("params", "tags"):
        for model, key, value in rows(
            f"select model_id, {table[:-1]}_key, {table[:-1]}_value from logged_model_{table}"
        ):
            yield ("models", ids.named(model), table, key), value
    for model, key, step, value in rows(
        "select model_id, metric_name, metric_step, metric_value from logged_model_metrics"
    ):
        yield ("models", ids.named(model), "metrics", key, step), value
    for name, version, source in rows("select name, version, source from model_versions"):
        yield ("registered", name, version), source


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


Reader = Callable[[Path, Ids], Found]
READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".parquet": read_table,
    ".safetensors": read_tensors,
    ".png": read_picture,
    ".db": read_database,
    ".txt": read_text,
    ".yaml": read_yaml,
    ".html": read_text,
    "MLmodel": read_yaml,
}


def options_of(text: str) -> Values:
    """The --help of a command, in one column -> {option: its kind of value, and its default}."""
    found: Values = {}
    cells = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    for cell in re.split(r"\n(?=--)", "\n".join(["", *cells])):
        if match := re.match(r"(--\S+)(.*)", cell, re.DOTALL):
            words = " ".join(match[2].split())
            kind = re.match(r"(\{[^}]*\}\S*|\[[A-Z]+ .*?\]\]|[A-Z|]+\b)?", words)
            default = re.search(r"\((?:default: ([^()]*(?:\([^()]*\)[^()]*)*)|(required))\)$", words)
            found[match[1].rstrip(",")] = (
                f"{kind[0] if kind else ''} {default[1] or default[2] if default else ''}".strip()
            )
    return found
