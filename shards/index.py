"""A split of a packed data set: which samples it has, and where the bytes of each lie.

A sample's number is its row in the split's index: shards in order, samples in the order in which they lie there. A shard's rows
are read when one of its samples is asked for, and checked by their CRC-32. A bounded number of shards' rows is kept, so that
nothing here grows with the number of samples.
"""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.dataset import DESCRIPTION, read_dataset
from shards.rows import SCHEMA, Rows, Sample, index_name
from shards.store import REQUESTS, BadShards, open_store
from shards.threads import ordered_map
from shards.video import Stream

SHARDS_HELD = 32  # of which the rows are kept, unless a reader needs more
SHARDS_CHECKED = 256  # of which the rows are checked before a run, at most


class Index:
    """One split of a packed data set: which samples there are and where their bytes lie. Safe to use from several threads."""

    def __init__(self, url: str | Path, split: str):
        """Opens a split of a folder or URL. Raises BadShards if it is not there, BadUrl for what is neither."""
        self.store = open_store(url)
        self.split = split
        self.info = read_dataset(self.store)
        self.shard_store = open_store(self.info.shards_at) if self.info.shards_at else self.store
        self.shards = self.info.splits.get(split, ())
        if not self.shards:
            found = ", ".join(name for name, shards in self.info.splits.items() if shards)
            raise BadShards(f"{self.url}: no samples in the split {split!r} (splits with samples: {found or 'none'})")
        self.starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.caption_starts = np.cumsum([0, *(shard.captions for shard in self.shards)])
        self.held: OrderedDict[int, Rows] = OrderedDict()
        self.most_held = SHARDS_HELD
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.store.url

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_captions(self) -> int:
        return int(self.caption_starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample of that number, 0 to len - 1. Raises BadShards if its row is damaged."""
        return self.samples([number])[0]

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of these numbers. Rows that are not held are read side by side."""
        size = len(self)
        for number in numbers:
            if not 0 <= number < size:
                raise IndexError(f"sample {number} of {size}")
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        places = (np.asarray(numbers) - self.starts[shards]).tolist()
        rows = self.rows_of(shards.tolist())
        return [
            rows[shard].sample(self.shards[shard].name, number, place)
            for shard, number, place in zip(shards.tolist(), numbers, places, strict=True)
        ]

    def pairs(self, numbers: Sequence[int]) -> list[tuple[Sample, int]]:
        """(video, which of its captions) of each of these pairs. Pairs are numbered from 0 to num_captions - 1: shard by shard,
        video by video, caption by caption.

        videos with 2, 0 and 3 captions:    pair  0 1   2 3 4
                                            video 0 0   2 2 2
                                          caption 0 1   0 1 2

        Raises BadShards if a shard's rows are damaged.
        """
        size = self.num_captions
        for number in numbers:
            if not 0 <= number < size:
                raise IndexError(f"pair {number} of {size}")
        shards = np.searchsorted(self.caption_starts, numbers, side="right") - 1
        rows_of = self.rows_of(shards.tolist())
        pairs = []
        for number, shard in zip(numbers, shards.tolist(), strict=True):
            starts, about = rows_of[shard].caption_starts, self.shards[shard]
            if starts[-1] != about.captions:
                raise BadShards(
                    f"{self.url}: {about.name} has {starts[-1]} captions by its rows, {about.captions} by {DESCRIPTION}; restore "
                    "the files, or pack again"
                )
            within = number - int(self.caption_starts[shard])
            row = int(np.searchsorted(starts, within, side="right")) - 1
            sample = rows_of[shard].sample(about.name, int(self.starts[shard]) + row, row)
            pairs.append((sample, within - int(starts[row])))
        return pairs

    def hold(self, shards: int) -> None:
        """Keeps the rows of this many shards from now on, or of as many as before if that is more."""
        self.most_held = max(self.most_held, shards)

    def rows_of(self, shards: Sequence[int]) -> dict[int, "Rows"]:
        """The rows of each of these shards, by its number."""
        with self.lock:
            found = {shard: self.held[shard] for shard in shards if shard in self.held}
        missing = sorted(set(shards) - found.keys())
        if len(missing) > 1:
            with ThreadPoolExecutor(min(REQUESTS, len(missing))) as pool:
                found |= zip(missing, pool.map(self.read_rows, missing), strict=True)
        elif missing:
            found[missing[0]] = self.read_rows(missing[0])
        with self.lock:
            for shard in found:
                self.held[shard] = found[shard]
                self.held.move_to_end(shard)
            while len(self.held) > max(self.most_held, len(found)):
                self.held.popitem(last=False)
        return found

    def read_rows(self, number: int) -> "Rows":
        """Reads a shard's rows. Raises BadShards if they are not those that dataset.json describes."""
        shard, name = self.shards[number], index_name(self.split)
        data = self.store.read(name, shard.rows_offset, shard.rows_size)
        if zlib.crc32(data) != shard.rows_crc32:
            raise BadShards(
                f"{self.url}/{name}: the {shard.rows_size:,} bytes at offset {shard.rows_offset:,} are not the rows of "
                f"{shard.name} that {DESCRIPTION} describes (CRC-32 differs): the file is damaged or of another packing; "
                "restore it, or pack again"
            )
        return Rows(pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(data)), SCHEMA))

    def check_videos(self) -> None:
        """Raises BadShards if the shards hold vectors and no videos."""
        if self.info.encoder is not None:
            raise BadShards(
                f"{self.url}: holds vectors that an encoder computed (python -m jobs.encode), no videos; name the shards that "
                "jobs.make_shards wrote"
            )

    def check_stream(self, stream: Stream) -> None:
        """Raises BadShards if this stream was not packed."""
        self.check_videos()
        if stream == "flow" and self.info.packing.flow == "none":
            raise BadShards(
                f"{self.url}: packed without optical flow, which the stream {stream!r} needs; pack the videos "
                "again into another folder with: python -m jobs.make_shards --flow tvl1"
            )

    def check_classes(self) -> None:
        """Raises BadShards if the videos have no classes."""
        if not self.info.classes:
            raise BadShards(
                f"{self.url}: packed with captions and without classes; expected videos with classes, as "
                "jobs.make_shards packs them from ucf101, hmdb51, kinetics, folder or csv"
            )

    def check_captions(self) -> None:
        """Raises BadShards unless every video has a caption. In a large data set, SHARDS_CHECKED shards stand for all."""
        if not self.num_captions:
            raise BadShards(
                f"{self.url}: no video of the split {self.split} has a caption; expected videos with captions, as "
                "jobs.make_shards packs them from msvd"
            )
        first, without, looked_at, some = "", 0, 0, self.some_shards()
        for number, rows in zip(some, ordered_map(self.read_rows, some, REQUESTS, REQUESTS), strict=True):
            bare = np.flatnonzero(rows.columns["num_captions"] == 0)
            if len(bare) and not without:
                first = f"{rows.texts['key'][int(bare[0])]} in {self.shards[number].name}"
            without, looked_at = without + len(bare), looked_at + self.shards[number].samples
        if without:
            raise BadShards(
                f"{self.url}: {without:,} of {looked_at:,} videos of the split {self.split} have no caption, the first: "
                f"{first}; give each a caption, or leave these videos out, and pack again"
            )

    def check_files(self) -> None:
        """Raises BadShards unless every shard is there in its full length and the index is the one that was packed.

        This is done before each run, so in a large data set only the rows of SHARDS_CHECKED shards are checked. All other
        rows, and the videos, are checked when they are read, and by `python -m jobs.inspect_shards verify`.
        """
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(self.read_rows, self.some_shards()))
        for shard, found in zip(
            self.shards, self.shard_store.sizes([shard.name for shard in self.shards]), strict=True
        ):
            if found != shard.size_bytes:
                state = "missing" if found is None else f"{found:,} bytes"
                raise BadShards(
                    f"{self.shard_store.url}/{shard.name}: {state}; expected {shard.size_bytes:,} bytes by the index; "
                    "restore the file, or pack again"
                )

    def some_shards(self) -> list[int]:
        """Numbers of the shards whose rows are checked before a run: all, or SHARDS_CHECKED of them, equally spaced."""
        return np.linspace(0, len(self.shards) - 1, min(len(self.shards), SHARDS_CHECKED)).astype(int).tolist()
