"""A preview of a data set: training clips of some samples as the model will see them, as a page and as a picture."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from grurcn.drawing.clip_frames import RenderedClip, render_clip
from grurcn.drawing.clip_page import clip_page
from grurcn.drawing.contact_sheet import contact_sheet
from grurcn.drawing.text import Heading
from shards.index import Index
from shards.reading.clips import ClipConfig, train_clip
from shards.store import written_file

SHARDS_TRIED = 256  # at most, to find samples of all classes
MOST_SAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class PreviewJob:
    """Draw training clips of some samples as the model will see them: cut out, resized, mirrored, in order.

    Writes a page with the clips in motion, which needs no other file, and a picture with a row of frames for each sample.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL (s3://, gs://, http://) of the data set."""
    split: str = "train"
    """Split to draw samples of."""
    samples: int = 16
    """Number of samples, drawn evenly over the classes."""
    seed: int = 0
    """Decides which samples, and which clip of each: as a recipe's seed does in its first epoch."""
    clips: Annotated[ClipConfig, tyro.conf.arg(name="")] = field(default_factory=ClipConfig)
    out: Path = Path("preview.html")
    """File of the page."""
    png: Path | None = None
    """File of the picture. Default: beside the page, with the same name."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_SAMPLES or self.seed < 0:
            raise ValueError(
                f"--samples {self.samples}, --seed {self.seed}: expected 1 to {MOST_SAMPLES} samples and a seed of at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class PreviewedClip:
    """A clip that was drawn."""

    key: str
    class_name: str
    frames: list[int]
    box: list[int]
    mirror: bool


@dataclass(frozen=True, kw_only=True)
class PreviewResult:
    """The files that were written, and the clips in them."""

    url: str
    split: str
    page: str
    picture: str
    samples: list[PreviewedClip]


def draw_preview(job: PreviewJob) -> PreviewResult:
    """Chooses samples, reads their clips and writes the files. Raises BadShards for what cannot be read."""
    png = job.png or job.out.with_suffix(".png")
    index = Index(job.url, job.split)
    index.check_stream(job.clips.stream)
    clips = [train_clip_of(index, number, job.clips, job.seed) for number in choose(index, job.samples, job.seed)]
    heading = heading_of(index, job, len(clips))
    for path, content in ((png, contact_sheet(heading, clips)), (job.out, clip_page(heading, clips).encode())):
        with written_file(path) as file:
            file.write(content)
    samples = [
        PreviewedClip(
            key=clip.sample.key,
            class_name=clip.class_name,
            frames=clip.clip.frames.tolist(),
            box=list(clip.clip.box),
            mirror=bool(clip.clip.mirror),
        )
        for clip in clips
    ]
    return PreviewResult(url=job.url, split=job.split, page=str(job.out), picture=str(png), samples=samples)


def choose(index: Index, count: int, seed: int) -> list[int]:
    """Numbers of `count` samples, or of all there are, as many of each class as of the others where there are enough.

    If there are many shards, some are tried in the seed's order, until there are samples of enough classes.
    """
    generator = np.random.default_rng(seed)
    num_classes = min(count, max(1, len(index.info.classes)))
    each = -(-count // num_classes)
    found: dict[int, list[int]] = {}
    for shard in generator.permutation(len(index.shards))[:SHARDS_TRIED].tolist():
        labels = index.read_rows(shard).columns["label"]
        for row in generator.permutation(len(labels)).tolist():
            of_class = found.setdefault(int(labels[row]), [])
            if len(of_class) < count:
                of_class.append(int(index.starts[shard]) + row)
        if len(found) >= num_classes and sum(min(len(of_class), each) for of_class in found.values()) >= count:
            break
    classes = generator.permutation(sorted(found)).tolist()
    in_turn = [found[label][place] for place in range(count) for label in classes if place < len(found[label])]
    label_of = {number: label for label in found for number in found[label]}
    return sorted(in_turn[:count], key=lambda number: (label_of[number], number))


def train_clip_of(index: Index, number: int, clips: ClipConfig, seed: int) -> RenderedClip:
    """A sample's training clip of the first epoch."""
    sample, packing = index[number], index.info.packing
    clip = train_clip(sample.num_frames, packing.height, packing.width, clips, seed, 0, sample.number)
    return render_clip(index, sample, clip, clips)


def heading_of(index: Index, job: PreviewJob, count: int) -> Heading:
    clips, packing = job.clips, index.info.packing
    what = f"{clips.num_frames} frames"
    if clips.stride > 1:
        what += f", every {({2: '2nd', 3: '3rd'}).get(clips.stride, f'{clips.stride}th')}"
    if clips.stream == "flow":
        what += f" with {clips.flow_fields} fields of flow each (the first is drawn: its colour is the direction, white is still)"
    return Heading(
        title=f"{job.url}: {job.split}",
        lines=(
            f"{count} of {len(index):,} samples, {len(index.info.classes):,} classes, seed {job.seed}",
            f"{what}, {clips.size} x {clips.size} pixels, cut from {packing.width} x {packing.height}",
        ),
    )
