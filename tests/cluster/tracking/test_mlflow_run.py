"""What a run's driver tells MLflow, to a client that fails as the test wants: nothing lost, nothing twice, no endless wait."""

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
from cluster.tracking import mlflow_run as report
from cluster.tracking.mlflow_run import UNSENT, MlflowRun, read_entries
from cluster.tracking.sender import is_passing
from cluster.tracking.server import NoTracking
from shards.store import BadShards

AWAY = MlflowException("connection refused")


class Client:
    """MLflow, in memory, with what a test lets go wrong."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int, int, float]] = []
        self.tags: dict[str, str] = {}
        self.files: list[str] = []
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

    def log_text(self, run_id, content, name) -> None:
        self.fault("log_text")
        self.files.append(name)

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
    monkeypatch.setattr(report, "MlflowClient", lambda uri: made)
    monkeypatch.setattr(report, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(report, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(report, "KEEP_SECONDS", 0.05)
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


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until, "waited 60 s"
        time.sleep(0.01)


def told(steps: range, to: MlflowRun) -> None:
    for step in steps:
        to.log_metrics(step, {"train/loss": step / 10, "train/top1": 0.5}, milliseconds=1000 * step)


def test_what_fails_for_a_while_is_sent_in_order_and_said_once(client, run):
    client.fault, said = fail(5, AWAY), []
    with MlflowRun("http://server", "id", run, said.append) as to:
        told(range(1, 6), to)
        to.end()
    assert client.steps() == [1, 2, 3, 4, 5]
    assert client.status == "FINISHED"
    assert len(said) == 2
    assert "MLflow at http://server does not answer (connection refused); metrics and events wait" in said[0]
    assert "takes metrics and events again" in said[1]
    assert not (Path(run.url) / UNSENT).exists()


def test_what_was_done_although_the_answer_was_lost_is_not_doubled(client, run):
    client.fault = fail(3, AWAY, at="answer")
    with MlflowRun("uri", "id", run, lambda _: None) as to:
        told(range(1, 4), to)
        to.log_event(3, "lost worker 1")
        to.log_event(3, "training again")
    assert client.steps() == [1, 2, 3]
    assert sorted(client.tags) == ["event.0001", "event.0002"]


def test_events_are_numbered_on_from_those_there_and_one_that_is_sent_again_keeps_its_number(client, run):
    with MlflowRun("uri", "id", run) as to:
        to.log_event(1, "first")
        to.log_event(2, "second")
    client.fault = fail(1, AWAY, at="answer")
    with MlflowRun("uri", "id", run, lambda _: None) as to:
        to.log_event(3, "third")
        to.log_event(4, "fourth")
    assert [f"{key} {text.split(': ')[1]}" for key, text in sorted(client.tags.items())] == [
        "event.0001 first", "event.0002 second", "event.0003 third", "event.0004 fourth",
    ]  # fmt: skip
    assert [(step, value) for key, step, _, value in client.metrics if key == "run/events"] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0),
    ]  # fmt: skip


def test_a_refused_entry_is_said_and_dropped_and_the_others_go_on(client, run):
    client.fault, said = fail(1, MlflowException("a key that is too long", codes.INVALID_PARAMETER_VALUE)), []
    with MlflowRun("uri", "id", run, said.append) as to:
        told(range(1, 4), to)
    assert client.steps() == [2, 3]
    assert said == ["warning: MLflow at uri refuses metrics: a key that is too long"]


def test_steps_that_mlflow_has_or_that_wait_for_it_are_not_told_again(client, run, monkeypatch):
    monkeypatch.setattr(report, "CLOSE_SECONDS", 0.1)
    with MlflowRun("uri", "id", run) as to:
        told(range(1, 4), to)
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as to:
        told(range(2, 6), to)
    assert [entry["step"] for entry in read_entries(run)] == [4, 5]
    client.fault = lambda call: None
    with MlflowRun("uri", "id", run) as to:
        assert to.last_step() == 5
        told(range(3, 8), to)
    assert client.steps() == [1, 2, 3, 4, 5, 6, 7]


def test_an_end_that_a_run_was_to_have_before_it_went_on_is_not_sent(client, run, monkeypatch):
    monkeypatch.setattr(report, "CLOSE_SECONDS", 0.1)
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as to:
        told(range(1, 2), to)
        to.end("FAILED")
    assert [entry["kind"] for entry in read_entries(run)] == ["metrics", "end"]
    client.fault = lambda call: None
    with MlflowRun("uri", "id", run) as to:
        wait_until(lambda: not to.waiting)
        assert client.status == "RUNNING"
        to.end()
    assert client.status == "FINISHED"


def test_closing_is_bounded_and_keeps_and_says_what_is_left(client, run, monkeypatch, gate):
    """The server takes the connection and answers nothing, for longer than a run waits."""
    monkeypatch.setattr(report, "CLOSE_SECONDS", 0.3)
    client.fault = lambda call: gate.wait(60) and None
    said, started = [], time.monotonic()
    gate.set()
    with MlflowRun("uri", "id", run, said.append) as to:
        gate.clear()
        told(range(1, 4), to)
        to.end()
    assert time.monotonic() - started < 30
    assert said == [
        f"MLflow at uri did not take 4 entries; they are kept in {run.url}/{UNSENT}; send them once it answers: "
        f"python -m jobs.sync_mlflow --run {run.url}"
    ]
    assert [entry["kind"] for entry in read_entries(run)] == ["metrics", "metrics", "metrics", "end"]


def test_metrics_do_not_wait_behind_a_file_and_the_end_waits_for_both(client, run, gate):
    client.fault = lambda call: gate.wait(60) and None if call == "log_text" else None
    with MlflowRun("uri", "id", run) as to:
        to.log_text("recipe.json", "{}")
        told(range(1, 4), to)
        to.end()
        wait_until(lambda: client.steps() == [1, 2, 3])
        assert client.status == "RUNNING"
        gate.set()
    assert client.files == ["recipe.json"]
    assert client.status == "FINISHED"


def test_a_file_that_takes_too_long_ends_the_waiting_too(client, run, monkeypatch, gate):
    monkeypatch.setattr(report, "BUSY_SECONDS", 0.5)
    client.fault = lambda call: gate.wait(60) and None if call == "log_text" else None
    to = MlflowRun("uri", "id", run, lambda _: None)
    to.log_text("recipe.json", "{}")
    started = time.monotonic()
    assert not to.close()
    assert time.monotonic() - started < 30
    assert [entry["kind"] for entry in read_entries(run)] == ["text"]


def test_what_waits_is_kept_while_the_run_goes_on_and_forgotten_once_it_is_sent(client, run):
    client.fault = always(AWAY)
    with MlflowRun("uri", "id", run, lambda _: None) as to:
        told(range(1, 4), to)
        wait_until(lambda: len(read_entries(run)) == 3)
        client.fault = lambda call: None
        wait_until(lambda: not read_entries(run))
        assert client.steps() == [1, 2, 3]


def test_a_checkpoint_is_kept_at_once_and_those_that_would_be_deleted_are_left_out(client, run, monkeypatch):
    """A restart goes on from the newest checkpoint and tells again only what came since the one before."""
    monkeypatch.setattr(report, "KEEP_SECONDS", 3600)
    client.list_artifacts = lambda *_: (_ for _ in ()).throw(AWAY)  # pyright: ignore[reportAttributeAccessIssue]
    client.fault = always(AWAY)
    monkeypatch.setattr(report, "CLOSE_SECONDS", 0.1)
    with MlflowRun("uri", "id", run, lambda _: None) as to:
        for step in range(1, 7):
            told(range(step, step + 1), to)
            to.log_checkpoint(f"checkpoint-{step}", keep=2, new_best=step == 3)
            wait_until(lambda: "checkpoint" in [entry["kind"] for entry in read_entries(run)])
        wait_until(lambda: len(read_entries(run)) == 6 + 3)
    checkpoints = [entry for entry in read_entries(run) if entry["kind"] == "checkpoint"]
    assert [entry["name"] for entry in checkpoints] == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]
    assert [entry["new_best"] for entry in checkpoints] == [False, True, False]


def test_a_folder_that_cannot_be_written_is_said_and_does_not_end_the_run(client, run, monkeypatch):
    monkeypatch.setattr(report, "CLOSE_SECONDS", 0.1)
    client.fault, said = always(AWAY), []
    Path(run.url).rmdir()
    Path(run.url).write_text("no folder")
    with MlflowRun("uri", "id", None, said.append) as to:
        to.run, to.last_steps = run, {"train": -1}
        told(range(1, 3), to)
    assert any(line.startswith("warning: what MLflow has not taken cannot be kept") for line in said)
    assert not any("they are kept" in line for line in said)


def test_a_server_that_is_away_when_a_report_begins_is_no_traceback(client, run):
    client.fault = fail(1, AWAY, at="history")
    with pytest.raises(NoTracking, match="MLflow at uri does not tell of id: connection refused"):
        MlflowRun("uri", "id", run)


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
