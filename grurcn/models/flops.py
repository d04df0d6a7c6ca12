"""What a whole model multiplies, by arithmetic: nothing is built and nothing runs. FLOPs are twice the multiplications.

A step of training multiplies once forward; where a layer learns, again for the gradient of its weights; and where anything
before it learns, again for the gradient of what it saw. So a frozen trunk counts once, a learned layer three times, and the
first learned one twice: the input products of GRUs over a frozen trunk, or the first convolution of a trunk that learns.

Counted is what tensor cores do: convolutions and matrix products. Left out are pooling, norms, activations, the GRUs' gates,
the optimizer, and cutting out and resizing frames (pixels.py; at most 0.07e9 multiplications a frame of 340 x 256, small
beside VGG-16's 15e9, not beside MobileNetV2's 0.3e9). Running the GRUs again for less memory (recompute) is no
progress, and does not count.

N1 x N2 cells a map, O_x input channels, O_h state channels, k the kernel's side, T frames (paper section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from grurcn.models import c3d
from grurcn.models.gru_rcn import ModelConfig
from grurcn.models.trunks import mobilenet, vgg
from grurcn.models.trunks.base import scaled

Part = Literal["trunk", "grus", "heads"]


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product of a clip's forward pass, over all frames in which it runs."""

    part: Part
    multiplications: int
    passes: int  # of training: 1 frozen; 2 learned, over what does not learn; 3 learned, over what does


@dataclass(frozen=True, kw_only=True)
class Multiplications:
    """Of one clip, by part."""

    trunk: int
    grus: int
    heads: int

    @property
    def total(self) -> int:
        return self.trunk + self.grus + self.heads

    @property
    def flops(self) -> int:
        """A multiplication and the addition that goes with it."""
        return 2 * self.total


def forward_multiplications(
    config: ModelConfig, num_frames: int, size: int, num_classes: int, in_channels: int = 3
) -> Multiplications:
    """Of one clip's forward pass: num_frames frames of size x size pixels with in_channels channels.

    The GRUs' are those of cost.py (and of the paper) less the recurrent ones of the first frame, whose state before is zero.
    Raises ValueError if the model cannot take such clips.
    """
    return by_part([(each, 1) for each in products(config, num_frames, size, num_classes, in_channels)])


def training_multiplications(
    config: ModelConfig, num_frames: int, size: int, num_classes: int, in_channels: int = 3
) -> Multiplications:
    """Of one clip, forward and backward, in a step of training. Raises ValueError if the model cannot take such clips."""
    return by_part([(each, each.passes) for each in products(config, num_frames, size, num_classes, in_channels)])


def by_part(counted: list[tuple[Product, int]]) -> Multiplications:
    """Each product so many times -> their sums."""
    sums: dict[Part, int] = {"trunk": 0, "grus": 0, "heads": 0}
    for product, times in counted:
        sums[product.part] += product.multiplications * times
    return Multiplications(**sums)


def products(config: ModelConfig, num_frames: int, size: int, num_classes: int, in_channels: int) -> Iterator[Product]:
    """All that a clip's forward pass multiplies."""
    config.check_size(num_frames, size)
    if config.kind == "c3d":
        yield from learned_trunk(c3d_layers(config.width, in_channels))  # C3D is never frozen
        yield Product("heads", scaled(vgg.FC_CHANNELS, config.width) * num_classes, passes=3)
        return
    layers = vgg_layers if config.trunk == "vgg16" else mobilenet_layers
    of_clip = [num_frames * each for each in layers(config, size, in_channels)]
    if config.frozen:
        yield from (Product("trunk", each, passes=1) for each in of_clip)
    else:
        yield from learned_trunk(of_clip)
    if config.kind == "gru-rcn":
        yield from gru_products(config, num_frames, size)
        pooled, votes, passes = [hidden * config.directions for hidden in config.hidden], 1, 3
    else:
        pooled, votes, passes = [tap.channels for tap in config.tap_maps.values()], num_frames, learned(config)
    yield from (Product("heads", votes * channels * num_classes, passes) for channels in pooled)


def learned(config: ModelConfig) -> int:
    """Passes of a learned layer that sees the trunk's maps."""
    return 2 if config.frozen else 3


def learned_trunk(layers: list[int]) -> Iterator[Product]:
    """The first layer sees pixels, which want no gradient."""
    return (Product("trunk", each, passes=3 if number else 2) for number, each in enumerate(layers))


def gru_products(config: ModelConfig, num_frames: int, size: int) -> Iterator[Product]:
    """The input products of all frames; the recurrent ones, of all but the first; where stacked, those of the level below."""
    below = 0
    for tap, hidden in zip(config.tap_maps.values(), config.hidden, strict=True):
        window = config.kernel_size**2 if tap.stride else 1
        each = window * hidden * tap.size(size) ** 2 * config.directions  # for an input channel, a frame and a gate
        yield Product("grus", 3 * tap.channels * each * num_frames, learned(config))
        yield Product("grus", 3 * hidden * each * (num_frames - 1), passes=3)
        yield Product("grus", 2 * below * each * num_frames, passes=3)
        below = hidden if config.stacked else 0


# Multiplications of each layer of a trunk, in the order in which they run: of one frame, for C3D of one clip.


def vgg_layers(config: ModelConfig, size: int, in_channels: int) -> list[int]:
    """Up to the deepest tap: a 3x3 convolution at every cell, then fc6 and fc7."""
    deepest = max(list(vgg.known_taps(config.width)).index(tap) for tap in config.taps) + 1  # 1 to 5 pools, fc6, fc7
    counts, channels, pools = [], in_channels, 0
    for layer in vgg.LAYERS:
        if pools == deepest:
            break
        if layer == "pool":
            pools += 1
        else:
            assert isinstance(layer, int)
            wanted, cells = scaled(layer, config.width), (size // 2**pools) ** 2
            counts.append(9 * channels * wanted * cells)
            channels = wanted
    fc = scaled(vgg.FC_CHANNELS, config.width)
    return counts + [vgg.FC_GRID**2 * channels * fc, fc * fc][: max(0, deepest - len(vgg.POOL_CHANNELS))]


def mobilenet_layers(config: ModelConfig, size: int, in_channels: int) -> list[int]:
    """Up to the deepest tap: a convolution, the blocks of all stages, a 1x1 convolution. Halving rounds up."""
    last = max(number for number, tap in mobilenet.TAP_OF.items() if tap in config.taps)
    channels, side = scaled(mobilenet.FIRST_CHANNELS, config.width), -(-size // 2)
    features = [[9 * in_channels * channels * side**2]]
    for expansion, stage_channels, num_blocks, first_stride in mobilenet.STAGES:
        for number in range(num_blocks):
            wanted, stride = scaled(stage_channels, config.width), 1 if number else first_stride
            features.append(block_layers(channels, wanted, expansion, side, -(-side // stride)))
            channels, side = wanted, -(-side // stride)
    features.append([channels * scaled(mobilenet.LAST_CHANNELS, config.width) * side**2])
    return [count for feature in features[: last + 1] for count in feature]


def block_layers(in_channels: int, channels: int, expansion: int, side: int, out_side: int) -> list[int]:
    """An inverted residual: 1x1 to more channels, 3x3 of each channel by itself, 1x1 to few."""
    inside = in_channels * expansion
    widen = [in_channels * inside * side**2] if expansion > 1 else []
    return [*widen, 9 * inside * out_side**2, inside * channels * out_side**2]


def c3d_layers(width: float, in_channels: int) -> list[int]:
    """Eight 3x3x3 convolutions, whose maps five poolings make smaller (the first in space only), then fc6 and fc7."""
    x64, x128, x256, x512, fc = (scaled(channels, width) for channels in (64, 128, 256, 512, vgg.FC_CHANNELS))
    frames, side = c3d.NUM_FRAMES, c3d.SIZE
    convolutions = [
        (in_channels, x64, frames * side**2),
        (x64, x128, frames * (side // 2) ** 2),
        (x128, x256, frames // 2 * (side // 4) ** 2),
        (x256, x256, frames // 2 * (side // 4) ** 2),
        (x256, x512, frames // 4 * (side // 8) ** 2),
        (x512, x512, frames // 4 * (side // 8) ** 2),
        (x512, x512, frames // 8 * (side // 16) ** 2),
        (x512, x512, frames // 8 * (side // 16) ** 2),
    ]
    return [*(27 * inputs * outputs * cells for inputs, outputs, cells in convolutions), x512 * 4 * 4 * fc, fc * fc]
