"""MobileNetV2 (Sandler et al. 2018), a trunk for small machines: frames -> {tap: map}.

Parameters and buffers have torchvision's names: features.0.0.weight ... features.18.1.running_var. A frame of 224 x 224 pixels
takes 0.6 GFLOP, and 31 in VGG-16.

N frames, I their channels, S their height and width, X a map's channels.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from grurcn.models.trunks.base import Drop, Tap, Trunk, TrunkSpec, scale_channels, select_taps

# torchvision names the file after the first digits of its SHA-256.
IMAGENET = "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth#sha256=b0353104"

# Table 2 of the paper, a row per stage: expansion, output channels, number of blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FIRST_CHANNELS, LAST_CHANNELS = 32, 1280
NUM_SUMS = sum(num_blocks - 1 for _, _, num_blocks, _ in STAGES)  # residual sums: 10
# Number in `features` of the last layer of each stride; "pooled" is the mean of the last layer's map.
TAP_OF = {3: "stride4", 6: "stride8", 13: "stride16", 17: "stride32", 18: "pooled"}


class MobileNetV2(Trunk):
    """frames -> {tap: map}; a map of stride s has a cell for every s pixels and one for the rest, if any.

    Batch norm uses its stored statistics, in training too: a batch's own would depend on the number of workers. Its scales and
    shifts are trained like other weights.
    """

    name: ClassVar[str] = "mobilenet_v2"
    first_weight: ClassVar[str] = "features.0.0.weight"

    def __init__(self, taps: Sequence[str], width: float = 1.0, in_channels: int = 3):
        """width multiplies the channels of every layer. Raises ValueError for taps that MobileNetV2 does not have."""
        super().__init__()
        self.taps = select_taps(taps, known_taps(width), "MobileNetV2")
        self.features = features(max(number for number, tap in TAP_OF.items() if tap in taps), width, in_channels)

    def forward(self, frames: Tensor, drop: Drop | None = None) -> dict[str, Tensor]:
        """frames (N, I, S, S), normalised -> {tap: (N, X, S / stride, S / stride), rounded up}, in the order of the taps.

        drop is never called: MobileNetV2's only dropout is in front of ImageNet's classes, which are not built.
        """
        maps: dict[str, Tensor] = {}
        x = frames.contiguous(memory_format=torch.channels_last)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in TAP_OF:
                maps[TAP_OF[number]] = x
        if "pooled" in maps:
            maps["pooled"] = maps["pooled"].mean(dim=(-2, -1), keepdim=True)  # (N, X, 1, 1)
        return {tap: maps[tap] for tap in self.taps}


def known_taps(width: float) -> dict[str, Tap]:
    """Every tap of a MobileNetV2 that is `width` times as wide, the deepest last."""
    maps = {
        f"stride{stride}": Tap(scale_channels(channels, width), stride, rounds_up=True)
        for stride, channels in ((4, 24), (8, 32), (16, 96), (32, 320))
    }
    return {**maps, "pooled": Tap(scale_channels(LAST_CHANNELS, width), stride=None)}


def features(last: int, width: float, in_channels: int) -> nn.Sequential:
    """The layers 0 to `last`: a convolution, the blocks of all stages, a 1x1 convolution."""
    channels = scale_channels(FIRST_CHANNELS, width)
    layers: list[nn.Module] = [norm_relu(convolution(in_channels, channels, 3, stride=2))]
    for expansion, stage_channels, num_blocks, stride in STAGES:
        for number in range(num_blocks):
            out_channels = scale_channels(stage_channels, width)
            layers.append(Block(channels, out_channels, expansion, stride=1 if number else stride, adds=number > 0))
            channels = out_channels
    layers.append(norm_relu(convolution(channels, scale_channels(LAST_CHANNELS, width))))
    return nn.Sequential(*layers[: last + 1])


class Block(nn.Module):
    """An inverted residual: 1x1 to more channels, depthwise 3x3, 1x1 to few channels without a ReLU."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int, adds: bool):
        """adds: the input is added to the output."""
        super().__init__()
        self.adds = adds
        inside = in_channels * expansion
        norm = nn.BatchNorm2d(channels)
        if adds:
            # With stored statistics, a new trunk's maps would grow with every sum. A small branch prevents it (De and
            # Smith 2020): the variance grows by e at most, (1 + 1/10) ** 10.
            nn.init.constant_(norm.weight, NUM_SUMS**-0.5)
        self.conv = nn.Sequential(
            *([norm_relu(convolution(in_channels, inside))] if expansion > 1 else []),
            norm_relu(convolution(inside, inside, 3, stride=stride, groups=inside, rectified=True)),
            convolution(inside, channels, rectified=True),
            norm,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, X, H, W) -> (N, X', H / stride, W / stride), rounded up."""
        *layers, convolution, norm = self.conv
        branch = x
        for layer in layers:
            branch = layer(branch)
        branch = normed(branch, convolution, norm)
        return x + branch if self.adds else branch


class NormReLU(nn.Sequential):
    """A convolution, its batch norm and a ReLU6."""

    def forward(self, input: Tensor) -> Tensor:
        """input (N, X, H, W) -> (N, X', H / stride, W / stride), rounded up."""
        convolution, norm, relu = self
        return relu(normed(input, convolution, norm))


def norm_relu(convolution: nn.Conv2d) -> NormReLU:
    # In place: the convolution's output is no tap, and the backward pass does not read it.
    return NormReLU(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU6(inplace=True))


def normed(x: Tensor, convolution: nn.Module, norm: nn.Module) -> Tensor:
    """norm(convolution(x)) as one convolution.

    With stored statistics a batch norm is a scale and a shift per channel. Scaling the kernel costs nothing; another pass over
    the maps costs as much as the convolution.
    """
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    kernel, shift = convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    stride, padding = convolution.stride, convolution.kernel_size[0] // 2
    return functional.conv2d(x, kernel, shift, stride, padding, groups=convolution.groups)


def convolution(
    in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, rectified: bool = False
) -> nn.Conv2d:
    """A convolution whose initial weights keep the variance of its input; rectified: its input comes from a ReLU."""
    layer = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if rectified else "linear")
    return layer


SPEC = TrunkSpec(
    title="MobileNetV2",
    build=MobileNetV2,
    taps=known_taps,
    levels={"stride4": 32, "stride8": 64, "stride16": 128, "stride32": 256, "pooled": 512},
    imagenet=IMAGENET,
)
