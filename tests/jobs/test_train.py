"""The training job in this process: resuming exactly, early stopping, MLflow, and what it refuses."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from small_runs import OPTIONS, ROOT, TINY, job, losses, run_train

from cluster.checkpoints.run_folder import OtherRun, RunFolder, load_best
from cluster.tracking.models import BEST, CHECKPOINT, LoggedModels
from cluster.tracking.server import NoTracking, tracking_uri
from grurcn.models.trunks.base import BadWeights
from grurcn.training.divergence import Diverged
from grurcn.training.optim import OptimConfig
from jobs import train
from shards.reading.order import BadBatch
from shards.store import BadShards


@pytest.fixture(scope="module")
def finished(shards, storage) -> dict:
    return run_train(shards, storage, "finished")


def test_a_run_ends_with_its_best_model_a_line_and_json(finished, storage, capsys):
    assert finished["steps"] == 6
    assert not finished["stopped_early"]
    assert finished["best_step"] in (3, 6)
    documented = (train.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in finished)
    best = load_best(storage / "finished")
    assert best.best
    assert best.step == finished["best_step"]
    assert best.training.model["classes"] == ["down", "left", "right", "up"]


def test_mlflow_has_one_run_with_parameters_metrics_tags_and_artifacts(finished, storage, shards):
    client = MlflowClient(finished["tracking_uri"])
    run = client.get_run(finished["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.hidden"] == "(4, 6)"
    assert run.data.params["global_batch"] == "8"
    assert len(run.data.tags["data_digest"]) == 64
    assert run.data.tags["git_commit"]
    for name in (
        "train/loss",
        "train/top1",
        "train/learning_rate",
        "val/loss",
        "perf/clips_per_second",
        "perf/data_wait_fraction",
    ):
        assert name in run.data.metrics
    assert sorted(losses(finished)) == [1, 2, 3, 4, 5, 6]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"recipe.json", "dataset.json", "environment.txt", "pictures"} <= files
    models = LoggedModels(client, finished["tracking_uri"], run.info.run_id)
    assert [model.name for model in models.all(CHECKPOINT)] == ["checkpoint-00000003", "checkpoint-00000006"]
    assert [model.name for model in models.all(BEST)] == [f"best-{finished['best_step']:08}"]
    same_name = client.search_runs([run.info.experiment_id], "attributes.run_name = 'finished'")
    assert len(same_name) == 1


def test_a_finished_run_is_not_trained_again(finished, shards, storage, capsys):
    again = run_train(shards, storage, "finished")
    assert "finished before" in capsys.readouterr().out
    assert {**again, "seconds": 0} == {**finished, "seconds": 0}


@pytest.mark.long
def test_a_run_killed_at_any_moment_goes_on_with_bit_equal_losses(shards, storage, finished):
    """SIGKILL while it trains, then the same command; compared with a run that nobody disturbed."""
    command = [
        sys.executable, "-m", "jobs.train", "demo", "--shards", str(shards), "--storage", str(storage),
        "--cpus-per-worker", "1", "--save-every", "2", *OPTIONS,
    ]  # fmt: skip
    subprocess.run([*command, "--name", "undisturbed"], cwd=ROOT, check=True, capture_output=True, timeout=120)
    rng = np.random.default_rng(time.time_ns())
    kills = 0
    while kills < 3:
        process = subprocess.Popen(
            [*command, "--name", "killed"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wanted_lines = int(rng.integers(2, 7))
        assert process.stdout is not None
        for _, _line in zip(range(wanted_lines), process.stdout, strict=False):
            pass
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        for checkpoint in RunFolder(str(storage / "killed")).checkpoints():
            checkpoint.check()
    subprocess.run([*command, "--name", "killed"], cwd=ROOT, check=True, capture_output=True, timeout=120)

    results = [RunFolder(str(storage / name)) for name in ("undisturbed", "killed")]
    histories = [
        losses({"tracking_uri": tracking_uri(storage), "mlflow_run_id": identity.mlflow_run_id})
        for identity in (run.identity() for run in results)
        if identity
    ]
    assert sorted(histories[0]) == list(range(1, 13))
    assert histories[0] == histories[1]
    weights = [load_best(run.url).weights for run in results]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list((storage / "killed").rglob(".*.partial"))


def test_accumulation_and_zero_stages_change_no_loss(shards, storage, finished):
    plain = losses(finished)
    for name, options in {"accumulated": {"accumulation": 4}, "zero3": {"zero": 3}, "zero1": {"zero": 1}}.items():
        other = losses(run_train(shards, storage, name, **options))
        assert other == pytest.approx(plain, rel=1e-5)


def test_training_stops_early_when_the_validation_log_probability_gets_no_better(shards, storage):
    still = dataclasses.replace(TINY, optim=OptimConfig(learning_rate=1e-12), num_steps=40, val_every=1, patience=3)
    result = run_train(shards, storage, "early", recipe=still)
    assert result["stopped_early"]
    assert 4 <= result["steps"] < 40
    assert result["steps"] - result["best_step"] == 3


def test_only_the_newest_checkpoints_are_kept(finished, shards, storage):
    result = run_train(shards, storage, "kept", save_every=1, keep=2)
    assert [checkpoint.name for checkpoint in RunFolder(str(storage / "kept")).checkpoints()] == [
        "checkpoint-00000005",
        "checkpoint-00000006",
    ]
    models = LoggedModels(MlflowClient(result["tracking_uri"]), result["tracking_uri"], result["mlflow_run_id"])
    assert [model.name for model in models.all(CHECKPOINT)] == ["checkpoint-00000005", "checkpoint-00000006"]


def test_another_recipe_under_the_same_name_is_refused_with_the_difference(finished, shards, storage):
    other = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, learning_rate=1.0))
    with pytest.raises(
        OtherRun, match=r"finished: a run of another recipe \(optim\.learning_rate 0\.003 there, 1\.0 here\)"
    ):
        train.main("tiny", job(shards, storage, "finished", recipe=other))


def test_other_data_under_the_same_name_is_refused(finished, shards, storage, tmp_path):
    (copy := tmp_path / "shards").mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    description = json.loads((copy / "dataset.json").read_text())
    description["plan"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(OtherRun, match="a run on other data"):
        train.main("tiny", job(copy, storage, "finished"))


def test_a_batch_that_cannot_be_made_is_refused_before_anything_starts(shards, storage):
    from cluster.workers.options import Workers

    with pytest.raises(BadBatch, match="16 samples are fewer than one global batch of 64"):
        train.main("tiny", job(shards, storage, "big", recipe=dataclasses.replace(TINY, global_batch=64)))
    with pytest.raises(BadBatch, match=r"8 cannot be shared evenly by 3 workers; workers that divide it: 1, 2, 4, 8"):
        train.main("tiny", job(shards, storage, "odd", on=Workers(workers=3)))
    with pytest.raises(ValueError, match="accumulation 3: a worker's 8 videos of a global batch do not divide into 3"):
        train.main("tiny", job(shards, storage, "odd", accumulation=3))
    assert not (storage / "big").exists()
    assert not (storage / "odd").exists()


def test_shards_that_are_not_there_or_not_whole_are_refused(shards, storage, tmp_path):
    with pytest.raises(BadShards, match=r"dataset\.json: not found \(nothing was packed there\)"):
        train.main("tiny", job(tmp_path, storage, "none"))
    (copy := tmp_path / "copy").mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "train-000001.tar").unlink()
    with pytest.raises(BadShards, match=r"train-000001\.tar: missing"):
        train.main("tiny", job(copy, storage, "none"))


def test_weights_that_do_not_fit_the_trunk_are_refused(shards, storage, tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    model = dataclasses.replace(TINY.model, weights=str(tmp_path / "vgg16.pth"))
    with pytest.raises(BadWeights, match=r"vgg16\.pth: no features\.0\.bias"):
        train.main("tiny", job(shards, storage, "weights", recipe=dataclasses.replace(TINY, model=model)))


def test_a_tracking_server_that_is_away_is_said_at_once(shards, storage, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(NoTracking, match=r"no MLflow server at http://127\.0\.0\.1:9 .*unset MLFLOW_TRACKING_URI"):
        train.main("tiny", job(shards, storage, "untracked"))


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_steps(shards, storage):
    wild = dataclasses.replace(TINY, optim=OptimConfig(learning_rate=1e30, clip_norm=0), num_steps=30)
    with pytest.raises(
        Diverged,
        match=r"the loss is not a number, or infinite, at step \d+ \(seen at step \d+\): worker 0 of 1, epoch",
    ):
        train.main("tiny", job(shards, storage, "wild", recipe=wild))
    identity = RunFolder(str(storage / "wild")).identity()
    assert identity is not None
    assert MlflowClient(identity.tracking_uri).get_run(identity.mlflow_run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gru-rcm"], "gru-rcn-stacked, gru-rcn-bidirectional"),
        (["demo", "--shards", "x", "--modle.width", "1"], "Unrecognized options: --modle.width"),
        (["demo"], "--shards"),
        (["demo", "--shards", "x", "--model.hidden", "3"], "one hidden size per tap"),
        (["demo", "--shards", "x", "--precision", "int3"], "int3"),
    ],
)
def test_recipes_and_options_that_do_not_exist_are_refused(words, message, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        train.COMMAND.parse(words, "train")
    said = capsys.readouterr()
    assert end.value.code == 2
    assert message in said.out + said.err


def test_help_without_a_recipe_is_one_screen_that_names_every_recipe(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        train.COMMAND.parse(["--help"], "grurcn train")
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert all(any(line.split()[:1] == [name] for line in lines) for name in train.recipes())
    assert any("grurcn train gru-rcn-small --shards" in line for line in lines)
