"""Dropout whose masks depend only on each clip's random bits: the same on any device, worker and after any restart."""

import torch
from torch import Tensor


def dropout(x: Tensor, fraction: float, draw: Tensor, level: int) -> Tensor:
    """x (B, ..., C), draw (B,) int64 -> x with a fraction of each clip's channels dropped and the others scaled up.

    The clip's random bits `draw` decide which, so that a clip loses the same channels on every worker and device. `level` tells
    the dropouts of one model apart.
    """
    channel = torch.arange(x.shape[-1], device=x.device)
    kept = uniform(draw[:, None] ^ mix(channel + (level << 32))) >= fraction  # (B, C)
    kept = kept.view(len(x), *[1] * (x.dim() - 2), -1)
    return x * kept / (1 - fraction)


def uniform(bits: Tensor) -> Tensor:
    """int64 numbers -> float64 in [0, 1), one each, unrelated even for neighbours."""
    return (mix(bits) >> 11 & (1 << 53) - 1).double() / 2**53


def mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): each output bit depends on every input bit."""
    bits = bits + SPLITMIX_STEP
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * SPLITMIX_FIRST
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * SPLITMIX_SECOND
    return bits ^ (bits >> 31 & (1 << 33) - 1)


# 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers: torch multiplies int64 modulo 2^64.
SPLITMIX_STEP = 0x9E3779B97F4A7C15 - 2**64
SPLITMIX_FIRST = 0xBF58476D1CE4E5B9 - 2**64
SPLITMIX_SECOND = 0x94D049BB133111EB - 2**64
