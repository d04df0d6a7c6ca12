"""What a data set holds, from its description and its index alone: no video is read."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shards.dataset import FORMAT_VERSION, REJECTED, DatasetInfo, read_dataset
from shards.index import Index
from shards.packing.duplicates import Duplicates
from shards.store import REQUESTS, BadShards, NoFile, Store, open_store
from shards.threads import ordered_map

EXAMPLES = 3  # names of videos that are kept for each reason


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What a split holds."""

    videos: int = 0
    shards: int = 0
    bytes: int = 0
    frames: int = 0
    hours: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("min", "median", "max"), 0.0))
    captions: int = 0
    per_class: tuple[int, ...]  # videos of each class


@dataclass(kw_only=True)
class Rejection:
    """Why videos were left out."""

    reason: str  # N stands for numbers that differ
    count: int = 0
    names: list[str] = field(default_factory=list)  # of the first few


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What a data set holds."""

    url: str
    info: DatasetInfo
    splits: dict[str, SplitSummary]
    shared_groups: int  # that are in more than one split
    rejections: list[Rejection]  # the most frequent first

    def to_json(self) -> dict[str, Any]:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        per_class = {name: split.pop("per_class") for name, split in splits.items()}
        classes = enumerate(self.info.classes)
        return {
            "url": self.url,
            "format_version": FORMAT_VERSION,
            "digest": self.info.digest,
            "classes": {name: {split: per_class[split][label] for split in splits} for label, name in classes},
            "splits": splits,
            "packing": asdict(self.info.packing),
            "encoder": self.info.encoder,
            "source": self.info.source,
            "shared_groups": self.shared_groups,
            "rejected": self.info.rejected,
            "reasons": [asdict(rejection) for rejection in self.rejections],
        }


def summarize_dataset(url: str) -> DatasetSummary:
    """Reads the index once, shard by shard. Raises BadShards if the data set cannot be read."""
    store = open_store(url)
    info = read_dataset(store)
    with Duplicates() as groups:
        splits = {
            split: summarize_split(Index(url, split), groups, number)
            if shards
            else SplitSummary(per_class=(0,) * len(info.classes))
            for number, (split, shards) in enumerate(info.splits.items())
        }
        shared = sum(len(set(numbers)) > 1 for numbers in groups.found())
    return DatasetSummary(url=url, info=info, splits=splits, shared_groups=shared, rejections=read_rejections(store))


def summarize_split(index: Index, groups: Duplicates, split: int) -> SplitSummary:
    """Counts a split's rows, and adds their groups with the number of the split."""
    frames, per_class = 0, np.zeros(len(index.info.classes), np.int64)
    durations: Counter[int] = Counter()  # {hundredths of a second: videos}
    for rows in ordered_map(index.read_rows, range(len(index.shards)), num_threads=REQUESTS, in_flight=REQUESTS):
        labels, num_frames, fps = (rows.columns[name] for name in ("label", "num_frames", "fps"))
        per_class += np.bincount(labels[labels >= 0], minlength=len(per_class))
        frames += int(num_frames.sum())
        lengths, counts = np.unique(np.rint(100 * num_frames / fps).astype(np.int64), return_counts=True)
        durations.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        groups.add(sorted(set(rows.texts["group"].to_pylist())), split)
    return SplitSummary(
        videos=len(index),
        shards=len(index.shards),
        bytes=sum(shard.size_bytes for shard in index.shards),
        frames=frames,
        hours=sum(duration * count for duration, count in durations.items()) / 360_000,
        seconds=dict(zip(("min", "median", "max"), quantiles(durations), strict=True)),
        captions=sum(shard.captions for shard in index.shards),
        per_class=tuple(per_class.tolist()),
    )


def quantiles(durations: Counter[int]) -> tuple[float, float, float]:
    """{hundredths of a second: videos} -> (shortest, median, longest) in seconds; zeros for no videos."""
    if not durations:
        return 0.0, 0.0, 0.0
    lengths = np.array(sorted(durations))
    before = np.cumsum([durations[length] for length in lengths.tolist()])
    middle = lengths[np.searchsorted(before, before[-1] / 2)]
    return float(lengths[0] / 100), float(middle / 100), float(lengths[-1] / 100)


def read_rejections(store: Store) -> list[Rejection]:
    """Why videos were left out, the most frequent reason first; reasons that differ in numbers only are one."""
    try:
        lines = store.read_file(REJECTED).splitlines()
    except NoFile:
        return []
    found: dict[str, Rejection] = {}
    for number, line in enumerate(lines, start=1):
        try:
            rejected = json.loads(line)
            reason, name = str(rejected["reason"]), str(rejected["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadShards(f"{store.url}/{REJECTED}:{number}: not a path and a reason ({error!r})") from None
        pattern = re.sub(r"(?<!\w)\d([\d,.]*\d)?(?!\w)", "N", reason)
        rejection = found.setdefault(pattern, Rejection(reason=reason))
        if rejection.reason != reason:
            rejection.reason = pattern
        rejection.count += 1
        if len(rejection.names) < EXAMPLES:
            rejection.names.append(name)
    return sorted(found.values(), key=lambda rejection: -rejection.count)
