"""VGG-16 (Simonyan and Zisserman 2015) as one list of layers: frames -> {tap: map}.

Parameters have torchvision's names (features.0.weight ... classifier.3.bias), so its published file of ImageNet weights
loads as it is. Only the layers up to the deepest tap are built.

N frames, S the input's height and width, X a map's channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Channels of the 3x3 convolutions; "pool" is 2x2 max pooling. The n-th pool is the tap pool<n>.
LAYERS = (
    64,
    64,
    "pool",
    128,
    128,
    "pool",
    256,
    256,
    256,
    "pool",
    512,
    512,
    512,
    "pool",
    512,
    512,
    512,
    "pool",
)
TAPS = ("pool1", "pool2", "pool3", "pool4", "pool5", "fc6", "fc7")
FC_CHANNELS = 4096
FC_GRID = 7  # fc6 sees 7 x 7 cells


class BadWeights(ValueError):
    """A file of weights that does not fit the trunk. The message names the first parameters that differ."""


@dataclass(frozen=True)
class Tap:
    """What is known of a map before the trunk runs."""

    channels: int
    stride: int | None  # input pixels a cell; None where the whole frame is one cell


class VGG16(nn.Module):
    """frames -> {tap: map}; fc6 and fc7 are maps of 1 x 1."""

    def __init__(self, taps: Sequence[str], width: float = 1.0):
        """width multiplies the channels of every layer. Raises ValueError for taps that VGG-16 does not have."""
        super().__init__()
        unknown = [tap for tap in taps if tap not in TAPS]
        if unknown or not taps:
            raise ValueError(f"taps {', '.join(unknown) or '(none)'}: VGG-16 has {', '.join(TAPS)}")
        if len(set(taps)) < len(taps):
            raise ValueError(f"taps {', '.join(taps)}: wanted each once")
        self.taps = {tap: tap_of(tap, width) for tap in taps}
        deepest = max(TAPS.index(tap) for tap in taps)
        self.features = features(min(deepest, 4) + 1, width)
        self.classifier = classifier(deepest, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, frames: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """frames (N, 3, S, S), normalised -> {tap: (N, X, S / stride, S / stride)}, in the order of the taps.

        drop (N, X) -> (N, X) stands where VGG-16 has its dropout, between fc6 and fc7.
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


def tap_of(tap: str, width: float) -> Tap:
    if tap.startswith("fc"):
        return Tap(scaled(FC_CHANNELS, width), None)
    number = int(tap.removeprefix("pool"))
    return Tap(scaled((64, 128, 256, 512, 512)[number - 1], width), 2**number)


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def features(num_pools: int, width: float) -> nn.Sequential:
    """The convolutions up to the given pool."""
    layers: list[nn.Module] = []
    channels, pools = 3, 0
    for layer in LAYERS:
        if pools == num_pools:
            break
        if layer == "pool":
            layers.append(nn.MaxPool2d(2))
            pools += 1
        else:
            assert isinstance(layer, int)
            layers += [nn.Conv2d(channels, scaled(layer, width), 3, padding=1), nn.ReLU(inplace=True)]
            channels = scaled(layer, width)
    return nn.Sequential(*layers)


def classifier(deepest: int, width: float) -> nn.Sequential:
    """fc6 and fc7, as far as taps need them; the last layer, ImageNet's 1,000 classes, is never built."""
    fc = scaled(FC_CHANNELS, width)
    layers: list[nn.Module] = []
    if deepest >= TAPS.index("fc6"):
        layers += [nn.Linear(scaled(512, width) * FC_GRID**2, fc), nn.ReLU()]
    if deepest >= TAPS.index("fc7"):
        layers += [nn.Identity(), nn.Linear(fc, fc), nn.ReLU()]  # Identity: torchvision's number of the dropout
    return nn.Sequential(*layers)


def load_weights(trunk: VGG16, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights by torchvision's names; layers behind the deepest tap are left out.

    Raises BadWeights, naming `source`, if a parameter is missing or has another shape.
    """
    wanted = trunk.state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise BadWeights(
            f"{source}: no {missing[0]} ({len(missing)} of the trunk's {len(wanted)} parameters are missing; found "
            f"{', '.join(list(weights)[:3])}, ...); wanted torchvision's vgg16 weights"
        )
    for name, parameter in wanted.items():
        if weights[name].shape != parameter.shape:
            raise BadWeights(
                f"{source}: {name} is {tuple(weights[name].shape)}, the trunk wants {tuple(parameter.shape)}; "
                "weights fit a trunk of the same width only (--model.width 1 for torchvision's)"
            )
    trunk.load_state_dict({name: weights[name] for name in wanted})
