"""Predicting new videos: files -> classes and probabilities, or captions; in this process or by Ray tasks."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import torch
import tyro

from cluster.checkpoints.run_folder import Model
from cluster.workers.connect import start_ray
from cluster.workers.tasks import has_gpus, run_tasks
from grurcn.drawing.attention import Attention, attention_sheet
from grurcn.drawing.clip_frames import rgb_of
from grurcn.drawing.overlay import write_overlay
from grurcn.drawing.text import Heading
from grurcn.inference.captioner import Caption, VideoCaptioner, VideoSegments
from grurcn.inference.classifier import Classification, Classifier, Sampling, VideoClips, top_classes
from grurcn.inference.model_source import find_model
from grurcn.inference.videos import STANDARD_INPUT, absolute_path, find_videos, read_videos, store
from shards.packing.sandbox import Sandbox
from shards.store import written_file
from shards.video import Limits

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """Which videos to predict with which model, and what to draw."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO|FOLDER|-")]
    """Video files; folders, whose video files are taken at any depth, in order of their names; - for the standard input."""
    model: str
    """Folder or URL of a run (STORAGE/NAME), whose best model is taken, one of its checkpoints, runs:/ID of MLflow, or a
    registered model: models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS."""
    top: int = 5
    """How many of the likeliest classes to list for each video."""
    clips: int = 10
    """Equally spaced clips of each video, whose probabilities are averaged."""
    views: int = 1
    """Views of each clip: 1 centre, 2 and its mirror, 5 centre and corners, 10 all of them mirrored too."""
    clips_at_once: int = 25
    """Clips in their views that the model computes at once; fewer take less memory."""
    overlay: Path | None = None
    """Write the (one) video with the prediction as it develops, as an mp4."""
    heat: bool = False
    """Show in the overlay where the states of the GRUs change most."""
    caption: bool = False
    """Request captions: refuse a classification model."""
    beam: int | None = None
    """Captions that the search keeps at each word; 1 takes the likeliest word each time. Default: the recipe's."""
    captions: int = 1
    """How many captions to list for each video, the likeliest first."""
    attention: Path | None = None
    """Draw into this folder which segments of each video each word of its caption attends to."""
    workers: int = 0
    """Ray tasks among which the videos are divided, on all machines that see their paths; 0: this process alone."""
    storage: str = "runs"
    """Folder or URL of all runs: its MLflow database knows runs:/ and models:/, where MLFLOW_TRACKING_URI names no server."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    limits: Annotated[Limits, Flat] = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.beam is not None and self.beam < 1:
            raise ValueError(f"beam {self.beam}: expected at least 1 (1 takes the likeliest word each time)")
        for name in ("captions", "top", "clips", "clips_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: expected at least 0 (0: this process alone)")
        if self.heat and not self.overlay:
            raise ValueError("--heat is drawn in the overlay; add --overlay FILE.mp4")


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """A class and its probability."""

    name: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.name, "probability": self.probability}


@dataclass(frozen=True, kw_only=True)
class ClassPrediction:
    """The likeliest classes of a video."""

    video: Path
    classes: tuple[ClassProbability, ...]  # the likeliest first
    levels: Mapping[str, ClassProbability]  # the likeliest class of each level

    def to_dict(self) -> dict[str, Any]:
        """As --json holds it."""
        return {
            "video": str(self.video),
            **self.classes[0].to_dict(),
            "classes": [each.to_dict() for each in self.classes],
            "levels": {name: each.to_dict() for name, each in self.levels.items()},
        }


@dataclass(frozen=True, kw_only=True)
class CaptionPrediction:
    """The likeliest captions of a video."""

    video: Path
    captions: tuple[Caption, ...]  # the likeliest first
    seconds: np.ndarray  # where each segment begins
    picture: bytes | None = None  # a PNG of the attention, if requested

    def to_dict(self) -> dict[str, Any]:
        """As --json holds it. Words and attention are those of the likeliest caption."""
        best = self.captions[0]
        return {
            "video": str(self.video),
            "caption": best.sentence,
            "captions": [{"caption": each.sentence, "log_prob": each.log_prob} for each in self.captions],
            "words": list(best.words),
            "attention": best.attention.tolist(),
            "seconds": self.seconds.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class UnreadableVideo:
    """A video that was not predicted."""

    video: Path
    reason: str


Prediction = ClassPrediction | CaptionPrediction


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of some videos, in their order."""

    step: int  # of the model
    predictions: list[Prediction]
    unreadable: list[UnreadableVideo]


# What both have: `packing`, how videos are stored before they are read; `read`, a stored video -> what the model sees of it;
# `predict`, that -> the model's result.
Predictor = Classifier | VideoCaptioner


def predict(job: PredictJob, listener: Callable[[Prediction | UnreadableVideo], None] = lambda _: None) -> Predictions:
    """Predicts the job's videos; `listener` gets each prediction as it comes. Writes the pictures and the overlay.

    Raises ValueError for options that do not fit the videos or the model, OtherTask if captions of a classification model are
    requested, NoTracking if MLflow does not answer.
    """
    videos = find_videos(job.videos)
    check_videos(job, videos)
    model = find_model(job.model, job.storage)
    predictor = predictor_of(job, model)  # raises what it cannot do, also where tasks will do it
    pictures = picture_paths(videos, job.attention) if job.attention else {}
    result = Predictions(step=model.step, predictions=[], unreadable=[])
    found = predict_on_ray(job, model, videos) if job.workers else predict_here(job, predictor, videos)
    with closing(found):
        for video, prediction in zip(videos, found, strict=True):
            if isinstance(prediction, UnreadableVideo):
                result.unreadable.append(prediction)
            else:
                result.predictions.append(prediction)
            if isinstance(prediction, CaptionPrediction) and prediction.picture:
                write_picture(pictures[video], prediction.picture)
            listener(prediction)
    if job.overlay and isinstance(predictor, Classifier) and not result.unreadable:
        with Sandbox(job.limits) as packer:
            stored = store(videos[0], packer, predictor.packing)
        write_overlay(predictor, stored, job.overlay, heat=job.heat)
    return result


def check_videos(job: PredictJob, videos: Sequence[Path]) -> None:
    """Raises ValueError for options that do not fit the videos."""
    if job.overlay and (len(videos) != 1 or videos[0] == STANDARD_INPUT):
        raise ValueError(
            f"--overlay draws one video file; found {len(videos)} videos{' (-)' * (len(videos) == 1)}; name one"
        )
    if STANDARD_INPUT in videos and job.workers:
        raise ValueError("-: other machines do not have this one's standard input; use --workers 0, or name a file")


def predictor_of(job: PredictJob, model: Model) -> Predictor:
    """The model on this machine's device. Raises OtherTask or ValueError if it cannot do what the job requests."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model.training.task == "classification" and not job.caption:
        sampling = Sampling(clips=job.clips, views=job.views, clips_at_once=job.clips_at_once)
        return Classifier.of(model, device, job.precision, job.model).with_sampling(sampling)
    captioner = VideoCaptioner.of(model, device, job.precision, job.beam, job.model)
    if job.captions > captioner.beam:
        raise ValueError(
            f"captions {job.captions}: the search keeps {captioner.beam}; request at most so many, or set a larger --beam"
        )
    return captioner


def predict_here(
    job: PredictJob, predictor: Predictor, videos: Sequence[Path]
) -> Generator[Prediction | UnreadableVideo, None, None]:
    """The prediction of each video, in order, in this process."""
    reader = read_videos(videos, predictor.packing, job.limits, predictor.read)
    with closing(reader):
        for video, seen in zip(videos, reader, strict=True):
            match predictor, seen:
                case _, str(reason):
                    yield UnreadableVideo(video=video, reason=reason)
                case Classifier(), VideoClips():
                    yield class_prediction(job, predictor, video, predictor.predict(seen))
                case VideoCaptioner(), VideoSegments():
                    yield caption_prediction(job, video, seen, predictor.predict(seen))


def predict_on_ray(
    job: PredictJob, model: Model, videos: Sequence[Path]
) -> Generator[Prediction | UnreadableVideo, None, None]:
    """The same by Ray tasks, each of which takes every Nth video."""
    start_ray()
    stored = ray.put(model)  # sent once to each machine
    paths = [absolute_path(video) for video in videos]
    count = min(job.workers, len(paths))
    tasks = [(job, stored, list(enumerate(paths))[first::count]) for first in range(count)]
    waiting: dict[int, Prediction | UnreadableVideo] = {}
    following = 0
    for number, prediction in run_tasks(predict_task, tasks, count, num_gpus=int(has_gpus())):
        waiting[number] = prediction
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def predict_task(
    job: PredictJob, model: Model, videos: list[tuple[int, Path]]
) -> Iterator[tuple[int, Prediction | UnreadableVideo]]:
    """A task's videos with their numbers -> (number, prediction)."""
    predictions = predict_here(job, predictor_of(job, model), [video for _, video in videos])
    yield from zip((number for number, _ in videos), predictions, strict=True)


def class_prediction(job: PredictJob, classifier: Classifier, video: Path, found: Classification) -> ClassPrediction:
    """The likeliest classes of a video, and of each level."""
    classes = classifier.classes
    top = top_classes(found.probability, job.top)
    levels = {}
    for name, probability in zip(classifier.levels, found.levels.mean(dim=0), strict=True):
        number = int(probability.argmax())
        levels[name] = ClassProbability(name=classes[number], probability=float(probability[number]))
    return ClassPrediction(
        video=video,
        classes=tuple(ClassProbability(name=classes[number], probability=value) for number, value in top),
        levels=levels,
    )


def caption_prediction(
    job: PredictJob, video: Path, segments: VideoSegments, captions: Sequence[Caption]
) -> CaptionPrediction:
    """The likeliest captions of a video, with the picture that the job requests."""
    return CaptionPrediction(
        video=video,
        captions=tuple(captions[: job.captions]),
        seconds=segments.seconds[segments.present],
        picture=attention_picture(video, segments, captions[0]) if job.attention else None,
    )


def attention_picture(video: Path, segments: VideoSegments, caption: Caption) -> bytes:
    """A PNG of the attention of a caption's words."""
    present = segments.present
    attention = Attention(
        words=caption.words,
        weights=caption.attention,
        frames=np.stack([rgb_of(planes) for planes in segments.planes[present, 0]]),
        seconds=segments.seconds[present],
    )
    heading = Heading(
        title=caption.sentence or "(no word)",
        lines=(
            str(video),
            f"log-probability {caption.log_prob:.3f}",
            "the first frame of each segment, the darker the less a word attends to it; below, the attention in percent",
        ),
    )
    return attention_sheet(heading, attention)


def picture_paths(videos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """{video: its picture}, named as the videos are below the folder that they have in common. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = os.path.commonpath([absolute_path(video).parent for video in videos])
    return {video: folder / f"{absolute_path(video).relative_to(common)}.png" for video in videos}


def write_picture(path: Path, content: bytes) -> None:
    with written_file(path) as file:
        file.write(content)
