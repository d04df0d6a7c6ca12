"""Builds the classification model that a recipe states."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grurcn.models.c3d import C3D
from grurcn.models.config import ModelConfig
from grurcn.models.gru_rcn import GRURCN
from grurcn.models.trunks.base import load_weights


def build_model(
    config: ModelConfig,
    num_classes: int,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    in_channels: int = 3,
    recompute: bool = False,
) -> GRURCN | C3D:
    """The model with initial weights: random from the seed, the trunk's from `weights` if given.

    Raises BadWeights for weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.kind == "c3d":
            model = C3D(num_classes, in_channels, config.width, config.dropout)
        else:
            model = GRURCN(config, num_classes, in_channels, recompute)
    source = config.weights or "weights"
    if weights is not None:
        model.load(weights, source) if isinstance(model, C3D) else load_weights(model.trunk, weights, source)
    return model
