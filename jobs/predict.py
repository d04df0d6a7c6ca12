"""Say what is to be seen in videos, with a trained model: the likeliest classes, or a sentence.

    python -m jobs.predict --model runs/gru-rcn video.avi
    python -m jobs.predict --model models:/actions/1 videos/ --workers 8 --json found.json
    python -m jobs.predict --model runs/gru-rcn video.avi --overlay seen.mp4 --heat
    python -m jobs.predict --model runs:/0f3a... --captions 3 --attention attention videos/
    curl https://example.org/video.mp4 | python -m jobs.predict --model runs/gru-rcn -

Takes video files, folders, of which all video files are taken, and - for a video on the standard input. Videos are decoded as
make_shards decodes them: in helper processes, within limits, to the last frame. One that cannot be read is named with its
reason on the error output in the end, the others are answered, and the exit status is 1.

On a terminal each video is followed by its classes and their probabilities; elsewhere it is a line: its path, and then class and
probability in turn, between tabs. Of a captioning model a line a caption: path, log-probability if --captions asks for several,
sentence.

--overlay FILE.mp4 writes the video with the prediction as it develops and each level's vote over time; --heat also shows where
the states change most. --attention FOLDER gets a picture VIDEO.png of each video: which segments each word looked at.

--json FILE holds a list, for each video {video, class, probability, classes [{class, probability}], levels {level: {class,
probability}}}; of a captioning model {video, caption, captions [{caption, log_prob}], words, attention (a row a word, a number a
segment), seconds (where each segment begins)}.
"""

import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import ray
import torch
import tyro

from cluster.checkpoints.run_folder import Model
from cluster.progress import Bar, duration
from cluster.tracking.server import tracking_uri
from cluster.workers.connect import start_ray
from cluster.workers.tasks import has_gpus, run_tasks
from grurcn.drawing.overlay import overlay
from grurcn.inference.captioner import Describer, Seen, picture_of, row_of
from grurcn.inference.classifier import Recognised, Recogniser
from grurcn.inference.videos import STANDARD_INPUT, find_videos, normal, read_videos, store
from grurcn.training.pretrained import MLFLOW, read_run
from jobs.command import Command, Flat
from shards.packing.sandbox import Sandbox
from shards.printable import printable
from shards.reading.clips import evaluation_clips
from shards.store import written_file
from shards.video import Limits, Packing, Stored

WIDEST_PATH = 60  # up to which sentences are aligned on a terminal
BAR_WIDTH = 30  # letters, of a class that is certain


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Options of a prediction."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO|FOLDER|-")]
    """Video files, folders whose video files are taken, with those in folders below them, in order of their names, and - for
    the standard input."""
    model: str
    """Folder or URL of a run (STORAGE/NAME), whose best model is taken, one of its checkpoints, runs:/ID of MLflow, or a
    registered model: models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS."""
    top: int = 5
    """Classes that are told of each video."""
    clips: int = 10
    """Equally spaced clips of each video, whose probabilities are averaged."""
    views: int = 1
    """Views of each clip: 1 centre, 2 and its mirror, 5 centre and corners, 10 all of them mirrored too."""
    clips_at_once: int = 25
    """Clips in their views that the model computes at once; fewer take less memory."""
    overlay: Path | None = None
    """Write the (one) video with the prediction as it develops, as an mp4."""
    heat: bool = False
    """In the overlay: where the states of the GRUs change most."""
    caption: bool = False
    """Wanted are sentences: refuse a model that knows classes only."""
    beam: int | None = None
    """Captions that the search keeps at each word; 1 takes the likeliest word each time. Default: the recipe's."""
    captions: int = 1
    """How many captions to print for each video, the likeliest first."""
    attention: Path | None = None
    """Draw, into this folder, which segments of each video each word of its caption looked at."""
    workers: int = 0
    """Ray tasks that share the videos, on all machines that see their paths; 0: this process alone."""
    storage: str = "runs"
    """Folder or URL of all runs: its MLflow database knows runs:/ and models:/, where MLFLOW_TRACKING_URI names no server."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)
    json: Path | None = None
    """Write what was found as JSON to this file."""

    def __post_init__(self) -> None:
        if self.beam is not None and self.beam < 1:
            raise ValueError(f"beam {self.beam}: wanted at least 1 (1 takes the likeliest word each time)")
        for name in ("captions", "top", "clips", "clips_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: wanted at least 1")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: wanted at least 0 (0: this process alone)")
        if self.heat and not self.overlay:
            raise ValueError("--heat is drawn in the overlay; wanted --overlay FILE.mp4 too")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found of a video."""

    row: dict[str, Any]  # as --json holds it
    picture: bytes | None = None


class Asked(Protocol):
    """What a model is asked of videos."""

    packing: Packing

    def read(self, stored: Stored) -> Any:
        """What the model sees of a stored video; several threads call it. Raises BadVideo."""
        ...

    def answer(self, video: Path, seen: Any) -> Answer: ...


class Classes:
    """Which class a video belongs to."""

    def __init__(self, job: Predict, model: Model, device: torch.device):
        self.job, self.recogniser = job, Recogniser.of(model, device, job.precision)
        self.packing, self.views = self.recogniser.packing, self.recogniser.views(job.views)

    def read(self, stored: Stored) -> tuple[Any, torch.Tensor]:
        frames = evaluation_clips(stored.num_frames, self.job.clips, self.recogniser.recipe.clips)
        return frames, self.recogniser.read(stored, frames)

    def answer(self, video: Path, seen: tuple[Any, torch.Tensor]) -> Answer:
        frames, planes = seen
        found = self.recogniser.judge(frames, planes, self.views, self.job.clips_at_once)
        return Answer(row={"video": str(video), **self.row(found)})

    def row(self, found: Recognised) -> dict[str, Any]:
        classes = self.recogniser.classes
        top = [{"class": classes[number], "probability": value} for number, value in found.top(self.job.top)]
        levels = {}
        for name, of_level in zip(self.recogniser.levels, found.levels.mean(dim=0), strict=True):
            number = int(of_level.argmax())
            levels[name] = {"class": classes[number], "probability": float(of_level[number])}
        return {**top[0], "classes": top, "levels": levels}


class Sentences:
    """What a video shows, in words."""

    def __init__(self, job: Predict, model: Model, device: torch.device):
        self.job, self.describer = job, Describer(model, job.model, device, job.precision, job.beam)
        self.packing = self.describer.packing
        if job.captions > self.describer.beam:
            raise ValueError(
                f"captions {job.captions}: the search keeps {self.describer.beam}; wanted at most so many, or more of --beam"
            )

    def read(self, stored: Stored) -> Seen:
        return self.describer.read(stored)

    def answer(self, video: Path, seen: Seen) -> Answer:
        captions = self.describer.describe(seen)
        return Answer(
            row={"video": str(video), **row_of(seen, captions[: self.job.captions])},
            picture=picture_of(video, seen, captions[0]) if self.job.attention else None,
        )


def main(job: Predict) -> int:
    """Looks at the videos, prints and writes what was found; gives back the exit status."""
    started = time.monotonic()
    found = look(job, print_lines=True)
    if job.json:
        with written_file(job.json) as file:
            file.write((json.dumps(found.rows, indent=1) + "\n").encode())
    tell(job, found, time.monotonic() - started)
    return 1 if found.refused else 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found of some videos."""

    step: int  # of the model
    rows: list[dict[str, Any]]  # a video, as --json holds it
    refused: dict[Path, str]  # why a video was not looked at


def look(job: Predict, print_lines: bool = False) -> Found:
    """Finds the videos, reads and answers one after the other, and draws what is to be drawn."""
    videos = find_videos(job.videos)
    check(job, videos)
    model = read_run(job.model, tracking_uri(job.storage) if job.model.startswith(MLFLOW) else "")
    asked = ask(job, model, device_here())  # refuses what cannot be asked, also where tasks will ask
    pictures = picture_places(videos, job.attention) if job.attention else {}
    found = Found(step=model.step, rows=[], refused={})
    answers = on_ray(job, model, videos) if job.workers else answered(job, asked, videos)
    with Bar("looking", "videos", len(videos), lines=job.workers > 0) as bar, closing(answers):
        for video, answer in zip(videos, answers, strict=True):
            if isinstance(answer, Answer):
                for line in lines_of(answer.row, videos if bar.terminal else ()) if print_lines else ():
                    bar.print_line(line)
                if answer.picture:
                    with written_file(pictures[video]) as file:
                        file.write(answer.picture)
                found.rows.append(answer.row)
            else:
                found.refused[video] = answer
            bar.advance()
    if job.overlay and isinstance(asked, Classes) and not found.refused:
        draw_overlay(job, asked, videos[0])
    return found


def check(job: Predict, videos: Sequence[Path]) -> None:
    """Raises ValueError for options that do not fit the videos."""
    if job.overlay and (len(videos) != 1 or videos[0] == STANDARD_INPUT):
        raise ValueError(
            f"--overlay draws one video file; found {len(videos)} videos{' (-)' * (len(videos) == 1)}; name one"
        )
    if STANDARD_INPUT in videos and job.workers:
        raise ValueError("-: other machines do not have this one's standard input; wanted --workers 0, or a file")


def ask(job: Predict, model: Model, device: torch.device) -> Asked:
    """What the model can be asked. Raises OtherTask or ValueError where that is not what the job asks."""
    if job.caption or "classes" not in model.meta:
        return Sentences(job, model, device)
    return Classes(job, model, device)


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Where the work is done


def answered(job: Predict, asked: Asked, videos: Sequence[Path]) -> Generator[Answer | str, None, None]:
    """The answer to each video, in order, or why there is none; in this process."""
    reader = read_videos(videos, asked.packing, job.limits, asked.read)
    with closing(reader):
        for video, seen in zip(videos, reader, strict=True):
            yield seen if isinstance(seen, str) else asked.answer(video, seen)


def on_ray(job: Predict, model: Model, videos: Sequence[Path]) -> Generator[Answer | str, None, None]:
    """The same by Ray tasks, each of which takes every so-manieth video; in order."""
    start_ray()
    shared = ray.put(model)  # once to each machine
    paths = [normal(video) for video in videos]
    count = min(job.workers, len(paths))
    tasks = [(job, shared, list(enumerate(paths))[first::count]) for first in range(count)]
    waiting: dict[int, Answer | str] = {}
    following = 0
    for number, answer in run_tasks(answer_task, tasks, count, num_gpus=int(has_gpus())):
        waiting[number] = answer
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def answer_task(job: Predict, model: Model, videos: list[tuple[int, Path]]) -> Iterator[tuple[int, Answer | str]]:
    """A task's videos with their numbers -> (number, its answer)."""
    asked = ask(job, model, device_here())
    answers = answered(job, asked, [video for _, video in videos])
    yield from zip((number for number, _ in videos), answers, strict=True)


def draw_overlay(job: Predict, asked: Classes, video: Path) -> None:
    assert job.overlay is not None
    with Sandbox(job.limits) as packer:
        stored = store(video, packer, asked.packing)
    overlay(asked.recogniser, stored, job.overlay, heat=job.heat)


# Telling


def picture_places(videos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """{video: its picture}: named as the videos are below the folder that they have in common. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = os.path.commonpath([normal(video).parent for video in videos])
    return {video: folder / f"{normal(video).relative_to(common)}.png" for video in videos}


def lines_of(row: Mapping[str, Any], aligned_with: Sequence[Path]) -> list[str]:
    """What is printed of a video; for a terminal in columns, as wide as the paths that they are aligned with."""
    return class_lines(row, bool(aligned_with)) if "classes" in row else caption_lines(row, aligned_with)


def class_lines(row: Mapping[str, Any], is_table: bool) -> list[str]:
    """A line between tabs: path, and class and probability in turn; or a line a class below the path, with a bar."""
    name, found = on_a_line(row["video"]), [(on_a_line(each["class"]), each["probability"]) for each in row["classes"]]
    if not is_table:
        return ["\t".join([name, *(field for label, value in found for field in (label, f"{value:.4f}"))])]
    width = max(len(label) for label, _ in found)
    return [
        name,
        *(f"  {value:6.3f}  {label:<{width}}  {'█' * round(BAR_WIDTH * value)}".rstrip() for label, value in found),
    ]


def caption_lines(row: Mapping[str, Any], aligned_with: Sequence[Path]) -> list[str]:
    """A line a caption: path, log-probability if there are several, sentence."""
    name = on_a_line(row["video"])
    width = min(WIDEST_PATH, max((len(str(path)) for path in aligned_with), default=0))
    lines = []
    for caption in row["captions"]:
        fields = [on_a_line(caption["caption"])]
        if len(row["captions"]) > 1:
            fields.insert(0, f"{caption['log_prob']:8.3f}" if width else f"{caption['log_prob']:.3f}")
        lines.append("  ".join([f"{name:<{width}}", *fields]) if width else "\t".join([name, *fields]))
    return lines


def on_a_line(text: str) -> str:
    """Whatever stands in a file's name, a class or a caption, without what a terminal would act on."""
    return "".join(map(printable, text))


def tell(job: Predict, found: Found, seconds: float) -> None:
    """The last lines, on the error output, so that the other holds answers and nothing else."""
    looked_at, named = len(found.rows), len(found.rows) + len(found.refused)
    drawn = "".join(f"; {place} written" for place in (job.overlay, job.attention) if place and looked_at)
    print(
        f"looked at {looked_at:,} of {named:,} videos with the model of {job.model} (step {found.step:,}) "
        f"in {duration(seconds)}{drawn}",
        file=sys.stderr,
    )
    for video, reason in found.refused.items():
        print(f"error: {on_a_line(str(video))}: {reason}", file=sys.stderr)


COMMAND = Command(Predict, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
