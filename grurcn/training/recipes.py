"""Recipes: everything that decides a run's numbers, by name. Where a run computes, and on how many workers, is not part of it.

A recipe's docstring states its command, its cost, the paper's number and ours.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from grurcn.models.config import ModelConfig
from grurcn.models.trunks.base import trunk_spec
from grurcn.training.losses import loss_function
from grurcn.training.optim import OptimConfig
from shards.reading.clips import ClipConfig


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What the recipes of all tasks have (classification: Recipe; captioning: CaptionRecipe)."""

    task: ClassVar[str]
    """The name that the task is registered under (task.py)."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    global_batch: int = 64
    """Videos in one step, over all workers."""
    num_steps: int = 20_000
    """Number of steps; early stopping may end a run before."""
    val_every: int = 500
    """Validate every N steps."""
    patience: int = 10
    """Stop after N validations without a better log-probability; 0 never stops early."""
    seed: int = 0
    """Random seed of the first weights, the order of samples, clips, crops and dropout."""

    def __post_init__(self) -> None:
        for name, least in (("global_batch", 1), ("num_steps", 1), ("val_every", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON, with the name of its task."""
        return {"task": self.task, **dataclasses.asdict(self)}

    def digest(self) -> str:
        """SHA-256 of all values. The task's name is left out: runs of before did not have it, and must still resume."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """A classification run."""

    task: ClassVar[str] = "classification"
    model: ModelConfig = field(default_factory=ModelConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    loss: str = "mean"
    """mean: negative log of the levels' mean probability; heads: mean of the losses of the levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.check_size(self.clips.num_frames, self.clips.size)
        loss_function(self.loss)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "Recipe":
        """The recipe that to_dict wrote as JSON."""
        return Recipe(
            **{
                **without_task(content),
                "model": ModelConfig(**as_tuples(content["model"])),
                "clips": ClipConfig(**as_tuples(content["clips"])),
                "optim": OptimConfig(**content["optim"]),
            }
        )


def without_task(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "task"}


def as_tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 1}} -> {"model.width": 1}"""
    values: dict[str, Any] = {}
    for key, value in content.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


R = TypeVar("R", bound=TrainingRecipe)


def changed(recipe: R, **changes: Any) -> R:
    """The recipe with other values; those of its parts as dictionaries: changed(recipe, clips={"size": 112}, seed=1)."""
    values = {
        key: dataclasses.replace(getattr(recipe, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return dataclasses.replace(recipe, **values)


def over_trunk(recipe: Recipe, trunk: str) -> Recipe:
    """The recipe with another trunk: its default levels for those of VGG-16, its last tap for fc7 alone."""
    if recipe.model.kind == "c3d" or recipe.model.trunk == trunk:
        return recipe
    spec = trunk_spec(trunk)
    if recipe.model.taps == (trunk_spec(recipe.model.trunk).last_tap,):
        return changed(recipe, model={"trunk": trunk, "taps": (spec.last_tap,)})
    return changed(recipe, model={"trunk": trunk, "taps": tuple(spec.levels), "hidden": tuple(spec.levels.values())})


# Table 1 of the paper: UCF-101 split 1. The models of frames are fine-tuned first; the others read the maps of what came out,
# which stays as it is: --model.weights runs/vgg16-frames (for flow, runs/vgg16-frames-flow).


def vgg16_frames() -> Recipe:
    """VGG-16 on single RGB frames, from ImageNet's weights (section 5.1, Table 1; rates and dropout of Wang et al. 2015).

    python -m jobs.train vgg16-frames --shards data/ucf101 --workers 8
    Cost: not yet measured; a GPU.  Paper: 78.0 % top-1.  Ours: not yet run.
    """
    return Recipe(
        model=ModelConfig(
            kind="frames",
            taps=("fc7",),
            hidden=(512,),
            weights="imagenet",
            freeze=False,
            dropout=0.9,
            trunk_dropout=0.9,
        ),
        clips=ClipConfig(num_frames=1, crop_gap=1),
        optim=OptimConfig(optimizer="sgd", learning_rate=1e-3, weight_decay=5e-4, schedule="steps", step_every=4000),
        global_batch=256,
        num_steps=10_000,
        patience=0,
    )


def vgg16_frames_flow() -> Recipe:
    """VGG-16 on 10 stacked fields of optical flow, from ImageNet's weights (Table 1; Wang et al. 2015).

    python -m jobs.train vgg16-frames-flow --shards data/ucf101 --workers 8
    Cost: not yet measured; a GPU.  Paper: 85.4 % top-1.  Ours: not yet run.
    """
    return changed(
        vgg16_frames(),
        model={"dropout": 0.8},
        clips={"stream": "flow"},
        optim={"learning_rate": 5e-3, "step_every": 10_000},
        num_steps=30_000,
    )


def vgg16_rnn() -> Recipe:
    """Fully connected GRU over VGG-16's fc7: the paper's VGG-16 RNN, 512 units (section 5.1, Table 1).

    python -m jobs.train vgg16-rnn --shards data/ucf101 --model.weights runs/vgg16-frames --workers 8
    Cost: not yet measured; a GPU.  Paper: 78.1 % top-1.  Ours: not yet run.
    """
    return changed(gru_rcn(), model={"taps": ("fc7",), "hidden": (512,)})


def vgg16_rnn_flow() -> Recipe:
    """Fully connected GRU over VGG-16's fc7 on optical flow (VGG-16 RNN, Table 1).

    python -m jobs.train vgg16-rnn-flow --shards data/ucf101 --model.weights runs/vgg16-frames-flow --workers 8
    Cost: not yet measured; a GPU.  Paper: 84.9 % top-1.  Ours: not yet run.
    """
    return changed(vgg16_rnn(), clips={"stream": "flow"})


def gru_rcn() -> Recipe:
    """GRU-RCN on RGB frames: convolutional GRUs over five levels of VGG-16 (section 5.1, Table 1).

    python -m jobs.train gru-rcn --shards data/ucf101 --model.weights runs/vgg16-frames --workers 8
    Cost: not yet measured; a GPU.  Paper: 79.9 % top-1.  Ours: not yet run.
    """
    return Recipe(model=ModelConfig(weights="imagenet"))


def gru_rcn_flow() -> Recipe:
    """GRU-RCN on optical flow (Table 1).

    python -m jobs.train gru-rcn-flow --shards data/ucf101 --model.weights runs/vgg16-frames-flow --workers 8
    Cost: not yet measured; a GPU.  Paper: 85.7 % top-1.  Ours: not yet run.
    """
    return changed(gru_rcn(), clips={"stream": "flow"})


def gru_rcn_stacked() -> Recipe:
    """Stacked GRU-RCN: each level's gates also see the state of the level below (eq. 9 to 12, Table 1).

    python -m jobs.train gru-rcn-stacked --shards data/ucf101 --model.weights runs/vgg16-frames --workers 8
    Cost: not yet measured; a GPU.  Paper: 78.3 % top-1.  Ours: not yet run.
    """
    return changed(gru_rcn(), model={"stacked": True})


def gru_rcn_bidirectional() -> Recipe:
    """Bi-directional GRU-RCN: a second GRU a level runs from the last frame to the first (Table 1).

    python -m jobs.train gru-rcn-bidirectional --shards data/ucf101 --model.weights runs/vgg16-frames --workers 8
    Cost: not yet measured; a GPU.  Paper: 80.7 % top-1.  Ours: not yet run.
    """
    return changed(gru_rcn(), model={"bidirectional": True})


def c3d() -> Recipe:
    """C3D on 16 frames of 112 x 112: one network, trained from scratch or from weights that you name (Tran et al. 2015, Table 1).

    python -m jobs.train c3d --shards data/ucf101 --model.weights c3d.pth --workers 8
    Cost: not yet measured; a GPU.  Paper: 82.3 % top-1 (with a million videos of Sports-1M before).  Ours: not yet run.

    Published Sports-1M files want pixels of 0 to 255; ours are divided by ImageNet's deviation, so the first kernels train anew.
    """
    return Recipe(
        model=ModelConfig(kind="c3d", dropout=0.5),
        clips=ClipConfig(num_frames=16, size=112, crop_scales=(0.875,)),
        optim=OptimConfig(optimizer="sgd", learning_rate=3e-3, weight_decay=5e-4, schedule="steps", step_every=4000),
        num_steps=16_000,
    )


# Smaller ones.


def gru_rcn_small() -> Recipe:
    """GRU-RCN over a narrow trunk on small frames, trained from scratch: for CPUs and first tries.

    python -m jobs.train gru-rcn-small --shards data/mine --workers 2
    Cost: about 5 minutes on two CPU cores.  Paper: none.  Ours: 0.417 on UT-Interaction (docs/results.md).
    """
    return Recipe(
        model=ModelConfig(taps=("pool2", "pool3", "pool4"), hidden=(16, 32, 48), width=0.125, dropout=0.3),
        clips=ClipConfig(num_frames=10, stride=3, size=64),
        optim=OptimConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=20, clip_norm=1.0),
        loss="heads",
        global_batch=16,
        num_steps=600,
        val_every=100,
        patience=0,
    )


def demo() -> Recipe:
    """GRU-RCN on the demo's moving shapes: small enough for two CPU cores in about a minute.

    make demo
    Cost: about a minute on two CPU cores.  Paper: none.  Ours: 0.990 top-1 (chance 0.125).
    """
    return Recipe(
        model=ModelConfig(taps=("pool1", "pool2", "pool3"), hidden=(16, 32, 48), width=0.125, dropout=0.1),
        clips=ClipConfig(num_frames=10, stride=2, size=36, crop_scales=(1.0, 0.9), test_scale=0.9, mirror=False),
        optim=OptimConfig(learning_rate=5e-3, schedule="cosine", warmup_steps=20, clip_norm=1.0),
        global_batch=16,
        num_steps=380,
        val_every=190,
        patience=0,
    )


def demo_frames() -> Recipe:
    """The demo's trunk on single frames, which cannot see motion: scores are averaged over the clip.

    python -m jobs.train demo-frames --shards demo/shards
    Cost: about a minute on two CPU cores.  Paper: none.  Ours: 0.115 top-1 (chance 0.125).
    """
    return changed(demo(), model={"kind": "frames"})


RECIPES: dict[str, Callable[[], Recipe]] = {
    "vgg16-frames": vgg16_frames,
    "vgg16-frames-flow": vgg16_frames_flow,
    "vgg16-rnn": vgg16_rnn,
    "vgg16-rnn-flow": vgg16_rnn_flow,
    "gru-rcn": gru_rcn,
    "gru-rcn-flow": gru_rcn_flow,
    "gru-rcn-stacked": gru_rcn_stacked,
    "gru-rcn-bidirectional": gru_rcn_bidirectional,
    "c3d": c3d,
    "gru-rcn-small": gru_rcn_small,
    "demo": demo,
    "demo-frames": demo_frames,
}
