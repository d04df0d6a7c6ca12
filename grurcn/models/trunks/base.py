"""What a trunk is: a network of single frames, read at several depths, whose maps are known before it runs.

Each trunk has a file (vgg.py, mobilenet.py) and a line in `__init__.py`, which registers it by name. A trunk's parameters have
torchvision's names, so its published ImageNet weights load as they are. Only the layers up to the deepest tap are built.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from grurcn.plugins import PLUGINS, import_plugins


class BadWeights(ValueError):
    """A file of weights that does not fit the trunk. The message names the first parameters that differ."""


@dataclass(frozen=True)
class Tap:
    """A layer of a trunk whose map can be read."""

    channels: int
    stride: int | None  # input pixels per cell; None if the whole frame is one cell
    rounds_up: bool = False  # if the frame's size is no multiple of the stride, the rest gets a cell too

    def size(self, frame_size: int) -> int:
        """Height and width of the map of a frame of frame_size x frame_size pixels."""
        if self.stride is None:
            return 1
        return -(-frame_size // self.stride) if self.rounds_up else frame_size // self.stride


Drop = Callable[[Tensor], Tensor]


class Trunk(nn.Module):
    """Base class of trunks: frames -> {tap: map}."""

    name: ClassVar[str]  # torchvision's
    first_weight: ClassVar[str]  # name of the kernels of the first convolution, which sees the frames' channels
    taps: dict[str, Tap]  # in the order in which maps are returned

    def forward(self, frames: Tensor, drop: Drop | None = None) -> dict[str, Tensor]:
        """frames (N, I, S, S), normalised -> {tap: (N, X, S / stride, S / stride)}, in the order of the taps.

        drop (N, X) -> (N, X) is the dropout between two fully connected layers, if the trunk has such layers.
        """
        raise NotImplementedError


# Trunks by name


@dataclass(frozen=True, kw_only=True)
class TrunkSpec:
    """A trunk as the registry knows it."""

    title: str  # for tables
    build: Callable[[Sequence[str], float, int], Trunk]  # (taps, width, channels of a frame) -> a new trunk
    taps: Callable[[float], dict[str, Tap]]  # width -> all taps, the deepest last
    levels: Mapping[str, int]  # the taps that GRU-RCN reads by default, with the state channels of their GRUs
    imagenet: str | None = None  # URL#sha256=HEX of published ImageNet weights

    @property
    def last_tap(self) -> str:
        """The deepest of the default taps: of the built-in trunks, the vector of the whole frame."""
        return list(self.levels)[-1]


TRUNKS: dict[str, TrunkSpec] = {}


def register_trunk(name: str, spec: TrunkSpec) -> None:
    """Makes a trunk available to recipes under a name: `--model.trunk NAME`.

    Workers on Ray are processes of their own: put the call into a module that GRURCN_PLUGINS names (docs/extending.md).
    """
    TRUNKS[name] = spec


def trunk_spec(name: str) -> TrunkSpec:
    """The registered trunk. Raises ValueError for a name that is not registered."""
    if name not in TRUNKS:
        import_plugins()
    if name not in TRUNKS:
        raise ValueError(
            f"trunk {name}: not registered; expected one of {', '.join(sorted(TRUNKS))}, or a trunk of your own that a module "
            f"named in {PLUGINS} registers (docs/extending.md)"
        )
    return TRUNKS[name]


def select_taps(taps: Sequence[str], known: Mapping[str, Tap], trunk: str) -> dict[str, Tap]:
    """The named taps, in their order. Raises ValueError for an unknown tap, one that is named twice, or none."""
    unknown = [tap for tap in taps if tap not in known]
    if unknown or not taps:
        raise ValueError(f"taps {', '.join(unknown) or '(none)'}: {trunk} has {', '.join(known)}")
    if len(set(taps)) < len(taps):
        raise ValueError(f"taps {', '.join(taps)}: expected each once")
    return {tap: known[tap] for tap in taps}


def scale_channels(channels: int, width: float) -> int:
    """The channels of a layer in a trunk whose layers are `width` times as wide."""
    return max(1, round(channels * width))


# Weights


def load_weights(trunk: Trunk, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights by torchvision's names, and ignores those of layers behind the deepest tap.

    Weights that were trained on colour also start a trunk whose frames have other channels: for_channels. Raises BadWeights,
    naming `source`, if a parameter is missing or has another shape. The trunk is then unchanged.
    """
    expected: dict[str, Tensor] = trunk.state_dict()
    # The number of batches behind a batch norm's statistics: nothing reads it, and old files lack it.
    found = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")} | dict(weights)
    missing = [name for name in expected if name not in found]
    if missing:
        raise BadWeights(
            f"{source}: no {missing[0]} ({len(missing)} of the trunk's {len(expected)} parameters are missing; found "
            f"{', '.join(list(weights)[:3])}, ...); expected torchvision's {trunk.name} weights, or those of a {trunk.name} "
            "that was built as deep"
        )
    if trunk.first_weight in found:
        found[trunk.first_weight] = for_channels(found[trunk.first_weight], expected[trunk.first_weight].shape[1])
    for name, parameter in expected.items():
        if found[name].shape != parameter.shape:
            raise BadWeights(
                f"{source}: {name} is {tuple(found[name].shape)}, expected {tuple(parameter.shape)}; weights fit only a trunk "
                "of the same width (--model.width 1 for torchvision's) with as many input channels"
            )
    trunk.load_state_dict({name: found[name] for name in expected})


def for_channels(kernels: Tensor, in_channels: int) -> Tensor:
    """Adapts the first convolution's kernels (C, 3, k, k) to frames of I channels -> (C, I, k, k).

    Each of the I channels of optical flow gets the mean over colour (Wang et al. 2015, "Towards good practices for very deep
    two-stream ConvNets"). Kernels of anything but colour are returned unchanged.

    As in the models that they released, the mean is not scaled by 3 / I. The sum over I equal channels is then I / 3 times
    that of a grey picture. But flow is zero where nothing moves, and has either sign.
    """
    if kernels.dim() != 4 or kernels.shape[1] != 3 or in_channels == 3:
        return kernels
    return kernels.mean(dim=1, keepdim=True).expand(-1, in_channels, -1, -1)
