"""An evaluation's videos are decoded by machines without GPUs, also when one of them dies."""

import json
from collections.abc import Iterator

import pytest
from hosts import FOLDER, Cluster, Host
from trainings import SHARDS, STORAGE, train_command

pytestmark = [pytest.mark.multihost(minutes=3), pytest.mark.timeout(1200)]


@pytest.fixture
def with_gpu(cluster: Cluster) -> Iterator[Host]:
    """A node that says that it has a GPU."""
    host = cluster.one
    host.kill()
    cluster.wait_for_nodes(2)
    host.start(gpus=1)
    cluster.wait_for_nodes(3)
    yield host
    host.kill()  # Cluster.heal starts it again, without


def evaluate(cluster: Cluster, name: str, *options: str) -> str:
    """The job of an evaluation of all videos for training."""
    return cluster.submit([
        "python", "-m", "jobs.evaluate", "--run", f"{STORAGE}/decoded", "--shards", SHARDS, "--split", "train", "--views", "5",
        "--gpus", "False", "--cpus-per-worker", "1", "--json", str(FOLDER / f"{name}.json"), *options,
    ])  # fmt: skip


def result(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_machines_without_gpus_decode_and_what_one_had_when_it_died_is_decoded_again(cluster, packed, with_gpu):
    trained = cluster.submit(train_command("decoded", "--num-steps", "4", "--val-every", "4", "--gpus", "False"))
    assert cluster.wait(trained) == "SUCCEEDED", cluster.logs(trained)

    here = evaluate(cluster, "here")
    assert cluster.wait(here) == "SUCCEEDED", cluster.logs(here)
    assert "decoded_at" not in result("here")

    away = evaluate(cluster, "away", "--decoders", "2")
    assert cluster.wait(away) == "SUCCEEDED", cluster.logs(away)
    places = result("away")["decoded_at"]
    assert set(places) == {cluster.head.address, cluster.two.address}, places  # the one with a GPU had nothing to do
    assert sum(places.values()) == result("here")["videos"]

    died = evaluate(cluster, "died", "--decoders", "2")
    cluster.wait_in(
        died,
        lambda: bool(cluster.two.processes_titled("ray::decode")),
        60,
        "a video is decoded on the machine that is to die",
    )
    cluster.two.kill()
    assert cluster.wait(died) == "SUCCEEDED", cluster.logs(died)

    for name in ("away", "died"):
        assert {key: result(name)[key] for key in ("videos", "loss", "top1", "per_class", "per_level")} == {
            key: result("here")[key] for key in ("videos", "loss", "top1", "per_class", "per_level")
        }
