"""Table 2 of the paper in one command: search for each row's decoder, describe the test videos, print the table beside the paper's.

    python -m jobs.table2 --shards data/msvd --frame runs/vgg16-frames --states runs/gru-rcn-bidirectional --entity imagenet
    python -m jobs.table2 --shards data/mine --states runs/mine --hidden 96 192 --embedding 32 64 --segments 4 8 --samples 4 \\
        --optimizer adam --learning-rate 4e-3 --num-steps 500 --val-every 125 --global-batch 32 --rows states

    videos ── jobs.encode ──> vectors of each encoder and K ── trials, by Ray Tune ──> the best on validation videos ── jobs.caption ──> row

A trial is a run of jobs.train, in a process of its own, with an LSTM, word vectors and a number of segments K of random sizes;
as many run at the same time as the cluster has room for. All rows try the same sizes, and rows of the same encoders share their
vectors. Rows whose encoders are not named are not run.

Run the same command again after an interruption: trials that have ended are not trained again, the others go on from their own
checkpoints. With more --samples, those before count. MLflow has every trial as a run.

OUT/table2.md, OUT/table2.png and OUT/table2.json hold the table; --json FILE holds: shards, seed, samples, rows [{row, select,
encoders, paper {bleu4, meteor, cider}, scores {bleu1 ... cider}, videos, best, trials [{number, hidden, embedding, segments, run,
score, failed}]}].
"""

import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import ray
import torch
from mlflow import MlflowClient
from ray import tune
from ray.exceptions import RayActorError

from cluster.connect import NoCluster, start_ray
from cluster.launch import SECONDS_BETWEEN_LOOKS, STOP_SECONDS, Ear, Interrupted, Signals, Workers, first_line
from cluster.mailbox import new_mailbox
from cluster.nodes import fitting
from cluster.report import check_reachable, tracking_uri
from cluster.runs import OtherRun, RunFolder, read_json, write_json
from grurcn.model import TrunkName
from jobs import caption, encode, train
from jobs.caption_recipes import CaptionRecipe, Select
from jobs.caption_recipes import caption as paper_recipe
from jobs.caption_scores import check_installed, check_metrics
from jobs.command import EXPECTED, Flat, command_line, finish, message, run_command
from jobs.encoding import EncoderConfig
from jobs.recipes import changed
from jobs.table1 import TRUNKS, data_name, given
from jobs.training import Diverged, train_worker
from shards.index import Index
from shards.order import Order
from shards.store import absolute_url, open_store
from shards.stream import Reading

RowName = Literal["frame", "states", "entity", "both-bleu4", "both-nll", "both-meteor", "both-cider"]
EncoderName = Literal["frame", "states", "entity"]
SCORES = {"bleu4": "BLEU-4", "meteor": "METEOR", "cider": "CIDEr"}
SELECTED_BY = {"loss": "NLL", **SCORES}
LOSSES = 3  # of a trial's process, after which it is given up
# Tune's own files and lines: it keeps nothing here that is needed again.
TUNE_SETTINGS = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}


class LostTrial(OSError):
    """A trial's process was lost again and again."""


class FailedTrial(ValueError):
    """A trial that cannot be trained, or a row without one that could."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: what a video is seen by, which validation score selects, and the paper's test scores."""

    title: str
    encoders: tuple[EncoderName, ...]
    select: Select
    paper: dict[str, float]


def both(select: Select, bleu4: float, meteor: float, cider: float) -> Row:
    title = "Entity encoder (GoogLeNet) + bi-directional GRU-RCN"
    return Row(title=title, encoders=("entity", "states"), select=select, paper=scores(bleu4, meteor, cider))


def scores(bleu4: float, meteor: float, cider: float) -> dict[str, float]:
    return {"bleu4": bleu4, "meteor": meteor, "cider": cider}


ROWS: dict[RowName, Row] = {
    "frame": Row(
        title="Single frames (VGG-16)", encoders=("frame",), select="bleu4", paper=scores(0.3700, 0.2640, 0.4330)
    ),
    "states": Row(
        title="Bi-directional GRU-RCN", encoders=("states",), select="bleu4", paper=scores(0.4100, 0.2850, 0.5010)
    ),
    "entity": Row(
        title="Entity encoder (GoogLeNet)", encoders=("entity",), select="bleu4", paper=scores(0.4128, 0.2900, 0.4804)
    ),
    "both-bleu4": both("bleu4", 0.4963, 0.3075, 0.5937),
    "both-nll": both("loss", 0.4790, 0.3114, 0.6782),
    "both-meteor": both("meteor", 0.4842, 0.3170, 0.6538),
    "both-cider": both("cider", 0.4326, 0.3160, 0.6801),
}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Values that replace those of the recipe `caption`; its own where nothing is said."""

    global_batch: int | None = None
    """Pairs of a video and a caption in one step."""
    num_steps: int | None = None
    """Most steps."""
    val_every: int | None = None
    """Steps from one validation to the next."""
    patience: int | None = None
    """Validations without a better log-likelihood after which a trial stops; 0 never stops early."""
    optimizer: Literal["adam", "sgd", "adadelta"] | None = None
    """Others than the paper's adadelta want a learning rate."""
    learning_rate: float | None = None
    """Highest learning rate."""
    schedule: Literal["constant", "cosine", "steps"] | None = None
    """How the rate goes on from there."""
    warmup_steps: int | None = None
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float | None = None
    """As the optimizer takes it."""
    clip_norm: float | None = None
    """Longest gradient allowed; 0 turns clipping off."""
    dropout: float | None = None
    """Share of each state that is dropped in training."""
    attention: int | None = None
    """Units that score a segment."""
    standardise: bool | None = None
    """Give each number of a vector mean 0 and deviation 1."""
    min_count: int | None = None
    """How often a word must occur in the training captions."""
    max_words: int | None = None
    """Longer captions are cut."""
    beam: int | None = None
    """Captions that the search keeps at each word, in validation and on the test videos."""

    def __post_init__(self) -> None:
        if self.optimizer in ("adam", "sgd") and self.learning_rate is None:
            raise ValueError(
                f"optimizer {self.optimizer}: wanted a learning rate too (--learning-rate): the recipe's, 1, is "
                "adadelta's"
            )

    def __call__(self, recipe: CaptionRecipe) -> CaptionRecipe:
        """The recipe with these values."""
        parts = {
            "optim": ("optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm"),
            "decoder": ("dropout", "attention"),
        }
        values = given(vars(self))
        for part, names in parts.items():
            values[part] = {name: values.pop(name) for name in names if name in values}
        return changed(recipe, **values)


@dataclass(frozen=True, kw_only=True)
class Table2:
    """Options of the table."""

    shards: str
    """Folder or URL of videos that jobs.make_shards packed with captions, seen by every worker."""
    frame: str | None = None
    """Run (STORAGE/NAME, one of its checkpoints, or runs:/ID) whose trunk sees single frames."""
    states: str | None = None
    """Run of a GRU-RCN, whose last states are seen."""
    entity: str | None = None
    """Weights of a trunk that sees single frames beside the states: imagenet, a file, a URL, a run."""
    entity_trunk: TrunkName = "mobilenet_v2"
    """The trunk of those weights."""
    entity_size: int = 224
    """Height and width of the frames that it sees, in pixels."""
    rows: tuple[RowName, ...] = tuple(ROWS)
    """Rows of the table."""
    storage: Path = Path("runs")
    """Folder of all runs, and of the vectors (STORAGE/table2/vectors-...), seen by every worker."""
    out: Path | None = None
    """Folder of the table. Default: STORAGE/table2."""
    samples: int = 12
    """Trials of each row; at most all combinations of the sizes."""
    hidden: tuple[int, ...] = (1024, 2048, 3518, 4096)
    """LSTM units to draw from."""
    embedding: tuple[int, ...] = (256, 468, 512)
    """Lengths of a word's vector to draw from."""
    segments: tuple[int, ...] = (14, 28, 42)
    """Numbers of segments, K, to draw from. Each is encoded once for each encoder."""
    changes: Annotated[Changes, Flat] = field(default_factory=Changes)
    seed: int = 0
    """Of the sizes that are drawn, and of each trial."""
    cpus_per_trial: int = 1
    """CPU cores that each trial computes with."""
    gpus_per_trial: float | None = None
    """GPUs of each trial; 0.5 lets two share one. Default: one, if there are any."""
    save_every: int | None = None
    """Steps from one checkpoint of a trial to the next. Default: val_every."""
    experiment: str = "table2"
    """MLflow experiment that the runs belong to."""
    reading: Annotated[Reading, Flat] = field(default_factory=Reading)
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        for name in ("hidden", "embedding", "segments"):
            choices = getattr(self, name)
            if not choices or min(choices) < 1:
                raise ValueError(f"{name} {' '.join(map(str, choices))}: wanted at least one choice, each at least 1")
        if min(self.samples, self.cpus_per_trial, self.save_every or 1) < 1 or (self.gpus_per_trial or 0) < 0:
            raise ValueError(
                f"wanted samples, cpus_per_trial and save_every of at least 1, gpus_per_trial of at least 0; found "
                f"{self.samples}, {self.cpus_per_trial}, {self.save_every}, {self.gpus_per_trial}"
            )
        if not self.names:
            wanted = {f"--{name}" for row in self.rows or ROWS for name in ROWS[row].encoders}
            raise ValueError(
                f"no row has its encoders (rows: {', '.join(self.rows) or 'none'}); wanted {', '.join(sorted(wanted))}"
            )

    @property
    def names(self) -> list[RowName]:
        """The rows that are run: those wanted whose encoders are named."""
        return [
            name for name, row in ROWS.items() if name in self.rows and all(getattr(self, one) for one in row.encoders)
        ]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a trial tries."""

    hidden: int
    embedding: int
    segments: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, embedding {self.embedding}, K {self.segments}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial of a row."""

    number: int  # from 1
    sizes: Sizes
    select: Select
    training: train.TrainCaptions

    @property
    def run(self) -> RunFolder:
        return RunFolder(f"{self.training.storage}/{self.training.name}")

    def score(self) -> float | None:
        """The best validation score by which its row selects; None for a trial that has not ended."""
        result = self.run.result()
        return None if result is None else result[f"val_{self.select}"]

    def __str__(self) -> str:
        return f"trial {self.number} ({self.sizes})"


def main(job: Table2) -> int:
    """Encodes, searches and describes what is not done yet, then writes and prints the table."""
    check(job)
    start_ray()
    gpus = gpus_of_trial(job)
    check_room(job, gpus)
    create_experiment(job)
    found: dict[RowName, dict[str, Any]] = {}
    for number, name in enumerate(job.names):
        title = titled(ROWS[name].title, ROWS[name].select)
        print(f"[{number + 1} of {len(job.names)}] {title}: {len(draws(job))} trials", flush=True)
        found[name] = run_row(job, name, gpus)
    write_table(job, list(table_rows(found)))
    return 0


# Before anything is started


def check(job: Table2) -> None:
    """Finds out what would stop a row hours later. Raises ValueError for a score that cannot be computed here, a recipe that
    cannot be; BadShards for data without captions, BadBatch for less than a global batch of them."""
    check_installed()
    for name in job.names:
        try:
            check_metrics({ROWS[name].select} - {"loss"})
        except ValueError as error:
            raise ValueError(f"row {name}: {error}, or leave it out (--rows)") from None
    for split in ("train", "val", "test"):
        Index(job.shards, split).check_captions()
    recipe = trials_of(job, job.names[0], gpus=0)[0].training.recipe
    Order([shard.captions for shard in Index(job.shards, "train").shards], recipe.global_batch, recipe.seed)


def gpus_of_trial(job: Table2) -> float:
    if job.gpus_per_trial is not None:
        return job.gpus_per_trial
    return float(ray.cluster_resources().get("GPU", 0) > 0)


def check_room(job: Table2, gpus: float) -> None:
    """Raises NoCluster if no machine has room for a trial: Tune would wait for one for ever."""
    wanted = {"CPU": float(job.cpus_per_trial)} | ({"GPU": gpus} if gpus else {})
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(fitting(machine, wanted) for machine in machines):
        most = {kind: max(machine.get(kind, 0) for machine in machines) for kind in wanted}
        raise NoCluster(
            f"a trial wants {in_words(wanted)}, and no machine of the Ray cluster has so many (the most: {in_words(most)}); "
            "ask for less (--cpus-per-trial, --gpus-per-trial) or add machines"
        )


def in_words(resources: dict[str, float]) -> str:
    return " and ".join(f"{count:g} {kind}" for kind, count in resources.items())


def create_experiment(job: Table2) -> None:
    """MLflow's database and the experiment in it: trials that begin at the same time would each want to make them."""
    uri, storage = tracking_uri(job.storage), absolute_url(job.storage)
    check_reachable(uri)
    is_file = uri.startswith("sqlite:")
    if is_file:
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    if client.get_experiment_by_name(job.experiment) is None:
        # A local database would put artifacts into the working directory.
        place = (Path(storage) / "mlflow-artifacts").as_uri() if is_file else None
        client.create_experiment(job.experiment, artifact_location=place)


# What is tried


def draws(job: Table2) -> list[Sizes]:
    """The sizes of each trial, the same in every row: of all combinations, in a random order, the first ones.

    A combination's place is a matter of the seed and of itself: with other choices or more samples, the others stay in order.
    """
    combinations = itertools.product(*(dict.fromkeys(sizes) for sizes in (job.hidden, job.embedding, job.segments)))
    every = [Sizes(hidden=hidden, embedding=embedding, segments=k) for hidden, embedding, k in combinations]
    return sorted(every, key=lambda sizes: hashlib.sha256(f"{job.seed}: {sizes}".encode()).digest())[: job.samples]


def trials_of(job: Table2, name: RowName, gpus: float) -> list[Trial]:
    """A row's trials. A run's name says what it is, so that whoever wants the same finds it."""
    row, trials, storage = ROWS[name], [], absolute_url(job.storage)
    for number, sizes in enumerate(draws(job), start=1):
        recipe = changed(
            job.changes(paper_recipe()),
            encoder={"segments": sizes.segments},
            decoder={"hidden": sizes.hidden, "embedding": sizes.embedding},
            select=row.select,
            seed=job.seed,
        )
        size = f"h{sizes.hidden}-e{sizes.embedding}-k{sizes.segments}"
        training = train.TrainCaptions(
            recipe=recipe,
            shards=vectors_of(job, row, sizes.segments),
            storage=storage,
            name=f"table2-{name}-{data_name(job.shards)}-{size}-seed{job.seed}",
            experiment=job.experiment,
            on=Workers(workers=0, cpus_per_worker=job.cpus_per_trial, gpus=gpus > 0),
            reading=job.reading,
            save_every=job.save_every,
        )
        trials.append(Trial(number=number, sizes=sizes, select=row.select, training=training))
    return trials


def vectors_of(job: Table2, row: Row, segments: int) -> str:
    """Where the vectors of a row's encoders and so many segments lie."""
    folder = f"vectors-{data_name(job.shards)}-{'-'.join(row.encoders)}-k{segments}"
    return f"{absolute_url(job.storage)}/table2/{folder}"


# A row


def run_row(job: Table2, name: RowName, gpus: float) -> dict[str, Any]:
    """Encodes, searches and describes, as far as that is not done. Raises FailedTrial if no trial could be trained."""
    row, trials = ROWS[name], trials_of(job, name, gpus)
    for segments in sorted({trial.sizes.segments for trial in trials}):
        encode_videos(job, row, segments)
    for trial in trials:
        check_run(trial)
    failures = search(job, trials, gpus)
    ended = [(score, trial) for trial in trials if (score := trial.score()) is not None]
    if not ended:
        raise FailedTrial(f"{titled(row.title, row.select)}: no trial came to its end; {next(iter(failures.values()))}")
    best = best_of(ended)
    described = describe(job, best, gpus)
    return {
        "encoders": encoders_in_words(best.training.shards),
        "scores": described["scores"],
        "videos": described["videos"],
        "best": {"number": best.number, **asdict(best.sizes), "run": best.run.name},
        "trials": [
            {"number": trial.number, **asdict(trial.sizes), "run": trial.run.name, "score": trial.score(),
             "failed": failures.get(trial.number)}
            for trial in trials
        ],
    }  # fmt: skip


def encode_videos(job: Table2, row: Row, segments: int) -> None:
    """Raises BadShards if the vectors that are there were made by other encoders or of other videos."""
    sources = {name: getattr(job, name) for name in row.encoders}
    encoder = EncoderConfig(segments=segments, entity_trunk=job.entity_trunk, entity_size=job.entity_size, **sources)
    out = vectors_of(job, row, segments)
    encode.main(encode.Encode(shards=job.shards, out=out, encoder=encoder, storage=str(job.storage)))


def check_run(trial: Trial) -> None:
    """Raises OtherRun if the trial's folder holds a run of another recipe or other vectors, finished or not."""
    found, wanted = trial.run.identity(), trial.training.recipe
    if found is None:
        return
    way_out = "give the options that it began with, or another --storage"
    if found.recipe_digest != wanted.digest():
        different = train.differences(found.recipe, wanted)
        raise OtherRun(f"{trial.run.url}: a run of another recipe ({different}); {way_out}")
    if found.data_digest != Index(trial.training.shards, "train").info.digest:
        raise OtherRun(f"{trial.run.url}: a run on other vectors than {trial.training.shards}; {way_out}")


def best_of(ended: Sequence[tuple[float, Trial]]) -> Trial:
    """The trial of the lowest loss, or of the highest of any other score; of equals, the first one."""
    sign = -1 if ended[0][1].select == "loss" else 1
    return max(ended, key=lambda one: sign * one[0])[1]


def describe(job: Table2, trial: Trial, gpus: float) -> dict[str, Any]:
    """What jobs.caption says of the test videos, by the trial's best model."""
    beam, trained = trial.training.recipe.beam, trial.run.result()
    place = f"captions/test-beam{beam}/result.json"
    found = read_json(trial.run.store, place)
    if found is None or trained is None or found["step"] != trained["best_step"]:
        on = Workers(workers=int(gpus > 0), cpus_per_worker=job.cpus_per_trial, gpus=gpus > 0)
        shards = trial.training.shards
        caption.main(caption.Caption(run=trial.run.url, shards=shards, beam=beam, on=on, reading=job.reading))
    return read_json(trial.run.store, place)


def encoders_in_words(vectors: str) -> str:
    """What a data set's vectors were computed by: "MobileNetV2 (imagenet) + bi-directional GRU-RCN over VGG-16 (runs/x)"."""
    encoder = Index(vectors, "train").info.encoder
    assert encoder is not None
    parts = []
    for part in encoder["parts"]:
        model = part["model"]
        kind = TRUNKS[model["trunk"]]
        if part["kind"] == "states":
            variant = "bi-directional " * model["bidirectional"] + "stacked " * model["stacked"]
            kind = f"{variant}GRU-RCN over {kind}"
        parts.append(f"{kind} ({part['source']})")
    return " + ".join(parts)


# The search


class Trials(tune.search.Searcher):
    """Hands Tune the trials that are left, one after the other, and says how each one ended.

    Which sizes are tried was known before (draws), as they are encoded before; and what came out is in the runs' folders, from
    where an interrupted search goes on. Tune's own notes would lose what ended since it last wrote them, and are pickles.
    """

    def __init__(self, trials: Sequence[Trial]):
        super().__init__()
        self.trials = list(trials)
        self.ended = [(score, trial) for trial in trials if (score := trial.score()) is not None]
        self.left = [number for number, trial in enumerate(trials) if trial.score() is None]
        self.place: dict[str, int] = {}  # of a trial among all, by Tune's name for it
        self.failures: dict[int, str] = {}  # a trial's number -> why it could not be trained
        self.refused: str | None = None  # why none can be
        self.is_over = False  # nothing more is to be begun

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.is_over or not self.left:
            return self.FINISHED
        self.place[trial_id] = self.left.pop(0)
        return {"place": self.place[trial_id]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial, result = self.trials[self.place[trial_id]], result or {}
        score = trial.score()
        if result.get("ended") == "refused":
            self.refused = self.refused or f"{trial}: {result['why']}"
        elif result.get("ended") == "failed":
            self.failures[trial.number] = f"{trial}: {result['why']}"
            print(f"{trial} failed: {result['why']}", flush=True)
        elif score is not None:
            self.ended.append((score, trial))
            print(f"{trial}: {self.with_best(score)}", flush=True)

    def with_best(self, score: float) -> str:
        """ "validation BLEU-4 0.3121; best so far: trial 4, 0.3310" """
        best = best_of(self.ended)
        said = next(one for one, trial in self.ended if trial is best)
        return f"validation {SELECTED_BY[best.select]} {score:.4f}; best so far: trial {best.number}, {said:.4f}"

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see above."""


class Losses(tune.Callback):
    """Says when a trial's process was lost."""

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        why = first_line(trial.get_error())
        print(
            f"trial {trial.config['place'] + 1} lost its process ({why}); it goes on from its newest checkpoint",
            flush=True,
        )


def search(job: Table2, trials: Sequence[Trial], gpus: float) -> dict[int, str]:
    """Trains all trials that have not ended; gives back why some could not be trained, by their numbers.

    Raises FailedTrial if something is wrong with more than one trial's sizes, LostTrial for a process that was lost too often;
    Interrupted after a signal, once the trials have saved.
    """
    searcher = Trials(trials)
    if searcher.ended:
        best = best_of(searcher.ended)
        print(f"{len(searcher.ended)} of {len(trials)} trials were trained before; best so far: {best}", flush=True)
    if not searcher.left:
        return {}
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    mailbox = new_mailbox()
    trainable = tune.with_parameters(
        run_trial,
        trainings=[trial.training for trial in trials],
        mailbox=mailbox,
        uri=tracking_uri(job.storage),
        arguments=sys.argv,
    )
    with TemporaryDirectory(prefix="grurcn-ray-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": job.cpus_per_trial, "gpu": gpus}),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=len(searcher.left)),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="search",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=LOSSES),
                callbacks=[Losses()],
            ),
        )
        results = fit(tuner, searcher, mailbox)
        for result in results:
            if result.error is not None:
                raise given_up(trials[result.config["place"]], result.error)
    ray.kill(mailbox)
    if searcher.refused is not None:
        raise FailedTrial(searcher.refused)
    return searcher.failures


def fit(tuner: tune.Tuner, searcher: Trials, mailbox: Any) -> tune.ResultGrid:
    """Tuner.fit() in a thread, so that this one can look after it; and Tune takes no signal for itself there."""
    with Signals() as signals:
        running = in_thread(tuner.fit)
        while wait([running], SECONDS_BETWEEN_LOOKS).not_done:
            if (signals.number or searcher.refused) and not searcher.is_over:
                searcher.is_over = True
                mailbox.ask.remote()
            if signals.number and time.monotonic() > signals.at + STOP_SECONDS:
                raise Interrupted(signals.number)
        if signals.number:
            raise Interrupted(signals.number)
    return running.result()


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="search", daemon=True).start()
    return future


def given_up(trial: Trial, error: Exception) -> Exception:
    """What to raise for a trial that Tune has given up: a loss in a line, a fault of ours with its stack trace."""
    if not isinstance(error, RayActorError):
        return error
    return LostTrial(
        f"{trial} lost its process {LOSSES + 1} times, the last time: {first_line(error)}; run the same command again to go on"
    )


def run_trial(
    config: dict[str, Any],
    trainings: Sequence[train.TrainCaptions],
    mailbox: Any,
    uri: str,
    arguments: list[str],
) -> dict[str, Any]:
    """One trial, in a process of its own. What came out is in the run's folder; this gives back whether it ended well.

    Of what can be expected, a loss that is no number and a lack of GPU memory are the sizes' fault; all else would stop the other
    trials too. What cannot be expected reaches Tune, as the loss of the process does.
    """
    if ray.get(mailbox.asked.remote()):
        return {"ended": "stopped"}
    os.environ["MLFLOW_TRACKING_URI"] = uri  # as the driver knows it, wherever this process is
    sys.argv = arguments  # MLflow is to know the command that people typed
    try:
        train.main("caption", trainings[config["place"]], partial(train_until_asked, mailbox))
    except Interrupted:
        return {"ended": "stopped"}
    except (Diverged, torch.OutOfMemoryError) as error:
        return {"ended": "failed", "why": first_line(error)}
    except EXPECTED as error:
        return {"ended": "refused", "why": message(error)}
    return {"ended": "finished"}


def train_until_asked(mailbox: Any, job: dict[str, Any]) -> dict[str, Any]:
    """train_worker, which saves and stops when the driver wants it."""
    with Ear(mailbox) as ear:
        return train_worker({**job, "stop_wanted": ear.stop_wanted})


# The table


def titled(title: str, select: Select) -> str:
    return f"{title} ({SELECTED_BY[select]})"


def table_rows(found: dict[RowName, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every row of the table; of those that were not run, scores, best and trials are None and nothing."""
    for name, row in ROWS.items():
        nothing = {"encoders": None, "scores": None, "videos": None, "best": None, "trials": []}
        yield {"row": name, "title": row.title, "select": row.select, "paper": row.paper, **found.get(name, nothing)}


def write_table(job: Table2, rows: list[dict[str, Any]]) -> None:
    """The table as Markdown, picture and JSON, and on the screen."""
    out = (job.out or job.storage / "table2").absolute()
    out.mkdir(parents=True, exist_ok=True)
    result = {"shards": absolute_url(job.shards), "seed": job.seed, "samples": job.samples, "rows": rows}
    write_json(open_store(out), "table2.json", result)
    (out / "table2.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, out / "table2.png")
    print("\n" + markdown(rows))
    done = sum(row["scores"] is not None for row in rows)
    finish(f"{done} of {len(rows)} rows; table2.md, table2.png and table2.json in {out}", result, job.json)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and what our encoders were."""
    columns = [f"{title}: ours | paper" for title in SCORES.values()]
    lines = [
        f"| encoder (model selected by) | {' | '.join(columns)} | best: hidden, embedding, K | trials |",
        "|---|" + "---:|" * 2 * len(columns) + "---|---:|",
    ]
    for row in rows:
        cells = [titled(row["title"], row["select"])]
        for name in SCORES:
            cells += [score_in_words(row, name), f"{row['paper'][name]:.4f}"]
        best = row["best"]
        cells.append(f"{best['hidden']}, {best['embedding']}, {best['segments']}" if best else "-")
        cells.append(str(sum(trial["score"] is not None for trial in row["trials"]) or "-"))
        lines.append(f"| {' | '.join(cells)} |")
    encoders = {row["title"]: row["encoders"] for row in rows if row["encoders"]}
    lines += ["", *(f"- {title}, ours: {said}" for title, said in encoders.items())]
    return "\n".join(lines) + "\n"


def score_in_words(row: dict[str, Any], name: str) -> str:
    if row["scores"] is None:
        return "not run"
    return f"{row['scores'][name]:.4f}" if name in row["scores"] else "-"  # METEOR, without Java


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Our scores as bars beside the paper's."""
    mpl.use("Agg")
    rows = [row for row in rows if row["scores"] is not None]
    figure, axes = plt.subplots(
        1, len(SCORES), figsize=(12, 1.4 + 0.7 * len(rows)), sharey=True, squeeze=False, layout="constrained"
    )
    for column, (name, title) in zip(axes[0], SCORES.items(), strict=True):
        for place, row in enumerate(rows):
            ours, paper = row["scores"].get(name), row["paper"][name]
            column.barh(place, ours or 0, height=0.6, color="#4c78a8", label=None if place else "ours")
            column.text(0, place, f" {score_in_words(row, name)}", va="center", fontsize=9)
            column.plot([paper] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=3,
                        label=None if place else "paper (YouTube2Text, its own encoders)")  # fmt: skip
        column.set_yticks(range(len(rows)), [titled(row["title"], row["select"]) for row in rows])
        column.set_xlim(left=0)
        column.set_title(title)
        column.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_command(lambda: main(command_line(Table2, __doc__ or "")))
