"""Trained models as grurcn.load gives them back: a video, or frames in memory -> classes, captions, features.

F frames of a video, N clips, T frames of a clip, S the model's input size, K classes, X channels of a map.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor, nn

from grurcn.inference.captioner import Caption, VideoCaptioner
from grurcn.inference.classifier import Classifier, Sampling, VideoClips, top_classes
from grurcn.inference.model_input import model_input
from grurcn.inference.model_source import find_model
from grurcn.models.gru_rcn import GRURCN
from shards.frames import to_planes
from shards.packing.sandbox import Sandbox
from shards.reading.clips import evaluation_clips
from shards.video import Limits, Stored

Frames = np.ndarray | Tensor


@dataclass(frozen=True, kw_only=True)
class ClassPrediction:
    """What a video shows."""

    label: str  # the likeliest class
    probability: float
    probabilities: dict[str, float]  # of every class, the likeliest first


class LoadedClassifier:
    """A classification model on a device, in evaluation mode."""

    def __init__(self, classifier: Classifier, limits: Limits | None = None):
        """limits: of time, memory and size within which videos are decoded."""
        self.classifier = classifier
        self.limits = limits or Limits()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, K of them, in the order of their numbers."""
        return self.classifier.classes

    def predict(self, video: str | Path, *, clips: int = 10, views: int = 1) -> ClassPrediction:
        """Classifies a video file by equally spaced clips, as `grurcn predict` does.

        views: 1 centre, 2 and its mirror, 5 centre and corners, 10 all of them mirrored too.

        Raises BadVideo if the file does not decode to its last frame, OSError if it cannot be read.
        """
        classifier = self.classifier.with_sampling(Sampling(clips=clips, views=views))
        return self.prediction(classifier.predict(classifier.read(self.stored(video))).probability)

    def scores(self, frames: Frames, *, clips: int = 10, views: int = 1) -> Tensor:
        """frames (F, H, W, 3) uint8 RGB, in order and at the rate of the training videos -> probabilities (K,) float64.

        Raises ValueError for frames of another shape or type, and for a model of optical flow, which needs a video.
        """
        classifier = self.classifier.with_sampling(Sampling(clips=clips, views=views))
        planes = self.planes(frames)  # (F, ...)
        numbers = evaluation_clips(len(planes), clips, classifier.recipe.clips)  # (N, T)
        return classifier.predict(VideoClips(frames=numbers, planes=planes[torch.from_numpy(numbers)])).probability

    def features(self, video: str | Path, tap: str, *, clips: int = 10) -> Tensor:
        """The trunk's maps at a tap, for equally spaced clips of a video: (N, T, X, height, width) float32, on the CPU.

        Raises ValueError for a tap that the model does not read; otherwise as predict.
        """
        network, classifier = self.classifier.model, self.classifier.with_sampling(Sampling(clips=clips))
        taps = classifier.recipe.model.taps if isinstance(network, GRURCN) else ()
        if not isinstance(network, GRURCN) or tap not in taps:
            raise ValueError(f"tap {tap}: this model reads {', '.join(taps) or 'no taps'}")
        read = classifier.read(self.stored(video))
        maps = []
        with torch.inference_mode():
            for planes in read.planes.split(1):  # clip by clip: maps are large
                maps.append(network.maps(self.clips(planes), self.draw(1))[taps.index(tap)].float().cpu())
        return torch.cat(maps)

    @cached_property
    def module(self) -> "ClipNetwork":
        """The network as a plain torch.nn.Module."""
        return ClipNetwork(self)

    # Steps of the above

    def prediction(self, probability: Tensor) -> ClassPrediction:
        ranked = [(self.classes[number], value) for number, value in top_classes(probability, len(self.classes))]
        return ClassPrediction(label=ranked[0][0], probability=ranked[0][1], probabilities=dict(ranked))

    def stored(self, video: str | Path) -> Stored:
        """The video as the training videos were stored."""
        with Sandbox(self.limits) as sandbox:
            return sandbox.store(Path(video).expanduser(), self.classifier.packing)

    def planes(self, frames: Frames) -> Tensor:
        """frames (F, H, W, 3) uint8 RGB -> planes (F, H' * 3 // 2, W') uint8 of the stored size."""
        array = np.asarray(frames)
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
            raise ValueError(f"frames {array.dtype} {array.shape}: expected uint8 (frames, height, width, 3), RGB")
        if self.classifier.recipe.clips.stream == "flow":
            raise ValueError("this model sees optical flow, which is computed from a video file; call predict(video)")
        packing = self.classifier.packing
        stored = [
            to_planes(av.VideoFrame.from_ndarray(one, format="rgb24"), packing.width, packing.height) for one in array
        ]
        return torch.from_numpy(np.stack(stored))

    def clips(self, planes: Tensor) -> Tensor:
        """planes (B, T, H' * 3 // 2, W') uint8 -> clips (B, T, 3, S, S) float32 of the centre view, on the model's device."""
        classifier, device = self.classifier, self.classifier.device
        [(box, mirror)] = classifier.views(1)
        count = len(planes)
        return model_input(
            planes.to(device),
            torch.full((count,), classifier.packing.flow_bound, device=device),
            torch.tensor([box] * count, device=device),
            torch.tensor([mirror] * count, device=device),
            classifier.recipe.clips,
        )

    def draw(self, count: int) -> Tensor:
        """Random bits for dropout, which is off."""
        return torch.zeros(count, dtype=torch.int64, device=self.classifier.device)


class ClipNetwork(nn.Module):
    """clips (B, T, 3, S, S) float32, as `preprocess` makes them -> probabilities of the classes (B, K) float32."""

    def __init__(self, loaded: LoadedClassifier):
        super().__init__()
        self.network = loaded.classifier.model
        self.loaded = loaded

    def forward(self, clips: Tensor) -> Tensor:
        levels = self.network(clips, self.loaded.draw(len(clips)))  # (B, L, K), log-probabilities
        return levels.float().exp().mean(dim=1)

    def preprocess(self, frames: Frames) -> Tensor:
        """frames (T, H, W, 3) uint8 RGB of one clip -> (1, T, 3, S, S) float32: cropped, resized, normalised, on the device."""
        return self.loaded.clips(self.loaded.planes(frames)[None])


class LoadedCaptioner:
    """A captioning model on a device, in evaluation mode."""

    def __init__(self, captioner: VideoCaptioner, limits: Limits | None = None):
        self.captioner = captioner
        self.limits = limits or Limits()

    @property
    def module(self) -> nn.Module:
        """The network: encoder and decoder (grurcn.models.captioner.Captioner)."""
        return self.captioner.model

    def predict(self, video: str | Path) -> Caption:
        """The likeliest caption of a video file. Raises BadVideo or OSError for one that cannot be read."""
        return self.captions(video)[0]

    def captions(self, video: str | Path) -> list[Caption]:
        """The captions that the beam search keeps, the likeliest first."""
        return self.captioner.predict(self.captioner.read(self.stored(video)))

    def features(self, video: str | Path) -> Tensor:
        """The encoder's vectors of the video's segments (segments, D) float32, on the CPU."""
        read = self.captioner.read(self.stored(video))
        with torch.inference_mode():
            planes = torch.from_numpy(read.planes)[None].to(self.captioner.device)
            vectors = self.captioner.model.vectors(planes)[0].float().cpu()
        return vectors[torch.from_numpy(read.present)]

    def stored(self, video: str | Path) -> Stored:
        with Sandbox(self.limits) as sandbox:
            return sandbox.store(Path(video).expanduser(), self.captioner.packing)


def load_model(
    source: str, device: torch.device | str | None, precision: str, storage: str
) -> LoadedClassifier | LoadedCaptioner:
    """See grurcn.load."""
    model = find_model(source, storage)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if model.training.task == "captioning":
        return LoadedCaptioner(VideoCaptioner.of(model, place, precision, source=source))
    return LoadedClassifier(Classifier.of(model, place, precision, source=source))
