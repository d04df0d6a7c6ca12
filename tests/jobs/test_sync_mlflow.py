"""Trainings whose MLflow server is killed, frozen or gone for good in the middle: they go on, and MLflow has all of it once.

One database for the whole file, and as few starts of the server as can be: each takes 10 s or more.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_servers import SECONDS, Server, wait_until
from servers import s3_server
from small_runs import ROOT, TINY, job

from cluster.checkpoints.run_folder import Identity, RunFolder, load_best
from cluster.tracking import outbox, sender
from cluster.tracking.entries import Metrics
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.models import CHECKPOINT, LoggedModels, download_best
from cluster.tracking.outbox import UNSENT, read_unsent
from cluster.tracking.sender import MlflowSender
from cluster.tracking.server import open_run, tracking_uri
from grurcn.training.loop import train_worker
from jobs import sync_mlflow, train
from shards.reading.stream import train_batches

pytestmark = pytest.mark.cluster

STEPS, VAL_EVERY, SAVE_EVERY = 24, 6, 4
RECIPE = dataclasses.replace(TINY, num_steps=STEPS, val_every=VAL_EVERY)
Hooks = dict[int, Callable[[], object]]


@pytest.fixture(scope="module")
def one_server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server, monkeypatch) -> Server:
    """The server, running; and a sender that has less patience between its attempts."""
    one_server.ready()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.url)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(outbox, "SAVE_SECONDS", 0.2)
    monkeypatch.setattr(sender, "CLOSE_SECONDS", SECONDS)
    return one_server


def run_with(hooks: Hooks, shards: Path, storage: Path, name: str) -> RunFolder:
    """Trains in this process; hooks: what happens once so many steps are done."""

    def read(index, clips, order, **options):
        epoch, epoch_step = options["start"]
        done = epoch * order.steps_per_epoch + epoch_step
        with closing(train_batches(index, clips, order, **options)) as batches:
            for number, batch in enumerate(batches, start=done):
                hooks.get(number, lambda: None)()
                yield batch

    worker = partial(train_worker, read=read)
    options = job(shards, storage, name, recipe=RECIPE, save_every=SAVE_EVERY)
    assert train.main("tiny", options, worker) == 0
    return RunFolder(str(storage / name))


def kept_steps(run: RunFolder) -> list[int]:
    waiting = [entry for entry in read_unsent(run) if isinstance(entry, Metrics)]
    return [metrics.step for metrics in waiting if "train/loss" in metrics.values]


def mlflow_run(run: RunFolder) -> tuple[MlflowClient, str]:
    identity = run.identity()
    assert identity is not None
    return MlflowClient(identity.tracking_uri), identity.mlflow_run_id


def logged_steps(run: RunFolder, name: str = "train/loss") -> list[int]:
    client, run_id = mlflow_run(run)
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def check_whole(run: RunFolder) -> None:
    """MLflow has every step once, each validation once, the newest checkpoints, the best model, and the end."""
    assert logged_steps(run) == logged_steps(run, "perf/clips_per_second") == list(range(1, STEPS + 1))
    assert logged_steps(run, "val/loss") == list(range(VAL_EVERY, STEPS + 1, VAL_EVERY))
    client, run_id = mlflow_run(run)
    identity = run.identity()
    assert identity is not None
    logged = LoggedModels(client, identity.tracking_uri, run_id).all(CHECKPOINT)
    there = [model.name for model in logged]
    assert there == [checkpoint.name for checkpoint in run.checkpoints()]
    assert there == ["checkpoint-00000020", "checkpoint-00000024"]
    files = {file.path for file in client.list_logged_model_artifacts(logged[-1].model_id)}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json"}
    best = load_best(download_best(identity.tracking_uri, run_id, run_downloads(run)))
    assert best.step == load_best(run.url).step
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not (Path(run.url) / UNSENT).exists()


def run_downloads(run: RunFolder) -> Path:
    folder = Path(f"{run.url}-downloads")
    folder.mkdir(exist_ok=True)
    return folder


def test_a_training_goes_on_while_its_server_is_frozen(server, shards, tmp_path, monkeypatch, capsys):
    """Requests that got no answer in time wait in the server's socket: it does them later, and again when they come again."""
    run, said = RunFolder(str(tmp_path / "frozen")), []

    def says(text: str) -> bool:
        said.append(capsys.readouterr().out)
        return text in "".join(said)

    def freeze() -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        wait_until(lambda: 7 in logged_steps(run))  # by a request that began before
        server.freeze()

    def thaw() -> None:
        wait_until(lambda: says("metrics and events wait") and 15 in kept_steps(run))
        server.thaw()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{SECONDS}")

    try:
        run_with({7: freeze, 15: thaw}, shards, tmp_path, run.name)
    finally:
        server.thaw()
    check_whole(run)
    assert says("takes metrics and events again")
    assert not says("did not take")


def test_a_server_that_did_it_but_whose_answer_was_lost_has_it_once(server, tmp_path, monkeypatch):
    """Each request is done several times: for a process that gets no answer, and for the next, which has unsent.jsonl."""
    run = RunFolder(str(tmp_path / "doubled"))
    identity = begin_run(run, tmp_path)
    log_batch, calls = MlflowClient.log_batch, []

    def done_without_an_answer(*args, **options) -> None:
        log_batch(*args, **options)
        calls.append(options)
        if len(calls) < enough:
            raise ConnectionResetError

    monkeypatch.setattr(MlflowClient, "log_batch", done_without_an_answer)
    enough = 1_000_000
    with monkeypatch.context() as patch:
        patch.setattr(sender, "CLOSE_SECONDS", 1.0)
        with MlflowRun(identity.tracking_uri, identity.mlflow_run_id, run, lambda _: None) as mlflow:
            mlflow.log_metrics(1, {"train/loss": 0.1, "train/top1": float("nan"), "perf/x": 1 / 3})
            mlflow.log_event(1, "lost worker 1")
            wait_until(lambda: len(calls) == 2)
    assert len(read_unsent(run)) == 2
    enough = len(calls) + 3
    assert sync(run) == 0
    for name in ("train/loss", "train/top1", "perf/x", "run/events"):
        assert logged_steps(run, name) == [1], name
    client, run_id = mlflow_run(run)
    assert [key for key in client.get_run(run_id).data.tags if key.startswith("event.")] == ["event.0001"]


CHILD = """
import os, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/helpers", "tests/jobs"]
import conftest, test_sync_mlflow as here
from cluster.tracking import outbox

os.environ["MLFLOW_TRACKING_URI"], shards, storage = sys.argv[1:]
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "3"
outbox.SAVE_SECONDS = 0.2

def wait_for_parent():
    print("waiting", flush=True)
    sys.stdin.readline()

here.run_with({6: wait_for_parent, 15: wait_for_parent}, Path(shards), Path(storage), "killed")
"""


def test_a_run_that_is_killed_while_mlflow_is_away_goes_on_and_tells_every_step_once(server, shards, tmp_path):
    run = RunFolder(str(tmp_path / "killed"))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(shards), str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert "waiting\n" in child.stdout
        server.freeze()
        child.stdin.write("go on\n")
        child.stdin.flush()
        assert "waiting\n" in child.stdout
        wait_until(lambda: 15 in kept_steps(run))  # three more than the newest checkpoint has
    finally:
        child.kill()
        child.wait()
        server.thaw()
    server.wait()
    run_with({}, shards, tmp_path, run.name)
    check_whole(run)


@pytest.mark.long
def test_a_training_goes_on_while_its_server_is_killed_and_started_again(server, shards, tmp_path, capsys):
    def start() -> None:
        wait_until(lambda: 12 in kept_steps(RunFolder(str(tmp_path / "restarted"))))
        server.start()

    run = run_with({6: server.kill, 13: start, 18: server.wait}, shards, tmp_path, "restarted")
    check_whole(run)
    said = capsys.readouterr().out
    assert "does not answer" in said
    assert "takes files again" in said


def sync(run: RunFolder) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as end:
        sync_mlflow.COMMAND.run(["--run", run.url])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.long
def test_what_a_training_could_not_tell_is_sent_by_a_command_once_the_server_is_back(
    server, shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 1.0)
    run = run_with({13: server.kill}, shards, tmp_path, "untold")
    kept = len(read_unsent(run))
    said = capsys.readouterr().out
    assert f"did not take {kept} entries; they are kept in {run.url}/{UNSENT}" in said
    assert f"python -m jobs.sync_mlflow --run {run.url}" in said
    assert kept_steps(run)[-1] == STEPS

    assert sync(run) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: no MLflow server at {server.url}" in error
    assert f"{kept} entries are kept in {run.url}/{UNSENT}" in error
    assert len(read_unsent(run)) == kept

    monkeypatch.setattr(sender, "CLOSE_SECONDS", SECONDS)
    server.ready()
    assert sync(run) == 0
    assert f"sent {kept} entries of {run.url} to MLflow" in capsys.readouterr().out
    check_whole(run)
    assert sync(run) == 0
    assert f"{run.url}: nothing to send" in capsys.readouterr().out


# Without a server


def begin_run(run: RunFolder, storage: Path) -> Identity:
    uri = tracking_uri(storage)
    identity = Identity(
        recipe_digest="", data_digest="", recipe={}, tracking_uri=uri,
        mlflow_run_id=open_run(uri, storage, "synced", run.name, None, {}, {}, {}),
    )  # fmt: skip
    run.begin(identity)
    return identity


def leave_entries(run: RunFolder, identity: Identity, monkeypatch) -> None:
    """As a process leaves them that could not send them, nor told how it ended."""
    with monkeypatch.context() as patch:
        patch.setattr(sender, "CLOSE_SECONDS", 0.1)
        patch.setattr(MlflowSender, "send", lambda *_: (_ for _ in ()).throw(ConnectionRefusedError()))
        with MlflowRun(identity.tracking_uri, identity.mlflow_run_id, run, lambda _: None) as mlflow:
            mlflow.log_metrics(1, {"train/loss": 0.5})
            mlflow.log_event(1, "ended: Diverged")
            mlflow.end("FAILED")


def test_a_runs_entries_are_sent_from_an_object_store(storage, monkeypatch, capsys):
    with s3_server() as bucket:
        run = RunFolder(f"{bucket}/runs/synced")
        identity = begin_run(run, storage)
        leave_entries(run, identity, monkeypatch)
        assert sync(run) == 0
        assert "sent 3 entries" in capsys.readouterr().out
        assert read_unsent(run) == []
    sent = MlflowClient(identity.tracking_uri).get_run(identity.mlflow_run_id)
    assert sent.info.status == "FAILED"
    assert sent.data.metrics == {"train/loss": 0.5, "run/events": 1.0}
    assert sent.data.tags["event.0001"].endswith("step 1: ended: Diverged")


def test_a_database_without_the_run_is_refused_and_nothing_is_lost(storage, tmp_path, monkeypatch, capsys):
    run = RunFolder(str(tmp_path / "elsewhere"))
    identity = begin_run(run, storage)
    leave_entries(run, identity, monkeypatch)
    run.begin(dataclasses.replace(identity, mlflow_run_id="0" * 32))
    assert sync(run) == 1
    assert f"does not show run {'0' * 32}" in capsys.readouterr().err
    assert len(read_unsent(run)) == 3


def test_a_run_that_does_not_exist_is_refused(tmp_path, capsys):
    assert sync(RunFolder(str(tmp_path / "none"))) == 1
    assert (
        f"error: {tmp_path}/none: no run.json in it; expected a run's folder (STORAGE/NAME)" in capsys.readouterr().err
    )
