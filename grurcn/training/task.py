"""What the training loop needs of a task, and the registry of tasks.

A new task is a recipe (a subclass of TrainingRecipe with the task's name), a class that has the methods of Task, and one call of
register_task. The tasks of this project are registered in train.py.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from grurcn.training.recipes import TrainingRecipe
from shards.reading.order import Order
from shards.reading.stages import ReadingOptions

Reader = Callable[..., Generator[Any, None, None]]  # such as shards.reading.stream.train_batches


class Prepared:
    """What the driver found out about a task's data before it started the workers. Subclasses hold what workers need of it."""

    @property
    def artifacts(self) -> dict[str, str]:
        """{name: text} for the MLflow run."""
        return {}


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What each worker of a training gets."""

    task: "TaskType"
    recipe: TrainingRecipe
    prepared: Prepared
    shards: str
    run: str  # folder or URL
    tracking_uri: str
    mlflow_run_id: str
    reading: ReadingOptions
    accumulation: int
    zero: int
    recompute: bool
    deepspeed: str | None
    precision: str
    log_every: int
    save_every: int
    keep: int
    timeout_minutes: float


class Task(Protocol):
    """What is trained, on one worker."""

    @property
    def order(self) -> Order: ...

    @property
    def data_digest(self) -> str: ...

    @property
    def select(self) -> str:
        """The validation score that selects the best model: the highest, of "loss" the lowest."""
        ...

    @property
    def flops_per_clip(self) -> int | None:
        """Floating-point operations of a clip, forward and backward; None if they are not counted."""
        ...

    @property
    def model_meta(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON, so that its model can be used without the data."""
        ...

    @property
    def confusion(self) -> dict[str, Any] | None:
        """Per-class results of the last validation, as JSON, to be drawn; None if there are none."""
        ...

    def build(self, fresh: bool) -> nn.Module:
        """The model. fresh: with its first weights; else a checkpoint fills it."""
        ...

    def batches(self, *, rank: int, world_size: int, start: tuple[int, int]) -> Generator[Any, None, None]:
        """((epoch, step), this rank's part of the global batch), without end. start: (epoch, step)."""
        ...

    def keys(self, numbers: list[int]) -> list[str]:
        """The names of samples by their numbers in the order."""
        ...

    def tally(self) -> Any:
        """Sums of training scores: read() gives their means, the same on every rank."""
        ...

    def loss(self, model: Callable[..., Any], batch: Any, tally: Any) -> Tensor:
        """The loss of a part of a batch, a scalar; adds its scores to the tally."""
        ...

    def validate(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """ "loss" and other scores of the validation videos. Every rank calls it, with the engine in evaluation mode."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskType:
    """A registered task."""

    recipes: Mapping[str, Callable[[], TrainingRecipe]]
    """{name: function that returns the recipe}, for the command line."""
    prepare: Callable[..., Prepared]
    """(recipe, shards, tracking_uri, fresh): raises in the driver what would stop a worker later."""
    start: Callable[..., Task]
    """(job, context, meta): the task on a worker. meta: of the checkpoint that the run resumes from, or None. An optional
    argument `read` replaces the reader of batches."""


TASKS: dict[str, TaskType] = {}


def register_task(
    name: str,
    recipes: Mapping[str, Callable[[], TrainingRecipe]],
    prepare: Callable[..., Prepared],
    start: Callable[..., Task],
) -> None:
    """Makes a task known to train() under the name that its recipes have (TrainingRecipe.task)."""
    TASKS[name] = TaskType(recipes=recipes, prepare=prepare, start=start)


def find_task(name: str) -> TaskType:
    """A registered task by its name. Raises ValueError for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"task {name}: expected one of {', '.join(TASKS)}; register others with register_task")
    return TASKS[name]


def find_recipe(name: str) -> TrainingRecipe:
    """A new recipe of a registered task by its name. Raises ValueError for an unknown one."""
    recipes = {each: recipe for task in TASKS.values() for each, recipe in task.recipes.items()}
    if name not in recipes:
        raise ValueError(f"recipe {name}: expected one of {', '.join(recipes)}")
    return recipes[name]()
