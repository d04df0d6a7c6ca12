"""How votes are averaged: over the levels of a model, and over the frames of a clip."""

import math

from torch import Tensor


def log_mean_vote(log_probs: Tensor) -> Tensor:
    """(B, L, K) log-probabilities of L votes -> (B, K), the log of their mean probability (paper section 5.1)."""
    return log_probs.logsumexp(dim=1) - math.log(log_probs.shape[1])
