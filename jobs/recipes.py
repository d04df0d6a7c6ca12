"""Recipes: everything that decides a run's numbers, by name. Where and on how many workers it runs is not part of it.

A recipe's docstring states its command, its cost, the paper's number and ours.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grurcn.loss import Loss
from grurcn.model import ModelConfig
from grurcn.optim import OptimConfig
from grurcn.vgg import TAPS, tap_of
from shards.clips import ClipConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is."""

    model: ModelConfig = field(default_factory=ModelConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: Loss = "mean"
    """mean: negative log of the levels' mean probability; heads: mean of the levels' own losses."""
    global_batch: int = 64
    """Videos in one step, over all workers."""
    num_steps: int = 20_000
    """Most steps; early stopping may end a run before."""
    val_every: int = 500
    """Steps from one validation to the next."""
    patience: int = 10
    """Validations without a better log-probability after which training stops; 0 never stops early."""
    seed: int = 0
    """Of the first weights, the order of samples, clips, crops and dropout."""

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.num_steps < 1 or self.val_every < 1 or self.patience < 0 or self.seed < 0:
            raise ValueError(
                f"wanted global_batch, num_steps and val_every of at least 1, patience and seed of at least 0; found "
                f"{self.global_batch}, {self.num_steps}, {self.val_every}, {self.patience}, {self.seed}"
            )

        for tap in self.model.taps:
            stride = tap_of(tap, 1.0).stride if tap in TAPS else None
            if stride and self.clips.size < stride:
                raise ValueError(
                    f"clips.size {self.clips.size}: too small for the tap {tap}, of which a cell takes {stride} pixels; "
                    f"wanted at least {stride}, or taps that are less deep"
                )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "Recipe":
        """The recipe that to_dict, by way of JSON, wrote."""
        return Recipe(
            **{
                **content,
                "model": ModelConfig(**as_tuples(content["model"])),
                "clips": ClipConfig(**as_tuples(content["clips"])),
                "optim": OptimConfig(**content["optim"]),
            }
        )

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def as_tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 1}} -> {"model.width": 1}"""
    values: dict[str, Any] = {}
    for key, value in content.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def gru_rcn() -> Recipe:
    """GRU-RCN on UCF-101 split 1, RGB frames (section 5.1, Table 1), over VGG-16 with the weights that you name.

    python -m jobs.train gru-rcn --shards data/ucf101 --model.weights vgg16.pth --workers 8
    Cost: not yet measured.  Paper: 79.9 % top-1.  Ours: not yet run.
    """
    return Recipe()


def gru_rcn_small() -> Recipe:
    """GRU-RCN over a narrow trunk that learns from nothing, on small frames: for CPUs and first tries.

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
    """The demo's trunk on single frames, scores averaged over the clip: it cannot see motion.

    python -m jobs.train demo-frames --shards demo/shards
    Cost: about a minute on two CPU cores.  Paper: none.  Ours: 0.115 top-1 (chance 0.125).
    """
    whole = demo()
    return dataclasses.replace(whole, model=dataclasses.replace(whole.model, kind="frames"))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "gru-rcn": gru_rcn,
    "gru-rcn-small": gru_rcn_small,
    "demo": demo,
    "demo-frames": demo_frames,
}
