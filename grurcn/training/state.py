"""Where a run is, besides its weights: the step, the best validation, early stopping."""

from dataclasses import dataclass, field

from cluster.workers.events import Metrics
from grurcn.training.recipes import TrainingRecipe
from grurcn.training.result import RunResult

Scores = dict[str, float]


@dataclass
class TrainingState:
    """The step that a run is at, and its best validation."""

    step: int = 0  # steps done
    best: Scores | None = None  # the scores of the best validation
    best_step: int = 0
    lowest_loss: float | None = None  # of the validations
    validations_since: int = 0  # the one with the lowest loss
    metrics: list[Metrics] = field(default_factory=list)  # since the last checkpoint, which keeps them

    def is_over(self, recipe: TrainingRecipe) -> bool:
        """Whether all steps are done, or early stopping ends the run."""
        return self.step >= recipe.num_steps or self.is_stopped_early(recipe)

    def is_stopped_early(self, recipe: TrainingRecipe) -> bool:
        """Early stopping on the validation log-probability (paper section 5.1)."""
        return bool(recipe.patience) and self.validations_since >= recipe.patience

    def add_validation(self, scores: Scores, select: str) -> bool:
        """Notes a validation. Returns whether it is the best: the lowest loss, or the highest of any other score."""
        if self.lowest_loss is None or scores["loss"] < self.lowest_loss:
            self.lowest_loss, self.validations_since = scores["loss"], 0
        else:
            self.validations_since += 1
        if self.best is None:
            is_best = True
        elif select == "loss":
            is_best = scores["loss"] < self.best["loss"]
        else:
            is_best = scores[select] > self.best[select]
        if is_best:
            self.best, self.best_step = scores, self.step
        return is_best

    def result(self, recipe: TrainingRecipe) -> RunResult:
        assert self.best is not None  # the last step is always validated
        return RunResult(
            steps=self.step,
            stopped_early=self.step < recipe.num_steps,
            scores=self.best,
            best_step=self.best_step,
        )
