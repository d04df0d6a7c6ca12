"""The task classification: clip batches -> log-probabilities of the levels -> loss, and its validation."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from cluster.workers.collectives import all_rows
from cluster.workers.context import WorkerContext
from grurcn.evaluation.confusion import Confusion
from grurcn.inference.classifier import level_names
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.models.summary import summarize
from grurcn.models.votes import log_mean_vote
from grurcn.training.losses import Tally, loss_function
from grurcn.training.pretrained import first_weights
from grurcn.training.recipes import Recipe
from grurcn.training.task import Prepared, Reader, WorkerJob
from shards.index import Index
from shards.reading.order import Order
from shards.reading.stream import ClipBatch, evaluation_batches, train_batches

Batches = Generator[tuple[tuple[int, int], ClipBatch], None, None]


class Classification:
    """Which class a video belongs to."""

    def __init__(
        self, job: WorkerJob, context: WorkerContext, meta: Mapping[str, Any] | None, read: Reader = train_batches
    ):
        assert isinstance(job.recipe, Recipe)
        self.recipe, self.job, self.context, self.read = job.recipe, job, context, read
        self.index = Index(job.shards, "train")
        self.order = Order([shard.samples for shard in self.index.shards], self.recipe.global_batch, self.recipe.seed)
        self.confusion: dict[str, Any] | None = None  # of the last validation, over all ranks

    @property
    def model_meta(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that its model can be used without the data."""
        return {"classes": list(self.index.info.classes), "packing": vars(self.index.info.packing)}

    @property
    def flops_per_clip(self) -> int:
        clips, num_classes = self.recipe.clips, len(self.index.info.classes)
        return summarize(self.recipe.model, num_classes, clips.num_frames, clips.size, clips.channels).training_flops

    @property
    def data_digest(self) -> str:
        return self.index.info.digest

    @property
    def select(self) -> str:
        return "loss"

    def build(self, fresh: bool) -> nn.Module:
        """The model. Pretrained weights are read for a fresh start only, as a checkpoint has its own."""
        model, clips = self.recipe.model, self.recipe.clips
        weights = first_weights(model, self.job.tracking_uri) if fresh else None
        num_classes = len(self.index.info.classes)
        return build_model(model, num_classes, self.recipe.seed, weights, clips.channels, self.job.recompute)

    def batches(self, **lanes: Any) -> Batches:
        """This rank's part of every global batch. lanes: rank, world_size, start."""
        return self.read(self.index, self.recipe.clips, self.order, **lanes, reading=self.job.reading)

    def keys(self, numbers: list[int]) -> list[str]:
        """The names of the order's samples."""
        return [sample.key for sample in self.index.samples(numbers)]

    def tally(self) -> Tally:
        return Tally(self.context.device)

    def loss(self, model: Callable[..., Tensor], batch: ClipBatch, tally: Tally) -> Tensor:
        """The loss of some clips, a scalar; their scores go to the tally."""
        levels = self.levels(model, batch)
        tally.add(log_mean_vote(levels), batch.label)
        return loss_function(self.recipe.loss)(levels, batch.label)

    def levels(self, model: Callable[..., Tensor], batch: ClipBatch) -> Tensor:
        """The votes of each clip's levels (B, L, K)."""
        clips = model_input(batch.frames, batch.flow_bound, batch.box, batch.mirror, self.recipe.clips)
        return model(clips, batch.draw)

    def validate(self, engine: Any) -> dict[str, float]:
        """loss, top1, top5 of the middle clip of each validation video, centre view. Every rank calls it."""
        index = Index(self.job.shards, "val")
        tally, confusion = self.tally(), Confusion(index.info.classes, level_names(self.recipe))
        with torch.inference_mode(), closing(self.validation_batches(index)) as batches:
            for _, batch in batches:
                part = batch.to(self.context.device)
                levels = self.levels(engine, part)
                tally.add(log_mean_vote(levels), part.label, part.weight)
                kept = part.weight > 0
                numbers: list[int] = part.sample[kept].tolist()
                keys = [sample.key for sample in index.samples(numbers)]
                confusion.add(levels[kept].exp(), part.label[kept], keys, numbers)
        self.confusion = joined(confusion)
        return tally.read()

    def validation_batches(self, index: Index) -> Any:
        return evaluation_batches(
            index,
            self.recipe.clips,
            global_batch=self.recipe.global_batch,
            rank=self.context.rank,
            world_size=self.context.world_size,
            reading=self.job.reading,
        )


def joined(confusion: Confusion) -> dict[str, Any]:
    """The confusion over all ranks' videos, as JSON holds it. Every rank calls it."""
    first, *others = all_rows([confusion.to_dict()])
    whole = Confusion.from_dict(first)
    for other in others:
        whole.merge(Confusion.from_dict(other))
    return whole.to_dict()


def prepare(recipe: Recipe, shards: str, tracking_uri: str, fresh: bool) -> Prepared:
    """Raises in the driver, before anything is started, what would stop a worker later."""
    index = Index(shards, "train")
    index.check_videos()
    index.check_classes()
    index.check_stream(recipe.clips.stream)
    index.check_files()
    Index(shards, "val").check_files()
    Order([shard.samples for shard in index.shards], recipe.global_batch, recipe.seed)
    weights = first_weights(recipe.model, tracking_uri) if fresh else None
    build_model(recipe.model, len(index.info.classes), recipe.seed, weights, recipe.clips.channels)
    return Prepared()
