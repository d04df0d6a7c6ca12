"""Fixed encoders of a video's segments, for captioning: stored frames -> one vector per segment (paper section 5.2).

    frame    the trunk's maps of the segment's first frame, averaged over space and joined; fc7 as it is
    states   the last states of a GRU-RCN over the segment's first frames, averaged over space, joined over levels

The vectors of several encoders are joined. Encoders are never trained.

B videos, K segments, R frames of each that are read, N = B * K, D a vector's length, S a part's input size, H x W the stored
frames' size.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grurcn.models.config import ModelConfig
from grurcn.models.gru_rcn import GRURCN
from grurcn.models.pixels import to_clips

CLIPS_AT_ONCE = 16  # more would need more memory, and not be faster


class BadEncoder(ValueError):
    """An encoder that cannot be read, or is not the one that is expected."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One encoder."""

    kind: Literal["frame", "states"]
    model: ModelConfig  # of kind gru-rcn for states, else of kind frames
    offsets: tuple[int, ...]  # its input frames, counted from the segment's start
    size: int  # height and width of its input, in pixels
    box_share: (
        float  # side of the centre crop, as a fraction of the stored frames' shorter side; stored under this name
    )

    @property
    def vector_size(self) -> int:
        if self.kind == "states":
            return sum(self.model.hidden) * self.model.directions
        return sum(tap.channels for tap in self.model.tap_maps.values())

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "PartConfig":
        """The configuration from the JSON of dataclasses.asdict."""
        model: dict[str, Any] = dict(content["model"])
        model |= {key: tuple(value) for key, value in model.items() if isinstance(value, list)}
        return PartConfig(**{**content, "model": ModelConfig(**model), "offsets": tuple(content["offsets"])})


class Encoder(nn.Module):
    """Several parts whose vectors are joined. Always in evaluation mode, and without gradients."""

    def __init__(self, parts: Sequence[PartConfig]):
        super().__init__()
        self.configs = tuple(parts)
        self.parts = nn.ModuleList(network_of(part) for part in parts)
        self.requires_grad_(False)
        self.train(False)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The R frames of a segment that any part needs, in order."""
        return read_offsets(self.configs)

    @property
    def vector_size(self) -> int:
        return sum(part.vector_size for part in self.configs)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(False)

    def forward(self, planes: Tensor) -> Tensor:
        """planes (B, K, R, H * 3 // 2, W) uint8 yuv420p, the frames at `offsets` of each segment -> vectors (B, K, D) float32."""
        segments = planes.flatten(0, 1)  # (N, R, H * 3 // 2, W)
        with torch.no_grad():
            vectors = [self.encode(some) for some in segments.split(CLIPS_AT_ONCE)]
        return torch.cat(vectors).unflatten(0, planes.shape[:2])

    def encode(self, planes: Tensor) -> Tensor:
        """planes (N, R, H * 3 // 2, W) -> (N, D)"""
        height, width = planes.shape[2] * 2 // 3, planes.shape[3]
        places = {offset: place for place, offset in enumerate(self.offsets)}
        vectors = []
        for part, network in zip(self.configs, self.parts, strict=True):
            box = planes.new_tensor([centre_box(height, width, part.box_share)], dtype=torch.int64)  # (1, 4)
            mirror = torch.zeros(len(planes), dtype=torch.bool, device=planes.device)
            seen = planes[:, [places[offset] for offset in part.offsets]]  # (N, T, H * 3 // 2, W)
            clips = to_clips(seen, box.expand(len(planes), -1), mirror, part.size)  # (N, T, 3, S, S)
            assert isinstance(network, GRURCN)
            vectors.append(vector_of(network, clips).float())
        return torch.cat(vectors, dim=1)


def network_of(part: PartConfig) -> GRURCN:
    """The part's network without heads."""
    network = GRURCN(part.model, num_classes=1)
    network.heads = nn.ModuleList()
    return network


def vector_of(network: GRURCN, clips: Tensor) -> Tensor:
    """clips (N, T, 3, S, S) -> the last states (N, C of all levels), or the first frame's maps (N, X of all taps), both averaged
    over space."""
    draw = torch.zeros(len(clips), dtype=torch.int64, device=clips.device)  # nothing is dropped
    maps = network.maps(clips, draw)
    levels = network.last_states(maps) if len(network.grus) else maps  # (N, T, C or X, H, W)
    return torch.cat([level[:, 0].mean(dim=(-2, -1)) for level in levels], dim=1)


def read_offsets(parts: Sequence[PartConfig]) -> tuple[int, ...]:
    """The frames of a segment that any of the parts needs, in order."""
    return tuple(sorted({offset for part in parts for offset in part.offsets}))


def centre_box(height: int, width: int, fraction: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of the centre square, as evaluations crop it (shards/reading/clips.py)."""
    side = round(min(height, width) * fraction)
    return (height - side) // 2, (width - side) // 2, side, side


def build_encoder(description: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Encoder:
    """The encoder that a description describes; its weights, where they are not given, are to be loaded with a checkpoint.

    Raises BadEncoder for other weights than those that it describes.
    """
    parts = [PartConfig.from_dict({key: part[key] for key in part if key != "source"}) for part in description["parts"]]
    encoder = Encoder(parts)
    if weights is not None:
        if weights_digest(weights) != description["weights"]:
            raise BadEncoder(
                f"the weights of {sources(description)} are not those that the encoder was described with; encode again"
            )
        encoder.load_state_dict(dict(weights))
    return encoder


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over all names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sources(description: Mapping[str, Any]) -> str:
    return " + ".join(f"{part['kind']} of {part['source']}" for part in description["parts"])
