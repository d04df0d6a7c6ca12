"""VGG-16 (Simonyan and Zisserman 2015), the paper's trunk: frames -> {tap: map}.

Parameters have torchvision's names: features.0.weight ... classifier.3.bias.

N frames, I their channels, S their height and width, X a map's channels.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from grurcn.models.trunks.base import Drop, Tap, Trunk, TrunkSpec, scale_channels, select_taps

IMAGENET = (
    "https://download.pytorch.org/models/vgg16-397923af.pth"
    "#sha256=397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
)

# Channels of the 3x3 convolutions; "pool" is 2x2 max pooling. The n-th pool is the tap pool<n>.
LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
POOL_CHANNELS = (64, 128, 256, 512, 512)
FC_CHANNELS = 4096
FC_GRID = 7  # fc6 sees 7 x 7 cells


class VGG16(Trunk):
    """frames -> {tap: map}; fc6 and fc7 are maps of 1 x 1."""

    name: ClassVar[str] = "vgg16"
    first_weight: ClassVar[str] = "features.0.weight"

    def __init__(self, taps: Sequence[str], width: float = 1.0, in_channels: int = 3):
        """width multiplies the channels of every layer. Raises ValueError for taps that VGG-16 does not have."""
        super().__init__()
        known = known_taps(width)
        self.taps = select_taps(taps, known, "VGG-16")
        depth = max(list(known).index(tap) for tap in taps) + 1  # 1 to 5 pools, then fc6 and fc7
        self.features = features(depth, width, in_channels)
        self.classifier = classifier(depth - len(POOL_CHANNELS), width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, frames: Tensor, drop: Drop | None = None) -> dict[str, Tensor]:
        """frames (N, I, S, S), normalised -> {tap: (N, X, S / stride, S / stride)}, in the order of the taps.

        drop (N, X) -> (N, X) replaces VGG-16's dropout between fc6 and fc7.
        """
        maps: dict[str, Tensor] = {}
        x, pools = frames.contiguous(memory_format=torch.channels_last), 0
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools += 1
                maps[f"pool{pools}"] = x
        if len(self.classifier):
            x = nn.functional.adaptive_avg_pool2d(x, FC_GRID).flatten(1)  # (N, 49X), in torchvision's order
            for i, layer in enumerate(self.classifier):
                x = drop(x) if drop and isinstance(layer, nn.Identity) else layer(x)
                if isinstance(layer, nn.ReLU):
                    maps["fc6" if i == 1 else "fc7"] = x[:, :, None, None]
        return {tap: maps[tap] for tap in self.taps}


def known_taps(width: float) -> dict[str, Tap]:
    """Every tap of a VGG-16 that is `width` times as wide, the deepest last."""
    pools = {
        f"pool{number}": Tap(scale_channels(channels, width), stride=2**number)
        for number, channels in enumerate(POOL_CHANNELS, start=1)
    }
    fc = Tap(scale_channels(FC_CHANNELS, width), stride=None)
    return {**pools, "fc6": fc, "fc7": fc}


def features(num_pools: int, width: float, in_channels: int) -> nn.Sequential:
    """The convolutions up to the given pool; there are five."""
    layers: list[nn.Module] = []
    channels, pools = in_channels, 0
    for layer in LAYERS:
        if pools == num_pools:
            break
        if layer == "pool":
            layers.append(nn.MaxPool2d(2))
            pools += 1
        else:
            assert isinstance(layer, int)
            layers += [nn.Conv2d(channels, scale_channels(layer, width), 3, padding=1), nn.ReLU(inplace=True)]
            channels = scale_channels(layer, width)
    return nn.Sequential(*layers)


def classifier(num_layers: int, width: float) -> nn.Sequential:
    """fc6 and fc7, or fc6, or nothing. The last layer, ImageNet's 1,000 classes, is never built."""
    fc = scale_channels(FC_CHANNELS, width)
    layers: list[nn.Module] = []
    if num_layers >= 1:
        layers += [nn.Linear(scale_channels(512, width) * FC_GRID**2, fc), nn.ReLU()]
    if num_layers >= 2:
        layers += [nn.Identity(), nn.Linear(fc, fc), nn.ReLU()]  # Identity: takes the dropout's number in torchvision
    return nn.Sequential(*layers)


SPEC = TrunkSpec(
    title="VGG-16",
    build=VGG16,
    taps=known_taps,
    levels={"pool2": 64, "pool3": 128, "pool4": 256, "pool5": 256, "fc7": 512},
    imagenet=IMAGENET,
)
