"""Table 2 of the paper: for each row, searches a decoder, and scores its captions of the test videos.

For each row, Ray Tune trains several decoders in parallel. Run folders say what is done, not Tune's notes: after an
interruption, finished trainings return their results at once, and others continue.
"""

import dataclasses
import itertools
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import ray
import tyro
from matplotlib.figure import Figure
from ray import tune

from cluster.checkpoints.run_folder import RunFolder
from cluster.tracking.server import check_reachable, experiment_of, tracking_uri
from cluster.workers.connect import start_ray
from cluster.workers.options import Workers
from grurcn.evaluation.caption import CaptionJob, caption
from grurcn.evaluation.caption_scores import check_metrics
from grurcn.evaluation.paper_tables import (
    Bar,
    Changes,
    PaperTable,
    PrintLine,
    draw_bars,
    markdown_table,
    read_current_result,
)
from grurcn.models.trunks.base import trunk_spec
from grurcn.training.caption_recipes import CaptionRecipe, Select
from grurcn.training.caption_recipes import caption as caption_recipe
from grurcn.training.encode import EncodeJob, encode
from grurcn.training.encoders import EncoderConfig
from grurcn.training.job import TrainJob
from grurcn.training.recipes import changed
from grurcn.training.train import train
from shards.index import Index
from shards.store import absolute_url

RowName = Literal["frame", "states", "entity", "both-bleu4", "both-loss", "both-meteor", "both-cider"]
METRICS = {"bleu4": "BLEU-4", "meteor": "METEOR", "cider": "CIDEr"}
SELECTED_BY = {**METRICS, "loss": "NLL"}
TUNE_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # with it, Tune would end normally after Ctrl-C
    "RAY_AIR_NEW_OUTPUT": "0",  # its new output ignores verbose=0
}
MAX_FAILURES = 3  # lost processes of a trial


@dataclass(frozen=True)
class Row:
    """A row of the table: its encoders, the score that selects its model, and the paper's BLEU-4, METEOR and CIDEr."""

    title: str
    encoders: tuple[str, ...]
    select: Select
    paper: tuple[float, float, float]


BOTH = "{entity} + GRU-RCN states"
ROWS: dict[RowName, Row] = {
    "frame": Row("{frame}, first frames", ("frame",), "bleu4", paper=(0.3700, 0.2640, 0.4330)),
    "states": Row("GRU-RCN states", ("states",), "bleu4", paper=(0.4100, 0.2850, 0.5010)),
    "entity": Row("{entity}", ("entity",), "bleu4", paper=(0.4128, 0.2900, 0.4804)),
    "both-bleu4": Row(BOTH, ("entity", "states"), "bleu4", paper=(0.4963, 0.3075, 0.5937)),
    "both-loss": Row(BOTH, ("entity", "states"), "loss", paper=(0.4790, 0.3114, 0.6782)),
    "both-meteor": Row(BOTH, ("entity", "states"), "meteor", paper=(0.4842, 0.3170, 0.6538)),
    "both-cider": Row(BOTH, ("entity", "states"), "cider", paper=(0.4326, 0.3160, 0.6801)),
}


@dataclass(frozen=True, kw_only=True)
class Table2Changes(Changes):
    """Values that replace those of the recipe `caption`. Default: its own."""

    optimizer: Literal["adam", "sgd", "adadelta"] | None = None
    """Optimizer."""
    weight_decay: float | None = None
    """Weight decay, as the optimizer applies it."""
    standardise: bool | None = None
    """Give each number of a vector mean 0 and standard deviation 1 over the training videos."""
    beam: int | None = None
    """Captions that the beam search keeps at each word."""

    def apply(self, recipe: CaptionRecipe) -> CaptionRecipe:
        """The recipe with these values."""
        optim = self.given("optimizer", "learning_rate", "weight_decay", "schedule")
        whole = self.given("global_batch", "num_steps", "val_every", "patience", "standardise", "beam")
        return changed(recipe, optim=optim, decoder=self.given("dropout"), **whole)


@dataclass(frozen=True, kw_only=True)
class Table2Job:
    """Which rows of the table to run, with which encoders, on which data."""

    shards: str
    """Folder or URL that jobs.make_shards wrote, with captions."""
    frame: str | None = None
    """Run whose trunk encodes single frames (as --encoder.frame of jobs.train)."""
    states: str | None = None
    """Run of a GRU-RCN, bi-directional in the paper (as --encoder.states)."""
    entity: str | None = None
    """Weights of an image trunk, GoogLeNet in the paper (as --encoder.entity)."""
    entity_trunk: str = "mobilenet_v2"
    """The trunk of those weights."""
    entity_size: int = 224
    """Height and width of its input frames, in pixels."""
    rows: tuple[RowName, ...] = tuple(ROWS)
    """Rows of the table. Rows whose encoders are not given stay empty."""
    samples: int = 10
    """Decoders to train for each row."""
    hidden: tuple[int, ...] = (512, 1024, 2048, 3518)
    """LSTM sizes to draw from."""
    embedding: tuple[int, ...] = (128, 256, 468, 512)
    """Lengths of word vectors to draw from."""
    segments: tuple[int, ...] = (10, 20, 28)
    """Numbers of segments to draw from."""
    seed: int = 0
    """Seed of the draws and of the trainings."""
    changes: Annotated[Table2Changes, tyro.conf.arg(name="")] = field(default_factory=Table2Changes)
    storage: Path = Path("runs")
    """Folder of all runs and vectors; every machine must see it."""
    out: Path | None = None
    """Folder of the table. Default: STORAGE/table2."""
    experiment: str = "table2"
    """MLflow experiment of the runs."""
    cpus_per_trial: int = 1
    """CPU cores of each training."""
    gpus_per_trial: int | None = None
    """GPUs of each training, 0 or 1. Default: 1 if there are any."""

    def __post_init__(self) -> None:
        if not (self.rows and self.hidden and self.embedding and self.segments) or self.samples < 1:
            raise ValueError(
                "expected at least one row, one sample, and one value each of hidden, embedding and segments"
            )
        if self.cpus_per_trial < 1 or self.gpus_per_trial not in (None, 0, 1):
            raise ValueError(
                f"cpus_per_trial {self.cpus_per_trial}, gpus_per_trial {self.gpus_per_trial}: expected at least 1, and 0 or 1"
            )
        if not self.encoders:
            raise ValueError("no encoder is given; expected --frame, --states or --entity, one or more of them")
        trunk_spec(self.entity_trunk)

    @property
    def encoders(self) -> dict[str, str]:
        """The given encoders and their sources."""
        sources = {"entity": self.entity, "frame": self.frame, "states": self.states}
        return {name: source for name, source in sources.items() if source}

    @property
    def possible_rows(self) -> list[RowName]:
        """The rows whose encoders are given."""
        return [name for name in ROWS if name in self.rows and set(ROWS[name].encoders) <= self.encoders.keys()]

    @property
    def folder(self) -> Path:
        return (self.out or self.storage / "table2").absolute()


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The sizes that were drawn for one training."""

    number: int
    hidden: int
    embedding: int
    segments: int


@dataclass(frozen=True, kw_only=True)
class Trial(Draw):
    """A trained decoder."""

    run: str
    validation: float  # the score that selects


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of the table, beside the paper's scores."""

    row: str
    select: Select
    paper: dict[str, float]
    scores: dict[str, float] | None = None  # of the test videos
    best: Trial | None = None
    trials: tuple[Trial, ...] = ()


def reproduce_table2(job: Table2Job, print_line: PrintLine = print) -> PaperTable:
    """Searches, trains and captions what is not done yet, and writes the table.

    Raises ValueError for data or encoders that do not fit, and OSError if a training was lost too often.
    """
    validate_table2(job)
    draws = draw_sizes(job)
    start_ray()
    table = {name: empty_row(job, name) for name in ROWS}
    for number, name in enumerate(job.possible_rows):
        selected_by = SELECTED_BY[ROWS[name].select]
        print_line(f"[{number + 1} of {len(job.possible_rows)}] {table[name].row}, selected by {selected_by}")
        for segments in sorted({draw.segments for draw in draws}):
            encode_row(job, name, segments)
        table[name] = run_row(job, name, draws, print_line)
    rows = list(table.values())
    return PaperTable(
        name="table2",
        folder=job.folder,
        settings={"shards": absolute_url(job.shards), "encoders": job.encoders},
        rows=rows,
        num_done=sum(row.scores is not None for row in rows),
        markdown=markdown(rows),
    ).write(draw_table(rows))


def validate_table2(job: Table2Job) -> None:
    """Raises, before anything is started, what would stop a row later."""
    if not job.possible_rows:
        raise ValueError(
            f"rows {', '.join(job.rows)}: none of them has all its encoders; given: {', '.join(job.encoders)}"
        )
    Index(job.shards, "train").check_videos()
    for split in ("train", "val", "test"):
        Index(job.shards, split).check_captions()
    check_metrics(["bleu4", *(ROWS[name].select for name in job.possible_rows if ROWS[name].select != "loss")])
    check_reachable(tracking_uri(job.storage))


def draw_sizes(job: Table2Job) -> list[Draw]:
    """The draws, the same for every row: each combination at most once, in an order that depends only on the seed."""
    combinations = list(itertools.product(job.hidden, job.embedding, job.segments))
    drawn = random.Random(f"table2/{job.seed}").sample(combinations, min(job.samples, len(combinations)))
    return [Draw(number=number, hidden=h, embedding=e, segments=k) for number, (h, e, k) in enumerate(drawn)]


# One row


def vectors_folder(job: Table2Job, name: RowName, segments: int) -> Path:
    return job.folder / f"vectors-{'-'.join(ROWS[name].encoders)}-{segments}"


def encode_row(job: Table2Job, name: RowName, segments: int) -> None:
    """Computes the vectors of a row's encoders, unless that is done."""
    sources = {encoder: job.encoders[encoder] for encoder in ROWS[name].encoders}
    config = EncoderConfig(segments=segments, entity_trunk=job.entity_trunk, entity_size=job.entity_size, **sources)
    out = str(vectors_folder(job, name, segments))
    encode(EncodeJob(shards=job.shards, out=out, encoder=config, storage=str(job.storage)))


def run_row(job: Table2Job, name: RowName, draws: Sequence[Draw], print_line: PrintLine) -> TableRow:
    """Trains all decoders of a row, and scores the best one's captions of the test videos."""
    trials = search(job, name, draws, print_line)
    best = (min if ROWS[name].select == "loss" else max)(trials, key=lambda trial: trial.validation)
    run = job.storage.absolute() / best.run
    trained = RunFolder(str(run)).result()
    assert trained is not None
    beam = job.changes.apply(caption_recipe()).beam
    result = read_current_result(run / "captions" / f"test-beam{beam}", trained["best_step"])
    if result is None:
        shards = str(vectors_folder(job, name, best.segments))
        result = caption(CaptionJob(run=str(run), shards=shards, beam=beam)).to_dict()
    return dataclasses.replace(empty_row(job, name), scores=result["scores"], best=best, trials=tuple(trials))


def search(job: Table2Job, name: RowName, draws: Sequence[Draw], print_line: PrintLine) -> list[Trial]:
    """Trains a decoder for each draw, as many in parallel as there is room for. Raises what a training refuses as ValueError."""
    use_gpus = ray.cluster_resources().get("GPU", 0) > 0 if job.gpus_per_trial is None else job.gpus_per_trial > 0
    trainings = {run_name(name, draw): training_of(job, name, draw) for draw in draws}
    experiment_of(tracking_uri(job.storage), job.storage, job.experiment)  # create it once, before the trials use it
    os.environ.update(TUNE_SETTINGS)
    with TemporaryDirectory(prefix="grurcn-tune-") as notes:
        names = lambda trial: trial.config["run"]  # noqa: E731
        trainable = tune.with_parameters(run_trial, trainings=trainings)  # as Tune's own space takes plain values only
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": job.cpus_per_trial, "gpu": int(use_gpus)}),
            param_space={"run": tune.grid_search(list(trainings))},
            tune_config=tune.TuneConfig(trial_name_creator=names, trial_dirname_creator=names),
            run_config=tune.RunConfig(
                name=name,
                storage_path=notes,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[TrialLines(ROWS[name].select, trainings, print_line)],
            ),
        )
        results = tuner.fit()
    for result in results:
        if result.error is not None:
            raise OSError(f"{name}: a training was lost {MAX_FAILURES + 1} times: {result.error}")
        if refused := (result.metrics or {}).get("refused"):
            raise ValueError(refused)
    validation = {result.metrics["run"]: result.metrics["validation"] for result in results if result.metrics}
    return [
        Trial(**vars(draw), run=run, validation=validation[run]) for draw, run in zip(draws, trainings, strict=True)
    ]


def training_of(job: Table2Job, name: RowName, draw: Draw) -> TrainJob:
    return TrainJob(
        recipe=recipe_of(job, name, draw),
        recipe_name="caption",
        shards=str(vectors_folder(job, name, draw.segments)),
        storage=str(job.storage.absolute()),
        name=run_name(name, draw),
        experiment=job.experiment,
        on=Workers(workers=0, cpus_per_worker=job.cpus_per_trial),
    )


def run_name(name: RowName, draw: Draw) -> str:
    return f"table2-{name}-{draw.number:02}"


def recipe_of(job: Table2Job, name: RowName, draw: Draw) -> CaptionRecipe:
    """The recipe `caption` with the drawn sizes and the job's changes."""
    sizes = {"hidden": draw.hidden, "embedding": draw.embedding}
    recipe = changed(caption_recipe(), decoder=sizes, select=ROWS[name].select, seed=job.seed)
    return job.changes.apply(changed(recipe, encoder={"segments": draw.segments}))


def run_trial(config: dict[str, Any], trainings: Mapping[str, TrainJob]) -> None:
    """One training, in a process of its own. Reports its validation score to Tune, or why it was refused."""
    run, training = config["run"], trainings[config["run"]]
    assert isinstance(training.recipe, CaptionRecipe)
    try:
        trained = train(training)
    except (ValueError, OSError) as error:
        tune.report({"run": run, "refused": f"{run}: {error}"})
        return
    tune.report({"run": run, "validation": trained.result.scores[training.recipe.select]})


class TrialLines(tune.Callback):
    """Prints a line for each training that ends."""

    def __init__(self, select: str, trainings: Mapping[str, TrainJob], print_line: PrintLine):
        self.select, self.trainings, self.print_line, self.done = select, trainings, print_line, 0
        self.best: float | None = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        value = trial.last_result.get("validation")
        if value is None:
            return
        better = self.best is None or (value < self.best if self.select == "loss" else value > self.best)
        self.done, self.best = self.done + 1, value if better else self.best
        run = trial.config["run"]
        recipe = self.trainings[run].recipe
        assert isinstance(recipe, CaptionRecipe)
        self.print_line(
            f"  {self.done} of {len(self.trainings)}: {run}, hidden {recipe.decoder.hidden}, embedding "
            f"{recipe.decoder.embedding}, {recipe.encoder.segments} segments: validation {self.select} {value:.4f}"
            f"{', best so far' if better else ''}"
        )


# The table


def empty_row(job: Table2Job, name: RowName) -> TableRow:
    """A row that was not run."""
    row = ROWS[name]
    frame = Path(job.frame).name if job.frame else "VGG-16"
    title = row.title.format(frame=frame, entity=trunk_spec(job.entity_trunk).title)
    return TableRow(row=title, select=row.select, paper=dict(zip(METRICS, row.paper, strict=True)))


def markdown(rows: Sequence[TableRow]) -> str:
    """Our scores / the paper's."""
    lines = []
    for row in rows:
        cells = [f"{format_score(row.scores, metric)} / {row.paper[metric]:.4f}" for metric in METRICS]
        sizes = f"{row.best.hidden}, {row.best.embedding}, {row.best.segments}" if row.best else "-"
        lines.append([f"{row.row} ({SELECTED_BY[row.select]})", *cells, sizes])
    head = ["encoder (selected by)", *METRICS.values(), "hidden, embedding, K"]
    return markdown_table(head, lines) + "\nours / the paper's, on MSVD\n"


def format_score(scores: dict[str, float] | None, metric: str) -> str:
    """METEOR is missing if there is no Java."""
    if scores is None:
        return "not yet run"
    return f"{scores[metric]:.4f}" if metric in scores else "no Java"


def draw_table(rows: Sequence[TableRow]) -> Figure:
    rows = [row for row in rows if row.scores is not None]
    panels = {
        title: [Bar(ours=(row.scores or {}).get(metric, 0), paper=row.paper[metric]) for row in rows]
        for metric, title in METRICS.items()
    }
    names = [f"{row.row}\nby {SELECTED_BY[row.select]}" for row in rows]
    return draw_bars(names, panels, ("ours", "paper (MSVD, its own encoders)"), width=12)
