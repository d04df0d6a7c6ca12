"""The optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Options of the optimizer and of the learning rate."""

    optimizer: Literal["adam", "sgd", "adadelta"] = "adam"
    """adam (the paper's, section 5.1), sgd with momentum 0.9, or adadelta (the captioning decoder's, with a rate of 1)."""
    learning_rate: float = 1e-4
    """Highest learning rate (the paper does not state it)."""
    weight_decay: float = 0.0
    """Weight decay: decoupled with adam (AdamW), added to the gradient with sgd and adadelta (L2)."""
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    """Learning rate after the warm-up: constant; cosine, down to 0 at the last step; steps, times 0.1 every `step_every`."""
    step_every: int = 4000
    """Cut the learning rate every N steps, with the schedule `steps`."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float = 10.0
    """Maximum norm of the gradient over all weights; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate {self.learning_rate:g}: expected above 0")
        for name, least in (("warmup_steps", 0), ("step_every", 1), ("clip_norm", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name):g}: expected at least {least}")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """A torch optimizer of the trainable parameters."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.AdamW(trainable, lr=rate, weight_decay=decay)
    if config.optimizer == "adadelta":
        return torch.optim.Adadelta(trainable, lr=rate, rho=0.95, eps=1e-6, weight_decay=decay)
    return torch.optim.SGD(trainable, lr=rate, momentum=0.9, weight_decay=decay)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The learning rate of a step; 0 is the first. It depends on nothing else, so that a restart needs no state.

    warmup_steps = 4: 1/4, 2/4, 3/4, 4/4 of the highest rate, then the schedule
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = step - config.warmup_steps
    if config.schedule == "cosine":
        left = max(1, num_steps - config.warmup_steps)
        return config.learning_rate * (1 + math.cos(math.pi * min(1.0, done / left))) / 2
    if config.schedule == "steps":
        return config.learning_rate * 0.1 ** (done // config.step_every)
    return config.learning_rate
