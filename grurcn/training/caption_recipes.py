"""Recipes of captioning: everything that decides such a run's numbers, by name (paper section 5.2, Table 2).

A recipe's docstring states its command, its cost, the paper's number and ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from grurcn.models.decoder import DecoderConfig
from grurcn.training.encoder_config import EncoderConfig
from grurcn.training.optim import OptimConfig
from grurcn.training.recipes import TrainingRecipe, changed, without_task

Select = Literal["loss", "bleu4", "meteor", "rouge_l", "cider"]


def adadelta() -> OptimConfig:
    """As the decoder's authors trained it: rate 1; 1e-4 |theta|^2 in the loss is a decay of twice that in its gradient."""
    return OptimConfig(optimizer="adadelta", learning_rate=1.0, weight_decay=2e-4, clip_norm=10.0)


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe(TrainingRecipe):
    """A captioning run."""

    task: ClassVar[str] = "captioning"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    optim: OptimConfig = field(default_factory=adadelta)
    standardise: bool = False
    """Give each value of a vector mean 0 and deviation 1 over training videos: for encoders whose values differ in size."""
    max_vocabulary: int = 20_000
    """Largest vocabulary; other words become <unk>."""
    min_count: int = 1
    """Leave out words that occur less than N times in the training captions."""
    max_words: int = 30
    """Cut captions after N words."""
    select: Select = "loss"
    """Validation score that selects the best model: loss (negative log-likelihood), or a score of captions."""
    beam: int = 5
    """Width of the beam search; 1 takes the likeliest word each time."""
    global_batch: int = 64
    """Pairs of a video and a caption in one step, over all workers."""
    num_steps: int = 100_000
    val_every: int = 750
    patience: int = 20
    """Stop after N validations without a better log-likelihood; 0 never stops early."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_vocabulary", "min_count", "max_words", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "CaptionRecipe":
        """The recipe that to_dict wrote as JSON."""
        return CaptionRecipe(
            **{
                **without_task(content),
                "encoder": EncoderConfig(**content["encoder"]),
                "decoder": DecoderConfig(**content["decoder"]),
                "optim": OptimConfig(**content["optim"]),
            }
        )


def caption() -> CaptionRecipe:
    """Captions by an LSTM with soft attention over a video's segments, seen by the encoders that you name (section 5.2, Table 2).

    python -m jobs.train caption --shards data/msvd-encoded --workers 8
    python -m jobs.train caption --shards data/msvd --encoder.states runs/gru-rcn-bidirectional --encoder.entity imagenet
    Cost: not yet measured; a GPU.  Paper: BLEU-4 .4963, CIDEr .5937 (GoogLeNet + bi-directional GRU-RCN).  Ours: not yet run.
    """
    return CaptionRecipe()


def caption_small() -> CaptionRecipe:
    """Captions by a small LSTM decoder: for CPUs and first tries.

    python -m jobs.train caption-small --shards data/mine-encoded
    Cost: minutes on two CPU cores.  Paper: none.  Ours: 'python -m jobs.demo caption' (docs/results.md).
    """
    return changed(
        CaptionRecipe(optim=OptimConfig(learning_rate=4e-3, schedule="cosine", warmup_steps=20, clip_norm=5.0)),
        encoder={"segments": 4},
        standardise=True,
        decoder={"hidden": 96, "embedding": 32, "dropout": 0.2},
        global_batch=32,
        num_steps=500,
        val_every=125,
        patience=0,
        beam=3,
    )


CAPTION_RECIPES: dict[str, Callable[[], CaptionRecipe]] = {"caption": caption, "caption-small": caption_small}
