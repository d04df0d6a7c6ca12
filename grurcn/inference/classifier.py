"""A trained classifier: stored video -> clips in views -> each level's probabilities.

It imports no ray, deepspeed or mlflow, so that a model can be served where there are none.

N clips, F stored frames (or fields of flow) of a clip, V views, L levels, K classes.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoints.run_folder import Model
from cluster.checkpoints.state import Training
from cluster.precision import autocast
from grurcn.inference.meta import check_task, packing_of
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.training.recipes import Recipe
from shards.reading.clips import Box, evaluation_clips, evaluation_views
from shards.reading.decode import read_flow, read_frames
from shards.video import Packing, Stored

View = tuple[Box, bool]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which clips of a video a classifier sees, and in which views; their probabilities are averaged."""

    clips: int = 10  # equally spaced
    views: int = 1  # see shards.reading.clips.evaluation_views
    clips_at_once: int = 25  # clips in their views that are computed together


@dataclass(frozen=True, kw_only=True)
class VideoClips:
    """The clips of a video."""

    frames: np.ndarray  # (N, F) numbers of the stored frames, or fields, of each clip
    planes: Tensor  # (N, F, ...) uint8, as in a ClipBatch


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A video's probabilities."""

    frames: np.ndarray  # (N, F) numbers of the stored frames, or fields, of each clip
    levels: Tensor  # (N, L, K) float64, each clip's probabilities by each level, the mean over its views

    @property
    def probability(self) -> Tensor:
        """(K,): the mean over clips, views and levels (paper section 5.1)."""
        return self.levels.mean(dim=(0, 1))


class Classifier:
    """A model on a device, in evaluation mode."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        training: Training,
        device: torch.device,
        precision: str = "auto",
        source: str = "this model",
    ):
        """weights, training: of a run's model (run_folder.Model). source: its name. Raises OtherTask for a captioning model."""
        check_task(training, "classification", source)
        self.classes: tuple[str, ...] = tuple(training.model["classes"])
        self.recipe = Recipe.from_dict(training.recipe)
        self.training, self.device, self.precision = training, device, precision
        self.sampling = Sampling()
        recipe = self.recipe
        self.model = build_model(recipe.model, len(self.classes), recipe.seed, in_channels=recipe.clips.channels)
        self.model.load_state_dict(dict(weights))
        self.model.to(device).eval().requires_grad_(False)

    @classmethod
    def of(
        cls, model: Model, device: torch.device, precision: str = "auto", source: str = "this model"
    ) -> "Classifier":
        return cls(model.weights, model.training, device, precision, source)

    def with_sampling(self, sampling: Sampling) -> "Classifier":
        """The same model, which sees other clips and views. Raises ValueError for views that its recipe does not allow."""
        self.views(sampling.views)
        other = copy.copy(self)
        other.sampling = sampling
        return other

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels that vote, L of them."""
        return level_names(self.recipe)

    @cached_property
    def packing(self) -> Packing:
        """How its training videos were stored. Raises ValueError if its checkpoint does not say so."""
        return packing_of(self.training.model, needs_flow=self.recipe.clips.stream == "flow")

    def views(self, number: int) -> list[View]:
        """The boxes of so many views of each clip, and whether they are mirrored: see evaluation_views."""
        return evaluation_views(self.packing.height, self.packing.width, number, self.recipe.clips)

    def read(self, video: Stored) -> VideoClips:
        """The clips of a stored video. Several threads may call it. Raises BadVideo if a frame does not decode."""
        return self.read_clips(video, evaluation_clips(video.num_frames, self.sampling.clips, self.recipe.clips))

    def read_clips(self, video: Stored, frames: np.ndarray) -> VideoClips:
        """The clips of frames (N, F) of a stored video; each frame is decoded once."""
        needed, places = np.unique(frames, return_inverse=True)
        if self.recipe.clips.stream == "flow":
            assert video.flow is not None
            planes = read_flow(video.flow, needed.tolist(), self.packing)
        else:
            planes = read_frames(video.data, needed.tolist(), self.packing)
        return VideoClips(
            frames=frames, planes=torch.from_numpy(planes)[torch.from_numpy(places.reshape(frames.shape))]
        )

    def predict(self, clips: VideoClips) -> Classification:
        """The probabilities of a video, of which `read` gave the clips."""
        bound = torch.full((len(clips.frames),), self.packing.flow_bound)
        views, at_once = self.views(self.sampling.views), self.sampling.clips_at_once
        return Classification(frames=clips.frames, levels=self.votes(clips.planes, bound, views, at_once))

    def votes(self, planes: Tensor, flow_bound: Tensor, views: Sequence[View], at_once: int = 25) -> Tensor:
        """Planes of clips (N, F, ...), flow_bound (N,) -> each clip's probabilities by each level (N, L, K) float64, on the
        CPU: the mean over its views. at_once: clips in their views that are computed together."""
        device = self.device
        boxes = torch.tensor([box for box, _ in views], device=device)  # (V, 4)
        mirrors = torch.tensor([mirror for _, mirror in views], device=device)  # (V,)
        planes, flow_bound = planes.to(device), flow_bound.to(device)
        total = torch.zeros(len(planes), len(self.levels), len(self.classes), dtype=torch.float64, device=device)
        pairs = torch.cartesian_prod(torch.arange(len(planes)), torch.arange(len(views))).to(
            device
        )  # each clip, each view
        with torch.inference_mode(), autocast(self.precision, device):
            for clip, view in (some.unbind(dim=1) for some in pairs.split(at_once)):
                clips = model_input(planes[clip], flow_bound[clip], boxes[view], mirrors[view], self.recipe.clips)
                draw = torch.zeros(len(clips), dtype=torch.int64, device=device)  # of dropout, which is off
                total.index_add_(0, clip, self.model(clips, draw).double().exp())
        return (total / len(views)).cpu()


def level_names(recipe: Recipe) -> tuple[str, ...]:
    """The taps whose levels vote; the one level of C3D has its name."""
    return ("c3d",) if recipe.model.kind == "c3d" else recipe.model.taps


def top_classes(probability: Tensor, most: int) -> list[tuple[int, float]]:
    """probability (K,) -> (number of a class, its probability), the likeliest first; of equal ones the lower number."""
    values = probability.tolist()
    order = sorted(range(len(values)), key=lambda number: -values[number])
    return [(number, values[number]) for number in order[:most]]
