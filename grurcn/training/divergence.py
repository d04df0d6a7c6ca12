"""Finds losses that are not numbers, and the videos that they came from."""

import torch
from torch import Tensor

from cluster.workers.collectives import Collectives
from grurcn.training.recipes import TrainingRecipe
from grurcn.training.task import Task
from shards.reading.order import lanes_of

MOST_NAMED = 8  # videos in a message


class Diverged(ValueError):
    """The loss is not a number any more."""


class LossCheck:
    """Keeps this rank's losses on the device until they are checked: looking at each one would wait for it."""

    def __init__(self, step: int, collectives: Collectives):
        """step: steps done."""
        self.first, self.collectives = step, collectives
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def check(self, step: int, recipe: TrainingRecipe, task: Task) -> None:
        """Checks the losses up to `step` and forgets them.

        Raises Diverged on every rank if a loss of any rank is not finite. Every rank calls it.
        """
        values = torch.stack(self.losses).double().cpu()
        bad = (~values.isfinite()).nonzero()
        parts = len(values) // (step - self.first)
        first_bad = self.first + int(bad[0]) // parts if len(bad) else -1
        first_bad_of_ranks = self.collectives.gather(first_bad)
        if max(first_bad_of_ranks) >= 0:
            first = int(min(each for each in first_bad_of_ranks if each >= 0))
            rank, world_size = first_bad_of_ranks.index(first), len(first_bad_of_ranks)
            raise Diverged(
                f"the loss is not a number, or infinite, at step {first + 1} (seen at step {step}): worker {rank} of "
                f"{world_size}, {videos_of(first, rank, world_size, recipe, task)}; the checkpoints before it are kept. Look at "
                "these videos (python -m jobs.inspect_shards preview), lower --optim.learning-rate, or clip sooner than "
                f"--optim.clip-norm {recipe.optim.clip_norm:g}"
            )
        self.first, self.losses = step, []


def videos_of(step: int, rank: int, world_size: int, recipe: TrainingRecipe, task: Task) -> str:
    """epoch 0, videos a, b, c"""
    epoch, epoch_step = divmod(step, task.order.steps_per_epoch)
    lanes = lanes_of(rank, world_size, recipe.global_batch)
    keys = task.keys(task.order.samples(epoch, epoch_step, lanes).tolist())
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"epoch {epoch}, videos {', '.join(keys[:MOST_NAMED])}{more}"
