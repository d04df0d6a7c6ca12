"""GRU-RCN: clips -> maps of several layers -> a convolutional GRU over each -> one vote a layer (paper section 3).

B clips, T frames, I a frame's channels (3, or those of stacked flow), X map channels, C state channels, H x W a map's size,
L levels (taps), K classes.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from grurcn.models.config import ModelConfig
from grurcn.models.dropout import dropout
from grurcn.models.gru import ConvGRU
from grurcn.models.trunks.base import trunk_spec
from grurcn.models.votes import log_mean_vote


class GRURCN(nn.Module):
    """Convolutional GRUs over the maps of several layers; each level votes, and the votes count alike."""

    def __init__(self, config: ModelConfig, num_classes: int, in_channels: int = 3, recompute: bool = False):
        """recompute: the GRUs run again in the backward pass instead of keeping what it needs, for less memory."""
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.recompute = recompute
        self.trunk = trunk_spec(config.trunk).build(config.taps, config.width, in_channels)
        self.grus = self.build_grus() if config.kind == "gru-rcn" else nn.ModuleList()
        self.reverse_grus = self.build_grus() if config.bidirectional else nn.ModuleList()
        pooled = [tap.channels for tap in self.trunk.taps.values()]
        if config.kind == "gru-rcn":
            pooled = [channels * config.directions for channels in config.hidden]
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for channels in pooled)
        self.trunk.requires_grad_(not config.frozen)
        self.train()  # sets a frozen trunk to evaluation mode

    def build_grus(self) -> nn.ModuleList:
        """A GRU per tap, for one direction."""
        config = self.config
        below = (0, *config.hidden) if config.stacked else [0] * len(config.taps)
        return nn.ModuleList(
            ConvGRU(tap.channels, channels, config.kernel_size if tap.stride else 1, below_channels)
            for tap, channels, below_channels in zip(self.trunk.taps.values(), config.hidden, below, strict=False)
        )

    def train(self, mode: bool = True) -> "GRURCN":
        """A frozen trunk stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.config.frozen:
            self.trunk.eval()
        return self

    def forward(self, clips: Tensor, draw: Tensor) -> Tensor:
        """clips (B, T, I, S, S), normalised; draw (B,) int64, each clip's random bits for dropout
        -> log-probabilities of each level (B, L, K). log_mean_vote averages them to those of the clip."""
        return self.votes(self.maps(clips, draw), draw)

    def maps(self, clips: Tensor, draw: Tensor) -> list[Tensor]:
        """clips (B, T, I, S, S) -> each tap's maps (B, T, X, H, W), which lie frame by frame in memory, as the GRUs need them."""
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
            pooled = x.mean(dim=(-2, -1))  # (B, 1 or T, C): after the last frame, or of each frame
            if self.training:
                pooled = dropout(pooled, self.config.dropout, draw, level)
            votes.append(log_mean_vote(head(pooled).float().log_softmax(dim=-1)))  # (B, K)
        return torch.stack(votes, dim=1)

    def last_states(self, maps: list[Tensor]) -> list[Tensor]:
        """Each tap's state after all frames (B, 1, C, H, W). Both directions' channels are joined."""
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
        """fc6 (T*B, X) -> the same with dropout if the trunk is in training; all frames of a clip lose the same channels."""
        if not self.trunk.training:
            return fc6
        by_clip = fc6.unflatten(0, (-1, len(draw))).transpose(0, 1)  # (B, T, X)
        dropped = dropout(by_clip, self.config.trunk_dropout, draw, level=len(self.heads))
        return dropped.transpose(0, 1).flatten(0, 1)


def recomputed(gru: nn.Module, x: Tensor, below: Tensor | None, reverse: bool) -> Tensor:
    """gru(x, below, reverse), which keeps only x and below for the backward pass and runs again in it.

    It runs on a quarter of the clips at a time, so that memory for the backward pass is needed for a quarter of one level.
    """
    size = -(-len(x) // 4)
    belows = [None] * len(x) if below is None else below.split(size)
    pieces = [
        checkpoint(gru, *piece, reverse, use_reentrant=False) for piece in zip(x.split(size), belows, strict=False)
    ]
    return torch.cat(pieces)  # pyright: ignore[reportArgumentType]


def pooled_to(states: Tensor, size: int) -> Tensor:
    """states (B, T, C, H, W) of the level below, max-pooled to size x size cells: 2 x 2 between neighbouring pools."""
    frames = states.transpose(0, 1)  # the order in memory
    cells = states.shape[-1] // size
    pooled = functional.max_pool2d(frames.flatten(0, 1), cells) if cells > 1 else frames.flatten(0, 1)
    return pooled.unflatten(0, frames.shape[:2]).transpose(0, 1)
