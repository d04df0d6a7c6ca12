"""Train a recipe on packed shards.

    python -m jobs.train gru-rcn-small --shards data/mine                     in this process
    python -m jobs.train gru-rcn-small --shards data/mine --workers 2         two Ray Train workers
    ray job submit --working-dir . -- python -m jobs.train gru-rcn --shards /nfs/ucf101 --storage /nfs/runs --workers 8

The same command goes on with an interrupted run at the exact step, on any number of workers that divides the global batch.
With --workers 1:8 a run goes on by itself when workers or machines are lost, with those that are left, and with more when
they come back. MLflow tracks it: in STORAGE/mlflow.db, or on the server that MLFLOW_TRACKING_URI names.

Recipes called caption... learn to describe videos, from shards that were packed with captions, or from the vectors that
jobs.encode has made of them.

--json FILE holds: run, name, steps, stopped_early, best_step, val_loss, val_top1, val_top5 (of captions: val_loss,
val_perplexity, val_word_accuracy, val_bleu4, ...), mlflow_run_id, tracking_uri, seconds.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from mlflow.entities import Dataset

from cluster.checkpoints.run_folder import Identity, OtherRun, RunFolder
from cluster.progress import Bar, duration
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.provenance import command, environment, git_diff, provenance_tags
from cluster.tracking.server import open_run, tracking_uri, ui_command
from cluster.workers.context import WorkerContext
from cluster.workers.events import (
    CaptionTable,
    Event,
    Metrics,
    Notice,
    Progress,
    Saved,
    Stopped,
    SystemMetrics,
    Validated,
)
from cluster.workers.launch import run_workers
from cluster.workers.options import Workers
from grurcn.drawing.charts import Painter, pictures
from grurcn.evaluation.confusion import Judgement
from grurcn.inference.mlflow_model import save_pyfunc
from grurcn.training import captioning
from grurcn.training import classification as recognition
from grurcn.training.caption_recipes import CAPTION_RECIPES, CaptionRecipe
from grurcn.training.captioning import CAPTION_TABLE
from grurcn.training.loop import in_words, train_worker
from grurcn.training.pretrained import absolute
from grurcn.training.recipes import RECIPES, Recipe, changed, flat
from jobs.command import Command, Configurations, Flat, finish
from shards.dataset import DESCRIPTION
from shards.index import Index
from shards.reading.order import lanes_of
from shards.reading.stream import Reading
from shards.store import absolute_url

ROOT = Path(__file__).parents[1]
DIGEST_LETTERS = 32  # of a data set's; MLflow stores 36
ABOUT = """`{command}`

Data: `{shards}`, digest `{digest}`; what is in it: *dataset.json* among the artifacts. Checkpoints and the best model, which
`mlflow models serve` serves, are under *Logged models*, and in `{folder}`. Pictures of the best validation are in *pictures/val*,
packages and changes of the code in *environment.txt* and *changes.diff*.
"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of a training, whatever it learns."""

    shards: str
    """Folder or URL (s3://, gs://, http://) that jobs.make_shards wrote, seen by every worker."""
    storage: str = "runs"
    """Folder or URL (s3://, gs://) of all runs, seen by every worker."""
    name: str | None = None
    """Of the run, its folder in the storage. Default: the recipe's name."""
    experiment: str = "grurcn"
    """MLflow experiment that the run belongs to."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[Reading, Flat] = field(default_factory=Reading)
    accumulation: int = 1
    """Parts that each worker's share of a global batch is computed in, for less memory."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what DeepSpeed spreads over the workers (1 optimizer state, 2 and gradients, 3 and weights)."""
    recompute: bool = False
    """Compute the GRUs again in the backward pass instead of keeping what it needs: less memory, more time."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON file of your own instead of cluster/deepspeed/zeroN.json."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    log_every: int = 20
    """Steps from one line of progress to the next."""
    save_every: int | None = None
    """Steps from one checkpoint to the next. Default: the recipe's val_every. Each validation is saved as well."""
    register: str | None = None
    """Register the best model under this name in MLflow's model registry once the run has ended."""
    keep: int = 2
    """Newest checkpoints that are kept; each holds the best model so far too."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if min(self.accumulation, self.log_every, self.save_every or 1, self.keep) < 1:
            raise ValueError(
                f"wanted accumulation, log_every, save_every and keep of at least 1; found {self.accumulation}, "
                f"{self.log_every}, {self.save_every}, {self.keep}"
            )


@dataclass(frozen=True, kw_only=True)
class Train(TrainOptions):
    """Training of recognition."""

    recipe: Annotated[Recipe, Flat]
    """What the run is; changing any of it makes another run."""


@dataclass(frozen=True, kw_only=True)
class TrainCaptions(TrainOptions):
    """Training of captioning."""

    recipe: Annotated[CaptionRecipe, Flat]
    """What the run is; changing any of it makes another run."""


Job = Train | TrainCaptions


Worker = Callable[[dict[str, Any], WorkerContext], dict[str, Any] | Stopped]


def main(recipe_name: str, job: Job, worker: Worker = train_worker) -> int:
    """Checks, opens the MLflow run, trains, reports; gives back the exit status. worker: what each worker runs."""
    started = time.monotonic()
    run = RunFolder(f"{absolute_url(job.storage)}/{job.name or recipe_name}")
    # Workers run in other folders; and a run is the same wherever it is begun from.
    job = replace(job, recipe=with_absolute_paths(job.recipe))
    index, prepared = check(job, run)
    identity = open_identity(job, run, index, recipe_name)
    result = run.result()
    with MlflowRun(identity.tracking_uri, identity.mlflow_run_id, run, package=save_pyfunc) as mlflow_run:
        if result is None:
            run.prepare()
            try:
                result = train(job, run, index, identity, mlflow_run, worker, prepared)
            except BaseException as error:
                mlflow_run.log_event(mlflow_run.last_step(), f"ended: {type(error).__name__}: {error}".rstrip(": "))
                mlflow_run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
            run.finish(result)
            if job.register:
                mlflow_run.register(job.register)
        else:
            print(f"{run.url} was finished before; choose another --name to train anew", flush=True)
        mlflow_run.end()  # a run that was finished before too: opening it set it running
    conclude(job, run, identity, result, time.monotonic() - started)
    return 0


def with_absolute_paths(recipe: Recipe | CaptionRecipe) -> Recipe | CaptionRecipe:
    if isinstance(recipe, CaptionRecipe):
        return replace(recipe, encoder=recipe.encoder.absolute())
    return changed(recipe, model={"weights": absolute(recipe.model.weights)})


def check(job: Job, run: RunFolder) -> tuple[Index, dict[str, Any]]:
    """Finds out, before anything is started, what would stop a worker later. Gives back what workers get to know besides."""
    recipe = job.recipe
    uri, fresh = tracking_uri(job.storage), not run.checkpoints()
    if isinstance(recipe, CaptionRecipe):
        prepared = captioning.prepare(recipe, job.shards, uri, fresh)
    else:
        prepared = recognition.prepare(recipe, job.shards, uri, fresh)
    if not job.on.sizes(partial(divides, job)):
        lanes = lanes_of(0, max(1, job.on.most), recipe.global_batch)
        raise ValueError(
            f"a worker's {len(lanes)} videos of a global batch cannot be cut into {job.accumulation} equal parts; "
            f"wanted an --accumulation that divides {len(lanes)}"
        )
    return Index(job.shards, "train"), prepared


def divides(job: Job, workers: int) -> bool:
    """Whether so many workers can share a global batch, and each cut its share into its accumulated parts."""
    return job.recipe.global_batch % (workers * job.accumulation) == 0


def open_identity(job: Job, run: RunFolder, index: Index, recipe_name: str) -> Identity:
    """The run's identity and its MLflow run: begun now, or found in its folder and fitting this job.

    Raises OtherRun if the folder holds a run of another recipe or data set.
    """
    found = run.identity()
    recipe_digest, data_digest = job.recipe.digest(), index.info.digest
    if found is not None:
        if found.recipe_digest != recipe_digest:
            raise OtherRun(f"{run.url}: a run of another recipe ({differences(found.recipe, job.recipe)}); "
                           "choose another --name, or the options that it began with")  # fmt: skip
        if found.data_digest != data_digest:
            raise OtherRun(f"{run.url}: a run on other data than {job.shards} (digest {found.data_digest[:12]}... there, "
                           f"{data_digest[:12]}... here); choose another --name, or the shards that it began with")  # fmt: skip
    uri = found.tracking_uri if found else tracking_uri(job.storage)
    run_id = open_run(
        uri,
        job.storage,
        job.experiment,
        run.name,
        found.mlflow_run_id if found else None,
        parameters={
            "recipe": recipe_name,
            **flat(job.recipe.to_dict()),
            "shards": absolute_url(job.shards),
            "zero": job.zero,
            "precision": job.precision,
            "accumulation": job.accumulation,
            "workers": job.on.workers,
        },
        tags={
            **provenance_tags(ROOT),
            "data_digest": data_digest,
            "recipe_digest": recipe_digest,
            "run_folder": run.url,
            "mlflow.note.content": ABOUT.format(
                command=command(), shards=absolute_url(job.shards), digest=data_digest, folder=run.url
            ),
        },
        datasets={"training": dataset_of(index)},
    )
    if found is not None:
        return found
    identity = Identity(
        recipe_digest=recipe_digest,
        data_digest=data_digest,
        recipe=job.recipe.to_dict(),
        tracking_uri=uri,
        mlflow_run_id=run_id,
    )
    run.begin(identity)
    return identity


def dataset_of(index: Index) -> Dataset:
    """A packed data set, as MLflow's pages show it."""
    info, url = index.info, absolute_url(index.url)
    counts = {name: sum(shard.samples for shard in shards) for name, shards in info.splits.items()}
    return Dataset(
        name=url.rpartition("/")[2],
        digest=info.digest[:DIGEST_LETTERS],
        source_type="local" if "://" not in url else url.partition("://")[0],
        source=json.dumps({"uri": f"{url}/{DESCRIPTION}"}),
        profile=json.dumps({"classes": len(info.classes), **counts}),
    )


def differences(found: dict[str, Any], recipe: Recipe | CaptionRecipe, most: int = 4) -> str:
    if ("decoder" in found) != isinstance(recipe, CaptionRecipe):
        return "one learns captions, the other classes"
    there, here = flat(type(recipe).from_dict(found).to_dict()), flat(recipe.to_dict())
    changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    return "; ".join(changed[:most]) + (f" and {len(changed) - most} more" if len(changed) > most else "")


def train(
    job: Job,
    run: RunFolder,
    index: Index,
    identity: Identity,
    mlflow_run: MlflowRun,
    worker: Worker,
    prepared: dict[str, Any],
) -> dict[str, Any]:
    """Runs the workers and shows their news: a bar on a terminal, a line every `log_every` steps, and in MLflow."""
    mlflow_run.log_text("recipe.json", json.dumps(job.recipe.to_dict(), indent=1))
    if "vocabulary" in prepared:
        mlflow_run.log_text("vocabulary.json", json.dumps(prepared["vocabulary"], ensure_ascii=False))
    mlflow_run.log_text("dataset.json", index.info.to_json())
    mlflow_run.log_text("environment.txt", environment())
    if (diff := git_diff(ROOT)) is not None:
        mlflow_run.log_text("changes.diff", diff)
    with (
        Bar("training", "steps", job.recipe.num_steps, lines=False) as bar,
        Painter(mlflow_run.log_file, bar.print_line) as painter,
    ):
        mlflow_run.print_line = bar.print_line

        def listen(event: Event) -> None:
            match event:
                case Progress(step=step, line=line):
                    bar.print_line(line)
                    bar.move_to(step)
                case Metrics(step=step, values=values, milliseconds=milliseconds):
                    mlflow_run.log_metrics(step, values, milliseconds)
                case SystemMetrics(host=host, values=values, milliseconds=milliseconds):
                    values = {f"system/{host}/{name}": value for name, value in values.items()}
                    mlflow_run.log_metrics(mlflow_run.last_step(), values, milliseconds)
                case Validated():
                    painter.paint(partial(pictures_of, job, run, event))
                case CaptionTable(name=name, rows=rows):
                    mlflow_run.log_table(name, CAPTION_TABLE, rows)
                case Saved(checkpoint=checkpoint, keep=keep):
                    mlflow_run.log_checkpoint(checkpoint, keep)
                case Notice(text=text):
                    bar.print_line(text)
                    mlflow_run.log_event(mlflow_run.last_step(), text)
                case _:
                    pass

        worker_job = {
            "recipe": job.recipe.to_dict(),
            "shards": absolute_url(job.shards),
            "run": run.url,
            "tracking_uri": identity.tracking_uri,
            "mlflow_run_id": identity.mlflow_run_id,
            "reading": dataclasses.asdict(job.reading),
            "accumulation": job.accumulation,
            "zero": job.zero,
            "recompute": job.recompute,
            "deepspeed": str(job.deepspeed.absolute()) if job.deepspeed else None,
            "precision": job.precision,
            "log_every": job.log_every,
            "save_every": job.save_every or job.recipe.val_every,
            "keep": job.keep,
            "timeout_minutes": job.on.timeout_minutes,
            **prepared,
        }
        return run_workers(worker, worker_job, job.on, listen, partial(divides, job))


def pictures_of(job: Job, run: RunFolder, event: Validated) -> dict[str, bytes]:
    """{artifact: PNG} of a validation."""
    assert isinstance(job.recipe, Recipe)
    about = f"{run.name}, step {event.step:,}: the middle clip of each validation video"
    drawn = pictures(Judgement.from_dict(dict(event.confusion)), Index(job.shards, "val"), job.recipe.clips, about)
    return {f"pictures/val/{name}": content for name, content in drawn.items()}


def conclude(job: Job, run: RunFolder, identity: Identity, result: dict[str, Any], seconds: float) -> None:
    early = " (stopped early)" if result["stopped_early"] else ""
    values = {key.removeprefix("val_"): value for key, value in result.items() if key.startswith("val_")}
    finish(
        f"trained {result['steps']:,} steps{early} ({duration(seconds)} of it now): best at step {result['best_step']:,} with "
        f"validation {in_words(values, ', ')}; model and checkpoints in {run.url}; see the run: "
        f"{ui_command(identity.tracking_uri)}",
        {
            "run": run.url,
            "name": run.name,
            **result,
            "mlflow_run_id": identity.mlflow_run_id,
            "tracking_uri": identity.tracking_uri,
            "seconds": seconds,
        },
        job.json,
    )


def configurations() -> Configurations:
    """Each recipe's options."""
    jobs: dict[str, Job] = {name: Train(recipe=recipe(), shards=tyro.MISSING) for name, recipe in RECIPES.items()}
    jobs |= {name: TrainCaptions(recipe=recipe(), shards=tyro.MISSING) for name, recipe in CAPTION_RECIPES.items()}
    recipes = {**RECIPES, **CAPTION_RECIPES}
    return Configurations({name: ((recipes[name].__doc__ or "").strip(), job) for name, job in jobs.items()})


COMMAND = Command[tuple[str, Job]](configurations(), lambda chosen: main(*chosen), __doc__)

if __name__ == "__main__":
    COMMAND.run()
