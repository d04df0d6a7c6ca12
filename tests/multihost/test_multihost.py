"""Packing and training on machines that share nothing but a network: three Ray nodes, an S3 server, an MLflow server."""

import pytest
from hosts import RAY_PORT
from trainings import SHORT, losses, train_command

pytestmark = [pytest.mark.multihost(minutes=3), pytest.mark.timeout(1200)]


def test_two_machines_train_from_what_three_packed_to_the_losses_of_one_process(cluster, packed, alone):
    log, num_machines = packed
    assert "packed 24 videos" in log
    assert num_machines >= 2

    job = cluster.submit(train_command("two-machines", *SHORT, "--workers", "2"))
    cluster.wait_for_workers(job, hosts=2)
    assert cluster.wait(job) == "SUCCEEDED", cluster.logs(job)

    found = losses(cluster, "two-machines")
    assert sorted(found) == [2, 4, 6, 8, 10, 12]
    assert found == pytest.approx(alone(*SHORT), rel=1e-5)


def test_a_slow_link_that_loses_packets_changes_no_loss(cluster, packed, alone):
    for host in cluster.nodes:
        host.slow_link(10)
        host.lossy_link(5)
    job = cluster.submit(train_command("slow", *SHORT, "--workers", "2"))
    assert cluster.wait(job, seconds=300) == "SUCCEEDED", cluster.logs(job)
    assert losses(cluster, "slow") == pytest.approx(alone(*SHORT), rel=1e-5)


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
