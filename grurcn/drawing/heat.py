"""Where the frames of a video change a GRU-RCN's states: a map for each level and frame, laid over the frame.

A state changes even while nothing moves: h_0 is zero, and the GRU goes on taking in what it has seen already. In a trained model
|h_t - h_(t-1)| is as large for a still picture as for a moving one. So a change is measured against the state that there would
be if the frame before had been shown once more:

    |h_t - GRU(x_(t-1), h_(t-1))|, the mean over the channels

It is zero wherever a cell sees no difference between two frames. In the flow stream, fields take the place of frames.

N clips, T frames, X and C channels of maps and states, H x W a map's size, L levels, K classes.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cluster.precision import autocast
from grurcn.inference.classifier import Classifier, View
from grurcn.inference.model_input import model_input
from grurcn.models.gru_rcn import GRURCN, pooled_to
from shards.reading.clips import Box, ClipConfig

USUAL = 0.9  # fraction of a level's maps that have no cell hotter than 1
FAINTEST = 0.02  # of a level's mean state: smaller changes are noise


@dataclass(frozen=True, kw_only=True)
class Changes:
    """A level's maps, and which part of the model's input they cover."""

    maps: np.ndarray  # (N, T - 1, H, W) float32, 0 to 1: of the steps from the second on
    reach: float  # fraction of the input's height and width that the map's cells cover; may exceed 1


def check_heat(classifier: Classifier) -> None:
    """Raises ValueError for a model without states, or whose states are all of 1 x 1 cells."""
    config = classifier.recipe.model
    if config.kind != "gru-rcn":
        raise ValueError(
            f"heat shows where GRUs' states change, and a model of kind {config.kind} has none; use a model of kind gru-rcn"
        )
    if not placed_levels(classifier):
        raise ValueError(
            f"heat needs a level whose map has more than one cell; this model reads only {', '.join(config.taps)} at 1 x 1"
        )


def placed_levels(classifier: Classifier) -> dict[int, float]:
    """{number of each level of more than 1 x 1 cells: fraction of the input that they cover}."""
    size = classifier.recipe.clips.size
    cells = [(tap.size(size), tap.stride) for tap in classifier.recipe.model.tap_maps.values()]
    return {number: side * stride / size for number, (side, stride) in enumerate(cells) if stride and side > 1}


def votes_and_changes(
    classifier: Classifier, planes: Tensor, flow_bound: Tensor, view: View, at_once: int = 25
) -> tuple[Tensor, list[Changes]]:
    """Planes of clips (N, F, ...), flow_bound (N,) -> (Classifier.votes of them in one view, the changes of each placed level).

    A bidirectional model's changes are those of its forward GRUs.
    """
    check_heat(classifier)
    model, device = classifier.model, classifier.device
    assert isinstance(model, GRURCN)
    levels = placed_levels(classifier)
    votes: list[Tensor] = []
    found: dict[int, list[Tensor]] = {level: [] for level in levels}
    sizes: dict[int, list[Tensor]] = {level: [] for level in levels}
    box, mirror = (torch.tensor([part], device=device) for part in view)
    with torch.inference_mode(), autocast(classifier.precision, device):
        for some, bound in zip(planes.split(at_once), flow_bound.split(at_once), strict=True):
            count = len(some)
            clips = model_input(
                some.to(device), bound.to(device), box.expand(count, -1), mirror.expand(count), classifier.recipe.clips
            )
            draw = torch.zeros(count, dtype=torch.int64, device=device)  # of dropout, which is off
            maps = model.maps(clips, draw)
            votes.append(model.votes(maps, draw).double().exp().cpu())
            for level, (states, repeated) in enumerate(states_and_repeats(model, maps)):
                if level in levels:
                    found[level].append((states[:, 1:] - repeated).abs().float().mean(dim=2).cpu())
                    sizes[level].append(states.float().abs().mean().cpu().expand(count))
    changes = [
        Changes(maps=scaled(torch.cat(found[level]).numpy(), float(torch.cat(sizes[level]).mean())), reach=reach)
        for level, reach in levels.items()
    ]
    return torch.cat(votes), changes


def states_and_repeats(model: GRURCN, maps: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Level by level: the states (N, T, C, H, W), and from the second frame on what each would be if the frame before had been
    shown once more (N, T - 1, C, H, W)."""
    below = None
    for gru, x, states in zip(model.grus, maps, model.states(model.grus, maps, reverse=False), strict=True):
        if below is not None:
            below = pooled_to(below, x.shape[-1])
        repeated = next_states(gru, x[:, :-1], states[:, :-1], below)
        yield states, repeated
        below = repeated if model.config.stacked else None


def next_states(gru: nn.Module, x: Tensor, h: Tensor, below: Tensor | None) -> Tensor:
    """Maps x, states h and the level below, all (N, T, ...) -> the state one step after each h (N, T, C, H, W)."""
    clips = [None if maps is None else maps.flatten(0, 1)[:, None] for maps in (x, below)]  # of one frame each
    return gru(*clips, start=h.flatten(0, 1)).unflatten(0, x.shape[:2])[:, :, 0]


def scaled(maps: np.ndarray, state: float) -> np.ndarray:
    """Changes (N, T - 1, H, W) scaled to 0 to 1. 1 is what most maps' hottest cell stays below, so that one cut between two
    scenes does not make everything else look cold. state: the mean size of the level's states, to tell noise from changes."""
    hottest = maps.max(axis=(2, 3)).ravel()
    full = max(float(np.quantile(hottest, USUAL)) if hottest.size else 0.0, FAINTEST * state, 1e-9)
    return np.clip(maps / full, 0, 1)


# Onto the frames


def shown_steps(frames: np.ndarray, num_frames: int, clips: ClipConfig) -> np.ndarray:
    """Clips (N, F) of a video -> the clip and the step whose change each of its frames shows (num_frames, 2); (-1, -1) where
    there is none.

    A step's change belongs to the frames after the step before, up to its own. Of several clips, the one that has seen most
    frames before shows it, the first of equal ones.

        stride = 2, clips 0 2 4 and 1 3 5:      frame  0   1   2   3   4   5
                                                clip   -   0   0   0   0   1
                                                step   -   1   1   2   2   2
    """
    if clips.stream == "flow":  # a step's last field
        ends = frames[:, clips.stride * np.arange(clips.num_frames) + clips.flow_fields - 1]
    else:
        ends = frames
    steps = np.full((num_frames, 2), -1)
    for clip, of_clip in enumerate(ends.tolist()):
        for step, (before, end) in enumerate(itertools.pairwise(of_clip), start=1):
            for frame in range(before + 1, end + 1):
                if steps[frame, 1] < step:
                    steps[frame] = clip, step
    return steps


class HeatMaps:
    """The heat of each frame of a video, in the drawn frames' size."""

    def __init__(
        self, changes: Sequence[Changes], steps: np.ndarray, box: Box, stored: tuple[int, int], size: tuple[int, int]
    ):
        """steps: from shown_steps. box: of the view, in stored frames of `stored` height and width. size: height and width of
        the drawn frames."""
        self.changes, self.steps = changes, steps
        top, left, box_height, box_width = box
        self.places = []
        for level in changes:
            height, width = level.maps.shape[2:]
            rows = onto_line(height, top, box_height, level.reach, stored[0], size[0])
            columns = onto_line(width, left, box_width, level.reach, stored[1], size[1])
            self.places.append((rows, columns))
        self.cold = np.zeros(size, np.float32)

    def of_frame(self, frame: int) -> np.ndarray:
        """(height, width) float32, 0 to 1: the mean over the levels; zero outside the box."""
        clip, step = self.steps[frame].tolist()
        if step < 0:
            return self.cold
        maps = [
            rows @ level.maps[clip, step - 1] @ columns.T
            for level, (rows, columns) in zip(self.changes, self.places, strict=True)
        ]
        return np.mean(maps, axis=0)


def onto_line(cells: int, start: float, length: float, reach: float, stored: int, drawn: int) -> np.ndarray:
    """Weights (drawn, cells) that lay a line of cells over `drawn` pixels.

    The cells cover a fraction `reach` of the stretch [start, start + length) of `stored` pixels. Weights are linear between the
    cells' middles, go on from the last one to the stretch's end, and are zero outside.
    """
    pixel = (np.arange(drawn) + 0.5) * stored / drawn - start  # from the stretch's start, in stored pixels
    cell = np.clip(pixel / (length * reach) * cells - 0.5, 0, cells - 1)
    weights = np.clip(1 - np.abs(cell[:, None] - np.arange(cells)), 0, None)
    weights[(pixel < 0) | (pixel > length)] = 0
    return weights.astype(np.float32)
