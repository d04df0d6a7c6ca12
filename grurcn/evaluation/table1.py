"""Table 1 of the paper: trains every row, evaluates, and fuses RGB and flow. What is done already is not done again."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from matplotlib.figure import Figure

from cluster.workers.options import Workers
from grurcn.evaluation.evaluate import EvaluateJob, evaluate
from grurcn.evaluation.fusion import FuseJob, fuse
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
from grurcn.training.job import TrainJob
from grurcn.training.recipes import RECIPES, Recipe, changed, over_trunk
from grurcn.training.train import train
from shards.index import Index
from shards.reading.stages import ReadingOptions
from shards.store import absolute_url
from shards.video import Stream

Flat = tyro.conf.arg(name="")
RowName = Literal["frames", "rnn", "gru-rcn", "stacked", "bidirectional", "c3d"]


@dataclass(frozen=True)
class Row:
    """A row of the table: a model, and for each stream its recipe and the paper's accuracy in per cent."""

    title: str
    streams: dict[Stream, tuple[str, float]]


@dataclass(frozen=True)
class FusionRow:
    """A row that fuses two others: RGB with weight 1, flow with weight 2."""

    title: str
    rgb: RowName
    flow: RowName
    paper: float


ROWS: dict[RowName, Row] = {
    "frames": Row("{trunk}, single frames", {"rgb": ("vgg16-frames", 78.0), "flow": ("vgg16-frames-flow", 85.4)}),
    "rnn": Row("{trunk} RNN", {"rgb": ("vgg16-rnn", 78.1), "flow": ("vgg16-rnn-flow", 84.9)}),
    "gru-rcn": Row("GRU-RCN", {"rgb": ("gru-rcn", 79.9), "flow": ("gru-rcn-flow", 85.7)}),
    "stacked": Row("Stacked GRU-RCN", {"rgb": ("gru-rcn-stacked", 78.3)}),
    "bidirectional": Row("Bi-directional GRU-RCN", {"rgb": ("gru-rcn-bidirectional", 80.7)}),
    "c3d": Row("C3D, one network", {"rgb": ("c3d", 82.3)}),
}
FUSIONS = (
    FusionRow("{trunk}, RGB + flow", rgb="frames", flow="frames", paper=89.1),
    FusionRow("Bi-directional GRU-RCN RGB + GRU-RCN flow", rgb="bidirectional", flow="gru-rcn", paper=90.8),
)


@dataclass(frozen=True, kw_only=True)
class Table1Changes(Changes):
    """Values that replace those of all recipes. Default: each recipe's own."""

    size: int | None = None
    """Height and width of the model's input, in pixels."""
    num_frames: int | None = None
    """Frames in a clip; a fine-tuning keeps single frames."""
    stride: int | None = None
    """Distance from one frame of a clip to the next."""
    crop_scales: tuple[float, ...] | None = None
    """Sides of training crops, as fractions of the stored frames' shorter side."""
    test_scale: float | None = None
    """Side of test crops, as a fraction of the stored frames' shorter side."""
    hidden: tuple[int, ...] | None = None
    """State channels of each level's GRU; the RNN takes the last."""
    loss: str | None = None
    """mean or heads."""

    def apply(self, recipe: Recipe, fine_tuning: bool) -> Recipe:
        """The recipe with these values."""
        clips = self.given("size", "stride", "crop_scales", "test_scale")
        clips |= {} if fine_tuning else self.given("num_frames")
        model = self.given("dropout", "hidden")
        if recipe.model.kind == "c3d":  # whose clips have one size
            clips, model = {}, self.given("dropout")
        elif self.hidden is not None:
            model["hidden"] = self.hidden[-len(recipe.model.taps) :]
        whole = self.given("global_batch", "num_steps", "val_every", "patience", "loss")
        return changed(recipe, model=model, clips=clips, optim=self.given("learning_rate", "schedule"), **whole)


@dataclass(frozen=True, kw_only=True)
class Table1Job:
    """Which rows of the table to run, on which data."""

    shards: tuple[str, ...]
    """Folders or URLs that jobs.make_shards wrote, each a split of the data."""
    storage: Path = Path("runs")
    """Folder of all runs; every worker must see it."""
    out: Path | None = None
    """Folder of the table. Default: STORAGE/table1."""
    trunk: str = "vgg16"
    """Trunk of all models but C3D: vgg16, mobilenet_v2, or one of your own."""
    weights: str = "imagenet"
    """Initial weights of the trunk: imagenet, a file, a URL, or a run (as --model.weights of jobs.train)."""
    finetune: bool = True
    """Fine-tune the trunk on frames first, and use it in all other rows, as the paper does. With --no-finetune all rows use the
    trunk as it is, and the row of single frames trains its heads only."""
    rows: tuple[RowName, ...] = tuple(ROWS)
    """Rows of the table."""
    streams: tuple[Stream, ...] | None = None
    """rgb, flow. Default: those in the shards."""
    seeds: tuple[int, ...] = (0,)
    """Train each row once with each seed."""
    changes: Annotated[Table1Changes, Flat] = field(default_factory=Table1Changes)
    clips: int = 25
    """Equally spaced clips of each test video."""
    views: int = 10
    """Views of each clip: 1, 2, 5 or 10."""
    clips_at_once: int = 25
    """Clips that each worker computes at once in an evaluation."""
    experiment: str = "table1"
    """MLflow experiment of the runs."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[ReadingOptions, Flat] = field(default_factory=ReadingOptions)

    def __post_init__(self) -> None:
        if not self.shards or not self.rows or not self.seeds:
            raise ValueError("expected at least one folder of shards, one row and one seed")
        names = [data_name(url) for url in self.shards]
        if len(set(names)) < len(names):
            raise ValueError(
                f"shards {', '.join(names)}: expected different folder names, as runs are named after them"
            )
        trunk_spec(self.trunk)

    @property
    def folder(self) -> Path:
        return (self.out or self.storage / "table1").absolute()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the table: a row and stream, on one split with one seed."""

    row: RowName
    stream: Stream
    shards: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class TableRun:
    """An evaluated run, or a fusion of two."""

    run: str
    shards: str
    seed: int
    top1: float
    videos: int


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row and stream of the table, beside the paper's; accuracies from 0 to 1."""

    row: str
    stream: str
    paper: float
    top1: float | None  # mean of the runs
    spread: float | None  # standard deviation of several runs
    runs: tuple[TableRun, ...]


def reproduce_table1(job: Table1Job, print_line: PrintLine = print) -> PaperTable:
    """Trains and evaluates what is not done yet, and writes the table.

    Raises ValueError for sizes that do not fit before anything is trained, and OtherRun if a run's folder holds a run of another
    recipe or other shards, finished or not.
    """
    cells = list(cells_of(job, job.streams or streams_of(job)))
    recipes = [recipe_of(job, cell) for cell in cells]
    runs = []
    for number, (cell, recipe) in enumerate(zip(cells, recipes, strict=True)):
        print_line(f"[{number + 1} of {len(cells)}] {run_name(job, cell)}")
        runs.append(run_cell(job, cell, recipe, print_line))
    rows = list(table_rows(job, cells, runs))
    shards = [absolute_url(url) for url in job.shards]
    return PaperTable(
        name="table1",
        folder=job.folder,
        settings={"trunk": job.trunk, "shards": shards, "seeds": list(job.seeds)},
        rows=rows,
        num_done=sum(row.top1 is not None for row in rows),
        markdown=markdown(rows),
    ).write(draw_table(rows))


# Trainings


def streams_of(job: Table1Job) -> tuple[Stream, ...]:
    """The streams that all shards hold."""
    flows = [Index(url, "train").info.packing.flow for url in job.shards]
    return ("rgb",) if "none" in flows else ("rgb", "flow")


def cells_of(job: Table1Job, streams: Sequence[Stream]) -> Iterator[Cell]:
    """Every training; the trunks' fine-tuning comes before the trainings that use it."""
    for url, seed in itertools.product(job.shards, job.seeds):
        for name in ROWS:
            is_needed = name == "frames" and job.finetune and set(job.rows) != {"c3d"}
            for stream in streams if name in job.rows or is_needed else ():
                if stream in ROWS[name].streams:
                    yield Cell(row=name, stream=stream, shards=url, seed=seed)


def recipe_name(cell: Cell) -> str:
    return ROWS[cell.row].streams[cell.stream][0]


def recipe_of(job: Table1Job, cell: Cell) -> Recipe:
    """The cell's recipe, with the job's trunk and changes."""
    recipe = over_trunk(RECIPES[recipe_name(cell)](), job.trunk)
    fine_tuning = cell.row == "frames" and job.finetune
    if cell.row == "frames" and not job.finetune:
        # Only the heads, trained as those of the other rows are, on the same clips.
        other = RECIPES["gru-rcn-flow" if cell.stream == "flow" else "gru-rcn"]()
        model = {"freeze": True, "dropout": other.model.dropout}
        recipe = changed(other, model=vars(recipe.model) | model)
    recipe = changed(job.changes.apply(recipe, fine_tuning), seed=cell.seed)
    if cell.row == "c3d":
        return recipe
    weights = job.weights
    if job.finetune and not fine_tuning:
        weights = str(run_folder(job, dataclasses.replace(cell, row="frames")))
    return changed(recipe, model={"weights": weights})


def run_name(job: Table1Job, cell: Cell) -> str:
    """The name of a cell's run: gru-rcn-mobilenet_v2-rgb-split1-seed0."""
    trunk = [] if job.trunk == "vgg16" or cell.row == "c3d" else [job.trunk]
    return "-".join([cell.row, *trunk, cell.stream, data_name(cell.shards), f"seed{cell.seed}"])


def run_folder(job: Table1Job, cell: Cell) -> Path:
    return job.storage.absolute() / run_name(job, cell)


def evaluation_folder(job: Table1Job, cell: Cell) -> Path:
    return run_folder(job, cell) / "evaluations" / f"test-{job.clips}x{job.views}"


def data_name(url: str) -> str:
    """The last part of a folder or URL."""
    return absolute_url(url).rsplit("/", 1)[-1]


def run_cell(job: Table1Job, cell: Cell, recipe: Recipe, print_line: PrintLine) -> TableRun:
    """Trains and evaluates, unless that is done."""
    run = run_folder(job, cell)
    trained = train(
        TrainJob(
            recipe=recipe,
            recipe_name=recipe_name(cell),
            shards=cell.shards,
            storage=str(job.storage),
            name=run.name,
            experiment=job.experiment,
            on=job.on,
            reading=job.reading,
        )
    )
    if trained.finished_before:
        print_line(f"{run} was finished before")
    result = read_current_result(evaluation_folder(job, cell), trained.result.best_step)
    if result is not None:
        print_line(f"{run} was evaluated before")
    else:
        evaluation = evaluate(
            EvaluateJob(
                run=str(run),
                shards=cell.shards,
                clips=job.clips,
                views=job.views,
                clips_at_once=job.clips_at_once,
                on=job.on,
                reading=job.reading,
            )
        )
        result = evaluation.to_dict()
    return TableRun(run=run.name, shards=cell.shards, seed=cell.seed, top1=result["top1"], videos=result["videos"])


# The table


def table_rows(job: Table1Job, cells: Sequence[Cell], runs: Sequence[TableRun]) -> Iterator[TableRow]:
    """Each row and stream of the table, then the fusions."""
    trunk = trunk_spec(job.trunk).title
    for name, row in ROWS.items():
        for stream, (_, paper) in row.streams.items():
            pairs = zip(cells, runs, strict=True) if name in job.rows else ()
            found = [run for cell, run in pairs if (cell.row, cell.stream) == (name, stream)]
            yield summarize_runs(row.title.format(trunk=trunk), stream, paper / 100, found)
    for fusion in FUSIONS:
        found = list(fused_runs(job, fusion, cells))
        yield summarize_runs(fusion.title.format(trunk=trunk), "rgb + flow", fusion.paper / 100, found)


def fused_runs(job: Table1Job, fusion: FusionRow, cells: Sequence[Cell]) -> Iterator[TableRun]:
    """The fusion of each pair of runs on the same split with the same seed."""
    for rgb in cells:
        flow = dataclasses.replace(rgb, row=fusion.flow, stream="flow")
        if (rgb.row, rgb.stream) != (fusion.rgb, "rgb") or flow not in cells:
            continue
        fused = fuse(FuseJob(scores=(evaluation_folder(job, rgb), evaluation_folder(job, flow))))
        yield TableRun(
            run=f"{run_name(job, rgb)} + {run_name(job, flow)}",
            shards=rgb.shards,
            seed=rgb.seed,
            top1=fused.top1,
            videos=len(fused.scores.videos),
        )


def summarize_runs(title: str, stream: str, paper: float, runs: Sequence[TableRun]) -> TableRow:
    """A row's mean over its runs, and their standard deviation if there are several."""
    accuracies = [run.top1 for run in runs]
    return TableRow(
        row=title,
        stream=stream,
        paper=paper,
        top1=statistics.mean(accuracies) if accuracies else None,
        spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        runs=tuple(runs),
    )


def markdown(rows: Sequence[TableRow]) -> str:
    """Accuracies in per cent."""
    cells = []
    for row in rows:
        ours = "not yet run" if row.top1 is None else f"{row.top1:.1%}"
        if row.spread is not None:
            ours += f" ± {100 * row.spread:.1f}"
        cells.append([row.row, row.stream, ours, str(len(row.runs) or "-"), f"{row.paper:.1%}"])
    return markdown_table(["model", "stream", "ours", "runs", "paper (UCF-101)"], cells)


def draw_table(rows: Sequence[TableRow]) -> Figure:
    """Accuracies in per cent."""
    names, bars = [], []
    for row in rows:
        if row.top1 is not None:
            names.append(f"{row.row}\n{row.stream}")
            deviation, runs = 100 * (row.spread or 0), [100 * run.top1 for run in row.runs]
            bars.append(Bar(ours=100 * row.top1, paper=100 * row.paper, deviation=deviation, runs=runs))
    legend = ("ours (standard deviation; a dot per run)", "paper (UCF-101, its own trunk)")
    return draw_bars(names, {"top-1 accuracy, %": bars}, legend, width=9)
