"""Table 2 of the paper in one command: search, train, describe and score every row of captioning, beside the paper's numbers.

    python -m jobs.table2 --shards data/msvd --frame runs/vgg16-frames --states runs/gru-rcn-bidirectional --entity imagenet
    python -m jobs.table2 --shards data/mine --states runs/mine --rows states --samples 4 --hidden 64 96 --segments 4 8

For each row, Ray Tune trains --samples decoders side by side, whose LSTM size, word vectors and number of segments are drawn at
random; the one with the best score of the validation videos (BLEU-4, or what the row says) describes the test videos. The vectors
of each encoder and number of segments are computed once (jobs.encode). What is done is not done again when the same command is
run again, and a training that was interrupted goes on. Rows whose encoders are not named stay empty.

OUT/table2.md, OUT/table2.png and OUT/table2.json hold the table; --json FILE holds: shards, encoders, rows [{row, select, paper
{bleu4, meteor, cider}, scores, best {run, hidden, embedding, segments, validation}, trials}].
"""

import dataclasses
import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import ray
from ray import tune

from cluster.checkpoints.run_folder import RunFolder, read_json, write_json
from cluster.tracking.server import check_reachable, experiment_of, tracking_uri
from cluster.workers.connect import start_ray
from cluster.workers.options import Workers
from grurcn.evaluation.caption_scores import check_metrics
from grurcn.models.trunks.base import trunk_spec
from grurcn.training.caption_recipes import CaptionRecipe, Select
from grurcn.training.caption_recipes import caption as caption_recipe
from grurcn.training.encoders import EncoderConfig
from grurcn.training.recipes import changed
from jobs import caption, encode, train
from jobs.command import Command, Flat, finish
from jobs.table1 import given
from shards.index import Index
from shards.store import absolute_url, open_store

RowName = Literal["frame", "states", "entity", "both-bleu4", "both-loss", "both-meteor", "both-cider"]
METRICS = {"bleu4": "BLEU-4", "meteor": "METEOR", "cider": "CIDEr"}
SELECTED_BY = {**METRICS, "loss": "NLL"}
TUNE_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end well, as if nobody had interrupted
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints a box whatever it is told
}
FAILURES = 3  # losses of a trial's process, after which the search gives up


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: its encoders, what selects its model, and the paper's BLEU-4, METEOR and CIDEr."""

    title: str
    encoders: tuple[str, ...]
    select: Select
    paper: tuple[float, float, float]


BOTH = "{entity} + GRU-RCN states"
ROWS: dict[RowName, Row] = {
    "frame": Row(title="{frame}, first frames", encoders=("frame",), select="bleu4", paper=(0.3700, 0.2640, 0.4330)),
    "states": Row(title="GRU-RCN states", encoders=("states",), select="bleu4", paper=(0.4100, 0.2850, 0.5010)),
    "entity": Row(title="{entity}", encoders=("entity",), select="bleu4", paper=(0.4128, 0.2900, 0.4804)),
    "both-bleu4": Row(title=BOTH, encoders=("entity", "states"), select="bleu4", paper=(0.4963, 0.3075, 0.5937)),
    "both-loss": Row(title=BOTH, encoders=("entity", "states"), select="loss", paper=(0.4790, 0.3114, 0.6782)),
    "both-meteor": Row(title=BOTH, encoders=("entity", "states"), select="meteor", paper=(0.4842, 0.3170, 0.6538)),
    "both-cider": Row(title=BOTH, encoders=("entity", "states"), select="cider", paper=(0.4326, 0.3160, 0.6801)),
}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Values that replace those of the recipe `caption`."""

    global_batch: int | None = None
    """Pairs of a video and a caption in one step."""
    num_steps: int | None = None
    """Most steps."""
    val_every: int | None = None
    """Steps from one validation to the next."""
    patience: int | None = None
    """Validations without a better likelihood after which training stops; 0 never stops early."""
    optimizer: Literal["adam", "sgd", "adadelta"] | None = None
    """How the weights learn."""
    learning_rate: float | None = None
    """Highest learning rate."""
    weight_decay: float | None = None
    """As the optimizer counts it."""
    schedule: Literal["constant", "cosine", "steps"] | None = None
    """How the rate goes on from there."""
    dropout: float | None = None
    """Share of each state, and of what the words are told from, that is dropped."""
    standardise: bool | None = None
    """Give each number of a vector mean 0 and deviation 1 over training videos."""
    beam: int | None = None
    """Captions that the search keeps at each word."""

    def __call__(self, recipe: CaptionRecipe) -> CaptionRecipe:
        """The recipe with these values."""
        values = given(dataclasses.asdict(self))
        optim = {name: values.pop(name) for name in list(values) if name in vars(recipe.optim)}
        decoder = {name: values.pop(name) for name in list(values) if name == "dropout"}
        return changed(recipe, optim=optim, decoder=decoder, **values)


@dataclass(frozen=True, kw_only=True)
class Table2:
    """Options of the table."""

    shards: str
    """Folder or URL that jobs.make_shards wrote, with captions."""
    frame: str | None = None
    """Run whose trunk sees single frames (as --encoder.frame of jobs.train)."""
    states: str | None = None
    """Run of a GRU-RCN, bi-directional in the paper (as --encoder.states)."""
    entity: str | None = None
    """Weights of a trunk of pictures, GoogLeNet in the paper (as --encoder.entity)."""
    entity_trunk: str = "mobilenet_v2"
    """The trunk of those weights."""
    entity_size: int = 224
    """Height and width of the frames that it sees, in pixels."""
    rows: tuple[RowName, ...] = tuple(ROWS)
    """Rows of the table."""
    samples: int = 10
    """Decoders of each row."""
    hidden: tuple[int, ...] = (512, 1024, 2048, 3518)
    """LSTM sizes to draw from."""
    embedding: tuple[int, ...] = (128, 256, 468, 512)
    """Lengths of word vectors to draw from."""
    segments: tuple[int, ...] = (10, 20, 28)
    """Numbers of segments to draw from."""
    seed: int = 0
    """Of what is drawn, and of the trainings."""
    changes: Annotated[Changes, Flat] = field(default_factory=Changes)
    storage: Path = Path("runs")
    """Folder of all runs and vectors, seen by every machine."""
    out: Path | None = None
    """Folder of the table. Default: STORAGE/table2."""
    experiment: str = "table2"
    """MLflow experiment that the runs belong to."""
    cpus_per_trial: int = 1
    """CPU cores of each training."""
    gpus_per_trial: int | None = None
    """GPUs of each training, 0 or 1. Default: 1 if there are any."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if not (self.rows and self.hidden and self.embedding and self.segments) or self.samples < 1:
            raise ValueError(
                "wanted at least one row, one sample, and one value each of hidden, embedding and segments"
            )
        if self.cpus_per_trial < 1 or self.gpus_per_trial not in (None, 0, 1):
            raise ValueError(
                f"cpus_per_trial {self.cpus_per_trial}, gpus_per_trial {self.gpus_per_trial}: wanted at least 1, and 0 or 1"
            )
        if not self.named:
            raise ValueError("no encoder is named; wanted --frame, --states or --entity, as many as there are")

    @property
    def named(self) -> set[str]:
        """The encoders that are there."""
        return {name for name in ("frame", "states", "entity") if getattr(self, name)}

    @property
    def possible(self) -> list[RowName]:
        """The rows whose encoders are there."""
        return [name for name in ROWS if name in self.rows and set(ROWS[name].encoders) <= self.named]

    @property
    def folder(self) -> Path:
        return (self.out or self.storage / "table2").absolute()


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What is drawn for one training."""

    number: int
    hidden: int
    embedding: int
    segments: int


def main(job: Table2) -> int:
    """Searches, trains, describes what is not done yet, then writes and prints the table."""
    check(job)
    draws = draws_of(job)
    start_ray()
    found: dict[RowName, dict[str, Any]] = {}
    for number, name in enumerate(job.possible):
        print(
            f"[{number + 1} of {len(job.possible)}] {title_of(job, name)}, selected by {SELECTED_BY[ROWS[name].select]}",
            flush=True,
        )
        for segments in sorted({draw.segments for draw in draws}):
            encode_row(job, name, segments)
        found[name] = run_row(job, name, draws)
    write_table(job, [table_row(job, name, found.get(name)) for name in ROWS])
    return 0


def check(job: Table2) -> None:
    """Finds out, before anything is started, what would stop a row later."""
    if not job.possible:
        raise ValueError(
            f"rows {', '.join(job.rows)}: the encoders of none of them are named; named: {', '.join(sorted(job.named))}"
        )
    Index(job.shards, "train").check_videos()
    for split in ("train", "val", "test"):
        Index(job.shards, split).check_captions()
    check_metrics(["bleu4", *(ROWS[name].select for name in job.possible if ROWS[name].select != "loss")])
    check_reachable(tracking_uri(job.storage))


def draws_of(job: Table2) -> list[Draw]:
    """What is drawn, the same for every row: each combination at most once, in an order that depends on the seed alone."""
    every = list(itertools.product(job.hidden, job.embedding, job.segments))
    chosen = random.Random(f"table2/{job.seed}").sample(every, min(job.samples, len(every)))
    return [Draw(number=number, hidden=h, embedding=e, segments=k) for number, (h, e, k) in enumerate(chosen)]


# One row


def vectors_of(job: Table2, name: RowName, segments: int) -> Path:
    return job.folder / f"vectors-{'-'.join(ROWS[name].encoders)}-{segments}"


def encode_row(job: Table2, name: RowName, segments: int) -> None:
    """The vectors of a row's encoders, computed if they are not there."""
    sources = {encoder: getattr(job, encoder) for encoder in ROWS[name].encoders}
    config = EncoderConfig(segments=segments, entity_trunk=job.entity_trunk, entity_size=job.entity_size, **sources)
    out = str(vectors_of(job, name, segments))
    encode.main(encode.Encode(shards=job.shards, out=out, encoder=config, storage=str(job.storage)))


def run_row(job: Table2, name: RowName, draws: Sequence[Draw]) -> dict[str, Any]:
    """{scores, best, trials} of a row: all its trainings, and the test videos as the best of them describes them."""
    trials = search(job, name, draws)
    select = ROWS[name].select
    best = (min if select == "loss" else max)(trials, key=lambda trial: trial["validation"])
    run = job.storage.absolute() / best["run"]
    beam = job.changes(caption_recipe()).beam
    trained = RunFolder(str(run)).result()
    described = read_json(open_store(run), f"captions/test-beam{beam}/result.json")
    if described is None or trained is None or described["step"] != trained["best_step"]:
        shards = str(vectors_of(job, name, best["segments"]))
        caption.main(caption.Caption(run=str(run), shards=shards, beam=beam))
        described = read_json(open_store(run), f"captions/test-beam{beam}/result.json")
    return {"scores": described["scores"], "best": best, "trials": trials}


def search(job: Table2, name: RowName, draws: Sequence[Draw]) -> list[dict[str, Any]]:
    """Trains a decoder for each draw, as many side by side as there is room for: {run, hidden, embedding, segments, validation}.

    Our runs' folders say what is done, not Tune's notes: a training that was finished gives its result at once, and one that
    was interrupted goes on. Raises what a training refuses as ValueError.
    """
    use_gpus = ray.cluster_resources().get("GPU", 0) > 0 if job.gpus_per_trial is None else job.gpus_per_trial > 0
    trials = [trial_of(job, name, draw) for draw in draws]
    experiment_of(tracking_uri(job.storage), job.storage, job.experiment)  # once, and not by all trials at once
    os.environ.update(TUNE_SETTINGS)
    with TemporaryDirectory(prefix="grurcn-tune-") as notes:
        names = lambda trial: trial.config["trial"]["run"]  # noqa: E731
        tuner = tune.Tuner(
            tune.with_resources(run_trial, {"cpu": job.cpus_per_trial, "gpu": int(use_gpus)}),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(trial_name_creator=names, trial_dirname_creator=names),
            run_config=tune.RunConfig(
                name=name,
                storage_path=notes,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=FAILURES),
                callbacks=[Lines(ROWS[name].select, len(trials))],
            ),
        )
        results = tuner.fit()
    for result in results:
        if result.error is not None:
            raise OSError(f"{name}: a training was lost {FAILURES + 1} times: {result.error}")
        if refused := (result.metrics or {}).get("refused"):
            raise ValueError(refused)
    validation = {result.metrics["run"]: result.metrics["validation"] for result in results if result.metrics}
    return [
        {"run": trial["run"], **dataclasses.asdict(draw), "validation": validation[trial["run"]]}
        for trial, draw in zip(trials, draws, strict=True)
    ]


def trial_of(job: Table2, name: RowName, draw: Draw) -> dict[str, Any]:
    """All that a trial's process must know."""
    return {
        "run": f"table2-{name}-{draw.number:02}",
        "recipe": recipe_of(job, name, draw).to_dict(),
        "shards": str(vectors_of(job, name, draw.segments)),
        "storage": str(job.storage.absolute()),
        "experiment": job.experiment,
        "cpus": job.cpus_per_trial,
    }


def recipe_of(job: Table2, name: RowName, draw: Draw) -> CaptionRecipe:
    """The recipe `caption` with what was drawn, and the job's changes."""
    sizes = {"hidden": draw.hidden, "embedding": draw.embedding}
    recipe = changed(caption_recipe(), decoder=sizes, select=ROWS[name].select, seed=job.seed)
    return job.changes(changed(recipe, encoder={"segments": draw.segments}))


def run_trial(config: dict[str, Any]) -> None:
    """One training, in a process of its own; tells Tune its validation score, or why it was refused."""
    trial = config["trial"]
    recipe = CaptionRecipe.from_dict(trial["recipe"])
    training = train.Train(
        recipe=recipe,
        shards=trial["shards"],
        storage=trial["storage"],
        name=trial["run"],
        experiment=trial["experiment"],
        on=Workers(workers=0, cpus_per_worker=trial["cpus"]),
    )
    try:
        train.main("caption", training)
    except (ValueError, OSError) as error:
        tune.report({"run": trial["run"], "refused": f"{trial['run']}: {error}"})
        return
    result = RunFolder(f"{trial['storage']}/{trial['run']}").result()
    assert result is not None
    tune.report({"run": trial["run"], "validation": result[f"val_{recipe.select}"]})


class Lines(tune.Callback):
    """A line for each training that ends."""

    def __init__(self, select: str, count: int):
        self.select, self.count, self.done = select, count, 0
        self.best: float | None = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        value = trial.last_result.get("validation")
        if value is None:
            return
        better = self.best is None or (value < self.best if self.select == "loss" else value > self.best)
        self.done, self.best = self.done + 1, value if better else self.best
        about = trial.config["trial"]
        decoder = about["recipe"]["decoder"]
        print(
            f"  {self.done} of {self.count}: {about['run']}, hidden {decoder['hidden']}, embedding {decoder['embedding']}, "
            f"{about['recipe']['encoder']['segments']} segments: validation {self.select} {value:.4f}"
            f"{', best so far' if better else ''}",
            flush=True,
        )


# The table


def title_of(job: Table2, name: RowName) -> str:
    frame = Path(job.frame).name if job.frame else "VGG-16"
    return ROWS[name].title.format(frame=frame, entity=trunk_spec(job.entity_trunk).title)


def table_row(job: Table2, name: RowName, found: dict[str, Any] | None) -> dict[str, Any]:
    row = ROWS[name]
    return {
        "row": title_of(job, name),
        "select": row.select,
        "paper": dict(zip(METRICS, row.paper, strict=True)),
        "scores": found and found["scores"],
        "best": found and found["best"],
        "trials": found["trials"] if found else [],
    }


def write_table(job: Table2, rows: list[dict[str, Any]]) -> None:
    """The table as Markdown, picture and JSON, and on the screen."""
    out = job.folder
    out.mkdir(parents=True, exist_ok=True)
    encoders = {name: getattr(job, name) for name in sorted(job.named)}
    result = {"shards": absolute_url(job.shards), "encoders": encoders, "rows": rows}
    write_json(open_store(out), "table2.json", json.loads(json.dumps(result)))
    (out / "table2.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, out / "table2.png")
    print("\n" + markdown(rows))
    done = sum(row["scores"] is not None for row in rows)
    finish(f"{done} of {len(rows)} rows; table2.md, table2.png and table2.json in {out}", result, job.json)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, ours / the paper's."""
    lines = [
        f"| encoder (selected by) | {' | '.join(METRICS.values())} | hidden, embedding, K |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        scores, best = row["scores"], row["best"]
        cells = [f"{format_score(scores, metric)} / {row['paper'][metric]:.4f}" for metric in METRICS]
        drawn = f"{best['hidden']}, {best['embedding']}, {best['segments']}" if best else "-"
        lines.append(f"| {row['row']} ({SELECTED_BY[row['select']]}) | {' | '.join(cells)} | {drawn} |")
    return "\n".join([*lines, "", "ours / the paper's, on MSVD"]) + "\n"


def format_score(scores: dict[str, float] | None, metric: str) -> str:
    """Without Java there is no METEOR."""
    if scores is None:
        return "not yet run"
    return f"{scores[metric]:.4f}" if metric in scores else "no Java"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Our scores as bars, the paper's as lines across them."""
    mpl.use("Agg")
    rows = [row for row in rows if row["scores"] is not None]
    figure, panels = plt.subplots(1, 3, figsize=(12, 1.6 + 0.6 * len(rows)), layout="constrained", sharey=True)
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for place, row in enumerate(rows):
            axes.barh(place, row["scores"].get(metric, 0), height=0.6, color="#4c78a8", label="" if place else "ours")
            axes.plot([row["paper"][metric]] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=3,
                      label="" if place else "paper (MSVD, its own encoders)")  # fmt: skip
        axes.set_title(title)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [f"{row['row']}\nby {SELECTED_BY[row['select']]}" for row in rows])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


COMMAND = Command(Table2, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
