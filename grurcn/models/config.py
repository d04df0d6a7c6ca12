"""What a classification model is, as a recipe states it: checked before anything is built."""

from dataclasses import dataclass
from typing import Literal

from grurcn.models.trunks.base import Tap, select_taps, trunk_spec

DEFAULT_TRUNK = "vgg16"
LEVELS = trunk_spec(DEFAULT_TRUNK).levels
C3D_FRAMES, C3D_SIZE = 16, 112  # the only clips that C3D takes: frames, and their height and width in pixels


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the network is."""

    kind: Literal["gru-rcn", "frames", "c3d"] = "gru-rcn"
    """gru-rcn: convolutional GRUs over the maps (over one 1 x 1 tap, the paper's fully connected RNN). frames: the same heads on
    each frame's maps, scores averaged over the frames, so that motion is not seen. c3d: 3-D convolutions."""
    trunk: str = DEFAULT_TRUNK
    """Network of single frames whose maps are read: vgg16 (the paper's), mobilenet_v2 (fifty times cheaper), or one of your own
    (register_trunk)."""
    taps: tuple[str, ...] = tuple(LEVELS)
    """Layers of the trunk whose maps are read (vgg16: pool1 ... pool5, fc6, fc7; mobilenet_v2: stride4 ... stride32,
    pooled)."""
    hidden: tuple[int, ...] = tuple(LEVELS.values())
    """State channels of each tap's GRU."""
    kernel_size: int = 3
    """Kernel size of the GRUs' convolutions, odd. A 1 x 1 map gets 1 x 1 kernels, with the same result."""
    bidirectional: bool = False
    """Add a second GRU per tap, with its own weights, from the last frame to the first (section 3)."""
    stacked: bool = False
    """Each tap's gates also see the state of the tap before, max-pooled to its size (eq. 9 to 12)."""
    dropout: float = 0.7
    """Fraction of each pooled state that training drops in front of its head."""
    trunk_dropout: float = 0.5
    """Fraction of fc6 that training drops in front of fc7, if the trunk is trainable."""
    width: float = 1.0
    """Multiplies the channels of every layer of the trunk; 1 is the published network."""
    weights: str | None = None
    """Pretrained weights of the trunk: imagenet; a file with torchvision's parameter names, or URL#sha256=HEX; the folder of
    a run or of a checkpoint whose trunk to start from; or runs:/ID of MLflow."""
    freeze: bool | None = None
    """Freeze the trunk. Default: only if it has pretrained weights."""

    def __post_init__(self) -> None:
        if self.kind != "c3d":
            self.tap_maps  # noqa: B018  # raises for an unknown trunk or tap
        if self.kind == "gru-rcn" and len(self.hidden) != len(self.taps):
            raise ValueError(
                f"taps {', '.join(self.taps)}; hidden {', '.join(map(str, self.hidden))}: expected one hidden size per tap"
            )
        if self.width <= 0 or min(self.hidden, default=1) < 1:
            raise ValueError(
                f"width {self.width:g}, hidden {', '.join(map(str, self.hidden))}: expected a width above 0 and hidden sizes "
                "of at least 1"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size}: expected an odd number, so that a map keeps its size")
        for name, value in (("dropout", self.dropout), ("trunk_dropout", self.trunk_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} {value:g}: expected at least 0 and below 1 (the fraction that is dropped)")
        if self.kind != "gru-rcn" and (self.bidirectional or self.stacked):
            raise ValueError(
                f"bidirectional and stacked are variants of gru-rcn; a model of kind {self.kind} has no GRUs"
            )

    @property
    def frozen(self) -> bool:
        """Whether the trunk is frozen."""
        return self.weights is not None if self.freeze is None else self.freeze

    @property
    def tap_maps(self) -> dict[str, Tap]:
        """The taps with their channels and strides."""
        return select_taps(self.taps, trunk_spec(self.trunk).taps(self.width), self.trunk)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def check_size(self, num_frames: int, size: int) -> None:
        """Raises ValueError if the model cannot take clips of num_frames frames of size x size pixels."""
        if self.kind == "c3d":
            if (num_frames, size) != (C3D_FRAMES, C3D_SIZE):
                raise ValueError(
                    f"clips of {num_frames} frames of {size} x {size}: C3D takes {C3D_FRAMES} frames of {C3D_SIZE} x "
                    f"{C3D_SIZE} (--clips.num-frames {C3D_FRAMES} --clips.size {C3D_SIZE})"
                )
            return
        sizes = {name: tap.size(size) for name, tap in self.tap_maps.items()}
        for name, tap in self.tap_maps.items():
            if not sizes[name]:
                raise ValueError(
                    f"size {size}: too small for the tap {name}, whose cells are {tap.stride} pixels wide; expected at least "
                    f"{tap.stride}, or taps that are less deep"
                )
        for below, above in zip(self.taps, self.taps[1:], strict=False):
            if self.stacked and sizes[below] % sizes[above]:
                raise ValueError(
                    f"stacked taps {below} ({sizes[below]} x {sizes[below]} cells) and {above} ({sizes[above]} x "
                    f"{sizes[above]}), for frames of {size} pixels: states cannot be pooled from the first to the second; "
                    "expected sizes that each divide the one before (frames of a multiple of the deepest stride)"
                )
