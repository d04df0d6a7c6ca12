"""What lies where: dataset.json describes a packed data set, one Arrow file a split says where each sample is.

    FOLDER/dataset.json          classes, counts, packing, every shard's size and SHA-256, format version
    FOLDER/train.index.arrow     one record batch a shard, one row a sample, memory-mapped
    FOLDER/train-000000.tar ...  plain WebDataset shards: KEY.mp4, KEY.flow.mp4 where flow was packed, KEY.json
    FOLDER/rejected.jsonl        videos that were listed and refused or missing, with the reason

A sample's number is its row in the split's index: shards in order, samples in order of their keys. Nothing here holds
more than O(shards) in memory.
"""

import bisect
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.clips import Stream
from shards.video import Packing

FORMAT = "grurcn-shards"
FORMAT_VERSION = 2
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("group", pa.string()),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("video_offset", pa.int64()),  # of the video's bytes in the tar
        ("video_size", pa.int64()),
        ("video_crc32", pa.uint32()),
        ("flow_offset", pa.int64()),  # of the optical flow's bytes; null, as the next three, where none was packed
        ("flow_size", pa.int64()),
        ("flow_crc32", pa.uint32()),
        ("flow_bound", pa.float32()),  # pixels that its largest byte means
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ]
)


class BadShards(ValueError):
    """A packed data set that cannot be read. The message names the file, what was found and the way out."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a split."""

    name: str
    samples: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Where the optical flow of one video lies."""

    offset: int  # bytes from the shard's start to its first byte
    size_bytes: int
    crc32: int
    bound: float  # pixels that its largest byte means


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where one video lies, and what is known of it without reading it."""

    number: int  # in the split, from 0
    key: str
    label: int
    group: str
    num_frames: int
    fps: float
    shard: str
    offset: int  # bytes from the shard's start to the video's first byte
    size_bytes: int
    crc32: int
    flow: Flow | None


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """dataset.json."""

    classes: tuple[str, ...]
    packing: Packing
    splits: dict[str, tuple[Shard, ...]]
    index_sha256: dict[str, str]
    plan: str  # digest of the listing and the settings that were packed
    source: dict[str, Any]
    rejected: int

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole description, and through it of every shard: what a run was trained on."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_dataset(folder: Path) -> DatasetInfo:
    """Reads FOLDER/dataset.json. Raises BadShards if there is none, or one of another format."""
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = "its packing was not finished" if (folder / ".packing").is_dir() else "nothing was packed there"
        raise BadShards(f"{path}: not found ({state}); pack videos with: python -m jobs.make_shards") from None
    except ValueError as error:
        raise BadShards(f"{path}: not a JSON file ({error}); pack the videos again") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise BadShards(f"{path}: not the description of a packed data set (no format {FORMAT!r})")
    version = content.pop("version", None)
    if version != FORMAT_VERSION:
        raise BadShards(
            f"{path}: format version {version}, this program reads version {FORMAT_VERSION}; "
            "pack the videos again, or use the program that packed them"
        )
    return DatasetInfo(
        **{
            **content,
            "classes": tuple(content["classes"]),
            "packing": Packing(**content["packing"]),
            "splits": {split: tuple(Shard(**shard) for shard in shards) for split, shards in content["splits"].items()},
        }
    )


class Index:
    """One split of a packed data set: which samples there are and where their bytes lie."""

    def __init__(self, folder: Path, split: str):
        """Opens FOLDER's split. Raises BadShards if its files are missing or belong to another packing."""
        self.folder = folder
        self.split = split
        self.info = read_dataset(folder)
        self.shards = self.info.splits.get(split, ())
        if not self.shards:
            found = ", ".join(name for name, shards in self.info.splits.items() if shards)
            raise BadShards(f"{folder}: no samples in the split {split!r} (splits with samples: {found or 'none'})")
        path = index_path(folder, split)
        if not path.is_file():
            raise BadShards(f"{path}: not found; copy it beside its shards, or pack the videos again")
        try:
            self.rows = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise BadShards(f"{path}: not an Arrow file ({error}); pack the videos again") from None
        if self.rows.num_record_batches != len(self.shards):
            raise BadShards(
                f"{path}: an index of {self.rows.num_record_batches} shards, dataset.json lists {len(self.shards)}; "
                "they are from two packings: pack the videos again"
            )
        self.starts = [0, *accumulate(shard.samples for shard in self.shards)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Sample:
        """The sample of that number, 0 to len - 1; touches one row of the mapped file."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = bisect.bisect_right(self.starts, number) - 1
        row = self.rows.get_batch(shard).slice(number - self.starts[shard], 1).to_pylist()[0]
        return Sample(
            number=number,
            key=row["key"],
            label=row["label"],
            group=row["group"],
            num_frames=row["num_frames"],
            fps=row["fps"],
            shard=self.shards[shard].name,
            offset=row["video_offset"],
            size_bytes=row["video_size"],
            crc32=row["video_crc32"],
            flow=flow_of(row),
        )

    def check_stream(self, stream: Stream) -> None:
        """Raises BadShards if clips of this stream are wanted and were not packed."""
        if stream == "flow" and self.info.packing.flow == "none":
            raise BadShards(
                f"{self.folder}: packed without optical flow, clips of the stream {stream!r} are wanted; pack the videos "
                "again into another folder with: python -m jobs.make_shards --flow tvl1"
            )

    def check_files(self) -> None:
        """Raises BadShards unless the index is the one of dataset.json and every shard is there in its full length."""
        path = index_path(self.folder, self.split)
        if file_sha256(path) != self.info.index_sha256[self.split]:
            raise BadShards(f"{path}: not the index that dataset.json describes (SHA-256 differs); pack again")
        for shard in self.shards:
            path = self.folder / shard.name
            found = path.stat().st_size if path.is_file() else None
            if found != shard.size_bytes:
                state = "missing" if found is None else f"{found:,} bytes"
                raise BadShards(
                    f"{path}: {state}, the index wants {shard.size_bytes:,} bytes; restore the file, or pack again"
                )


def flow_of(row: dict[str, Any]) -> Flow | None:
    if row["flow_offset"] is None:
        return None
    return Flow(
        offset=row["flow_offset"], size_bytes=row["flow_size"], crc32=row["flow_crc32"], bound=row["flow_bound"]
    )


def index_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.index.arrow"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
