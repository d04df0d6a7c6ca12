"""What state.json and run.json hold, as types. What earlier versions wrote is upgraded here, and nowhere else."""

from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.workers.events import Metrics

FORMAT = 3  # of state.json
Json = dict[str, Any]


class OtherFormat(ValueError):
    """A state.json that another version wrote."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Where a training is, and what its model needs besides its weights."""

    step: int  # steps done
    epoch: int = 0
    epoch_step: int = 0
    recipe: Json
    model: Json  # what the task's model needs without the data, such as classes and packing
    data_digest: str = ""
    mlflow_run_id: str = ""
    tracking_uri: str = ""
    lowest_loss: float | None = None  # of the validations
    validations_since: int = 0  # the one with the lowest loss
    metrics: list[Metrics] = field(
        default_factory=list
    )  # since the checkpoint before: they may be lost with the driver

    @property
    def task(self) -> str:
        return self.recipe["task"]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validation so far. sha256: of the model.safetensors of its step."""

    step: int
    sha256: str
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What an optimizer holds besides tensors. name: its class in torch.optim."""

    name: str
    trainable: list[str] = field(default_factory=list)  # names of parameters
    step_counts: dict[str, float]  # by parameter, where the optimizer counts
    loss_scale: Json | None = None  # scale and clean_steps, in fp16


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json. weights: the files that hold the model. sha256: of each file of the checkpoint, by name."""

    training: Training
    best: Best | None
    optimizer: Optimizer
    weights: list[str]
    sha256: dict[str, str]

    def to_json(self) -> Json:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Json) -> "CheckpointState":
        """Raises OtherFormat; KeyError, TypeError or AttributeError for what is no state."""
        found = content["format"]
        if found == 2:
            content = upgraded_state(content)
        elif found != FORMAT:
            raise OtherFormat(f"format {found} found, {FORMAT} expected; read it with the version that wrote it")
        training = content["training"]
        return cls(
            training=Training(**{**training, "metrics": [Metrics(**each) for each in training["metrics"]]}),
            best=Best(**content["best"]) if content["best"] else None,
            optimizer=Optimizer(**content["optimizer"]),
            weights=content["weights"],
            sha256=content["sha256"],
        )


@dataclass(frozen=True, kw_only=True)
class Identity:
    """run.json: what must be the same for a run to be resumed."""

    recipe_digest: str
    data_digest: str
    recipe: Json
    tracking_uri: str
    mlflow_run_id: str

    @classmethod
    def from_json(cls, content: Json) -> "Identity":
        return cls(**{**content, "recipe": upgraded_recipe(content["recipe"])})


def upgraded_recipe(recipe: Json) -> Json:
    """Recipes did not name their task; only those of captioning had a decoder."""
    return {"task": "captioning" if "decoder" in recipe else "classification", **recipe}


def upgraded_state(content: Json) -> Json:
    """A state of format 2, which had one dictionary for what the training and the task keep."""
    meta, best = dict(content["meta"]), dict(content["best"] or {})
    training = {
        "recipe": upgraded_recipe(meta.pop("recipe", {})),
        "lowest_loss": meta.pop("lowest", None),
        "validations_since": meta.pop("stale", 0),
        "metrics": [
            {"step": each["at"], "values": each["metrics"], "milliseconds": each["milliseconds"]}
            for each in meta.pop("told", ())
        ],
    }
    names = ("step", "epoch", "epoch_step", "data_digest", "mlflow_run_id", "tracking_uri")
    training |= {name: meta.pop(name) for name in names if name in meta}
    return {
        "training": {**training, "model": meta},
        "best": {"step": best.pop("step"), "sha256": best.pop("sha256"), "scores": best} if best else None,
        "optimizer": {
            "name": content["optimizer"],
            **{name: content[name] for name in ("trainable", "step_counts", "loss_scale")},
        },
        "weights": content["weights"],
        "sha256": content["sha256"],
    }
