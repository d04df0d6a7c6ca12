"""dataset.json: the description of a packed data set, from which everything else in it is found and checked.

    dataset.json          classes, counts, packing, every shard's size and SHA-256, where its rows lie, format version
    train.index.arrow     an Arrow file a split: where each sample lies (rows.py)
    train-000000.tar ...  plain WebDataset shards: KEY.mp4, KEY.flow.mp4 where flow was packed, KEY.json
    rejected.jsonl        videos that were listed and refused or missing, with the reason

They lie in a folder or an object store (store/).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from shards.store import BadShards, NoFile, Store, has_file
from shards.video import Packing

FORMAT = "grurcn-shards"
FORMAT_VERSION = 3
DESCRIPTION, PLAN = "dataset.json", ".packing/plan"
REJECTED = "rejected.jsonl"
EXTERNAL = "webdataset"  # kind of source of a data set whose tars others wrote


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar of a split."""

    name: str
    samples: int
    captions: int  # of all its samples
    size_bytes: int
    sha256: str
    rows_offset: int  # where its rows lie in the index: the bytes of one record batch
    rows_size: int
    rows_crc32: int


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """dataset.json."""

    classes: tuple[str, ...]  # none in a data set of captions
    packing: Packing
    splits: dict[str, tuple[Shard, ...]]
    plan: str  # digest of the listing and the settings that were packed
    source: dict[str, Any]
    rejected: int
    shards_at: str | None = None  # where the shards lie, unless they lie beside this description
    encoder: dict[str, Any] | None = None  # JSON: what computed the vectors that the shards hold instead of videos

    @property
    def is_external(self) -> bool:
        """Whether others wrote the tars: they were indexed, not packed."""
        return self.source.get("kind") == EXTERNAL

    def to_json(self) -> str:
        content = asdict(self)
        if self.encoder is None:  # so that data sets of videos keep the digest that runs remember
            del content["encoder"]
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **content}, indent=1) + "\n"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the description, and through it of every shard and row: it identifies what a run was trained on."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_dataset(store: Store) -> DatasetInfo:
    """Reads dataset.json. Raises BadShards if it is missing, of another format, or not as packing writes it."""
    path = f"{store.url}/{DESCRIPTION}"
    try:
        content = json.loads(store.read_file(DESCRIPTION))
    except NoFile:
        state = "its packing was not finished" if has_file(store, PLAN) else "nothing was packed there"
        raise BadShards(f"{path}: not found ({state}); pack videos with: python -m jobs.make_shards") from None
    except ValueError as error:
        if isinstance(error, BadShards):
            raise
        raise BadShards(f"{path}: not a JSON file ({error}); pack the videos again") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise BadShards(f"{path}: not the description of a packed data set (no format {FORMAT!r})")
    version = content.pop("version", None)
    if version != FORMAT_VERSION:
        raise BadShards(
            f"{path}: format version {version}; this program reads version {FORMAT_VERSION}; "
            "pack the videos again, or use the program that packed them"
        )
    try:
        return validated(
            DatasetInfo(
                **{
                    **content,
                    "classes": tuple(content["classes"]),
                    "packing": Packing(**content["packing"]),
                    "splits": {
                        split: tuple(Shard(**shard) for shard in shards) for split, shards in content["splits"].items()
                    },
                }
            )
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadShards(f"{path}: not as a packing writes it ({error!r}); restore the file, or pack again") from None


def validated(info: DatasetInfo) -> DatasetInfo:
    """The same. Raises ValueError, TypeError or AttributeError if a number or a text in it is none."""
    shards = [shard for split in info.splits.values() for shard in split]
    for text in (*info.classes, *(text for shard in shards for text in (shard.name, shard.sha256))):
        text.encode()  # as UTF-8
    for shard in shards:
        for number in (shard.samples, shard.captions, shard.size_bytes, shard.rows_offset, shard.rows_size):
            if not 0 <= number < 2**62:
                raise ValueError(f"{number} in {shard.name}")
    if info.encoder is not None:
        check_encoder(info.encoder)
    return info


def check_encoder(encoder: dict[str, Any]) -> None:
    """Raises ValueError unless the description of an encoder holds what every reader of its vectors needs."""
    sizes = [encoder.get(name) for name in ("segments", "size")]
    if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(encoder.get("digest"), str):
        raise ValueError(
            f"an encoder with segments {sizes[0]!r}, size {sizes[1]!r} and digest {encoder.get('digest')!r}; expected "
            "two numbers of at least 1, and a text"
        )
