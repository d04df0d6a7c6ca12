"""What a training is asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cluster.workers.options import Workers
from grurcn.training.recipes import TrainingRecipe
from shards.reading.stages import ReadingOptions

Flat = tyro.conf.arg(name="")  # the group's options need no prefix


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training."""

    shards: str
    """Folder or URL (s3://, gs://, http://) that make_shards wrote; every worker must see it."""
    storage: str = "runs"
    """Folder or URL (s3://, gs://) of all runs; every worker must see it."""
    name: str | None = None
    """Run name; also the name of its folder under --storage. Default: the recipe's name."""
    experiment: str = "grurcn"
    """MLflow experiment of the run."""
    register: str | None = None
    """Name under which the best model is registered in MLflow's model registry when the run ends."""
    log_every: int = 20
    """Log progress every N steps."""
    save_every: int | None = None
    """Save a checkpoint every N steps, and after each validation. Default: the recipe's val_every."""
    keep: int = 2
    """Number of newest checkpoints to keep; the best model is always kept."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    accumulation: int = 1
    """Compute each worker's part of a batch in N parts, to use less memory."""
    recompute: bool = False
    """Compute the GRUs again in the backward pass instead of storing what it needs: less memory, more time."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what is divided among the workers (1: optimizer state; 2: gradients too; 3: weights too)."""
    deepspeed: Path | None = None
    """Your own DeepSpeed JSON file instead of cluster/deepspeed/zeroN.json."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[ReadingOptions, Flat] = field(default_factory=ReadingOptions)
    recipe: Annotated[TrainingRecipe, Flat]
    """What decides the numbers of a run. A change of any of these options makes another run."""
    recipe_name: tyro.conf.Suppress[str] = "custom"
    """Name of the recipe, for the run and for MLflow."""

    def __post_init__(self) -> None:
        for name in ("accumulation", "log_every", "save_every", "keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
