"""A model's summary, without weights and without running it: parameters, multiplications and FLOPs, by part and by level.

Multiplications are those of convolutions and matrix products, which tensor cores do. Pooling, norms, activations, the GRUs'
gates and the optimizer are not counted. Neither is resizing frames (pixels.py): at most 0.07e9 multiplications for a frame of
340 x 256 pixels, little beside VGG-16's 15e9, much beside MobileNetV2's 0.3e9. FLOPs are twice the multiplications.

A training step multiplies once in the forward pass, once for the gradient of each trainable weight, and once for the gradient of
each input that depends on trainable weights. So a frozen trunk counts once and a trainable layer three times. The first trainable
layer counts twice: the GRUs' input products over a frozen trunk, or the first convolution of a trainable trunk. GRUs that are
recomputed to save memory do not count again.

N1 x N2 cells of a map, O_x input channels, O_h state channels, k the kernel's side, T frames (paper section 3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from grurcn.models.build import build_model
from grurcn.models.c3d import C3D
from grurcn.models.config import ModelConfig
from grurcn.models.gru import ConvGRU
from grurcn.models.gru_rcn import GRURCN
from grurcn.models.trunks.base import Tap

Part = Literal["trunk", "grus", "heads"]


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """A number for each part of a model. C3D counts as a trunk with a head."""

    trunk: int
    grus: int
    heads: int

    @property
    def total(self) -> int:
        return self.trunk + self.grus + self.heads


@dataclass(frozen=True, kw_only=True)
class LevelSummary:
    """One level's GRU, or its GRUs of both directions."""

    tap: str
    channels: int  # O_x
    size: int  # N1 = N2, cells
    hidden: int  # O_h, of each direction
    parameters: int  # 3 k k (O_x O_h + O_h O_h), and 2 k k O_below O_h if stacked
    multiplications: int  # of a clip: the parameters, at every cell of every frame
    fully_connected: int  # parameters of a fully connected GRU's input matrices on the same map: 3 N1 N2 O_x O_h


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Parameters of a model, and its multiplications for one clip."""

    parameters: PartCounts
    trainable: int  # parameters
    forward: PartCounts  # multiplications of the forward pass
    training: PartCounts  # multiplications of forward and backward pass
    levels: tuple[LevelSummary, ...]  # of a model of kind gru-rcn; others have none

    @property
    def training_flops(self) -> int:
        """FLOPs of one clip in a training step: a multiplication and an addition each."""
        return 2 * self.training.total


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product of a clip's forward pass, over all frames."""

    part: Part
    multiplications: int
    passes: int  # of training: 1 frozen; 2 trainable, over inputs without gradients; 3 trainable, over inputs with them


def summarize(config: ModelConfig, num_classes: int, num_frames: int, size: int, in_channels: int = 3) -> ModelSummary:
    """The summary of a model for clips of num_frames frames of size x size pixels with in_channels channels.

    The GRUs' multiplications are those of the levels (and of the paper) without the recurrent ones of the first frame, whose
    previous state is zero. Raises ValueError if the model cannot take such clips.
    """
    config.check_size(num_frames, size)
    with torch.device("meta"):  # shapes without numbers
        model = build_model(config, num_classes, seed=0, in_channels=in_channels).eval()
    if isinstance(model, GRURCN):
        products = [*trunk_products(model, num_frames, size, in_channels), *gru_products(model, num_frames, size)]
        products += head_products(model, num_frames)
    else:
        products = c3d_products(model)
    parts: dict[Part, int] = {"grus": 0, "heads": 0, "trunk": 0}
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return ModelSummary(
        parameters=PartCounts(**parts),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        forward=count_by_part([(product, 1) for product in products]),
        training=count_by_part([(product, product.passes) for product in products]),
        levels=tuple(level_summaries(model, num_frames, size)) if isinstance(model, GRURCN) else (),
    )


def part_of(parameter: str) -> Part:
    """The part of a model that a parameter belongs to, by its name."""
    module = parameter.partition(".")[0]
    if module in ("grus", "reverse_grus"):
        return "grus"
    return "heads" if module in ("heads", "head") else "trunk"


def count_by_part(products: list[tuple[Product, int]]) -> PartCounts:
    """The multiplications of each product times a number, summed by part."""
    sums: dict[Part, int] = {"trunk": 0, "grus": 0, "heads": 0}
    for product, times in products:
        sums[product.part] += product.multiplications * times
    return PartCounts(**sums)


# Products of each part


def trunk_products(model: GRURCN, num_frames: int, size: int, in_channels: int) -> list[Product]:
    frame = torch.empty(1, in_channels, size, size, device="meta")
    layers = [num_frames * layer for layer in count_products(lambda: model.trunk(frame))]
    if model.config.frozen:
        return [Product("trunk", layer, passes=1) for layer in layers]
    return trainable_trunk(layers)


def trainable_trunk(layers: list[int]) -> list[Product]:
    """The first layer's input is pixels, which need no gradient."""
    return [Product("trunk", layer, passes=3 if number else 2) for number, layer in enumerate(layers)]


def gru_products(model: GRURCN, num_frames: int, size: int) -> Iterator[Product]:
    """Input products and those of the level below run in all frames, recurrent products in all but the first."""
    for _, tap, grus in gru_levels(model):
        cells = tap.size(size) ** 2
        for gru in grus:
            below = 0 if gru.v_gates is None else gru.v_gates.numel()
            inputs, recurrent = gru.w_gates.numel() + gru.w.numel(), gru.u_gates.numel() + gru.u.numel()
            yield Product("grus", inputs * cells * num_frames, passes_over_maps(model.config))
            yield Product("grus", recurrent * cells * (num_frames - 1), passes=3)
            yield Product("grus", below * cells * num_frames, passes=3)


def head_products(model: GRURCN, num_frames: int) -> list[Product]:
    """Heads run once over GRUs, and in every frame over maps."""
    over_grus = model.config.kind == "gru-rcn"
    votes, passes = (1, 3) if over_grus else (num_frames, passes_over_maps(model.config))
    return [Product("heads", votes * head.get_parameter("weight").numel(), passes) for head in model.heads]


def c3d_products(model: C3D) -> list[Product]:
    clip = torch.empty(1, *model.clip_shape, device="meta")
    *layers, head = count_products(lambda: model(clip, torch.zeros(1, dtype=torch.int64, device="meta")))
    return [*trainable_trunk(layers), Product("heads", head, passes=3)]


def passes_over_maps(config: ModelConfig) -> int:
    """Training passes of a layer whose input is the trunk's maps."""
    return 2 if config.frozen else 3


# Levels


def gru_levels(model: GRURCN) -> Iterator[tuple[str, Tap, list[ConvGRU]]]:
    """The tap of each level, and its GRUs of one or both directions."""
    for level, (name, tap) in enumerate(model.config.tap_maps.items()):
        grus: list[nn.Module] = [*model.grus[level : level + 1], *model.reverse_grus[level : level + 1]]
        yield name, tap, [gru for gru in grus if isinstance(gru, ConvGRU)]


def level_summaries(model: GRURCN, num_frames: int, size: int) -> Iterator[LevelSummary]:
    for name, tap, grus in gru_levels(model):
        if not grus:  # of a model of kind frames
            continue
        cells, hidden = tap.size(size) ** 2, grus[0].channels
        parameters = sum(parameter.numel() for gru in grus for parameter in gru.parameters())
        yield LevelSummary(
            tap=name,
            channels=tap.channels,
            size=tap.size(size),
            hidden=hidden,
            parameters=parameters,
            multiplications=parameters * cells * num_frames,
            fully_connected=3 * cells * tap.channels * hidden * len(grus),
        )


# Counting what runs


def count_products(function: Callable[[], object]) -> list[int]:
    """The multiplications of each convolution and matrix product that a function runs, in order."""
    with torch.no_grad(), ProductCounter() as counter:
        function()
    return counter.multiplications


class ProductCounter(TorchDispatchMode):
    """Notes the multiplications of each operation for which PyTorch's FlopCounterMode has a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.multiplications.append(formula(*args, **(kwargs or {}), out_val=out) // 2)
        return out
