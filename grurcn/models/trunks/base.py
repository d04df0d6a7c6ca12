"""What every trunk promises: frames -> {tap: map}, with each map's channels and stride known before it runs.

vgg.py and mobilenet.py keep the promise, one file a trunk. Parameters have torchvision's names, so that its published files of
ImageNet weights load as they are; only the layers up to the deepest tap are built.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


class BadWeights(ValueError):
    """A file of weights that does not fit the trunk. The message names the first parameters that differ."""


@dataclass(frozen=True)
class Tap:
    """What is known of a map before the trunk runs."""

    channels: int
    stride: int | None  # input pixels a cell; None where the whole frame is one cell
    rounds_up: bool = False  # a frame whose size is no multiple of the stride: its rest gets a cell too

    def size(self, frame_size: int) -> int:
        """Height and width of the map of a frame of frame_size x frame_size pixels."""
        if self.stride is None:
            return 1
        return -(-frame_size // self.stride) if self.rounds_up else frame_size // self.stride


Drop = Callable[[Tensor], Tensor]


class Trunk(Protocol):
    """A network of one frame at a time, read at several depths."""

    name: ClassVar[str]  # torchvision's
    first: ClassVar[str]  # the weight of the first convolution, the one that sees the frames' channels
    taps: dict[str, Tap]  # in the order in which maps are given back

    def __call__(self, frames: Tensor, drop: Drop | None = None) -> dict[str, Tensor]:
        """frames (N, I, S, S) -> {tap: (N, X, S / stride, S / stride)}, in the order of the taps."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


def chosen(taps: Sequence[str], known: Mapping[str, Tap], trunk: str) -> dict[str, Tap]:
    """Those taps of the known ones. Raises ValueError for one that the trunk lacks, for one named twice, for none."""
    unknown = [tap for tap in taps if tap not in known]
    if unknown or not taps:
        raise ValueError(f"taps {', '.join(unknown) or '(none)'}: {trunk} has {', '.join(known)}")
    if len(set(taps)) < len(taps):
        raise ValueError(f"taps {', '.join(taps)}: wanted each once")
    return {tap: known[tap] for tap in taps}


def scaled(channels: int, width: float) -> int:
    """The channels of a layer in a trunk whose layers are `width` times as wide."""
    return max(1, round(channels * width))


def load_weights(trunk: Trunk, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights by torchvision's names; those of layers behind the deepest tap are left out.

    Weights that were trained on colour also start a trunk whose frames have other channels: for_channels. Raises BadWeights,
    naming `source`, if a parameter is missing or has another shape; the trunk is left as it was.
    """
    wanted: dict[str, Tensor] = trunk.state_dict()
    # How many batches the statistics of a batch norm were taken from: nothing reads it, and old files lack it.
    found = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")} | dict(weights)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise BadWeights(
            f"{source}: no {missing[0]} ({len(missing)} of the trunk's {len(wanted)} parameters are missing; found "
            f"{', '.join(list(weights)[:3])}, ...); wanted torchvision's {trunk.name} weights, or those of a {trunk.name} "
            "that was built as deep"
        )
    if trunk.first in found:
        found[trunk.first] = for_channels(found[trunk.first], wanted[trunk.first].shape[1])
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise BadWeights(
                f"{source}: {name} is {tuple(found[name].shape)}, the trunk wants {tuple(parameter.shape)}; "
                "weights fit only a trunk of the same width (--model.width 1 for torchvision's) that sees as many channels"
            )
    trunk.load_state_dict({name: found[name] for name in wanted})


def for_channels(kernels: Tensor, in_channels: int) -> Tensor:
    """The first convolution's kernels (C, 3, k, k) -> (C, I, k, k): their mean over colour, for each of I channels of optical
    flow (Wang et al. 2015, "Towards good practices for very deep two-stream ConvNets"). Kernels of anything but colour stay.

    As in the models that they released, it is not scaled by 3 / I. The sum over I channels of one and the same picture is
    then I / 3 times that of the picture in grey; but fields of flow are zero where nothing moves, and have either sign.
    """
    if kernels.dim() != 4 or kernels.shape[1] != 3 or in_channels == 3:
        return kernels
    return kernels.mean(dim=1, keepdim=True).expand(-1, in_channels, -1, -1)
