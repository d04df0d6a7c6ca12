"""jobs.inspect_shards info: what a data set holds, from its description and its index alone."""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command import finish
from shards.dataset import FORMAT_VERSION, REJECTED, DatasetInfo, read_dataset
from shards.index import Index
from shards.packing.duplicates import Duplicates
from shards.printable import printable
from shards.store import REQUESTS, BadShards, NoFile, Store, open_store
from shards.threads import ordered_map

CLASSES_SHOWN = 20
REASONS_SHOWN = 20
NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what a data set holds: classes, videos, frames, hours, how it was packed, what was left out and why."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL (s3://, gs://, http://) of the data set."""
    all: bool = False
    """Show all classes, not only the largest and the smallest."""
    json: Path | None = None
    """Write the same as JSON to this file."""


@dataclass(kw_only=True)
class Figures:
    """What a split holds."""

    per_class: np.ndarray  # videos of each class
    videos: int = 0
    shards: int = 0
    size_bytes: int = 0
    frames: int = 0
    captions: int = 0
    durations: Counter[int] = field(default_factory=Counter)  # hundredths of a second: videos that take so long

    def as_dict(self) -> dict[str, Any]:
        return {
            "videos": self.videos,
            "shards": self.shards,
            "bytes": self.size_bytes,
            "frames": self.frames,
            "hours": sum(duration * count for duration, count in self.durations.items()) / 360_000,
            "seconds": dict(zip(("min", "median", "max"), quantiles(self.durations), strict=True)),
            "captions": self.captions,
        }


@dataclass(kw_only=True)
class Reason:
    """Why videos were left out."""

    reason: str  # N stands for numbers that differ
    count: int = 0
    names: list[str] = field(default_factory=list)  # of the first few


def info(job: Info) -> int:
    """Reads the index once, shard by shard, prints and writes what is in it, and gives back the exit status."""
    store = open_store(job.url)
    dataset = read_dataset(store)
    with Duplicates() as groups:
        figures = {
            split: figures_of(Index(job.url, split), groups, number)
            if shards
            else Figures(per_class=no_videos(dataset))
            for number, (split, shards) in enumerate(dataset.splits.items())
        }
        shared = sum(len(set(splits)) > 1 for splits in groups.found())
    refused = reasons(store)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    if dataset.classes:
        console.print(class_table(dataset, figures, job.all))
    console.print(split_table(figures))
    for line in described(dataset, shared):
        console.print(Text(line), soft_wrap=True)
    show_refused(console, dataset, refused)
    videos, hours = (sum(split.as_dict()[name] for split in figures.values()) for name in ("videos", "hours"))
    finish(
        f"{videos:,} videos of {len(dataset.classes):,} classes, {hours:,.2f} hours, "
        f"{sum(split.size_bytes for split in figures.values()) / 1e6:,.1f} MB: {job.url}",
        {
            "url": job.url,
            "format_version": FORMAT_VERSION,
            "digest": dataset.digest,
            "classes": {
                name: {split: int(figures[split].per_class[label]) for split in figures}
                for label, name in enumerate(dataset.classes)
            },
            "splits": {split: split_figures.as_dict() for split, split_figures in figures.items()},
            "packing": asdict(dataset.packing),
            "encoder": dataset.encoder,
            "source": dataset.source,
            "shared_groups": shared,
            "rejected": dataset.rejected,
            "reasons": [asdict(reason) for reason in refused],
        },
        job.json,
    )
    return 0


def no_videos(dataset: DatasetInfo) -> np.ndarray:
    return np.zeros(len(dataset.classes), np.int64)


def figures_of(index: Index, groups: Duplicates, split: int) -> Figures:
    """Counts a split's rows, and adds their groups with the number of the split."""
    figures = Figures(per_class=no_videos(index.info), shards=len(index.shards), videos=len(index))
    figures.size_bytes = sum(shard.size_bytes for shard in index.shards)
    figures.captions = sum(shard.captions for shard in index.shards)
    for rows in ordered_map(index.read_rows, range(len(index.shards)), num_threads=REQUESTS, in_flight=REQUESTS):
        labels, frames, fps = (rows.columns[name] for name in ("label", "num_frames", "fps"))
        figures.per_class += np.bincount(labels[labels >= 0], minlength=len(figures.per_class))
        figures.frames += int(frames.sum())
        lengths, counts = np.unique(np.rint(100 * frames / fps).astype(np.int64), return_counts=True)
        figures.durations.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        groups.add(sorted(set(rows.texts["group"].to_pylist())), split)
    return figures


def quantiles(durations: Counter[int]) -> tuple[float, float, float]:
    """(shortest, median, longest) in seconds; zeros of no videos."""
    if not durations:
        return 0.0, 0.0, 0.0
    lengths = np.array(sorted(durations))
    before = np.cumsum([durations[length] for length in lengths.tolist()])
    middle = lengths[np.searchsorted(before, before[-1] / 2)]
    return float(lengths[0] / 100), float(middle / 100), float(lengths[-1] / 100)


def reasons(store: Store) -> list[Reason]:
    """Why videos were left out, the commonest reason first; reasons that differ in numbers only are one."""
    try:
        lines = store.read_file(REJECTED).splitlines()
    except NoFile:
        return []
    found: dict[str, Reason] = {}
    for number, line in enumerate(lines, start=1):
        try:
            refused = json.loads(line)
            text, name = str(refused["reason"]), str(refused["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadShards(f"{store.url}/{REJECTED}:{number}: not a path and a reason ({error!r})") from None
        pattern = re.sub(r"(?<!\w)\d([\d,.]*\d)?(?!\w)", "N", text)
        reason = found.setdefault(pattern, Reason(reason=text))
        if reason.reason != text:
            reason.reason = pattern
        reason.count += 1
        if len(reason.names) < NAMES_SHOWN:
            reason.names.append(name)
    return sorted(found.values(), key=lambda reason: -reason.count)


# What is shown


def class_table(dataset: DatasetInfo, figures: dict[str, Figures], show_all: bool) -> Table:
    """A row a class, from the largest on; of many classes the ends."""
    totals = sum((split.per_class for split in figures.values()), no_videos(dataset))
    order = np.argsort(-totals, kind="stable").tolist()
    half = CLASSES_SHOWN // 2
    hidden = 0 if show_all or len(order) <= CLASSES_SHOWN else len(order) - CLASSES_SHOWN
    empty = int((totals == 0).sum())
    table = Table(title=f"{len(order):,} classes{f', {empty:,} without a video' * bool(empty)}", title_justify="left")
    table.add_column("class")
    for split in (*figures, "all"):
        table.add_column(split, justify="right")
    for place, label in enumerate(order):
        if hidden and place == half:
            table.add_row(Text(f"... {hidden:,} more (--all)", style="dim"), *["..."] * (len(figures) + 1))
        if not hidden or place < half or place >= len(order) - half:
            counts = [int(split.per_class[label]) for split in figures.values()]
            table.add_row(Text(printable(dataset.classes[label])), *(f"{count:,}" for count in (*counts, sum(counts))))
    return table


def split_table(figures: dict[str, Figures]) -> Table:
    table = Table()
    titles = (
        "split",
        "videos",
        "shards",
        "MB",
        "frames",
        "hours",
        "seconds: shortest",
        "median",
        "longest",
        "captions",
    )
    for title in titles:
        table.add_column(title, justify="left" if title == "split" else "right")
    for name, split in figures.items():
        about = split.as_dict()
        table.add_row(
            name,
            *(f"{about[key]:,}" for key in ("videos", "shards")),
            f"{about['bytes'] / 1e6:,.1f}",
            f"{about['frames']:,}",
            f"{about['hours']:,.2f}",
            *(f"{about['seconds'][key]:,.2f}" for key in ("min", "median", "max")),
            f"{about['captions']:,}",
        )
    return table


def described(dataset: DatasetInfo, shared: int) -> list[str]:
    packing = dataset.packing
    stored = (
        "the videos' own bytes" if packing.copy else f"H.264, a key frame every {packing.gop} frames, crf {packing.crf}"
    )
    flow = f"{packing.flow}, up to {packing.flow_bound:g} pixels" if packing.flow != "none" else "none"
    source = ", ".join(f"{name} {value}" for name, value in dataset.source.items() if value not in (None, "", []))
    return [
        f"frames        {packing.width} x {packing.height}; {stored}",
        f"flow          {flow}",
        *(encoder_lines(dataset.encoder) if dataset.encoder else []),
        f"source        {printable(source)}",
        *([f"shards        {dataset.shards_at}"] if dataset.shards_at else []),
        f"format        version {FORMAT_VERSION}, digest {dataset.digest}",
        f"groups        {shared:,} in more than one split{' (should be 0: scores will be too good)' if shared else ''}",
    ]


def encoder_lines(encoder: Mapping[str, Any]) -> list[str]:
    """What the shards hold instead of videos, and by what it was computed."""
    parts = encoder.get("parts")
    named = [f"{part.get('kind')} of {part.get('source')}" for part in parts] if isinstance(parts, list) else []
    segments, size = encoder["segments"], encoder["size"]
    return [
        f"vectors       of {segments} segments a video at most, {size:,} numbers each; no videos lie here",
        f"encoder       {printable(' + '.join([*named, 'digest ' + encoder['digest']]))}",
    ]


def show_refused(console: Console, dataset: DatasetInfo, refused: Sequence[Reason]) -> None:
    why = "" if refused or not dataset.rejected else f" (no {REJECTED} here that says why)"
    console.print(Text(f"left out      {dataset.rejected:,}{why}"))
    for reason in refused[:REASONS_SHOWN]:
        more = ", ..." if reason.count > len(reason.names) else ""
        console.print(Text(f"  {reason.count:>10,}  {printable(reason.reason)}"), soft_wrap=True)
        console.print(
            Text(f"              {', '.join(map(printable, reason.names))}{more}", style="dim"), soft_wrap=True
        )
    if len(refused) > REASONS_SHOWN:
        console.print(Text(f"              and {len(refused) - REASONS_SHOWN} more reasons, in {REJECTED}"))
