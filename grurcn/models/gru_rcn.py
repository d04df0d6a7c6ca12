"""GRU-RCN: clips -> maps of several layers -> a convolutional GRU over each -> one vote a layer (paper section 3).

B clips, T frames, I a frame's channels (3, or those of stacked flow), X map channels, C state channels, H x W a map's size,
L levels (taps), K classes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from grurcn.models import c3d
from grurcn.models.c3d import C3D
from grurcn.models.dropout import dropout
from grurcn.models.gru import ConvGRU
from grurcn.models.trunks import mobilenet, vgg
from grurcn.models.trunks.base import Tap, chosen, load_weights
from grurcn.models.trunks.mobilenet import MobileNetV2
from grurcn.models.trunks.vgg import VGG16

TrunkName = Literal["vgg16", "mobilenet_v2"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the network is."""

    kind: Literal["gru-rcn", "frames", "c3d"] = "gru-rcn"
    """gru-rcn: convolutional GRUs over the maps (over a tap of 1 x 1 alone, the paper's fully connected RNN). frames: the
    same heads on each frame's maps, scores averaged over the frames, which cannot see motion. c3d: 3-D convolutions."""
    trunk: TrunkName = "vgg16"
    """The network of single frames whose maps are read: vgg16 (the paper's), or mobilenet_v2, fifty times cheaper."""
    taps: tuple[str, ...] = ("pool2", "pool3", "pool4", "pool5", "fc7")
    """Layers of the trunk whose maps are read (vgg16: pool1 ... pool5, fc6, fc7; mobilenet_v2: stride4 ... stride32,
    pooled)."""
    hidden: tuple[int, ...] = (64, 128, 256, 256, 512)
    """State channels of each tap's GRU."""
    kernel_size: int = 3
    """Of the GRUs' convolutions, odd; a 1 x 1 map gets 1 x 1 kernels, which give the same."""
    bidirectional: bool = False
    """A second GRU a tap, with weights of its own, runs from the last frame to the first (section 3)."""
    stacked: bool = False
    """Each tap's gates also see the state of the tap before, max-pooled to its size (eq. 9 to 12)."""
    dropout: float = 0.7
    """Share of each pooled state that is dropped before its head, in training."""
    trunk_dropout: float = 0.5
    """Share of fc6 that is dropped before fc7, where the trunk learns."""
    width: float = 1.0
    """Multiplies the channels of every layer of the trunk; 1 is the published one."""
    weights: str | None = None
    """Pretrained weights of the trunk: imagenet; a file with torchvision's parameter names, or URL#sha256=HEX; the folder of
    a run or of a checkpoint whose trunk to begin with; or runs:/ID of MLflow."""
    freeze: bool | None = None
    """Keep the trunk as it is. Default: only if it has pretrained weights."""

    def __post_init__(self) -> None:
        if self.kind != "c3d":
            chosen(self.taps, known_taps(self.trunk, self.width), self.trunk)
        if self.kind == "gru-rcn" and len(self.hidden) != len(self.taps):
            raise ValueError(
                f"one hidden size per tap wanted: taps {', '.join(self.taps)}; hidden {', '.join(map(str, self.hidden))}"
            )
        if self.width <= 0 or min(self.hidden, default=1) < 1:
            raise ValueError(
                f"width {self.width:g}, hidden {', '.join(map(str, self.hidden))}: wanted a width above 0, hidden sizes of "
                "at least 1"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size}: wanted an odd number, so that a map keeps its size")
        for name, share in (("dropout", self.dropout), ("trunk_dropout", self.trunk_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} {share:g}: wanted at least 0 and below 1 (it is the share that is dropped)")
        if self.kind != "gru-rcn" and (self.bidirectional or self.stacked):
            raise ValueError(
                f"bidirectional and stacked are variants of gru-rcn; a model of kind {self.kind} has no GRUs"
            )

    @property
    def frozen(self) -> bool:
        return self.weights is not None if self.freeze is None else self.freeze

    @property
    def tap_maps(self) -> dict[str, Tap]:
        """The taps with their channels and strides."""
        return chosen(self.taps, known_taps(self.trunk, self.width), self.trunk)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def check_size(self, num_frames: int, size: int) -> None:
        """Raises ValueError if the model cannot take clips of num_frames frames of size x size pixels."""
        if self.kind == "c3d":
            if (num_frames, size) != (c3d.NUM_FRAMES, c3d.SIZE):
                raise ValueError(
                    f"clips of {num_frames} frames of {size} x {size}: C3D takes {c3d.NUM_FRAMES} frames of {c3d.SIZE} x "
                    f"{c3d.SIZE} (--clips.num-frames {c3d.NUM_FRAMES} --clips.size {c3d.SIZE})"
                )
            return
        sizes = {name: tap.size(size) for name, tap in self.tap_maps.items()}
        for name, tap in self.tap_maps.items():
            if not sizes[name]:
                raise ValueError(
                    f"size {size}: too small for the tap {name}, of which a cell takes {tap.stride} pixels; "
                    f"wanted at least {tap.stride}, or taps that are less deep"
                )
        for below, above in zip(self.taps, self.taps[1:], strict=False):
            if self.stacked and sizes[below] % sizes[above]:
                raise ValueError(
                    f"stacked taps {below} ({sizes[below]} x {sizes[below]} cells) and {above} ({sizes[above]} x "
                    f"{sizes[above]}), for frames of {size} pixels: states cannot be pooled from the first to the second; "
                    "wanted sizes of which each divides the one before it (frames of a multiple of the deepest stride)"
                )


def known_taps(trunk: TrunkName, width: float) -> dict[str, Tap]:
    """All taps of a trunk."""
    return vgg.known_taps(width) if trunk == "vgg16" else mobilenet.known_taps(width)


class GRURCN(nn.Module):
    """Convolutional GRUs over the maps of several layers; each level votes, and the votes count alike."""

    def __init__(self, config: ModelConfig, num_classes: int, in_channels: int = 3, recompute: bool = False):
        """recompute: the GRUs keep nothing for the backward pass and run again in it, for less memory."""
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.recompute = recompute
        network = VGG16 if config.trunk == "vgg16" else MobileNetV2
        self.trunk = network(config.taps, config.width, in_channels)
        self.grus = self.build_grus(config.kind == "gru-rcn")
        self.reverse_grus = self.build_grus(config.bidirectional)
        pooled = [tap.channels for tap in self.trunk.taps.values()]
        if config.kind == "gru-rcn":
            pooled = [channels * config.directions for channels in config.hidden]
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for channels in pooled)
        self.trunk.requires_grad_(not config.frozen)
        self.train()  # a new module is in training mode, and so would a frozen trunk be

    def build_grus(self, wanted: bool) -> nn.ModuleList:
        """A GRU a tap, for one direction; none if they are not wanted."""
        config = self.config
        if not wanted:
            return nn.ModuleList()
        below = (0, *config.hidden) if config.stacked else [0] * len(config.taps)
        return nn.ModuleList(
            ConvGRU(tap.channels, channels, config.kernel_size if tap.stride else 1, below_channels)
            for tap, channels, below_channels in zip(self.trunk.taps.values(), config.hidden, below, strict=False)
        )

    def train(self, mode: bool = True) -> "GRURCN":
        """A frozen trunk stays in evaluation mode: its dropout is off."""
        super().train(mode)
        if self.config.frozen:
            self.trunk.eval()
        return self

    def forward(self, clips: Tensor, draw: Tensor) -> Tensor:
        """clips (B, T, I, S, S), normalised; draw (B,) int64, each clip's random bits for dropout
        -> log-probabilities of each level (B, L, K). The clip's are log_mean_vote of them."""
        return self.votes(self.maps(clips, draw), draw)

    def maps(self, clips: Tensor, draw: Tensor) -> list[Tensor]:
        """clips (B, T, I, S, S) -> each tap's maps (B, T, X, H, W); in memory they lie frame by frame, as GRUs want them."""
        num_frames = clips.shape[1]
        frames = clips.transpose(0, 1).flatten(0, 1)  # (T*B, I, S, S)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            maps = self.trunk(frames, partial(self.drop_fc, draw))  # {tap: (T*B, X, H, W)}
        return [x.unflatten(0, (num_frames, -1)).transpose(0, 1) for x in maps.values()]

    def votes(self, maps: list[Tensor], draw: Tensor) -> Tensor:
        """Each tap's maps (B, T, X, H, W) -> its log-probabilities (B, L, K)."""
        levels = self.last_states(maps) if len(self.grus) else maps  # (B, 1 or T, C or X, H, W)
        votes = []
        for level, (x, head) in enumerate(zip(levels, self.heads, strict=True)):
            pooled = x.mean(dim=(-2, -1))  # (B, 1 or T, C): after the last frame, or each frame by itself
            if self.training:
                pooled = dropout(pooled, self.config.dropout, draw, level)
            votes.append(log_mean_vote(head(pooled).float().log_softmax(dim=-1)))  # (B, K)
        return torch.stack(votes, dim=1)

    def last_states(self, maps: list[Tensor]) -> list[Tensor]:
        """Each tap's state once all frames were seen (B, 1, C, H, W); of both directions, their channels side by side."""
        forward = [states[:, -1:] for states in self.states(self.grus, maps, reverse=False)]
        if not len(self.reverse_grus):
            return forward
        backward = [states[:, :1] for states in self.states(self.reverse_grus, maps, reverse=True)]
        return [torch.cat(both, dim=2) for both in zip(forward, backward, strict=True)]

    def states(self, grus: nn.ModuleList, maps: list[Tensor], reverse: bool) -> Iterator[Tensor]:
        """The states of one direction, level by level (B, T, C, H, W)."""
        below = None
        for gru, x in zip(grus, maps, strict=True):
            if below is not None:
                below = pooled_to(below, x.shape[-1])
            if self.recompute and torch.is_grad_enabled():
                states = recomputed(gru, x, below, reverse)
            else:
                states = gru(x, below, reverse)
            yield states
            below = states if self.config.stacked else None

    def drop_fc(self, draw: Tensor, fc6: Tensor) -> Tensor:
        """fc6 (T*B, X) with a share of each clip's channels dropped, the same in all its frames, where the trunk learns."""
        if not self.trunk.training:
            return fc6
        by_clip = fc6.unflatten(0, (-1, len(draw))).transpose(0, 1)  # (B, T, X)
        dropped = dropout(by_clip, self.config.trunk_dropout, draw, level=len(self.heads))
        return dropped.transpose(0, 1).flatten(0, 1)


def recomputed(gru: nn.Module, x: Tensor, below: Tensor | None, reverse: bool) -> Tensor:
    """gru(x, below, reverse), which keeps nothing but x and below for the backward pass and runs again in it, on a quarter of
    the clips after the other: what a step back needs is then held for a quarter of one level."""
    size = -(-len(x) // 4)
    belows = [None] * len(x) if below is None else below.split(size)
    pieces = [
        checkpoint(gru, *piece, reverse, use_reentrant=False) for piece in zip(x.split(size), belows, strict=False)
    ]
    return torch.cat(pieces)  # pyright: ignore[reportArgumentType]


def pooled_to(states: Tensor, size: int) -> Tensor:
    """states (B, T, C, H, W) of the level below, max-pooled to size x size cells: 2 x 2 between neighbouring pools."""
    frames = states.transpose(0, 1)  # as they lie in memory
    cells = states.shape[-1] // size
    pooled = functional.max_pool2d(frames.flatten(0, 1), cells) if cells > 1 else frames.flatten(0, 1)
    return pooled.unflatten(0, frames.shape[:2]).transpose(0, 1)


def log_mean_vote(log_probs: Tensor) -> Tensor:
    """(B, L, K) log-probabilities of L votes -> (B, K), the log of their mean probability (paper section 5.1)."""
    return log_probs.logsumexp(dim=1) - math.log(log_probs.shape[1])


def build_model(
    config: ModelConfig,
    num_classes: int,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    in_channels: int = 3,
    recompute: bool = False,
) -> GRURCN | C3D:
    """The model with its first weights: random from the seed, the trunk's from `weights` if given.

    Raises BadWeights for weights that do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.kind == "c3d":
            model = C3D(num_classes, in_channels, config.width, config.dropout)
        else:
            model = GRURCN(config, num_classes, in_channels, recompute)
    source = config.weights or "weights"
    if weights is not None:
        model.load(weights, source) if isinstance(model, C3D) else load_weights(model.trunk, weights, source)
    return model
