"""jobs.inspect_shards info: what a data set holds."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command import finish
from shards.dataset import FORMAT_VERSION, REJECTED
from shards.printable import printable
from shards.summary import DatasetSummary, SplitSummary, summarize_dataset

CLASSES_SHOWN = 20
REASONS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show what a data set holds: classes, videos, frames, hours, how it was packed, what was left out and why."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL (s3://, gs://, http://) of the data set."""
    all: bool = False
    """Show all classes, not only the largest and the smallest."""
    json: Path | None = None
    """Write the same as JSON to this file."""


def print_info(job: Info) -> int:
    """Prints tables and lines; returns the exit status."""
    summary = summarize_dataset(job.url)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    if summary.info.classes:
        console.print(class_table(summary, job.all))
    console.print(split_table(summary.splits))
    for line in [*lines_of(summary), *rejection_lines(summary)]:
        console.print(Text(line), soft_wrap=True)
    videos, hours, size = (
        sum(getattr(split, name) for split in summary.splits.values()) for name in ("videos", "hours", "bytes")
    )
    finish(
        f"{videos:,} videos of {len(summary.info.classes):,} classes, {hours:,.2f} hours, {size / 1e6:,.1f} MB: {job.url}",
        summary.to_json(),
        job.json,
    )
    return 0


def class_table(summary: DatasetSummary, show_all: bool) -> Table:
    """A row for each class, the largest first; of many classes only both ends."""
    counts = np.array([split.per_class for split in summary.splits.values()]).T  # (classes, splits)
    order = np.argsort(-counts.sum(axis=1), kind="stable").tolist()
    half = CLASSES_SHOWN // 2
    hidden = 0 if show_all or len(order) <= CLASSES_SHOWN else len(order) - CLASSES_SHOWN
    empty = int((counts.sum(axis=1) == 0).sum())
    table = Table(title=f"{len(order):,} classes{f', {empty:,} without a video' * bool(empty)}", title_justify="left")
    table.add_column("class")
    for split in (*summary.splits, "all"):
        table.add_column(split, justify="right")
    for place, label in enumerate(order):
        if hidden and place == half:
            table.add_row(Text(f"... {hidden:,} more (--all)", style="dim"), *["..."] * (len(summary.splits) + 1))
        if not hidden or place < half or place >= len(order) - half:
            row = counts[label].tolist()
            table.add_row(Text(printable(summary.info.classes[label])), *(f"{count:,}" for count in (*row, sum(row))))
    return table


def split_table(splits: Mapping[str, SplitSummary]) -> Table:
    table = Table()
    titles = ("videos", "shards", "MB", "frames", "hours", "seconds: shortest", "median", "longest", "captions")
    for title in ("split", *titles):
        table.add_column(title, justify="left" if title == "split" else "right")
    for name, split in splits.items():
        table.add_row(
            name,
            f"{split.videos:,}",
            f"{split.shards:,}",
            f"{split.bytes / 1e6:,.1f}",
            f"{split.frames:,}",
            f"{split.hours:,.2f}",
            *(f"{split.seconds[key]:,.2f}" for key in ("min", "median", "max")),
            f"{split.captions:,}",
        )
    return table


def lines_of(summary: DatasetSummary) -> list[str]:
    """How the data set was made."""
    info, packing, shared = summary.info, summary.info.packing, summary.shared_groups
    stored = (
        "the videos' own bytes" if packing.copy else f"H.264, a key frame every {packing.gop} frames, crf {packing.crf}"
    )
    flow = f"{packing.flow}, up to {packing.flow_bound:g} pixels" if packing.flow != "none" else "none"
    source = ", ".join(f"{name} {value}" for name, value in info.source.items() if value not in (None, "", []))
    return [
        f"frames        {packing.width} x {packing.height}; {stored}",
        f"flow          {flow}",
        *(encoder_lines(info.encoder) if info.encoder else []),
        f"source        {printable(source)}",
        *([f"shards        {info.shards_at}"] if info.shards_at else []),
        f"format        version {FORMAT_VERSION}, digest {info.digest}",
        f"groups        {shared:,} in more than one split{' (should be 0: scores will be too good)' if shared else ''}",
    ]


def encoder_lines(encoder: Mapping[str, Any]) -> list[str]:
    """What the shards hold instead of videos, and what computed it."""
    parts = encoder.get("parts")
    named = [f"{part.get('kind')} of {part.get('source')}" for part in parts] if isinstance(parts, list) else []
    segments, size = encoder["segments"], encoder["size"]
    return [
        f"vectors       of at most {segments} segments a video, {size:,} numbers each; there are no videos here",
        f"encoder       {printable(' + '.join([*named, 'digest ' + encoder['digest']]))}",
    ]


def rejection_lines(summary: DatasetSummary) -> list[str]:
    """What was left out, and why."""
    rejected, rejections = summary.info.rejected, summary.rejections
    lines = [
        f"left out      {rejected:,}{'' if rejections or not rejected else f' (no {REJECTED} here that says why)'}"
    ]
    for rejection in rejections[:REASONS_SHOWN]:
        more = ", ..." if rejection.count > len(rejection.names) else ""
        lines += [
            f"  {rejection.count:>10,}  {printable(rejection.reason)}",
            f"              {', '.join(map(printable, rejection.names))}{more}",
        ]
    if len(rejections) > REASONS_SHOWN:
        lines.append(f"              and {len(rejections) - REASONS_SHOWN} more reasons, in {REJECTED}")
    return lines
