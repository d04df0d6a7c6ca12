"""Say what is to be seen in videos, with a trained captioning model: of files, and of all video files below folders.

    python -m jobs.predict --model runs/caption --caption video.avi
    python -m jobs.predict --model runs:/0f3a... --caption videos/ --captions 3 --attention attention --json captions.json

Prints a line a video: its path, a tab, the sentence; with --captions N a line a caption, its log-probability between them. Videos
are decoded as make_shards decodes them: in helper processes, within limits, to the last frame. One that cannot be read is named
with its reason on the error output in the end, the others are described, and the exit status is 1.

--attention FOLDER gets a picture VIDEO.png of each video: which segments each word looked at.

--json FILE holds a list, for each video {video, caption, captions [{caption, log_prob}], words, attention (a row a word, a number
a segment), seconds (where each segment begins)}.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import av
import numpy as np
import torch
import tyro

from cluster.precision import autocast
from cluster.progress import Bar, duration
from cluster.runs import Model
from cluster.tracking import tracking_uri
from grurcn.beam import beam_search
from grurcn.decoder import END, PADDING
from jobs.attention import Attended, attention_sheet
from jobs.captioning import Trained, captioner_of, segments_of
from jobs.command import Flat, command_line, run_command
from jobs.inspect_preview import write
from jobs.pretrained import read_run
from jobs.preview import Heading
from shards.captions import Segments
from shards.clips import segment_frames
from shards.isolated import VideoPacker
from shards.lists import VIDEO_SUFFIXES, video_files
from shards.scan import shown
from shards.threads import ordered_map
from shards.video import BadVideo, Limits, Packing, read_frames

MOST_READERS = 4  # videos that are decoded side by side
WIDEST_PATH = 60  # up to which sentences are aligned on a terminal


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Options of a prediction."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO|FOLDER")]
    """Video files, and folders whose video files are taken, with those in folders below them, in order of their names."""
    model: str
    """Folder or URL of a captioning run (STORAGE/NAME), whose best model is taken, one of its checkpoints, or runs:/ID."""
    caption: bool = False
    """Describe each video in a sentence; the one thing to ask for so far."""
    beam: int | None = None
    """Captions that the search keeps at each word; 1 takes the likeliest word each time. Default: the recipe's."""
    captions: int = 1
    """How many of them to print for each video, the likeliest first."""
    attention: Path | None = None
    """Draw, into this folder, which segments of each video each word looked at."""
    storage: str = "runs"
    """Folder or URL of all runs: its MLflow database knows the run named runs:/ID, where MLFLOW_TRACKING_URI names no server."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)
    json: Path | None = None
    """Write captions and attention as JSON to this file."""

    def __post_init__(self) -> None:
        if not self.caption:
            raise ValueError(
                "--caption is missing: wanted what to say of the videos, and captions are all there is so far"
            )
        if self.beam is not None and self.beam < 1:
            raise ValueError(f"beam {self.beam}: wanted at least 1 (1 takes the likeliest word each time)")
        if self.captions < 1:
            raise ValueError(f"captions {self.captions}: wanted at least 1")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model sees of a video."""

    planes: np.ndarray  # (K, R, H * 3 // 2, W) uint8, of each segment the frames that its encoder wants
    segments: np.ndarray  # (K,) bool, which of them the video has
    seconds: np.ndarray  # (K,) float, where each begins


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A sentence, and where its words looked."""

    words: tuple[str, ...]  # T
    log_prob: float  # of the whole, its end counted
    attention: np.ndarray  # (T, number of the video's segments)

    @property
    def sentence(self) -> str:
        return " ".join(self.words)


def main(job: Predict) -> int:
    """Finds the videos, reads, describes and prints one after the other; gives back the exit status."""
    started = time.monotonic()
    videos = find_videos(job.videos)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_run(job.model, tracking_uri(job.storage) if job.model.startswith("runs:") else "")
    trained = captioner_of(model, device, job.model)
    beam = job.beam or trained.recipe.beam
    if job.captions > beam:
        raise ValueError(f"captions {job.captions}: the search keeps {beam}; wanted at most so many, or more of --beam")
    pictures = picture_places(videos, job.attention) if job.attention else {}

    rows: list[dict[str, Any]] = []
    refused: dict[Path, str] = {}
    reader = read_all(videos, packing_of(model), segments_of(model.meta["encoder"]), job.limits)
    with Bar("describing", "videos", len(videos), lines=False) as bar, closing(reader):
        for video, seen in zip(videos, reader, strict=True):
            if isinstance(seen, Seen):
                with autocast(job.precision, device):
                    captions = describe(trained, seen, beam, device)
                for line in lines_of(video, captions[: job.captions], videos if bar.terminal else ()):
                    bar.say(line)
                if video in pictures:
                    write(pictures[video], picture_of(video, seen, captions[0]))
                rows.append(as_json(video, seen, captions[: job.captions]))
            else:
                refused[video] = seen
            bar.advance()
    if job.json:
        write(job.json, (json.dumps(rows, indent=1) + "\n").encode())
    tell(job, model, beam, len(rows), refused, time.monotonic() - started)
    return 1 if refused else 0


# Which videos


def find_videos(named: Sequence[Path]) -> list[Path]:
    """The files, and all video files below the folders in order of their names; none twice.

    Raises ValueError where nothing is named, and for a folder without videos.
    """
    found: dict[Path, Path] = {}
    for path in (path.expanduser() for path in named):
        videos = video_files(path) if path.is_dir() else [path]
        if not videos:
            raise ValueError(
                f"{path}: no videos found in this folder and those below it (looked for "
                f"*{{{','.join(sorted(VIDEO_SUFFIXES))}}}); name another, or a file"
            )
        for video in videos:
            found.setdefault(normal(video), video)
    if not found:
        raise ValueError("no videos are named; wanted files, or folders of videos")
    return list(found.values())


def picture_places(videos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """{video: its picture}: named as the videos are below the folder that they have in common. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = os.path.commonpath([normal(video).parent for video in videos])
    return {video: folder / f"{normal(video).relative_to(common)}.png" for video in videos}


def normal(path: Path) -> Path:
    """The path from the root, without "..", links as they are."""
    return Path(os.path.normpath(path.absolute()))


# Reading


def packing_of(model: Model) -> Packing:
    """How the model's training videos were stored; flow, which captions are not learned from, is not computed."""
    return dataclasses.replace(Packing(**model.meta["packing"]), flow="none")


def read_all(
    videos: Sequence[Path], packing: Packing, segments: Segments, limits: Limits
) -> Generator[Seen | str, None, None]:
    """What a model sees of each video, or why that cannot be had; some are read ahead, side by side."""
    readers = min(len(videos), MOST_READERS, os.cpu_count() or 1)
    with ExitStack() as helpers:
        free: SimpleQueue[VideoPacker] = SimpleQueue()
        for _ in range(readers):
            free.put(helpers.enter_context(VideoPacker(limits)))

        def read(video: Path) -> Seen | str:
            packer = free.get()
            try:
                return read_video(video, packer, packing, segments)
            except BadVideo as error:
                return str(error)
            except (FileNotFoundError, PermissionError) as error:
                return f"cannot be read ({error.strerror})"
            finally:
                free.put(packer)

        yield from ordered_map(read, videos, readers, readers)


def read_video(video: Path, packer: VideoPacker, packing: Packing, segments: Segments) -> Seen:
    """A video's segments as a model would read them from a shard: the video is stored first as it would be there.

    Raises BadVideo, and OSError for a file that cannot be read.
    """
    stored = packer.store(video, packing)
    frames, there = segment_frames(stored.num_frames, segments.num_segments, segments.offsets)
    planes = read_frames(stored.data, frames.ravel().tolist(), packing)  # (K * R, H * 3 // 2, W)
    return Seen(
        planes=planes.reshape(*frames.shape, *planes.shape[1:]),
        segments=np.asarray(there),
        seconds=frames[:, 0] / stored.fps,
    )


# Describing


@torch.inference_mode()
def describe(trained: Trained, seen: Seen, beam: int, device: torch.device) -> list[Caption]:
    """The captions that the search keeps for a video, the likeliest first."""
    vectors = trained.model.vectors(torch.from_numpy(seen.planes)[None].to(device))
    segments = torch.from_numpy(seen.segments)[None].to(device)
    found = beam_search(trained.model.decoder, vectors, segments, beam, trained.recipe.max_words + 1)
    attention = found.attention[0, :, :, segments[0]].float().cpu().numpy()  # (beam, T, K)
    captions = []
    for numbers, log_prob, of in zip(found.words[0].tolist(), found.log_prob[0].tolist(), attention, strict=True):
        words = tuple(trained.vocabulary.words[number] for number in numbers if number not in (END, PADDING))
        captions.append(Caption(words=words, log_prob=log_prob, attention=of[: len(words)]))
    return [
        caption for caption in captions if caption.log_prob > -np.inf
    ]  # there may be fewer than the beam has places


# Telling


def lines_of(video: Path, captions: Sequence[Caption], aligned_with: Sequence[Path]) -> list[str]:
    """A line a caption: path, log-probability if there are several, sentence. Between tabs, or in columns as wide as the paths
    that they are aligned with."""
    name, width = on_a_line(str(video)), min(WIDEST_PATH, max((len(str(path)) for path in aligned_with), default=0))
    lines = []
    for caption in captions:
        fields = [on_a_line(caption.sentence)]
        if len(captions) > 1:
            fields.insert(0, f"{caption.log_prob:8.3f}" if width else f"{caption.log_prob:.3f}")
        lines.append("  ".join([f"{name:<{width}}", *fields]) if width else "\t".join([name, *fields]))
    return lines


def on_a_line(text: str) -> str:
    """Whatever stands in a file's name or a caption, without what a terminal would act on."""
    return "".join(map(shown, text))


def picture_of(video: Path, seen: Seen, caption: Caption) -> bytes:
    """The PNG of a caption's attention."""
    there = seen.segments
    attended = Attended(
        words=caption.words,
        attention=caption.attention,
        frames=np.stack([rgb(planes) for planes in seen.planes[there, 0]]),
        seconds=seen.seconds[there],
    )
    heading = Heading(
        title=caption.sentence or "(no word)",
        lines=(
            str(video),
            f"log-probability {caption.log_prob:.3f}",
            "below the first frame of each segment: the share of attention that it has before the word; the less, the darker",
        ),
    )
    return attention_sheet(heading, attended)


def rgb(planes: np.ndarray) -> np.ndarray:
    """Planes (H * 3 // 2, W) -> (H, W, 3) uint8."""
    return av.VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")


def as_json(video: Path, seen: Seen, captions: Sequence[Caption]) -> dict[str, Any]:
    best = captions[0]
    return {
        "video": str(video),
        "caption": best.sentence,
        "captions": [{"caption": caption.sentence, "log_prob": caption.log_prob} for caption in captions],
        "words": list(best.words),
        "attention": best.attention.tolist(),
        "seconds": seen.seconds[seen.segments].tolist(),
    }


def tell(job: Predict, model: Model, beam: int, described: int, refused: Mapping[Path, str], seconds: float) -> None:
    """The last lines, on the error output, so that the other holds captions and nothing else."""
    drawn = f"; attention in {job.attention}" if job.attention and described else ""
    print(
        f"described {described:,} of {described + len(refused):,} videos with the model of {job.model} (step {model.step:,}), "
        f"beam {beam}, in {duration(seconds)}{drawn}",
        file=sys.stderr,
    )
    for video, reason in refused.items():
        print(f"error: {on_a_line(str(video))}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    run_command(lambda: main(command_line(Predict, __doc__ or "")))
