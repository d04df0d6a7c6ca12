"""Losses, and sums of scores over batches and workers.

B clips, L levels, K classes; of captions: B captions, T words, V words in the vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from grurcn.models.votes import log_mean_vote


def mean_loss(levels: Tensor, label: Tensor) -> Tensor:
    """levels (B, L, K) log-probabilities, label (B,) -> negative log of the levels' mean probability, a scalar.

    The literal reading of the paper.
    """
    return torch.nn.functional.nll_loss(log_mean_vote(levels), label)


def heads_loss(levels: Tensor, label: Tensor) -> Tensor:
    """levels (B, L, K) log-probabilities, label (B,) -> mean of the levels' own negative log-likelihoods, a scalar."""
    return torch.nn.functional.nll_loss(levels.flatten(0, 1), label.repeat_interleave(levels.shape[1]))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_loss, "heads": heads_loss}


def loss_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss by its name. Raises ValueError for an unknown one."""
    if name not in LOSSES:
        raise ValueError(f"loss {name}: expected one of {', '.join(LOSSES)}")
    return LOSSES[name]


class Tally:
    """Sums over batches and ranks, divided when read: log-probability of the label, top-1, top-5."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # clips, log-probability, top-1, top-5

    def add(self, log_probs: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """Adds clips: log_probs (B, K), label (B,), weight (B,) of each clip (default 1; 0 for padding)."""
        log_probs = log_probs.detach().double()
        weight = torch.ones(len(label), device=label.device) if weight is None else weight
        chosen = log_probs.gather(1, label[:, None])
        # The number of classes before the right one. A tie goes to the lower class: otherwise a model with equal scores for
        # all classes would always be right.
        lower = torch.arange(log_probs.shape[1], device=label.device) < label[:, None]
        better = ((log_probs > chosen) | (log_probs == chosen) & lower).sum(dim=1)
        # Nothing compares greater than NaN, so NaN must be excluded.
        right = [(better < k) & chosen[:, 0].isfinite() for k in (1, 5)]
        columns = [torch.ones_like(chosen[:, 0]), chosen[:, 0], right[0].double(), right[1].double()]
        weight = weight.double()
        self.sums += torch.stack([(torch.where(weight > 0, column, 0) * weight).sum() for column in columns])

    def read(self) -> dict[str, float]:
        """Means over the clips of all ranks. Every rank must call it."""
        clips, log_prob, top1, top5 = sum_over_ranks(self.sums)
        if not clips:
            raise ValueError("no clips were added, so there is no mean")
        return {"loss": -log_prob / clips, "top1": top1 / clips, "top5": top5 / clips}


class WordTally:
    """Sums over captions and ranks, divided when read: log-probability of the words, number of right words."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # captions, words, log-probability, right words

    def add(self, log_probs: Tensor, words: Tensor) -> None:
        """Adds captions: log_probs (B, T, V), words (B, T), negative after the end."""
        is_word = words >= 0
        chosen = log_probs.detach().gather(2, words.clamp(min=0)[..., None])[..., 0].double()
        right = (log_probs.detach().argmax(dim=2) == words) & chosen.isfinite()
        columns = [torch.ones_like(words[:, 0]), is_word, torch.where(is_word, chosen, 0), right & is_word]
        self.sums += torch.stack([column.double().sum() for column in columns])

    def read(self) -> dict[str, float]:
        """loss (negative log-likelihood per caption), perplexity (per word), word_accuracy. Every rank must call it."""
        captions, words, log_prob, right = sum_over_ranks(self.sums)
        if not captions:
            raise ValueError("no captions were added, so there is no mean")
        perplexity = math.exp(min(700.0, -log_prob / words)) if math.isfinite(log_prob) else math.nan
        return {"loss": -log_prob / captions, "perplexity": perplexity, "word_accuracy": right / words}


def sum_over_ranks(sums: Tensor) -> list[float]:
    """The sums of all ranks together. Every rank must call it."""
    sums = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()
