"""grurcn: from a folder of videos to a trained video model.

    import grurcn

    grurcn.pack("data/videos", "data/mine")                              # one folder of videos a class -> shards
    result = grurcn.train("gru-rcn-small", "data/mine", num_steps=200)   # the same run as `grurcn train` makes
    grurcn.evaluate(result.run, "data/mine").top1
    model = grurcn.load(result.run)
    model.predict("video.avi").label

The functions do what the commands of the same name do, and give back values. They run in this process, without Ray, unless
`workers` says otherwise. Everything is imported when it is first used: this module itself needs the standard library alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grurcn.data import PackResult
    from grurcn.evaluation.evaluate import Evaluation
    from grurcn.inference.loaded import LoadedCaptioner, LoadedClassifier
    from grurcn.models.trunks.base import TrunkSpec
    from grurcn.training.recipes import TrainingRecipe
    from grurcn.training.result import TrainResult
    from grurcn.training.task import Prepared, Task
    from shards.packing.sources import Source
    from shards.summary import DatasetSummary

__all__ = [
    "clips", "evaluate", "info", "load", "pack", "register_source", "register_task", "register_trunk", "train",
]  # fmt: skip


def pack(videos: "str | Path | Source", out: str | Path, *, workers: int = 0, **options: Any) -> "PackResult":
    """Packs videos into shards, and continues a packing that was interrupted.

    Args:
        videos: A folder with one folder of videos per class, or a source (`shards.packing.sources`) such as `Csv(...)`.
        out: Folder or URL (s3://, gs://) of the data set.
        workers: Ray tasks that pack at the same time; 0 packs in this process.
        options: Fields of the class-folder source (test_fraction=0.2), of Packing (width=340, height=256, flow="dis"), or of
            PackJob (videos_per_shard=100).

    Raises:
        BadSource: The source cannot be read.
        BadShards, OSError: The data set cannot be written.
        TypeError: There is no such option.

    Examples:
        >>> packed = grurcn.pack("data/videos", "data/mine", width=40, height=40, val_fraction=0.2)
        >>> packed.videos["train"], packed.classes
        (16, 4)
    """
    with needs("pack"):
        from grurcn.data import PackJob, pack
        from shards.packing.sources import Folder
        from shards.video import Packing
    packing = Packing(**taken(options, Packing))
    job = taken(options, PackJob)
    if isinstance(videos, str | Path):
        videos = Folder(videos=Path(videos).expanduser(), **taken(options, Folder))
    refuse_left_over("pack", options)
    return pack(PackJob(source=videos, out=str(out), packing=packing, workers=workers, **job))


def info(shards: str | Path) -> "DatasetSummary":
    """What a data set holds: splits, classes, lengths, what was left out. Reads its description and index, no video.

    Raises:
        BadShards: There is no data set.

    Examples:
        >>> grurcn.info("data/mine").splits["test"].videos
        4
    """
    from shards.summary import summarize_dataset

    return summarize_dataset(str(shards))


def clips(
    shards: str | Path,
    split: str = "train",
    *,
    batch_size: int = 16,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    **config: Any,
) -> "Iterator[tuple[Tensor, Tensor]]":
    """Batches of clips as a model sees them, and their labels.

    Gives (clips (B, T, 3, S, S) float32, cropped, resized and normalised; labels (B,) int64), both on the device.
    Of train: random clips, epoch after epoch, without end, in the order that a training with this seed has. Of another split:
    the middle clip of each video, once; the last batch may be smaller.

    Args:
        shards: Folder or URL of the data set.
        split: train, val or test.
        batch_size: Clips in a batch, B.
        seed: Of the order, the clips and the crops.
        device: Where the clips are computed.
        config: Fields of ClipConfig (num_frames=10, size=224, stride=1).

    Raises:
        BadShards: The data set cannot be read.

    Examples:
        >>> frames, labels = next(grurcn.clips("data/mine", batch_size=4, num_frames=5, size=32))
        >>> frames.shape, labels.shape
        (torch.Size([4, 5, 3, 32, 32]), torch.Size([4]))
    """
    from grurcn.inference.clip_batches import model_clips

    return model_clips(str(shards), split, batch_size, seed, device, **config)


def train(
    recipe: "str | TrainingRecipe",
    shards: str | Path,
    *,
    storage: str | Path = "runs",
    name: str | None = None,
    workers: int | str = 0,
    options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> "TrainResult":
    """Trains a recipe, or continues its run at the exact step.

    Args:
        recipe: A recipe's name, or a recipe.
        shards: Folder or URL of the data set.
        storage: Folder or URL of all runs.
        name: Name of the run; its folder is STORAGE/NAME. Default: the recipe's name.
        workers: 0 trains in this process; 2, or "1:8", on Ray Train workers.
        options: Other fields of TrainJob, such as zero=2, precision="bf16", register="actions".
        changes: Values of the recipe that differ; those of its parts as dictionaries.

    Raises:
        ValueError, OSError: The errors of the command, in one line.
        Interrupted: After Ctrl-C, once everything is saved.

    Examples:
        >>> result = grurcn.train("gru-rcn-small", "data/mine", num_steps=4, val_every=2, global_batch=8, clips={"size": 32})
        >>> result.result.steps, result.run.endswith("runs/gru-rcn-small")
        (4, True)
    """
    with needs("train"):
        from cluster.workers.options import Workers
        from grurcn.training.job import TrainJob
        from grurcn.training.recipes import changed
        from grurcn.training.task import find_recipe
        from grurcn.training.train import train
    recipe_name = recipe if isinstance(recipe, str) else "custom"
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    job = TrainJob(
        recipe=changed(chosen, **changes),
        recipe_name=recipe_name,
        shards=str(shards),
        storage=str(storage),
        name=name,
        on=Workers(workers=workers),
        **(options or {}),
    )
    return train(job)


def evaluate(
    run: str | Path, shards: str | Path, *, split: str = "test", workers: int | str = 0, **options: Any
) -> "Evaluation":
    """Evaluates a run's best model by the paper's protocol: 25 equally spaced clips in 10 views of every video.

    Args:
        run: Folder or URL of a run, or of one of its checkpoints.
        shards: Folder or URL of the data set.
        split: test, val or train.
        workers: 0 evaluates in this process; otherwise Ray Train workers.
        options: Fields of EvaluateJob (clips=25, views=10, precision="auto").

    Raises:
        OtherTask, OtherData: The model does not fit the data.

    Examples:
        >>> evaluation = grurcn.evaluate("runs/gru-rcn-small", "data/mine", clips=2, views=1)
        >>> evaluation.videos, 0 <= evaluation.top1 <= 1
        (4, True)
    """
    with needs("evaluate"):
        from cluster.workers.options import Workers
        from grurcn.evaluation.evaluate import EvaluateJob, evaluate
    return evaluate(EvaluateJob(run=str(run), shards=str(shards), split=split, on=Workers(workers=workers), **options))


def load(
    source: str | Path,
    *,
    device: "torch.device | str | None" = None,
    precision: str = "auto",
    storage: str | Path = "runs",
) -> "LoadedClassifier | LoadedCaptioner":
    """Loads a trained model, ready for use.

    Args:
        source: A run's folder or URL, one of its checkpoints, runs:/ID or models:/NAME/VERSION of MLflow.
        device: Default: the first GPU, else the CPU.
        precision: auto is fp32 on a CPU, bf16 on a GPU that has it, else fp16.
        storage: Where MLflow's database is, if MLFLOW_TRACKING_URI names no server.

    Raises:
        ValueError: There is no such model.
        NoTracking: MLflow does not answer.

    Examples:
        >>> model = grurcn.load("runs/gru-rcn-small")
        >>> prediction = model.predict("data/videos/left/0.avi")
        >>> prediction.label in model.classes
        True
        >>> model.features("data/videos/left/0.avi", "pool3").shape  # (clips, frames, channels, height, width)
        torch.Size([10, 10, 32, 4, 4])
    """
    from grurcn.inference.loaded import load_model

    return load_model(str(source), device, precision, str(storage))


def register_trunk(name: str, spec: "TrunkSpec") -> None:
    """Makes an image network available to recipes: `--model.trunk NAME`. See docs/extending.md."""
    from grurcn.models.trunks import register_trunk

    register_trunk(name, spec)


def register_source(name: str, source: "type[Source]") -> None:
    """Makes a kind of data set available to make_shards as a subcommand. See docs/extending.md."""
    from shards.packing.sources import register_source

    register_source(name, source)


def register_task(
    name: str,
    recipes: "Mapping[str, Callable[[], TrainingRecipe]]",
    prepare: "Callable[..., Prepared]",
    start: "Callable[..., Task]",
) -> None:
    """Makes something else than classes or captions trainable: `grurcn train RECIPE` of its recipes. See docs/extending.md."""
    with needs("register_task"):
        from grurcn.training.task import register_task

    register_task(name, recipes, prepare, start)


def taken(options: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Takes the options that are fields of a dataclass out of the dictionary."""
    return {field: options.pop(field) for field in kind.__dataclass_fields__ if field in options}


def refuse_left_over(function: str, options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"grurcn.{function}: no option {', '.join(options)}; its docstring names those that exist")


@contextmanager
def needs(function: str) -> Iterator[None]:
    """Turns a missing package into one line that says which function needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("grurcn", "shards", "cluster", ""):
            raise
        raise ImportError(f"grurcn.{function} needs the package {package}: pip install {package}") from None
