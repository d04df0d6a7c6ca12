"""Table 1 of the paper in one command: train every row, evaluate, fuse, and print the table beside the paper's.

    python -m jobs.table1 --shards data/ucf101 --workers 8
    python -m jobs.table1 --shards data/mine --trunk mobilenet_v2 --no-finetune --size 96 --seeds 0 1 2

Rows that are done are skipped, and one that was interrupted goes on, when the same command is run again. With several --shards
(the splits of a data set) and --seeds, each row runs on all of them, and the table shows the mean and the standard deviation.
Flow has its columns where the shards hold flow (jobs.make_shards --flow).

OUT/table1.md, OUT/table1.png and OUT/table1.json hold the table; --json FILE holds: trunk, shards, seeds, rows [{row, stream,
paper, top1, spread, runs [{run, shards, seed, top1, videos}]}].
"""

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt

from cluster.checkpoints.run_folder import RunFolder, read_json, write_json
from cluster.workers.options import Workers
from grurcn.evaluation.fusion import FuseJob, fuse
from grurcn.models.trunks.base import trunk_spec
from grurcn.training.recipes import RECIPES, Recipe, changed, over_trunk
from jobs import evaluate, train
from jobs.command import Command, Flat, finish
from shards.index import Index
from shards.reading.stream import Reading
from shards.store import absolute_url, open_store
from shards.video import Stream

RowName = Literal["frames", "rnn", "gru-rcn", "stacked", "bidirectional", "c3d"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a model, its recipes and the paper's accuracies in per cent, by stream."""

    title: str
    recipes: dict[Stream, str]
    paper: dict[Stream, float]


@dataclass(frozen=True, kw_only=True)
class FusionRow:
    """A row that adds up the scores of two others, RGB counting once and flow twice."""

    title: str
    rgb: str
    flow: str
    paper: float


ROWS: dict[RowName, Row] = {
    "frames": Row(
        title="{trunk}, single frames",
        recipes={"rgb": "vgg16-frames", "flow": "vgg16-frames-flow"},
        paper={"rgb": 78.0, "flow": 85.4},
    ),
    "rnn": Row(
        title="{trunk} RNN", recipes={"rgb": "vgg16-rnn", "flow": "vgg16-rnn-flow"}, paper={"rgb": 78.1, "flow": 84.9}
    ),
    "gru-rcn": Row(
        title="GRU-RCN", recipes={"rgb": "gru-rcn", "flow": "gru-rcn-flow"}, paper={"rgb": 79.9, "flow": 85.7}
    ),
    "stacked": Row(title="Stacked GRU-RCN", recipes={"rgb": "gru-rcn-stacked"}, paper={"rgb": 78.3}),
    "bidirectional": Row(title="Bi-directional GRU-RCN", recipes={"rgb": "gru-rcn-bidirectional"}, paper={"rgb": 80.7}),
    "c3d": Row(title="C3D, one network", recipes={"rgb": "c3d"}, paper={"rgb": 82.3}),
}
FUSIONS = (
    FusionRow(title="{trunk}, RGB + flow", rgb="frames", flow="frames", paper=89.1),
    FusionRow(title="Bi-directional GRU-RCN RGB + GRU-RCN flow", rgb="bidirectional", flow="gru-rcn", paper=90.8),
)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Values that replace those of all recipes; each recipe's own where nothing is said."""

    size: int | None = None
    """Height and width of the model's input, in pixels."""
    num_frames: int | None = None
    """Frames in a clip (not of a fine-tuning, which sees single frames)."""
    stride: int | None = None
    """From one frame of a clip to the next."""
    global_batch: int | None = None
    """Videos in one step."""
    num_steps: int | None = None
    """Most steps."""
    val_every: int | None = None
    """Steps from one validation to the next."""
    patience: int | None = None
    """Validations without a better log-probability after which training stops; 0 never stops early."""
    crop_scales: tuple[float, ...] | None = None
    """Training crops, as shares of the stored frames' shorter side."""
    test_scale: float | None = None
    """Side of the test crops, as a share of the stored frames' shorter side."""
    learning_rate: float | None = None
    """Highest learning rate."""
    schedule: Literal["constant", "cosine", "steps"] | None = None
    """How the rate goes on from there."""
    dropout: float | None = None
    """Share of each pooled state that is dropped."""
    hidden: tuple[int, ...] | None = None
    """State channels of each level's GRU; of the RNN, the last of them."""
    loss: str | None = None
    """mean or heads."""

    def __call__(self, recipe: Recipe, fine_tuning: bool) -> Recipe:
        """The recipe with these values."""
        clips = {"size": self.size, "stride": self.stride, "num_frames": None if fine_tuning else self.num_frames}
        clips |= {"crop_scales": self.crop_scales, "test_scale": self.test_scale}
        optim = {"learning_rate": self.learning_rate, "schedule": self.schedule}
        model: dict[str, Any] = {"dropout": self.dropout}
        if recipe.model.kind == "c3d":
            clips = {}
        elif self.hidden is not None:
            model["hidden"] = self.hidden[-len(recipe.model.taps) :]
        whole = {name: getattr(self, name) for name in ("global_batch", "num_steps", "val_every", "patience", "loss")}
        return changed(recipe, model=given(model), clips=given(clips), optim=given(optim), **given(whole))


def given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Table1:
    """Options of the table."""

    shards: tuple[str, ...]
    """Folders or URLs that jobs.make_shards wrote, each a split of the data."""
    storage: Path = Path("runs")
    """Folder of all runs, seen by every worker."""
    out: Path | None = None
    """Folder of the table. Default: STORAGE/table1."""
    trunk: str = "vgg16"
    """The network whose maps are read."""
    weights: str = "imagenet"
    """What the trunk begins with: imagenet, a file, a URL, a run (as --model.weights of jobs.train)."""
    finetune: bool = True
    """Fine-tune the trunk on frames first, and read what came out in all other rows, as the paper does. With --no-finetune all
    rows read the trunk as it is, and the one of single frames learns its heads only."""
    rows: tuple[RowName, ...] = tuple(ROWS)
    """Rows of the table."""
    streams: tuple[Stream, ...] | None = None
    """rgb, flow. Default: those that the shards hold."""
    seeds: tuple[int, ...] = (0,)
    """Each row is trained once with each."""
    changes: Annotated[Changes, Flat] = field(default_factory=Changes)
    clips: int = 25
    """Equally spaced clips of each test video."""
    views: int = 10
    """Views of each clip: 1, 2, 5 or 10."""
    clips_at_once: int = 25
    """Clips in their views that an evaluation computes at once, on each worker."""
    experiment: str = "table1"
    """MLflow experiment that the runs belong to."""
    on: Annotated[Workers, Flat] = field(default_factory=Workers)
    reading: Annotated[Reading, Flat] = field(default_factory=Reading)
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if not self.shards or not self.rows or not self.seeds:
            raise ValueError("wanted at least one folder of shards, one row and one seed")
        names = [data_name(url) for url in self.shards]
        if len(set(names)) < len(names):
            raise ValueError(
                f"shards {', '.join(names)}: wanted folders of different names, as runs are called by them"
            )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the table: what is trained for it, on one split with one seed."""

    row: RowName
    stream: Stream
    shards: str
    seed: int


def main(job: Table1) -> int:
    """Trains and evaluates what is not done yet, then writes and prints the table."""
    streams = job.streams or streams_of(job)
    cells = list(cells_of(job, streams))
    for cell in cells:
        recipe_of(job, cell)  # refuses sizes that do not fit before anything is trained
    results = []
    for number, cell in enumerate(cells):
        print(f"[{number + 1} of {len(cells)}] {run_name(job, cell)}", flush=True)
        result = json.loads((run_cell(job, cell) / "result.json").read_text())
        results.append((cell, result))
    write_table(job, list(table_rows(job, results)))
    return 0


def streams_of(job: Table1) -> tuple[Stream, ...]:
    """The streams that all shards hold."""
    flows = [Index(url, "train").info.packing.flow for url in job.shards]
    return ("rgb",) if "none" in flows else ("rgb", "flow")


def cells_of(job: Table1, streams: tuple[Stream, ...]) -> Iterator[Cell]:
    """Every training, the trunks' fine-tuning before those that need it."""
    for url, seed in itertools.product(job.shards, job.seeds):
        for name in ROWS:
            row = ROWS[name]
            wanted = name in job.rows or (name == "frames" and job.finetune and set(job.rows) != {"c3d"})
            for stream in streams if wanted else ():
                if stream in row.recipes:
                    yield Cell(row=name, stream=stream, shards=url, seed=seed)


def recipe_of(job: Table1, cell: Cell) -> Recipe:
    """The cell's recipe, over the job's trunk, with the job's changes."""
    recipe = over_trunk(RECIPES[ROWS[cell.row].recipes[cell.stream]](), job.trunk)
    fine_tuning = cell.row == "frames" and job.finetune
    if cell.row == "frames" and not job.finetune:
        # The heads alone, trained as those of the other rows are, on the same clips.
        like = RECIPES["gru-rcn-flow" if cell.stream == "flow" else "gru-rcn"]()
        model = {"freeze": True, "dropout": like.model.dropout}
        recipe = changed(like, model=vars(recipe.model) | model)
    recipe = changed(job.changes(recipe, fine_tuning), seed=cell.seed)
    if cell.row == "c3d":
        return recipe
    weights = job.weights
    if job.finetune and not fine_tuning:
        tuned = Cell(row="frames", stream=cell.stream, shards=cell.shards, seed=cell.seed)
        weights = str(job.storage.absolute() / run_name(job, tuned))
    return changed(recipe, model={"weights": weights})


def run_name(job: Table1, cell: Cell) -> str:
    """What a cell's run is called: gru-rcn-mobilenet_v2-split1-seed0."""
    trunk = [] if job.trunk == "vgg16" or cell.row == "c3d" else [job.trunk]
    parts = [cell.row, *trunk, cell.stream, data_name(cell.shards), f"seed{cell.seed}"]
    return "-".join(parts)


def data_name(url: str) -> str:
    """The last part of a folder or URL."""
    return absolute_url(url).rsplit("/", 1)[-1]


def run_cell(job: Table1, cell: Cell) -> Path:
    """Trains and evaluates, if that is not done, and gives back the evaluation's folder.

    Raises OtherRun if the run's folder holds a run of another recipe or other shards, finished or not.
    """
    run = job.storage.absolute() / run_name(job, cell)
    training = train.Train(
        recipe=recipe_of(job, cell),
        shards=cell.shards,
        storage=str(job.storage),
        name=run.name,
        experiment=job.experiment,
        on=job.on,
        reading=job.reading,
    )
    train.main(ROWS[cell.row].recipes[cell.stream], training)
    folder = evaluation_folder(job, run)
    evaluated, trained = read_json(open_store(folder), "result.json"), RunFolder(str(run)).result()
    if evaluated is not None and trained is not None and evaluated["step"] == trained["best_step"]:
        print(f"{run} was evaluated before", flush=True)
        return folder
    evaluation = evaluate.Evaluate(
        run=str(run),
        shards=cell.shards,
        clips=job.clips,
        views=job.views,
        clips_at_once=job.clips_at_once,
        on=job.on,
        reading=job.reading,
    )
    evaluate.main(evaluation)
    return folder


def evaluation_folder(job: Table1, run: Path) -> Path:
    return run / "evaluations" / f"test-{job.clips}x{job.views}"


def table_rows(job: Table1, results: list[tuple[Cell, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Each row and stream of the table, then the fusions: {row, stream, paper, top1, spread, runs}, accuracies as shares."""
    trunk = trunk_spec(job.trunk).title
    for name, row in ROWS.items():
        for stream in row.recipes:
            runs = [
                {"run": run_name(job, cell), "shards": cell.shards, "seed": cell.seed, "top1": result["top1"],
                 "videos": result["videos"]}
                for cell, result in results
                if (cell.row, cell.stream) == (name, stream) and name in job.rows
            ]  # fmt: skip
            yield summary(row.title.format(trunk=trunk), stream, row.paper[stream] / 100, runs)
    for fusion in FUSIONS:
        runs = list(fused_runs(job, fusion, [cell for cell, _ in results]))
        yield summary(fusion.title.format(trunk=trunk), "rgb + flow", fusion.paper / 100, runs)


def fused_runs(job: Table1, fusion: FusionRow, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """The fusion of each pair of runs on the same split with the same seed."""
    for rgb, flow in itertools.product(cells, cells):
        pair = (rgb.row, rgb.stream, flow.row, flow.stream) == (fusion.rgb, "rgb", fusion.flow, "flow")
        if not pair or (rgb.shards, rgb.seed) != (flow.shards, flow.seed):
            continue
        folders = [evaluation_folder(job, job.storage.absolute() / run_name(job, cell)) for cell in (rgb, flow)]
        fused = fuse(FuseJob(scores=tuple(folders)))
        names = f"{run_name(job, rgb)} + {run_name(job, flow)}"
        yield {
            "run": names,
            "shards": rgb.shards,
            "seed": rgb.seed,
            "top1": fused.top1,
            "videos": len(fused.scores.videos),
        }


def summary(title: str, stream: str, paper: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row's mean over its runs, and their standard deviation where there are several."""
    accuracies = [run["top1"] for run in runs]
    return {
        "row": title,
        "stream": stream,
        "paper": paper,
        "top1": statistics.mean(accuracies) if accuracies else None,
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "runs": runs,
    }


def write_table(job: Table1, rows: list[dict[str, Any]]) -> None:
    """The table as Markdown, picture and JSON, and on the screen."""
    out = (job.out or job.storage / "table1").absolute()
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "trunk": job.trunk,
        "shards": [absolute_url(url) for url in job.shards],
        "seeds": list(job.seeds),
        "rows": rows,
    }
    write_json(open_store(out), "table1.json", result)
    (out / "table1.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, out / "table1.png")
    print("\n" + markdown(rows))
    done = sum(row["top1"] is not None for row in rows)
    finish(f"{done} of {len(rows)} accuracies; table1.md, table1.png and table1.json in {out}", result, job.json)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, accuracies in per cent."""
    lines = ["| model | stream | ours | runs | paper (UCF-101) |", "|---|---|---|---|---|"]
    for row in rows:
        ours = "not yet run" if row["top1"] is None else f"{row['top1']:.1%}"
        if row["spread"] is not None:
            ours += f" ± {100 * row['spread']:.1f}"
        lines.append(f"| {row['row']} | {row['stream']} | {ours} | {len(row['runs']) or '-'} | {row['paper']:.1%} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Our accuracies as bars, each run a dot, beside the paper's."""
    mpl.use("Agg")
    rows = [row for row in rows if row["top1"] is not None]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.6 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axes.barh(place, 100 * row["top1"], xerr=100 * (row["spread"] or 0), height=0.6, color="#4c78a8", ecolor="#1b3a5c",
                  capsize=4, label="ours (standard deviation; a dot each run)" if not place else None)  # fmt: skip
        dots = [100 * run["top1"] for run in row["runs"]]
        axes.scatter(dots, [place] * len(dots), color="#f2b134", edgecolor="black", linewidth=0.5, s=22, zorder=3)
        axes.plot([100 * row["paper"]] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=3,
                  label="paper (UCF-101, its own trunk)" if not place else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['row']}\n{row['stream']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("top-1 accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


COMMAND = Command(Table1, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
