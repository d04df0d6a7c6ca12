"""jobs.inspect_shards preview: clips of a split as a model will see them, for a person to look at."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from grurcn.drawing.clip_frames import show
from grurcn.drawing.contact_sheet import Heading, Shown, contact_sheet, page
from jobs.command import Flat, finish
from shards.index import Index
from shards.reading.clips import ClipConfig, train_clip

SHARDS_LOOKED_AT = 256  # at most, for samples of all classes
MOST_SAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw training clips of some samples as the model will see them: cut out, resized, mirrored, in order.

    Writes a page with the clips in motion, which needs nothing but itself, and a picture with a row of frames a sample.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL (s3://, gs://, http://) of the data set."""
    split: str = "train"
    """Whose samples."""
    samples: int = 16
    """How many, drawn evenly over the classes."""
    seed: int = 0
    """Decides which samples, and which clip of each, as the seed of a recipe does in its first epoch."""
    clips: Annotated[ClipConfig, Flat] = field(default_factory=ClipConfig)
    out: Path = Path("preview.html")
    """The page."""
    png: Path | None = None
    """The picture. Default: beside the page, with the same name."""
    json: Path | None = None
    """Write what was drawn as JSON to this file."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_SAMPLES or self.seed < 0:
            raise ValueError(
                f"--samples {self.samples}, --seed {self.seed}: wanted 1 to {MOST_SAMPLES} samples and a seed of at least 0"
            )


def preview(job: Preview) -> int:
    """Chooses, reads, draws; gives back the exit status."""
    png = job.png or job.out.with_suffix(".png")
    index = Index(job.url, job.split)
    index.check_stream(job.clips.stream)
    clips = [train_clip_of(index, number, job.clips, job.seed) for number in choose(index, job.samples, job.seed)]
    heading = heading_of(index, job, len(clips))
    write(png, contact_sheet(heading, clips))
    write(job.out, page(heading, clips).encode())
    finish(
        f"drew {len(clips)} clips of {len({clip.sample.label for clip in clips})} classes: {job.out} (in motion), {png}",
        {
            "url": job.url,
            "split": job.split,
            "page": str(job.out),
            "picture": str(png),
            "samples": [as_json(clip) for clip in clips],
        },
        job.json,
    )
    return 0


def choose(index: Index, count: int, seed: int) -> list[int]:
    """Numbers of `count` samples, or of all there are, as many of each class as the others where it has so many.

    Of many shards some are looked at, in the seed's order, until there are samples of enough classes.
    """
    generator = np.random.default_rng(seed)
    wanted = min(count, max(1, len(index.info.classes)))
    each = -(-count // wanted)
    found: dict[int, list[int]] = {}
    for shard in generator.permutation(len(index.shards))[:SHARDS_LOOKED_AT].tolist():
        labels = index.read_rows(shard).columns["label"]
        for row in generator.permutation(len(labels)).tolist():
            of_class = found.setdefault(int(labels[row]), [])
            if len(of_class) < count:
                of_class.append(int(index.starts[shard]) + row)
        if len(found) >= wanted and sum(min(len(of_class), each) for of_class in found.values()) >= count:
            break
    classes = generator.permutation(sorted(found)).tolist()
    in_turn = [found[label][place] for place in range(count) for label in classes if place < len(found[label])]
    label_of = {number: label for label in found for number in found[label]}
    return sorted(in_turn[:count], key=lambda number: (label_of[number], number))


def train_clip_of(index: Index, number: int, clips: ClipConfig, seed: int) -> Shown:
    """A sample's training clip of the first epoch."""
    sample, packing = index[number], index.info.packing
    clip = train_clip(sample.num_frames, packing.height, packing.width, clips, seed, 0, sample.number)
    return show(index, sample, clip, clips)


def heading_of(index: Index, job: Preview, count: int) -> Heading:
    clips, packing = job.clips, index.info.packing
    what = (
        f"{clips.num_frames} frames, every {ordinal(clips.stride)}"
        if clips.stride > 1
        else f"{clips.num_frames} frames"
    )
    if clips.stream == "flow":
        what += f" with {clips.flow_fields} fields of flow each (the first is drawn: its colour is the direction, white is still)"
    return Heading(
        title=f"{job.url}: {job.split}",
        lines=(
            f"{count} of {len(index):,} samples, {len(index.info.classes):,} classes, seed {job.seed}",
            f"{what}, {clips.size} x {clips.size} pixels, cut from {packing.width} x {packing.height}",
        ),
    )


def ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def as_json(shown: Shown) -> dict[str, Any]:
    return {
        "key": shown.sample.key,
        "class": shown.class_name,
        "frames": shown.clip.frames.tolist(),
        "box": list(shown.clip.box),
        "mirror": bool(shown.clip.mirror),
    }


def write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
