"""A trained model of recognition and videos as it wants them: stored video -> clips in views -> each level's probabilities.

It imports no ray, deepspeed or mlflow: a model is served where there are none.

N clips, F stored frames (or fields of flow) a clip is made of, L levels, K classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoints.run_folder import Model
from cluster.precision import autocast
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.training.recipes import Recipe
from shards.reading.clips import Box, evaluation_clips, evaluation_views
from shards.reading.decode import read_flow, read_frames
from shards.video import Packing, Stored

View = tuple[Box, bool]


class OtherTask(ValueError):
    """A run that has learned something else than is wanted of it."""


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a model takes a video for."""

    frames: np.ndarray  # (N, F) numbers of the stored frames, or fields, of each clip
    levels: Tensor  # (N, L, K) float64, each clip's probabilities by each level, the mean over its views

    @property
    def probability(self) -> Tensor:
        """(K,): the mean over clips, views and levels (paper section 5.1)."""
        return self.levels.mean(dim=(0, 1))

    def top(self, most: int) -> list[tuple[int, float]]:
        """(number of a class, its probability) of the likeliest, the likeliest first; of equal ones the lower number."""
        values = self.probability.tolist()
        order = sorted(range(len(values)), key=lambda number: -values[number])
        return [(number, values[number]) for number in order[:most]]


class Recogniser:
    """A model on a device, in evaluation mode."""

    def __init__(
        self, weights: Mapping[str, Tensor], meta: Mapping[str, Any], device: torch.device, precision: str = "auto"
    ):
        """weights, meta: of a run's model (run_folder.Model). Raises OtherTask for one of another task than recognition."""
        if "classes" not in meta:
            raise OtherTask("a model of captioning, which knows no classes; wanted one of recognition")
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.recipe = Recipe.from_dict(meta["recipe"])
        self.meta, self.device, self.precision = meta, device, precision
        recipe = self.recipe
        self.model = build_model(recipe.model, len(self.classes), recipe.seed, in_channels=recipe.clips.channels)
        self.model.load_state_dict(dict(weights))
        self.model.to(device).eval()

    @classmethod
    def of(cls, model: Model, device: torch.device, precision: str = "auto") -> "Recogniser":
        return cls(model.weights, model.meta, device, precision)

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels that vote, L of them."""
        return level_names(self.recipe)

    @cached_property
    def packing(self) -> Packing:
        """How its training videos were stored, so that others can be stored alike. Raises ValueError if that is not known."""
        if "packing" not in self.meta:
            raise ValueError(
                "this model does not say how its videos were stored, as an older version trained it; train it again"
            )
        packing = Packing(**self.meta["packing"])
        wants_flow = self.recipe.clips.stream == "flow"
        return packing if wants_flow else dataclasses.replace(packing, flow="none")

    def views(self, number: int) -> list[View]:
        """So many views of each clip: see evaluation_views."""
        return evaluation_views(self.packing.height, self.packing.width, number, self.recipe.clips)

    def recognise(self, video: Stored, clips: int = 10, views: int = 1, at_once: int = 25) -> Recognised:
        """A stored video by equally spaced clips. at_once: clips in their views that are computed together.

        Raises BadVideo if a frame of it does not decode.
        """
        frames = evaluation_clips(video.num_frames, clips, self.recipe.clips)
        return self.judge(frames, self.read(video, frames), self.views(views), at_once)

    def judge(self, frames: np.ndarray, planes: Tensor, views: Sequence[View], at_once: int = 25) -> Recognised:
        """A video by its clips of frames (N, F), of which `read` gave the planes."""
        bound = torch.full((len(frames),), self.packing.flow_bound)
        return Recognised(frames=frames, levels=self.votes(planes, bound, views, at_once))

    def read(self, video: Stored, frames: np.ndarray) -> Tensor:
        """Clips (N, F) of a stored video -> their planes (N, F, ...) uint8, as in a ClipBatch; each frame is decoded once."""
        wanted, places = np.unique(frames, return_inverse=True)
        if self.recipe.clips.stream == "flow":
            assert video.flow is not None
            planes = read_flow(video.flow, wanted.tolist(), self.packing)
        else:
            planes = read_frames(video.data, wanted.tolist(), self.packing)
        return torch.from_numpy(planes)[torch.from_numpy(places.reshape(frames.shape))]

    def votes(self, planes: Tensor, flow_bound: Tensor, views: Sequence[View], at_once: int = 25) -> Tensor:
        """Planes of clips (N, F, ...), flow_bound (N,) -> each clip's probabilities by each level (N, L, K) float64, on the
        CPU: the mean over its views."""
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
