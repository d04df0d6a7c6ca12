"""GRU-RCN: clips -> maps of several layers -> a convolutional GRU over each -> one vote a layer (paper section 3).

B clips, T frames, X map channels, C state channels, H x W a map's size, L levels (taps), K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from grurcn.gru import ConvGRU
from grurcn.vgg import VGG16, load_weights


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the network is."""

    kind: Literal["gru-rcn", "frames"] = "gru-rcn"
    """gru-rcn: convolutional GRUs over the maps. frames: the same heads on each frame's maps, scores averaged over the
    frames, which cannot see motion."""
    taps: tuple[str, ...] = ("pool2", "pool3", "pool4", "pool5", "fc7")
    """Layers of VGG-16 whose maps are read (pool1 ... pool5, fc6, fc7)."""
    hidden: tuple[int, ...] = (64, 128, 256, 256, 512)
    """State channels of each tap's GRU."""
    kernel_size: int = 3
    """Of the GRUs' convolutions; a 1 x 1 map gets 1 x 1 kernels, which give the same."""
    dropout: float = 0.7
    """Share of each pooled state that is dropped before its head, in training."""
    width: float = 1.0
    """Multiplies the channels of every layer of the trunk; 1 is VGG-16."""
    weights: str | None = None
    """Pretrained weights of the trunk: a file with torchvision's parameter names, or URL#sha256=HEX."""
    freeze: bool | None = None
    """Keep the trunk as it is. Default: only if it has pretrained weights."""

    def __post_init__(self) -> None:
        if self.kind == "gru-rcn" and len(self.hidden) != len(self.taps):
            raise ValueError(
                f"one hidden size per tap wanted: taps {', '.join(self.taps)}; hidden {', '.join(map(str, self.hidden))}"
            )
        if self.width <= 0 or self.kernel_size < 1 or min(self.hidden, default=1) < 1:
            raise ValueError(
                f"width {self.width:g}, kernel_size {self.kernel_size}, hidden {', '.join(map(str, self.hidden))}: "
                "wanted a width above 0, the others at least 1"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout {self.dropout:g}: wanted at least 0 and below 1 (it is the share that is dropped)"
            )

    @property
    def frozen(self) -> bool:
        return self.weights is not None if self.freeze is None else self.freeze


class GRURCN(nn.Module):
    """Convolutional GRUs over the maps of several layers; each level votes, and the votes count alike."""

    def __init__(self, config: ModelConfig, num_classes: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.trunk = VGG16(config.taps, config.width)
        taps = self.trunk.taps.values()
        if config.kind == "gru-rcn":
            self.grus = nn.ModuleList(
                ConvGRU(tap.channels, channels, config.kernel_size if tap.stride else 1)
                for tap, channels in zip(taps, config.hidden, strict=True)
            )
            pooled = config.hidden
        else:
            self.grus = None
            pooled = [tap.channels for tap in taps]
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for channels in pooled)
        self.trunk.requires_grad_(not config.frozen)
        self.train()  # a new module is in training mode, and so would a frozen trunk be

    def train(self, mode: bool = True) -> "GRURCN":
        """A frozen trunk stays in evaluation mode: its dropout is off."""
        super().train(mode)
        if self.config.frozen:
            self.trunk.eval()
        return self

    def forward(self, clips: Tensor, draw: Tensor) -> Tensor:
        """clips (B, T, 3, S, S), normalised; draw (B,) int64, each clip's random bits for dropout
        -> log-probabilities of each level (B, L, K). The clip's are log_mean_vote of them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            maps = self.trunk(clips.flatten(0, 1), partial(self.drop_fc, draw))  # {tap: (B*T, X, H, W)}
        votes = []
        for level, (x, head) in enumerate(zip(maps.values(), self.heads, strict=True)):
            x = x.unflatten(0, clips.shape[:2])  # (B, T, X, H, W)
            if self.grus is not None:
                pooled = self.grus[level](x)[:, -1:].mean(dim=(-2, -1))  # (B, 1, C), after the last frame
            else:
                pooled = x.mean(dim=(-2, -1))  # (B, T, X), each frame by itself
            if self.training:
                pooled = dropout(pooled, self.config.dropout, draw, level)
            votes.append(log_mean_vote(head(pooled).float().log_softmax(dim=-1)))  # (B, K)
        return torch.stack(votes, dim=1)

    def drop_fc(self, draw: Tensor, fc6: Tensor) -> Tensor:
        """fc6 (B*T, X) with half of each clip's channels dropped, the same in all its frames, where the trunk learns."""
        if not self.trunk.training:
            return fc6
        return dropout(fc6.unflatten(0, (len(draw), -1)), 0.5, draw, level=len(self.heads)).flatten(0, 1)


def log_mean_vote(log_probs: Tensor) -> Tensor:
    """(B, L, K) log-probabilities of L votes -> (B, K), the log of their mean probability (paper section 5.1)."""
    return log_probs.logsumexp(dim=1) - math.log(log_probs.shape[1])


def dropout(x: Tensor, share: float, draw: Tensor, level: int) -> Tensor:
    """x (B, ..., C) with `share` of each clip's channels dropped and the others scaled up, as torch's dropout does.

    Which ones is a function of the clip's random bits alone, so that a clip loses the same channels whichever worker
    has it, on a CPU and on a GPU, before and after a restart.
    """
    channel = torch.arange(x.shape[-1], device=x.device)
    kept = uniform(draw[:, None] ^ mix(channel + (level << 32))) >= share  # (B, C)
    kept = kept.view(len(x), *[1] * (x.dim() - 2), -1)
    return x * kept / (1 - share)


def uniform(bits: Tensor) -> Tensor:
    """int64 numbers -> float64 in [0, 1), one each, unrelated even for neighbours."""
    return (mix(bits) >> 11 & (1 << 53) - 1).double() / 2**53


def mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): each output bit depends on every input bit."""
    bits = bits + SPLITMIX_STEP
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * SPLITMIX_FIRST
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * SPLITMIX_SECOND
    return bits ^ (bits >> 31 & (1 << 33) - 1)


# 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers: torch multiplies int64 modulo 2^64.
SPLITMIX_STEP = 0x9E3779B97F4A7C15 - 2**64
SPLITMIX_FIRST = 0xBF58476D1CE4E5B9 - 2**64
SPLITMIX_SECOND = 0x94D049BB133111EB - 2**64


def build_model(
    config: ModelConfig, num_classes: int, seed: int, weights: Mapping[str, Tensor] | None = None
) -> GRURCN:
    """The model with its first weights: random from the seed, the trunk's from `weights` if given.

    Raises ValueError for taps that the trunk lacks, BadWeights for weights that do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GRURCN(config, num_classes)
    if weights is not None:
        load_weights(model.trunk, weights, config.weights or "weights")
    return model
