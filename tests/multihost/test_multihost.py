"""Packing and training on machines that share nothing but a network: three Ray nodes, an S3 server, an MLflow server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import BUCKET, FOLDER, RAY_PORT, ROOT, Cluster, why_not
from mlflow import MlflowClient

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(600)]

SHARDS = f"s3://{BUCKET}/shards"
STORAGE = f"{FOLDER}/runs"  # of all runs on the cluster
RECIPE = [
    "demo",
    "--clips.size",
    "20",
    "--num-steps",
    "12",
    "--global-batch",
    "4",
    "--val-every",
    "6",
    "--log-every",
    "2",
]


@pytest.fixture(scope="module")
def machines() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(machines: Cluster) -> Iterator[Cluster]:
    """Whole before each test, whatever the one before did to it."""
    yield machines
    machines.heal()


@pytest.fixture(scope="module")
def packed(machines: Cluster, videos: Path) -> str:
    """The log of the job that packed the videos into SHARDS."""
    job = machines.submit([
        "python", "-m", "jobs.make_shards", "--out", SHARDS, "--width", "40", "--height", "40", "--videos-per-shard", "5",
        "--workers", "3", "folder", "--videos", str(videos), "--val-share", "0.17", "--test-share", "0.17",
    ])  # fmt: skip
    assert machines.wait(job) == "SUCCEEDED", machines.logs(job)
    return machines.logs(job)


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """step -> training loss, of the training in one process that reads the same videos from a folder."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "jobs.train", *RECIPE, "--shards", str(shards), "--storage", str(folder)]
    subprocess.run(
        [*command, "--cpus-per-worker", "1", "--json", str(folder / "result.json")],
        cwd=ROOT, check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    return losses(f"sqlite:///{folder}/mlflow.db", folder / "result.json")


def train_command(name: str) -> list[str]:
    return [
        "python", "-m", "jobs.train", *RECIPE, "--shards", SHARDS, "--storage", STORAGE, "--name", name,
        "--workers", "2", "--json", f"{FOLDER}/{name}.json",
    ]  # fmt: skip


def losses(tracking_uri: str, result: Path) -> dict[int, float]:
    """step -> training loss, as MLflow has it."""
    run_id = json.loads(result.read_text())["mlflow_run_id"]
    history = MlflowClient(tracking_uri).get_metric_history(run_id, "train/loss")
    return {metric.step: metric.value for metric in history}


def test_two_machines_train_from_what_three_packed_to_the_losses_of_one_process(cluster, packed, alone):
    assert "packed 24 videos" in packed
    assert cluster.machines_of_tasks("pack_shard") >= 2

    job = cluster.submit(train_command("two-machines"))
    cluster.wait_for_workers(job, hosts=2)
    assert cluster.wait(job) == "SUCCEEDED", cluster.logs(job)

    found = losses(cluster.tracking_file, FOLDER / "two-machines.json")
    assert sorted(found) == [2, 4, 6, 8, 10, 12]
    assert found == pytest.approx(alone, rel=1e-5)


def test_a_slow_link_that_loses_packets_changes_no_loss(cluster, packed, alone):
    for host in cluster.nodes:
        host.slow_link(10)
        host.lossy_link(5)
    job = cluster.submit(train_command("slow"))
    assert cluster.wait(job, seconds=300) == "SUCCEEDED", cluster.logs(job)
    assert losses(cluster.tracking_file, FOLDER / "slow.json") == pytest.approx(alone, rel=1e-5)


def test_a_machine_without_the_token_does_not_get_in_and_the_cluster_goes_on(cluster):
    members, stranger = cluster.alive(), cluster.add_host("stranger")
    join = [
        "ray", "start", "--address", f"{cluster.head.address}:{RAY_PORT}", "--node-ip-address", stranger.address,
        "--temp-dir", f"{stranger.folder}/ray",
    ]  # fmt: skip
    soon = {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # it is told no as often as this; 20 times by default, one a second

    none = stranger.run(join, soon, check=False)
    assert none.returncode == 1
    assert "Token authentication is enabled but no authentication token was found" in none.stdout

    refused = "InvalidAuthToken: Authentication token is missing or incorrect"
    silent = stranger.run(join, {**soon, "RAY_AUTH_MODE": "disabled"}, check=False)
    assert silent.returncode == 1
    assert refused in silent.stdout

    wrong = stranger.run(join, {**soon, "RAY_AUTH_TOKEN": "0" * 64}, check=False)
    assert wrong.returncode == 1
    assert refused in wrong.stdout

    assert cluster.alive() == members
    job = cluster.submit(["python", "-c", "import jobs; print('the code is in', jobs.__path__)"])
    assert cluster.wait(job) == "SUCCEEDED", cluster.logs(job)
    assert "/runtime_resources/working_dir_files/" in cluster.logs(job)  # shipped, not that of this folder


def test_a_machine_that_dies_is_missed_and_welcome_again(cluster):
    cluster.one.kill()
    cluster.wait_for_nodes(2)
    assert cluster.one.address not in cluster.alive()
    cluster.one.start()
    cluster.wait_for_nodes(3)
