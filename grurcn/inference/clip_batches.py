"""Batches of clips as a model sees them, for a training loop of a user's own."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from grurcn.inference.model_input import model_input
from shards.index import Index
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stages import ReadingOptions
from shards.reading.stream import evaluation_batches, train_batches


def model_clips(
    shards: str, split: str, batch_size: int, seed: int, device: torch.device | str, **config: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """See grurcn.clips."""
    index, clips, reading = Index(shards, split), ClipConfig(**config), ReadingOptions()
    index.check_videos()
    if split == "train":
        order = Order([shard.samples for shard in index.shards], batch_size, seed)
        batches = train_batches(index, clips, order, rank=0, world_size=1, reading=reading)
    else:
        batches = evaluation_batches(index, clips, global_batch=batch_size, reading=reading)
    with closing(batches):
        for _, whole in batches:
            batch = whole.to(torch.device(device))
            kept = batch.weight > 0
            yield model_input(batch.frames, batch.flow_bound, batch.box, batch.mirror, clips)[kept], batch.label[kept]
