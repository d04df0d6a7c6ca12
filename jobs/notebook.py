"""The jobs as functions, for notebooks and scripts: what the commands do, with what comes out as a value.

    from jobs.notebook import clips, pack, predict, train

    pack("data/videos", "data/mine")                              # one folder of videos a class -> shards
    for frames, labels in clips("data/mine", num_frames=10):      # (B, T, 3, S, S) float32, (B,) int64
        ...
    run = train("gru-rcn-small", "data/mine", num_steps=200)      # the run's folder
    predict(run, "video.avi")                                     # [{"video", "class", "probability", "classes", ...}]

They run in this process, without Ray, and show their progress as the commands do; a cluster is the commands' business.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grurcn.inference.model_input import model_input
from grurcn.training.recipes import RECIPES, Recipe, changed
from jobs import make_shards
from jobs import predict as predicting
from jobs import train as training
from shards.index import Index
from shards.packing.sources import Folder
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stream import Reading, evaluation_batches, train_batches
from shards.store import absolute_url
from shards.video import Packing


class Unfinished(RuntimeError):
    """A job that ended with another status than 0; what it said stands above."""


def pack(videos: str | Path, out: str, packing: Packing | None = None, **source: Any) -> str:
    """Packs a folder with one folder of videos a class, and gives back where the shards lie.

    source: options of jobs.make_shards folder (test_share=0.2, ...). Raises what the command refuses, as ValueError or OSError.
    """
    job = make_shards.MakeShards(
        source=Folder(videos=Path(videos).expanduser(), **source), out=str(out), packing=packing or Packing(), workers=0
    )
    if make_shards.main(job):
        raise Unfinished(f"{out}: not packed")
    return absolute_url(out)


def clips(
    shards: str,
    split: str = "train",
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    reading: Reading | None = None,
    **config: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips as a model sees them: (B, T, 3, S, S) float32, cut out, resized and normalised, and their labels (B,) int64, both on
    the device.

    Of train: random clips of an epoch after the other, for ever, as a training with this seed would see them. Of another split:
    the middle clip of each video, once, in batches of at most this size. config: fields of ClipConfig (num_frames=10, size=224).
    """
    index, chosen = Index(shards, split), ClipConfig(**config)
    index.check_videos()
    if split == "train":
        order = Order([shard.samples for shard in index.shards], batch_size, seed)
        batches = train_batches(index, chosen, order, rank=0, world_size=1, reading=reading or Reading())
    else:
        batches = evaluation_batches(index, chosen, global_batch=batch_size, reading=reading or Reading())
    with closing(batches):  # pyright: ignore[reportArgumentType]
        for _, whole in batches:
            batch = whole.to(torch.device(device))
            kept = batch.weight > 0
            frames = model_input(batch.frames, batch.flow_bound, batch.box, batch.mirror, chosen)
            yield frames[kept], batch.label[kept]


def train(recipe: str | Recipe, shards: str, storage: str = "runs", name: str | None = None, **changes: Any) -> str:
    """Trains a recipe, or goes on with its run, and gives back the run's folder.

    changes: of the recipe's values, those of its parts as dictionaries: train("gru-rcn-small", "data/mine", num_steps=200,
    clips={"size": 112}).
    """
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise ValueError(f"{recipe}: no recipe of this name; wanted one of {', '.join(RECIPES)}")
    chosen = RECIPES[recipe]() if isinstance(recipe, str) else recipe
    label = recipe if isinstance(recipe, str) else "own"
    job = training.Train(
        recipe=changed(chosen, **changes), shards=str(shards), storage=str(storage), name=name or label
    )
    if training.main(label, job):
        raise Unfinished(f"{storage}/{name or label}: not trained")
    return absolute_url(f"{storage}/{name or label}")


def predict(model: str, *videos: str | Path, **options: Any) -> list[dict[str, Any]]:
    """What a model takes videos for: for each {video, class, probability, classes, levels}, or of a captioning model {video,
    caption, ...}. options: of jobs.predict (top=5, clips=10, views=1, ...).

    Raises ValueError, naming them all, if videos cannot be read.
    """
    job = predicting.Predict(model=str(model), videos=tuple(Path(video) for video in videos), **options)
    found = predicting.look(job)
    if found.refused:
        raise ValueError("; ".join(f"{video}: {reason}" for video, reason in found.refused.items()))
    return found.rows
