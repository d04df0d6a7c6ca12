"""The same data from every store: packed to the same bytes, read as the same pixels, trained on to the same losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from packing import packing_job
from servers import KEYS, RangeServer, environment, first, gs_server, hang_up, s3_server, status
from small_runs import ROOT, losses, run_train
from small_runs import job as train_job

from cluster.checkpoints.run_folder import load_best
from cluster.tracking.server import NoTracking, tracking_uri
from jobs import evaluate, make_shards, train
from shards.index import Index
from shards.reading.clips import ClipConfig
from shards.reading.order import Order
from shards.reading.stream import evaluation_batches, train_batches
from shards.store import BadShards, open_store, retry

CLIPS = ClipConfig(num_frames=4, stride=2, size=16)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def gs():
    with gs_server() as url:
        yield url


def copy(folder: Path, url: str) -> str:
    """The folder's files in a store."""
    store = open_store(url)
    for path in folder.iterdir():
        with store.written(path.name) as file:
            file.write(path.read_bytes())
    return url


def contents(url: str | Path) -> dict[str, bytes]:
    store = open_store(url)
    return {name: store.read_file(name) for name in store.names()}


def epochs(url: str, num_batches: int = 9, start=(0, 0)) -> list[dict[str, torch.Tensor]]:
    """Training batches, of more than two epochs, and then those of an evaluation."""
    index = Index(url, "train")
    order = Order([shard.samples for shard in index.shards], global_batch=4, seed=3)
    with closing(train_batches(index, CLIPS, order, rank=0, world_size=1, start=start)) as batches:
        training = [vars(batch) for _, batch in islice(batches, num_batches)]
    return training + [vars(batch) for _, batch in evaluation_batches(Index(url, "test"), CLIPS, global_batch=2)]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for batch, other in zip(found, wanted, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_store_gets_the_same_bytes_as_a_folder_and_keeps_no_trace_of_the_packing(kind, request, videos, shards):
    url = f"{request.getfixturevalue(kind)}/packed"
    assert make_shards.main(packing_job(videos, url)) == 0
    assert contents(url) == contents(shards)


@pytest.mark.parametrize("kind", ["s3", "gs", "http"])
def test_every_store_gives_the_same_pixels(kind, request, shards):
    wanted = epochs(str(shards))
    if kind == "http":
        with RangeServer(shards) as server:
            assert_same(epochs(server.url), wanted)
    else:
        assert_same(epochs(copy(shards, f"{request.getfixturevalue(kind)}/pixels")), wanted)


def test_each_video_is_asked_for_once_an_epoch_and_nothing_else_of_the_shards(shards):
    index = Index(shards, "train")
    with RangeServer(shards) as server:
        epochs(server.url, num_batches=4)  # 16 samples: one epoch, of which the reader begins the next
        asked = [span for path, span in server.requests if "train-" in path and path.endswith(".tar")]
    wanted = {
        f"bytes={sample.offset}-{sample.offset + sample.size_bytes - 1}" for sample in index.samples(range(len(index)))
    }
    assert set(asked) == wanted
    assert len(server.requests) < 16 * 4


def test_a_store_that_fails_now_and_then_gives_the_same_pixels(shards, monkeypatch):
    wanted = epochs(str(shards))
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    draw = random.Random(1)
    faults = [status(500), status(503), hang_up]

    def sometimes(handler):
        if draw.random() < 0.8:
            return False
        draw.choice(faults)(handler)
        return True

    with RangeServer(shards, fault=sometimes) as server:
        assert_same(epochs(server.url), wanted)
        assert len(server.requests) > 16


def test_a_store_that_goes_away_while_it_is_read_is_one_error_with_shard_key_and_offset(shards, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.5)
    with (
        RangeServer(shards, fault=first(10**9, status(500), path=".tar")) as server,
        pytest.raises(
            BadShards, match=rf"sample \S+: {server.url}/train-00000\d\.tar: \d+ bytes at offset \d+: failed 2 t"
        ),
    ):
        epochs(server.url)


@pytest.mark.long
def test_a_packing_into_a_store_that_is_killed_again_and_again_ends_with_the_same_bytes(s3, videos, shards):
    url = f"{s3}/killed"
    code = (
        "import sys; sys.path[:0] = ['tests/helpers']\n"
        "from packing import packing_job; from jobs import make_shards; from pathlib import Path\n"
        f"make_shards.main(packing_job(Path({str(videos)!r}), {url!r}))"
    )
    draw = random.Random(0)
    kills = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            wait_for_news(url, process)
            time.sleep(draw.uniform(0, 0.4))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        finished = {name: content for name, content in contents(url).items() if name.endswith(".tar")}
        assert finished.items() <= contents(shards).items()
    assert kills >= 2
    assert make_shards.main(packing_job(videos, url)) == 0
    assert contents(url) == contents(shards)


def wait_for_news(url: str, process: subprocess.Popen) -> None:
    """Until one more file is in the store, or the process has ended."""
    before = set(open_store(url).names())
    deadline = time.monotonic() + 60
    while process.poll() is None and set(open_store(url).names()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_training_from_a_store_gives_the_same_losses_and_no_credential_is_written_anywhere(s3, shards, storage, capfd):
    wanted = losses(run_train(shards, storage, "from-folder"))
    result = run_train(copy(shards, f"{s3}/train"), storage, "from-s3")
    assert losses(result) == wanted
    said = "".join(capfd.readouterr())
    assert "step" in said
    written = [path for path in storage.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert KEYS[name] not in said
        assert not [path for path in written if KEYS[name].encode() in path.read_bytes()]


def test_a_run_that_was_begun_on_a_folder_goes_on_from_a_store_with_the_same_data(s3, shards, storage, capsys):
    run_train(shards, storage, "moved")
    run_train(copy(shards, f"{s3}/moved"), storage, "moved")
    assert "was finished before" in capsys.readouterr().out


def test_a_run_in_a_store_has_the_losses_of_one_in_a_folder_and_is_evaluated_there(s3, shards, storage, monkeypatch):
    wanted = run_train(shards, storage, "in-folder")
    with pytest.raises(NoTracking, match=r"s3://.*: MLflow's database cannot lie in an object store; start a server"):
        train.main("tiny", train_job(shards, f"{s3}/runs", "in-store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(storage))
    json_file = storage / "in-store.json"
    assert train.main("tiny", train_job(shards, f"{s3}/runs", "in-store", json=json_file)) == 0
    result = json.loads(json_file.read_text())
    assert result["run"] == f"{s3}/runs/in-store"
    assert losses(result) == losses(wanted)
    best = [load_best(place) for place in (storage / "in-folder", result["run"])]
    assert all(torch.equal(best[0].weights[name], best[1].weights[name]) for name in best[0].weights)

    scores = storage / "evaluation.json"
    evaluation = evaluate.Evaluate(run=result["run"], shards=str(shards), clips=2, views=1, json=scores)
    assert evaluate.main(evaluation) == 0
    place = json.loads(scores.read_text())["scores"]
    assert place == f"{s3}/runs/in-store/evaluations/test-2x1/scores.parquet"
    assert open_store(s3).read_file(place.removeprefix(f"{s3}/")).startswith(b"PAR1")
