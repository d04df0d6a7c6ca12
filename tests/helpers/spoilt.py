"""Data sets that are spoilt on purpose, and what verification finds in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grurcn.data import VerifyJob, verify
from shards.dataset import Shard
from shards.index import Index
from shards.rows import SCHEMA, written_index
from shards.store import FolderStore


def faults(url: Path | str, **options: Any) -> list[str]:
    """What verification finds, each fault as a line without the folder's name."""
    result = verify(VerifyJob(url=str(url), workers=0, **options))
    assert result.faults == len(result.fault_list)
    return [str(fault).replace(f"{url}/", "") for fault in result.fault_list]


def flip(path: Path, offset: int) -> None:
    """Flips the lowest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes dataset.json."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reindex(folder: Path, change: Callable[[str, dict[str, Any]], Any], split: str = "train") -> None:
    """Writes a split's index anew with changed rows, as a packer with a fault would: its checksums fit.

    change: takes a shard's name and a row, which it changes.
    """
    index = Index(folder, split)
    shards = []
    with written_index(FolderStore(folder), split) as file:
        for number, shard in enumerate(index.shards):
            rows = index.read_rows(number)
            columns = {**{name: text.to_pylist() for name, text in rows.texts.items()}, **rows.columns}
            samples = [{name: as_python(columns[name][row]) for name in SCHEMA.names} for row in range(shard.samples)]
            for sample in samples:
                change(shard.name, sample)
            shards.append(fields(file.add(samples, name=shard.name, size_bytes=shard.size_bytes, sha256=shard.sha256)))
    rewrite(folder, lambda content: content["splits"].update({split: shards}))


def write_rows(folder: Path, shards: dict[str, list[dict[str, Any]]]) -> None:
    """Replaces the split train by {shard: its rows}, without the shards themselves."""
    with written_index(FolderStore(folder), "train") as file:
        described = [fields(file.add(rows, name=name, size_bytes=0, sha256="")) for name, rows in shards.items()]
    rewrite(folder, lambda content: content.update(splits={"train": described}))


def as_python(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def fields(shard: Shard) -> dict[str, Any]:
    return {name: getattr(shard, name) for name in shard.__slots__}
