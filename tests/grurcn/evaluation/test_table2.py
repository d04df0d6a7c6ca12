"""Table 2: every row searched, trained, described and scored in one command, and nothing done twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import ROOT, TINY, run_train

from cluster.checkpoints.run_folder import RunFolder
from cluster.tracking.server import tracking_uri
from grurcn.evaluation.table2 import (
    METRICS,
    ROWS,
    Table2Changes,
    Table2Job,
    Trial,
    draw_sizes,
    empty_row,
    markdown,
    recipe_of,
    reproduce_table2,
)
from grurcn.training.caption_recipes import caption as caption_recipe
from jobs.table2 import Table2Options, main
from shards.store import BadShards

SMALL = Table2Changes(
    global_batch=8, num_steps=4, val_every=2, optimizer="adam", learning_rate=1e-2, weight_decay=0.0, dropout=0.1, beam=2
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    storage = tmp_path_factory.mktemp("classifier")
    run_train(shards, storage, "classifier", recipe=dataclasses.replace(TINY, num_steps=2, val_every=2))
    return str(storage / "classifier")


def table(scenes: Path, storage: Path, classifier: str | None, **options: Any) -> Table2Options:
    values: dict[str, Any] = {
        "shards": str(scenes), "storage": storage, "frame": classifier, "states": classifier, "rows": ("frame", "states"),
        "samples": 2, "hidden": (8, 12), "embedding": (6,), "segments": (2, 3), "changes": SMALL, **options,
    }  # fmt: skip
    return Table2Options(**values)


# What is drawn


def test_what_is_drawn_depends_on_the_seed_alone_and_no_combination_comes_twice():
    job = Table2Job(shards="x", frame="y", samples=12)
    draws = draw_sizes(job)
    assert draws == draw_sizes(dataclasses.replace(job, rows=("frame",), states="z"))
    assert draws != draw_sizes(dataclasses.replace(job, seed=1))
    assert len({(draw.hidden, draw.embedding, draw.segments) for draw in draws}) == len(draws) == 12
    assert [draw.number for draw in draws] == list(range(12))
    assert {draw.hidden for draw in draws} <= set(job.hidden)


def test_more_samples_than_there_are_combinations_take_each_once():
    job = Table2Job(shards="x", frame="y", samples=50, hidden=(1, 2), embedding=(3,), segments=(4, 5))
    assert len(draw_sizes(job)) == 4


def test_more_samples_begin_with_the_same_ones():
    """So that a table may be given more of them later without training any anew."""
    few, many = (draw_sizes(Table2Job(shards="x", frame="y", samples=samples)) for samples in (3, 9))
    assert many[:3] == few


def test_a_trials_recipe_is_the_papers_but_for_what_was_drawn_and_changed():
    job = Table2Job(
        shards="x", frame="y", changes=Table2Changes(num_steps=7, dropout=0.25, learning_rate=0.5), samples=1, seed=3
    )
    [draw] = draw_sizes(job)
    recipe = recipe_of(job, "frame", draw)
    expected = caption_recipe()
    assert recipe.decoder == dataclasses.replace(
        expected.decoder, hidden=draw.hidden, embedding=draw.embedding, dropout=0.25
    )
    assert recipe.optim == dataclasses.replace(expected.optim, learning_rate=0.5)
    assert (recipe.num_steps, recipe.seed, recipe.select) == (7, 3, "bleu4")
    assert recipe.encoder.segments == draw.segments
    assert recipe_of(job, "both-loss", draw).select == "loss"


def test_the_papers_numbers_are_those_of_its_table():
    rows = {name: row.paper for name, row in ROWS.items()}
    assert rows["states"] == (0.41, 0.285, 0.501)
    assert rows["both-cider"] == (0.4326, 0.3160, 0.6801)
    assert [ROWS[name].select for name in ROWS if name.startswith("both-")] == ["bleu4", "loss", "meteor", "cider"]


def test_rows_that_were_not_run_and_scores_that_need_java_say_so():
    job = Table2Job(shards="x", frame="y")
    best = Trial(number=0, run="r", hidden=1, embedding=2, segments=3, validation=0.5)
    done = dataclasses.replace(empty_row(job, "frame"), scores={"bleu4": 0.25, "cider": 1.5}, best=best)
    first, second = markdown([done, empty_row(job, "both-loss")]).splitlines()[2:4]
    assert first == "| y, first frames (BLEU-4) | 0.2500 / 0.3700 | no Java / 0.2640 | 1.5000 / 0.4330 | 1, 2, 3 |"
    assert second.startswith("| MobileNetV2 + GRU-RCN states (NLL) | not yet run / 0.4790 |")


# The whole command


@pytest.mark.cluster
@pytest.mark.long(minutes=3)
def test_a_table_that_was_killed_goes_on_to_all_its_rows_and_nothing_is_done_twice(scenes, classifier, tmp_path, capfd):
    """SIGKILL for the driver and all that it started, once a training has a checkpoint; then the same command, twice."""
    runs, file = tmp_path / "runs", tmp_path / "table.json"
    command = [
        sys.executable, "-m", "jobs.table2", "--shards", str(scenes), "--storage", str(runs), "--frame", classifier, "--states",
        classifier, "--rows", "frame", "states", "--samples", "2", "--hidden", "8", "12", "--embedding", "6", "--segments", "2",
        "3", "--num-steps", "40", "--val-every", "10", "--global-batch", "8", "--optimizer", "adam", "--learning-rate", "0.01",
        "--weight-decay", "0", "--dropout", "0.1", "--beam", "2", "--json", str(file),
    ]  # fmt: skip
    folders = [RunFolder(str(runs / f"table2-{row}-{number:02}")) for row in ("frame", "states") for number in range(2)]
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        until = time.monotonic() + 200
        while not any(run.checkpoints() for run in folders) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert any(run.checkpoints() for run in folders)
        os.killpg(process.pid, signal.SIGKILL)
    begun = {run.url: run.identity() for run in folders if run.identity()}
    assert begun

    job = table(scenes, runs, classifier, json=file, changes=dataclasses.replace(SMALL, num_steps=40, val_every=10))
    assert main(job) == 0
    first = json.loads(file.read_text())
    rows = {(row["row"], row["select"]): row for row in first["rows"]}
    done = [row for row in first["rows"] if row["scores"]]
    assert len(rows) == len(ROWS) == 7
    assert [len(row["trials"]) for row in done] == [2, 2]
    for row in done:
        assert set(METRICS) - {"meteor"} <= row["scores"].keys()
        assert row["best"]["validation"] == max(trial["validation"] for trial in row["trials"])
        sizes = RunFolder(f"{runs}/{row['best']['run']}").identity()
        assert sizes is not None
        assert sizes.recipe["decoder"]["hidden"] == row["best"]["hidden"]
        assert sizes.tracking_uri == tracking_uri(runs)
    for run in folders:
        assert (run.result() or {})["steps"] == 40
    assert begun == {url: RunFolder(url).identity() for url in begun}  # gone on with, not begun again
    for name in ("table2.md", "table2.png", "table2.json"):
        assert (runs / "table2" / name).stat().st_size

    checkpoints = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    capfd.readouterr()
    assert main(job) == 0
    assert json.loads(file.read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == checkpoints
    assert "captioned" not in capfd.readouterr().out


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": None}, "no encoder is given; expected --frame, --states or --entity"),
        ({"samples": 0}, "at least one row, one sample"),
        ({"hidden": ()}, "one value each of hidden"),
        ({"gpus_per_trial": 2}, "gpus_per_trial 2: expected at least 1, and 0 or 1"),
    ],
)
def test_options_that_make_no_table_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Table2Job(**{"shards": "x", "frame": "y", **options})


def test_rows_whose_encoders_are_not_named_are_refused_if_there_are_no_others(scenes, tmp_path, classifier):
    with pytest.raises(ValueError, match=r"both-loss: none of them has all its encoders; given: frame, states"):
        reproduce_table2(table(scenes, tmp_path, classifier, rows=("both-loss",)))


def test_data_without_captions_is_refused(shards, tmp_path, classifier):
    with pytest.raises(BadShards, match="caption"):
        reproduce_table2(table(shards, tmp_path, classifier))


def test_selecting_by_meteor_without_java_is_refused_before_anything_starts(scenes, tmp_path, classifier, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ValueError, match="meteor needs Java"):
        reproduce_table2(table(scenes, tmp_path, classifier, entity="imagenet", rows=("both-meteor",)))
    assert not (tmp_path / "table2").exists()
