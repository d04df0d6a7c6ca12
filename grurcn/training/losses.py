"""log-probabilities -> loss and scores. B clips, L levels, K classes; of captions: B captions, T words, V in the vocabulary."""

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from grurcn.models.gru_rcn import log_mean_vote

Loss = Literal["mean", "heads"]


def nll_loss(levels: Tensor, label: Tensor, kind: Loss = "mean") -> Tensor:
    """levels (B, L, K) log-probabilities, label (B,) -> the mean negative log-likelihood, a scalar.

    mean: of the averaged probability, the literal reading of the paper; heads: mean of the heads' own.
    """
    if kind == "mean":
        return torch.nn.functional.nll_loss(log_mean_vote(levels), label)
    return torch.nn.functional.nll_loss(levels.flatten(0, 1), label.repeat_interleave(levels.shape[1]))


class Tally:
    """Sums over batches and ranks, divided when read: log-probability of the label, top-1, top-5."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # clips, log-probability, top-1, top-5

    def add(self, log_probs: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """log_probs (B, K) and label (B,) of clips that count `weight` (B,) each (default 1; padding 0)."""
        log_probs = log_probs.detach().double()
        weight = torch.ones(len(label), device=label.device) if weight is None else weight
        chosen = log_probs.gather(1, label[:, None])
        # Classes that come before the right one; a tie goes to the lower number, or a model that scores all classes alike
        # would be right about every clip.
        lower = torch.arange(log_probs.shape[1], device=label.device) < label[:, None]
        better = ((log_probs > chosen) | (log_probs == chosen) & lower).sum(dim=1)
        # A score that is not a number beats nothing, and must not count as right.
        right = [(better < k) & chosen[:, 0].isfinite() for k in (1, 5)]
        columns = [torch.ones_like(chosen[:, 0]), chosen[:, 0], right[0].double(), right[1].double()]
        weight = weight.double()
        self.sums += torch.stack([(torch.where(weight > 0, column, 0) * weight).sum() for column in columns])

    def read(self) -> dict[str, float]:
        """Means over all that was added on any rank: every rank calls it, and all get the same."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        clips, log_prob, top1, top5 = sums.tolist()
        if not clips:
            raise ValueError("nothing was tallied: no mean of no clips")
        return {"loss": -log_prob / clips, "top1": top1 / clips, "top5": top5 / clips}


class WordTally:
    """Sums over captions and ranks, divided when read: log-probability of the words, and how often the likeliest was right."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # captions, words, log-probability, right words

    def add(self, log_probs: Tensor, words: Tensor) -> None:
        """log_probs (B, T, V) and words (B, T) of captions, negative behind their ends."""
        is_word = words >= 0
        chosen = log_probs.detach().gather(2, words.clamp(min=0)[..., None])[..., 0].double()
        right = (log_probs.detach().argmax(dim=2) == words) & chosen.isfinite()
        columns = [torch.ones_like(words[:, 0]), is_word, torch.where(is_word, chosen, 0), right & is_word]
        self.sums += torch.stack([column.double().sum() for column in columns])

    def read(self) -> dict[str, float]:
        """loss: negative log-likelihood of a caption; perplexity: of a word; word_accuracy. Every rank calls it."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        captions, words, log_prob, right = sums.tolist()
        if not captions:
            raise ValueError("nothing was tallied: no mean of no captions")
        perplexity = math.exp(min(700.0, -log_prob / words)) if math.isfinite(log_prob) else math.nan
        return {"loss": -log_prob / captions, "perplexity": perplexity, "word_accuracy": right / words}
