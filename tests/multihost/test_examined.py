"""The doctor on three machines: well as they are, and what makes trainings fail there is found before one starts."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hosts import FOLDER, Cluster, Host, system
from trainings import SHARDS, STORAGE

pytestmark = [pytest.mark.multihost(minutes=3), pytest.mark.timeout(1200)]


def examine(cluster: Cluster, name: str, storage: str, env: dict[str, str] | None = None) -> tuple[str, str, dict]:
    """The job's status, what it said, and its JSON."""
    json_file = FOLDER / f"{name}.json"
    job = cluster.submit(
        ["python", "-m", "jobs.doctor", "--shards", SHARDS, "--storage", storage, "--workers", "3", "--json", str(json_file)], env
    )  # fmt: skip
    status = cluster.wait(job, seconds=300)
    return status, cluster.logs(job), json.loads(json_file.read_text())


def levels(result: dict) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in result["findings"]:
        found.setdefault(finding["check"], set()).add(finding["level"])
    return found


@contextmanager
def named_as_the_loopback(hosts: list[Host]) -> Iterator[None]:
    """As many systems are installed: the host's own name is 127.0.1.1 in /etc/hosts. Written in place, so that it is seen."""
    files = [Path("/etc/netns") / host.namespace / "hosts" for host in hosts]
    before = [file.read_text() for file in files]
    try:
        for host, file in zip(hosts, files, strict=True):
            file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
        yield
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)


@contextmanager
def own_disk_at(folder: Path, host: Host) -> Iterator[None]:
    """What the host's Ray node sees in a folder is its own: a disk that nobody else has is mounted there."""
    [raylet] = host.processes_titled("raylet/raylet")
    # `ray start` and all that it started have a mount namespace of their own, as `ip netns exec` gives each command.
    enter = ["nsenter", "--target", raylet, "--mount"]
    assert psutil.pid_exists(raylet)
    system(*enter, "mount", "-t", "tmpfs", "none", folder)
    try:
        yield
    finally:
        system(*enter, "umount", folder)


def test_three_machines_are_well(cluster, packed):
    status, log, result = examine(cluster, "doctor-well", STORAGE)
    assert status == "SUCCEEDED", log
    assert len(result["machines"]) == 3
    found = levels(result)
    for check in (
        "cluster",
        "versions",
        "code",
        "DeepSpeed",
        "storage",
        "interface",
        "process group",
        "clocks",
        "MLflow",
    ):
        assert "error" not in found[check], log
    assert re.search(r"gloo adds up tensors over 3 machines at [\d,]+ MB/s", log)
    assert cluster.token not in log + json.dumps(result)
    assert "never/to+be/seen+anywhere" not in log + json.dumps(result)


def test_host_names_that_resolve_to_the_loopback_and_a_folder_that_is_each_machines_own_are_found(cluster, packed):
    folder = FOLDER / "looks-shared"
    folder.mkdir()
    nothing_named = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": ""}
    with named_as_the_loopback(cluster.nodes), own_disk_at(folder, cluster.two):
        status, log, result = examine(cluster, "doctor-trapped", str(folder), nothing_named)
        assert not list(folder.glob(".doctor*"))
    assert status == "FAILED"

    errors = {finding["check"]: finding for finding in result["findings"] if finding["level"] == "error"}
    assert set(errors) == {"interface", "process group", "storage"}, log
    assert "its host name resolves to 127.0.1.1" in errors["interface"]["text"]
    assert "gloo cannot form one over 3 machines" in errors["process group"]["text"]
    for check in ("interface", "process group"):
        assert errors[check]["fix"].startswith("export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0")
    assert f"{folder} is not shared: " in errors["storage"]["text"]
    assert f"two ({cluster.two.address})" in errors["storage"]["text"]
    assert log.count("Traceback") == 0
