"""The options of the fixed encoders of a captioning run."""

import dataclasses
from dataclasses import dataclass

from grurcn.inference.model_source import absolute_source
from grurcn.models.trunks.base import trunk_spec


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Fixed encoders of a video's segments; those that are named stand side by side."""

    segments: int = 28
    """Equally spaced segments of a video, K; a video of fewer frames has one a frame."""
    frame: str | None = None
    """Run (STORAGE/NAME, one of its checkpoints, or runs:/ID) whose trunk sees the first frame of each segment: its vector of the
    whole frame (fc7, pooled), or else all maps that the run reads, averaged over space."""
    states: str | None = None
    """Run of a GRU-RCN that sees the first frames of each segment, as many as its clips have: its last states."""
    entity: str | None = None
    """Weights of a trunk that sees the first frame of each segment too: imagenet, a file, a URL, a run."""
    entity_trunk: str = "mobilenet_v2"
    """The trunk of those weights."""
    entity_size: int = 224
    """Height and width of the frames that it sees, in pixels."""

    def __post_init__(self) -> None:
        if self.segments < 1 or self.entity_size < 1:
            raise ValueError(f"segments {self.segments}, entity_size {self.entity_size}: expected at least 1 of each")
        trunk_spec(self.entity_trunk)

    @property
    def named(self) -> bool:
        """Whether any encoder is named; if not, the shards must hold vectors."""
        return any((self.frame, self.states, self.entity))

    @property
    def of_mlflow(self) -> bool:
        """Whether MLflow is to be asked for a run."""
        return any(str(source).startswith("runs:") for source in (self.frame, self.states, self.entity))

    def absolute(self) -> "EncoderConfig":
        """The same sources, paths as seen from any folder."""
        places = {name: absolute_source(getattr(self, name)) for name in ("frame", "states", "entity")}
        return dataclasses.replace(self, **places)
