"""What a run's driver logs to MLflow, with a client that fails on request: nothing lost, nothing twice, no endless wait."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2 as codes

from cluster.checkpoints.run_folder import RunFolder
from cluster.tracking import mlflow_run, outbox, sender
from cluster.tracking.entries import File, Metrics, Register, RunEnd, RunEvent, SavedCheckpoint
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.outbox import UNSENT, read_unsent
from cluster.tracking.sender import is_passing
from cluster.tracking.server import NoTracking
from shards.store import BadShards

AWAY = MlflowException("connection refused")


class Client:
    """MLflow, in memory, with what a test lets go wrong."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int, int, float]] = []
        self.tags: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.models: list[str] = []
        self.calls: list[str] = []
        self.status = "RUNNING"
        self.fault: Callable[[str], None] = lambda call: None

    def log_batch(self, run_id, metrics=(), tags=(), synchronous=None) -> None:
        self.fault("log_batch")
        for each in metrics:
            row = (each.key, each.step, each.timestamp, each.value)
            if row not in self.metrics:  # as MLflow's database does
                self.metrics.append(row)
        self.tags |= {tag.key: tag.value for tag in tags}
        self.fault("answer")

    def log_artifact(self, run_id, path, folder) -> None:
        self.calls.append("log_artifact")
        self.fault("log_artifact")
        self.files[(Path(folder or "") / Path(path).name).as_posix()] = Path(path).read_bytes()

    def list_artifacts(self, run_id, path) -> list[SimpleNamespace]:
        self.fault("list_artifacts")
        return []

    def create_logged_model(self, experiment_id, name, **options) -> None:
        self.models.append(name)

    def get_run(self, run_id) -> SimpleNamespace:
        return SimpleNamespace(data=SimpleNamespace(tags=dict(self.tags)))

    def get_metric_history(self, run_id, name) -> list[SimpleNamespace]:
        self.fault("history")
        return [SimpleNamespace(step=step) for key, step, _, _ in self.metrics if key == name]

    def set_terminated(self, run_id, status, milliseconds) -> None:
        self.status = status

    def steps(self, name: str = "train/loss") -> list[int]:
        return [step for key, step, _, _ in self.metrics if key == name]


@pytest.fixture
def client(monkeypatch) -> Client:
    made = Client()
    monkeypatch.setattr(mlflow_run, "MlflowClient", lambda uri: made)
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(outbox, "SAVE_SECONDS", 0.05)
    return made


@pytest.fixture
def run(tmp_path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the test's end, so that no thread stays behind it."""
    event = threading.Event()
    yield event
    event.set()


def fail(times: int, error: Exception, at: str = "log_batch") -> Callable[[str], None]:
    left = [times]

    def fault(call: str) -> None:
        if call == at and left[0]:
            left[0] -= 1
            raise error

    return fault


def always(error: Exception) -> Callable[[str], None]:
    return fail(10**9, error)


def fail_at_all_calls(call: str) -> None:
    raise AWAY


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until, "waited 60 s"
        time.sleep(0.01)


def log(steps: range, mlflow: MlflowRun) -> None:
    for step in steps:
        mlflow.log_metrics(step, {"train/loss": step / 10, "train/top1": 0.5}, milliseconds=1000 * step)


def kinds(run: RunFolder) -> list[type]:
    """Of the entries in unsent.jsonl."""
    return [type(entry) for entry in read_unsent(run)]


def test_what_fails_for_a_while_is_sent_in_order_and_said_once(client, run):
    client.fault, said = fail(5, AWAY), []
    with MlflowRun("http://server", "id", run, said.append) as mlflow:
        log(range(1, 6), mlflow)
        mlflow.end()
    assert client.steps() == [1, 2, 3, 4, 5]
    assert client.status == "FINISHED"
    assert len(said) == 2
    assert "MLflow at http://server does not answer (connection refused); metrics and events wait" in said[0]
    assert "takes metrics and events again" in said[1]
    assert not (Path(run.url) / UNSENT).exists()


def test_what_was_done_although_the_answer_was_lost_is_not_doubled(client, run):
    client.fault = fail(3, AWAY, at="answer")
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        log(range(1, 4), mlflow)
        mlflow.log_event(3, "lost worker 1")
        mlflow.log_event(3, "training again")
    assert client.steps() == [1, 2, 3]
    assert sorted(client.tags) == ["event.0001", "event.0002"]


def test_events_are_numbered_on_from_those_there_and_one_that_is_sent_again_keeps_its_number(client, run):
    with MlflowRun("uri", "id", run) as mlflow:
        mlflow.log_event(1, "first")
        mlflow.log_event(2, "second")
    client.fault = fail(1, AWAY, at="answer")
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        mlflow.log_event(3, "third")
        mlflow.log_event(4, "fourth")
    assert [f"{key} {text.split(': ')[1]}" for key, text in sorted(client.tags.items())] == [
        "event.0001 first", "event.0002 second", "event.0003 third", "event.0004 fourth",
    ]  # fmt: skip
    assert [(step, value) for key, step, _, value in client.metrics if key == "run/events"] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0),
    ]  # fmt: skip


def test_a_refused_entry_is_said_and_dropped_and_the_others_go_on(client, run):
    client.fault, said = fail(1, MlflowException("a key that is too long", codes.INVALID_PARAMETER_VALUE)), []
    with MlflowRun("uri", "id", run, said.append) as mlflow:
        log(range(1, 4), mlflow)
    assert client.steps() == [2, 3]
    assert said == ["warning: MLflow at uri refuses metrics: a key that is too long"]


def test_steps_that_mlflow_has_or_that_wait_for_it_are_not_told_again(client, run, monkeypatch):
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.1)
    with MlflowRun("uri", "id", run) as mlflow:
        log(range(1, 4), mlflow)
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        log(range(2, 6), mlflow)
    assert [entry.step for entry in read_unsent(run) if isinstance(entry, Metrics)] == [4, 5]
    client.fault = lambda call: None
    with MlflowRun("uri", "id", run) as mlflow:
        assert mlflow.last_step() == 5
        log(range(3, 8), mlflow)
    assert client.steps() == [1, 2, 3, 4, 5, 6, 7]


def test_an_end_that_a_run_was_to_have_before_it_went_on_is_not_sent(client, run, monkeypatch):
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.1)
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        log(range(1, 2), mlflow)
        mlflow.end("FAILED")
    assert kinds(run) == [Metrics, RunEnd]
    client.fault = lambda call: None
    with MlflowRun("uri", "id", run) as mlflow:
        wait_until(lambda: mlflow.outbox.is_empty())
        assert client.status == "RUNNING"
        mlflow.end()
    assert client.status == "FINISHED"


def test_closing_is_bounded_and_keeps_and_says_what_is_left(client, run, monkeypatch, gate):
    """The server takes the connection and answers nothing, for longer than a run waits."""
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.3)
    client.fault = lambda call: gate.wait(60) and None
    said, started = [], time.monotonic()
    gate.set()
    with MlflowRun("uri", "id", run, said.append) as mlflow:
        gate.clear()
        log(range(1, 4), mlflow)
        mlflow.end()
    assert time.monotonic() - started < 30
    assert said == [
        f"MLflow at uri did not take 4 entries; they are kept in {run.url}/{UNSENT}; send them once it answers: "
        f"python -m jobs.sync_mlflow --run {run.url}"
    ]
    assert kinds(run) == [Metrics, Metrics, Metrics, RunEnd]


def test_metrics_do_not_wait_behind_a_file_and_the_end_waits_for_both(client, run, gate):
    client.fault = lambda call: gate.wait(60) and None if call == "log_artifact" else None
    with MlflowRun("uri", "id", run) as mlflow:
        mlflow.log_text("recipe.json", "{}")
        log(range(1, 4), mlflow)
        mlflow.end()
        wait_until(lambda: client.steps() == [1, 2, 3])
        assert client.status == "RUNNING"
        gate.set()
    assert list(client.files) == ["recipe.json"]
    assert client.status == "FINISHED"


def test_a_file_that_takes_too_long_ends_the_waiting_too(client, run, gate):
    client.fault = lambda call: gate.wait(60) and None if call == "log_artifact" else None
    mlflow = MlflowRun("uri", "id", run, lambda _: None)
    mlflow.log_text("recipe.json", "{}")
    started = time.monotonic()
    assert not mlflow.close(0.5)
    assert time.monotonic() - started < 30
    assert kinds(run) == [File]


def test_what_waits_is_kept_while_the_run_goes_on_and_forgotten_once_it_is_sent(client, run):
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        log(range(1, 4), mlflow)
        wait_until(lambda: len(read_unsent(run)) == 3)
        client.fault = lambda call: None
        wait_until(lambda: not read_unsent(run))
        assert client.steps() == [1, 2, 3]


def test_what_waits_is_kept_at_each_checkpoint(client, run, monkeypatch):
    """A restart goes on from the newest checkpoint, and logs again only what came since the one before."""
    monkeypatch.setattr(outbox, "SAVE_SECONDS", 3600)
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.1)
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        client.fault = fail_at_all_calls
        for step in range(1, 4):
            log(range(step, step + 1), mlflow)
            mlflow.log_checkpoint(f"checkpoint-{step}", keep=2)
            assert kinds(run) == [Metrics] * step + [SavedCheckpoint] * step


def test_a_checkpoint_that_newer_ones_have_replaced_is_left_out(client, run):
    said = []
    with MlflowRun("uri", "id", run, said.append) as mlflow:
        mlflow.log_checkpoint("checkpoint-00000001", keep=2)
    assert not said
    assert not client.models


def test_of_files_of_one_name_only_the_last_is_sent(client, run, gate):
    client.fault = lambda call: gate.wait(60) and None if call == "log_artifact" else None
    with MlflowRun("uri", "id", run) as mlflow:
        mlflow.log_text("recipe.json", "{}")
        wait_until(lambda: client.calls == ["log_artifact"])
        for content in (b"1", b"2", b"3"):
            mlflow.log_file("pictures/levels.png", content)
            mlflow.log_file("pictures/classes.png", content)
        gate.set()
    assert client.files == {"recipe.json": b"{}", "pictures/levels.png": b"3", "pictures/classes.png": b"3"}
    assert client.calls.count("log_artifact") == 3


def test_a_folder_that_cannot_be_written_is_said_and_does_not_end_the_run(client, run, monkeypatch):
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.1)
    client.fault, said = always(AWAY), []
    Path(run.url).rmdir()
    Path(run.url).write_text("no folder")
    with MlflowRun("uri", "id", None, said.append) as mlflow:
        mlflow.outbox.run = run
        log(range(1, 3), mlflow)
    assert any(line.startswith("warning: what MLflow has not taken cannot be kept") for line in said)
    assert not any("they are kept" in line for line in said)


def test_a_server_that_is_away_when_a_run_begins_is_no_traceback(client, run):
    client.fault = fail(1, AWAY, at="history")
    with pytest.raises(NoTracking, match=r"MLflow at uri does not show run id \(connection refused\)"):
        MlflowRun("uri", "id", run)


OLD = """{"kind": "metrics", "step": 3, "milliseconds": 1000, "values": {"train/loss": 0.5, "train/top1": NaN}}
{"kind": "event", "step": 3, "milliseconds": 2000, "text": "lost worker 1"}
{"kind": "text", "name": "recipe.json", "content": "{}"}
{"kind": "table", "name": "captions.json", "content": "[]"}
{"kind": "picture", "name": "levels.png", "content": "iVBORw0="}
{"kind": "checkpoint", "name": "checkpoint-00000008", "keep": 2, "new_best": true}
{"kind": "register", "name": "actions"}
{"kind": "end", "status": "FAILED", "milliseconds": 3000}
"""


def test_what_an_earlier_version_left_unsent_is_read(run):
    (Path(run.url) / UNSENT).write_text(OLD)
    metrics, *others = read_unsent(run)
    assert isinstance(metrics, Metrics)
    assert (metrics.step, metrics.milliseconds, metrics.values["train/loss"]) == (3, 1000, 0.5)
    assert math.isnan(metrics.values["train/top1"])
    assert others == [
        RunEvent(step=3, milliseconds=2000, text="lost worker 1"),
        File(name="recipe.json", content="e30="),
        File(name="captions.json", content="W10=", is_table=True),
        File(name="levels.png", content="iVBORw0="),
        SavedCheckpoint(name="checkpoint-00000008", keep=2),
        Register(name="actions"),
        RunEnd(status="FAILED", milliseconds=3000),
    ]


def test_an_outbox_beyond_its_memory_goes_on_in_a_file(client, run, monkeypatch):
    monkeypatch.setattr(outbox, "IN_MEMORY_BYTES", 200)
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as mlflow:
        log(range(1, 51), mlflow)
        client.fault = lambda call: None
    assert client.steps() == list(range(1, 51))


def answered(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status}", response=response)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (AWAY, True),
        (MlflowException("the database is locked", codes.TEMPORARILY_UNAVAILABLE), True),
        (MlflowException("too many", codes.REQUEST_LIMIT_EXCEEDED), True),
        (MlflowException("a token that is out of date", codes.UNAUTHENTICATED), True),
        (MlflowException("no such run", codes.RESOURCE_DOES_NOT_EXIST), True),
        (MlflowException("a bad value", codes.INVALID_PARAMETER_VALUE), False),
        (MlflowException("no right to", codes.PERMISSION_DENIED), False),
        (ConnectionResetError(), True),
        (answered(503), True),
        (answered(429), True),
        (answered(413), False),
        (BadShards("s3://runs: failed 9 times in 60 s"), True),
        (ValueError("a fault of ours"), False),
        (KeyError("a fault of ours"), False),
    ],
)
def test_what_passes_and_what_does_not(error, passes):
    assert is_passing(error) == passes
