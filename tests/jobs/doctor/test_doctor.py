"""The doctor as a command: on this machine, and on a real cluster of two nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from doctor_findings import SECRET, in_words

from jobs.commands import load
from jobs.doctor.examination import find_cluster

ROOT = Path(__file__).parents[3]
DOCTOR = load("doctor")


def test_this_machine_is_examined_without_ray_and_nothing_is_left_behind(examined, shards):
    output, result = examined.output, json.loads(examined.json.read_text())
    assert not ray.is_initialized()
    assert examined.status == (1 if result["errors"] else 0)
    assert "no Ray cluster found: only this machine is examined" in output
    for check in ("versions", "code", "GPUs", "DeepSpeed", "CPU cores", "Ray's disk", "storage", "shards", "MLflow"):
        assert re.search(rf"^(ok|warning) +{check} ", output, re.MULTILINE), output
    assert re.search(r"^1 machine: \d+ ok, \d+ warnings?, 0 errors$", output, re.MULTILINE), output
    assert list(examined.json.parent.iterdir()) == [examined.json]
    assert not list(shards.glob(".doctor*"))
    documented = (DOCTOR.description or "").split("FILE holds:")[1]
    assert all(key in documented for key in result)
    assert result["machines"][0]["versions"] == examined.facts.versions


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "jobs.doctor", "--storage", str(tmp_path / "runs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "looking for a Ray cluster ...\n"
    assert process.stdout.readline().startswith("examining this machine")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; run the same command again to go on\n"
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_is_an_error_and_only_this_machine_is_examined(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    address, [finding] = find_cluster()
    assert address is None
    assert "error cluster: no Ray cluster at RAY_ADDRESS=127.0.0.1:9" in in_words(finding)
    assert "ray start --head" in finding.fix


def test_a_negative_number_of_workers_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        DOCTOR.parse(["--workers", "-1"], "doctor")
    assert ended.value.code == 2
    assert "workers -1, cpus_per_worker 1: expected at least 0" in " ".join(capsys.readouterr().err.split())


NODES = """
import sys
from ray.cluster_utils import Cluster

folder = sys.argv[1]
common = {"num_cpus": 1, "object_store_memory": 80_000_000, "temp_dir": folder}
nodes = Cluster(initialize_head=True, head_node_args={**common, "gcs_server_port": 0, "include_dashboard": False})
nodes.add_node(**common)
print(nodes.address, flush=True)
sys.stdin.read()
nodes.shutdown()
"""


@contextmanager
def two_nodes() -> Iterator[dict[str, str]]:
    """Two Ray nodes with one CPU each on this machine, and a token; gives the environment of who uses them."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as a socket's path has 107 characters at most
    (Path(folder) / "ray").mkdir()
    environment = {
        **os.environ,
        "RAY_TMPDIR": folder,  # where the address of the last cluster is noted, for who asks for any
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": SECRET,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environment.pop("RAY_ADDRESS")
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, f"{folder}/ray"], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the nodes did not start"
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        process.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long(of="jobs/doctor")
def test_all_machines_of_a_real_cluster_are_examined_and_nothing_is_left(shards, tmp_path):
    json_file = tmp_path / "doctor.json"
    words = ["--shards", str(shards), "--storage", str(tmp_path / "runs"), "--workers", "2", "--json", str(json_file)]
    with two_nodes() as environment:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.doctor", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(json_file.read_text())
    assert len(result["machines"]) == 2
    levels = {finding["check"]: finding["level"] for finding in result["findings"] if finding["level"] != "warning"}
    for check in ("cluster", "versions", "code", "storage", "token", "process group", "clocks", "workers", "MLflow"):
        assert levels[check] == "ok", done.stdout
    assert re.search(r"gloo adds up tensors over 2 machines at [\d,]+ MB/s", done.stdout)
    assert SECRET not in done.stdout + done.stderr + json_file.read_text()
    assert list(tmp_path.iterdir()) == [json_file]
