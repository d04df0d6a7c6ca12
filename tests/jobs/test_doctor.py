"""The doctor: facts of this real machine, made bad one by one, are found and told with the line that mends them."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow_servers import Server
from servers import RangeServer, s3_server

import jobs.doctor.machine as doctor_machine
import shards.store as stores
from jobs.doctor import __main__ as doctor
from jobs.doctor import access as doctor_access
from jobs.doctor import findings as doctor_findings
from jobs.doctor.__main__ import Doctor
from jobs.doctor.cluster import Joined, Together, names_of
from jobs.doctor.device import Devices, Gpu, Trial, from_output
from jobs.doctor.findings import GIB, Finding
from jobs.doctor.machine import (
    Disk,
    Facts,
    Order,
    Reading,
    Token,
    absolute_order,
    gather,
    read_shards,
    token,
    try_storage,
)
from jobs.doctor.together import judge_clocks, judge_groups, judge_members, judge_storage
from jobs.doctor.tracking import Tracking, ask_tracking, judge_tracking, without_password

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Examined:
    """What the command said of this machine, and what it had gathered."""

    status: int
    output: str
    json: Path
    facts: Facts


@pytest.fixture(scope="module")
def examined(shards, tmp_path_factory) -> Examined:
    folder, gathered, output = tmp_path_factory.mktemp("examined"), [], io.StringIO()

    def gather_and_note(order: Order) -> Facts:
        gathered.append(gather(order))
        return gathered[0]

    job = Doctor(shards=str(shards), storage=str(folder / "not" / "yet" / "runs"), json=folder / "doctor.json")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(doctor, "gather", gather_and_note)
        status = doctor.main(job)
    return Examined(status, output.getvalue(), folder / "doctor.json", gathered[0])


@pytest.fixture(scope="module")
def here(examined) -> Facts:
    """This machine as it is, but for its name, and its token, which is another one on each."""
    no_token = Token(mode="unset", place=None, file_mode=None, digest=None)
    return replace(examined.facts, name="one", address="10.0.0.1", token=no_token)


@pytest.fixture
def two(here) -> list[Facts]:
    """Two machines that could train together."""
    named = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return [
        replace(here, named_interfaces=named),
        replace(here, name="two", address="10.0.0.2", named_interfaces=named),
    ]


@pytest.fixture
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(doctor_machine, "PATIENCE_SECONDS", 0.3)


def changed(two: list[Facts], **facts) -> list[Facts]:
    """The second machine is otherwise than the first."""
    return [two[0], replace(two[1], **facts)]


def bad(findings: list[Finding]) -> Finding:
    """The only one that is not ok."""
    [finding] = [finding for finding in findings if finding.level != "ok"]
    assert finding.mend
    return finding


def told(finding: Finding) -> str:
    return f"{finding.level} {finding.check}: {finding.text} -> {finding.mend}"


# The whole command


def test_this_machine_is_examined_without_ray_and_nothing_is_left_behind(examined, shards):
    output, result = examined.output, json.loads(examined.json.read_text())
    assert not ray.is_initialized()
    assert examined.status == (1 if result["wrong"] else 0)
    assert "no Ray cluster was found: this machine alone is examined" in output
    for check in ("versions", "code", "GPUs", "DeepSpeed", "CPU cores", "Ray's disk", "storage", "shards", "MLflow"):
        assert re.search(rf"^(ok|warning) +{check} ", output, re.MULTILINE), output
    assert re.search(r"^1 machine: \d+ ok, \d+ to think of, 0 wrong$", output, re.MULTILINE), output
    assert list(examined.json.parent.iterdir()) == [examined.json]
    assert not list(shards.glob(".doctor*"))
    documented = (doctor.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in result)
    assert result["machines"][0]["versions"] == examined.facts.versions


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "jobs.doctor", "--storage", str(tmp_path / "runs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "looking for a Ray cluster ...\n"
    assert process.stdout.readline().startswith("looking at this machine")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; run the same command again to go on\n"
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_is_wrong_and_this_machine_is_examined_all_the_same(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    address, [finding] = doctor.find_cluster()
    assert address is None
    assert "wrong cluster: no Ray cluster at RAY_ADDRESS=127.0.0.1:9" in told(finding)
    assert "ray start --head" in finding.mend


def test_workers_that_this_machine_has_no_room_for_are_wrong(here):
    job = Doctor(workers=here.cores + 1)
    assert f"--workers {here.cores}" in bad(doctor.room_here(job, here)).mend
    assert doctor.room_here(replace(job, workers=here.cores), here)[0].level == "ok"
    assert "2 GPUs" in bad(doctor.room_here(replace(job, workers=3), replace(here, devices=gpu_machine(2)))).text


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="workers -1"):
        Doctor(workers=-1)


# Packages and code


def test_two_machines_as_this_one_are_well(two):
    assert not [
        told(each) for each in (*doctor_findings.judge(two), *doctor_access.judge_access(two)) if each.level != "ok"
    ]


@pytest.mark.parametrize(
    ("package", "version", "wanted"),
    [
        ("ray", "3.1.0", "<3,>=2.60"),
        ("mlflow", None, "<4,>=3.17"),
        ("av", "16.1.0", ">=17"),
        ("python", "3.10.4", ">=3.11"),
    ],
)
def test_a_package_outside_of_its_range_is_wrong_on_the_machine_that_has_it(two, package, version, wanted):
    machines = changed(two, versions={**two[1].versions, package: version})
    first = doctor_findings.versions(machines)[0]
    assert f"wrong versions: {package} is {version or 'not there'} on two; wanted {wanted}" in told(first)
    assert "pip install" in first.mend or "Python 3.11" in first.mend


def test_versions_that_are_in_range_and_differ_are_wrong(two):
    machines = changed(two, versions={**two[1].versions, "torch": "2.99.0"})
    finding = bad(doctor_findings.versions(machines))
    assert f"torch differs: {two[0].versions['torch']} on one / 2.99.0 on two" in finding.text
    assert "pip install -c constraints.txt torch" in finding.mend


def test_builds_for_different_devices_are_a_warning(two):
    finding = bad(doctor_findings.versions(changed(two, cuda="13.0")))
    assert "warning versions: torch is built for different devices: CPUs on one / 13.0 on two" in told(finding)


def test_one_changed_byte_of_our_code_is_another_digest(two, tmp_path):
    for package in doctor_machine.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "part.py").write_text("x = 1\n")
    before = doctor_machine.code_digest(tmp_path)
    (tmp_path / "jobs" / "__pycache__").mkdir()
    (tmp_path / "jobs" / "__pycache__" / "part.pyc").write_bytes(b"x")
    assert doctor_machine.code_digest(tmp_path) == before
    (tmp_path / "jobs" / "part.py").write_text("x = 2\n")
    after = doctor_machine.code_digest(tmp_path)
    finding = bad(doctor_findings.code([replace(two[0], code=before), replace(two[1], code=after)]))
    assert f"differ: {before[:12]} on one / {after[:12]} on two" in finding.text
    assert "ray job submit --working-dir ." in finding.mend


# Devices


def gpu_machine(count: int, error: str | None = None, **facts) -> Devices:
    gpu = Gpu(name="NVIDIA H100", memory_bytes=80 * GIB, error=None)
    return Devices(gpus=(*[gpu] * (count - 1), replace(gpu, error=error)), **facts)


def test_a_machine_without_gpus_is_named_as_one_that_trains_on_cpus(here):
    if here.devices.gpus:
        pytest.skip("this machine has GPUs")
    assert doctor_findings.gpus([here])[0].text == "one: none, trains on CPUs"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"devices": gpu_machine(2, "CUDA error: ECC")}, r"wrong GPUs: one: GPU 1: CUDA error: ECC -> nvidia-smi"),
        ({"nvidia_gpus": 4}, r"warning GPUs: one has 4 GPUs .* built for CPUs -> pip install"),
        ({"nvidia_gpus": 4, "cuda": "13.0"}, r"wrong GPUs: .* tells of 4 GPUs, torch .* sees 0 -> unset"),
        ({"devices": gpu_machine(1, fused="no gcc")}, r"warning GPUs: one: .*uncompiled.*no gcc.* -> apt-get"),
    ],
)
def test_gpus_that_cannot_be_used_are_named_with_the_way_out(here, facts, words):
    assert re.search(
        words,
        told(
            bad(
                doctor_findings.gpus(
                    [replace(here, **{"driver": "580.1", "cuda": None, "devices": Devices(), **facts})]
                )
            )
        ),
    )


def test_gpus_that_work_are_counted(here):
    machine = replace(here, devices=gpu_machine(8), nvidia_gpus=8, driver="580.1", cuda="13.0", cores=8)
    assert doctor_findings.gpus([machine])[0].text == "one: 8 x NVIDIA H100, 80 GiB; driver 580.1, torch's CUDA 13.0"
    assert "8 for 8 GPUs" in bad(doctor_findings.cpus([machine])).text


def test_the_devices_of_this_machine_can_train(here):
    assert here.devices.engine is None
    assert all(gpu.error is None for gpu in here.devices.gpus)


@pytest.mark.gpu
def test_a_gpu_multiplies_and_compiles():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    with Trial() as trial:
        devices = trial.result()
    assert devices.gpus
    assert devices == replace(devices, engine=None, fused=None)


def test_a_trial_that_dies_takes_nobody_along(here):
    command = [sys.executable, "-c", "import os; print('half'); os.kill(os.getpid(), 11)"]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    devices = from_output(died.returncode, died.stdout, died.stderr)
    finding = bad(doctor_findings.engine([replace(here, devices=devices)]))
    assert "one: the trial ended with status -11" in finding.text
    assert "python -m jobs.doctor.device" in finding.mend


# Limits


def test_little_shared_memory_few_open_files_and_a_full_disk_are_told(here):
    small = Disk(path="/dev/shm", total_bytes=64 * 2**20, free_bytes=64 * 2**20)
    assert "64 MiB" in bad(doctor_findings.shared_memory([replace(here, shared_memory=small)])).text
    assert (
        "ulimit -n 65536"
        in bad(doctor_findings.open_files([replace(here, open_files=1024, open_files_most=10**6)])).mend
    )
    assert "limits.conf" in bad(doctor_findings.open_files([replace(here, open_files=1024, open_files_most=1024)])).mend
    for free, level in ((2, "wrong"), (9, "warning")):
        disk = Disk(path="/tmp/ray", total_bytes=100 * GIB, free_bytes=free * GIB)
        finding = bad(doctor_findings.temporary_disk([replace(here, temporary=disk)]))
        assert finding.level == level
        assert "--temp-dir" in finding.mend


# Storage and shards


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may write anywhere; what others may is seen as one of them."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_wrong_with_its_name(here, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    with as_another_user():
        error = try_storage(absolute_order(str(folder), None, "x"))
    assert error is not None
    finding = bad(doctor_findings.storage([replace(here, storage_error=error)]))
    assert re.search(r"one: writing: .*runs.*: Permission denied", finding.text)
    assert finding.mend.startswith("mkdir -p ")


def test_a_store_refuses_a_wrong_key_and_no_key_is_shown(here, hasty):
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        assert try_storage(absolute_order(f"{url}/runs", None, "x")) is None
        assert not stores.open_store(f"{url}/runs").names()
        asked_from_now_on(os.environ["AWS_ENDPOINT_URL"], "0")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        stores.ObjectStore("s3", url).fs.clear_instance_cache()
        try:
            error = try_storage(absolute_order(f"{url}/runs", None, "x"))
        finally:
            asked_from_now_on(os.environ["AWS_ENDPOINT_URL"], "inf")
    assert error is not None
    finding = bad(doctor_findings.storage([replace(here, storage=None, storage_error=error)]))
    assert "writing" in finding.text
    assert "AWS_SECRET_ACCESS_KEY" in finding.mend
    assert SECRET not in told(finding)


def asked_from_now_on(endpoint: str, after: str) -> None:
    """Moto asks for a key that it knows after so many requests."""
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", data=after.encode(), headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()


def test_a_web_server_is_no_storage(hasty, tmp_path):
    with RangeServer(tmp_path) as server:
        error = try_storage(absolute_order(server.url, None, "x"))
    assert error is not None
    assert "a web server cannot be written to" in error


def test_shards_are_read_over_the_network_and_a_server_that_is_away_is_wrong(here, shards, hasty):
    with RangeServer(shards, delay_seconds=0.05) as server:
        far = read_shards(server.url)
    assert far.error is None
    assert here.reading is not None
    assert far.digest == here.reading.digest
    assert far.first_byte_seconds >= 0.05
    away = read_shards("http://127.0.0.1:9/shards")
    finding = bad(doctor_findings.shards([replace(here, reading=away)]))
    assert finding.level == "wrong"
    assert "dataset.json" in finding.text


def test_a_folder_without_shards_is_wrong_and_says_what_is_missing(here, tmp_path, hasty):
    finding = bad(doctor_findings.shards([replace(here, reading=read_shards(str(tmp_path)))]))
    assert "dataset.json: not found" in finding.text


def test_shards_that_differ_or_are_slow_are_told(two):
    reading = two[0].reading
    assert reading is not None
    finding = bad(doctor_findings.shards(changed(two, reading=replace(reading, digest="f" * 64))))
    assert f"dataset.json {str(reading.digest)[:12]} on one / ffffffffffff on two" in finding.text
    slow = Reading(
        digest=reading.digest, shard="a.tar", first_byte_seconds=0.2, read_bytes=16 * 2**20, bytes_per_second=2e6
    )
    assert "200 ms to the first byte, 2 MB/s of a.tar" in bad(doctor_findings.shards(changed(two, reading=slow))).text


def test_a_storage_that_is_each_machines_own_is_wrong(here):
    together = Together(silent={}, clocks={}, clocks_within={}, unseen={"two": ("one",)}, groups={})
    finding = bad(judge_storage(together, "/data/runs"))
    assert "/data/runs is not shared: two does not see what one wrote" in finding.text
    assert "network folder" in finding.mend
    assert not judge_storage(replace(together, unseen={}), "/data/runs")


def test_little_room_in_the_storage_is_a_warning(here):
    disk = Disk(path="/data/runs", total_bytes=100 * GIB, free_bytes=GIB)
    assert "1.0 GiB free in /data/runs" in bad(doctor_findings.storage([replace(here, storage=disk)])).text


# The token


def write_token(home: Path, mode: int, content: str = SECRET) -> Token:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return token({"RAY_AUTH_MODE": "token"}, home, "salt")


def test_a_token_that_others_can_read_is_told_with_the_line_that_mends_it(here, tmp_path):
    finding = bad(doctor_access.token([replace(here, token=write_token(tmp_path, 0o644))]))
    assert f"{tmp_path}/.ray/auth_token can be read by others (mode 644)" in finding.text
    subprocess.run(finding.mend.split(), check=True)
    assert not doctor_access.token([replace(here, token=token({}, tmp_path, "salt"))])


def test_a_token_is_compared_and_never_shown(tmp_path):
    found = write_token(tmp_path, 0o600)
    assert SECRET not in repr(found)
    assert hashlib.sha256(SECRET.encode()).hexdigest() not in repr(found)
    assert found.digest == token({"RAY_AUTH_TOKEN": SECRET}, tmp_path / "nowhere", "salt").digest
    assert found.digest != token({"RAY_AUTH_TOKEN": SECRET}, tmp_path / "nowhere", "pepper").digest
    path = tmp_path / "elsewhere"
    path.write_text(f"{SECRET}\n")
    assert token({"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path / "nowhere", "salt").digest == found.digest


def test_a_machine_with_another_token_or_none_is_wrong(two, tmp_path):
    ours = write_token(tmp_path, 0o600)
    other = write_token(tmp_path, 0o600, SECRET[::-1])
    with_ours = [replace(each, token=ours) for each in two]
    assert doctor_access.token(with_ours) == []
    assert doctor_access.authentication(with_ours)[0].level == "ok"
    assert "not the same everywhere: one / two" in bad(doctor_access.token(changed(with_ours, token=other))).text
    none = token({}, tmp_path / "nowhere", "salt")
    assert "there is none on two" in bad(doctor_access.token(changed(with_ours, token=none))).text


def test_a_cluster_without_authentication_is_wrong_where_others_reach_it(two):
    assert "wrong token: Ray asks for none: whoever reaches 10.0.0.1" in told(bad(doctor_access.authentication(two)))
    alone = [replace(two[0], address="127.0.0.1")]
    finding = bad(doctor_access.authentication(alone))
    assert finding.level == "warning"
    assert "ray get-auth-token --generate" in finding.mend


# The network


@pytest.mark.parametrize(
    ("address", "resolves"), [("127.0.1.1", "resolves to 127.0.1.1"), (None, "resolves to nothing")]
)
def test_a_host_name_that_resolves_to_the_loopback_is_wrong_unless_an_interface_is_named(two, address, resolves):
    interfaces = {"lo": ("127.0.0.1",), "ens5": ("10.0.0.2",)}
    trapped = changed(two, host_address=address, named_interfaces={}, interfaces=interfaces)
    finding = bad(doctor_access.interface(trapped))
    assert (
        f"two: its host name {resolves}, so gloo would offer that to the other machines, not 10.0.0.2" in finding.text
    )
    assert "export GLOO_SOCKET_IFNAME=ens5 NCCL_SOCKET_IFNAME=ens5" in finding.mend
    named = changed(trapped, named_interfaces={"GLOO_SOCKET_IFNAME": "ens5"})
    assert doctor_access.interface(named)[0].level == "ok"


def test_an_interface_that_is_named_and_not_there_is_wrong(two):
    finding = bad(
        doctor_access.interface(
            changed(two, named_interfaces={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0,ib1"})
        )
    )
    assert "two: NCCL_SOCKET_IFNAME=ib0,ib1, and there is no such interface" in finding.text
    assert doctor_access.interface(
        changed(two, named_interfaces={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^lo"})
    )


def test_a_real_group_that_cannot_form_is_told_with_the_interface(two):
    """gloo itself, told to use an interface that this machine does not have."""
    script = "import jobs.doctor.cluster as c; print(c.join('gloo', '127.0.0.1:0', 0, 1, 5.0))"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "nosuch0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    match = re.fullmatch(r"Joined\(error=(?:'|\")(.+)(?:'|\"), bytes_per_second=0.0\)", done.stdout.strip())
    assert match, done.stdout + done.stderr
    assert "nosuch0" in match[1]
    together = Together(
        silent={},
        clocks={},
        clocks_within={},
        unseen={},
        groups={"gloo": {"one": Joined(error=match[1]), "two": Joined()}},
    )
    finding = bad(judge_groups(two, together))
    assert f"gloo forms none over 2 machines (one: {match[1]}" in finding.text


def test_a_group_that_fails_where_a_host_name_resolves_to_the_loopback_names_the_interface(two):
    trapped = changed(two, named_interfaces={}, host_address="127.0.0.1", interfaces={"eth7": ("10.0.0.2",)})
    joined = {"one": Joined(bytes_per_second=1e9), "two": Joined(error="connectFullMesh failed")}
    together = Together(silent={}, clocks={}, clocks_within={}, unseen={}, groups={"gloo": joined})
    assert "GLOO_SOCKET_IFNAME=eth7" in bad(judge_groups(trapped, together)).mend
    slow = replace(together, groups={"gloo": {name: Joined(bytes_per_second=1e6) for name in joined}})
    assert "warning process group: gloo adds up tensors over 2 machines at 1 MB/s" in told(bad(judge_groups(two, slow)))


def test_machines_that_do_not_answer_are_named(two):
    together = Together(
        silent={"three": "ModuleNotFoundError: No module named 'jobs'"},
        clocks={},
        clocks_within={},
        unseen={},
        groups={},
    )
    finding = bad(judge_members(two, together))
    assert "three is alive for Ray and did not answer: ModuleNotFoundError" in finding.text
    assert "ray job submit --working-dir ." in finding.mend


@pytest.mark.parametrize(("ahead", "level"), [(0.1, "ok"), (-30.0, "warning"), (1000.0, "wrong")])
def test_clocks_that_differ_are_told(ahead, level):
    together = Together(
        silent={}, clocks={"one": 0.0, "two": ahead}, clocks_within={"one": 0.001, "two": 0.5}, unseen={}, groups={}
    )
    [finding] = judge_clocks(together)
    assert finding.level == level
    assert level == "ok" or f"two is {ahead:+.1f} s off" in finding.text


def test_a_port_that_others_reach_is_a_warning_and_one_on_the_loopback_is_not(here):
    for host, level in (("0.0.0.0", "warning"), ("127.0.0.1", "ok")):
        with socket.socket() as server:
            server.bind((host, 0))
            server.listen()
            port = server.getsockname()[1]
            facts = replace(here, listening=doctor_machine.listening())
            [finding] = doctor_access.dashboard([facts], f"127.0.0.1:{port}")
        assert finding.level == level
    assert "ssh -L" in bad(doctor_access.dashboard([replace(here, listening={8265: ("::",)})], "10.0.0.1:8265")).mend


def test_nodes_of_one_host_have_names_of_their_own():
    node = {"NodeManagerHostname": "h", "NodeManagerAddress": "10.0.0.1"}
    other = {"NodeManagerHostname": "i", "NodeManagerAddress": "10.0.0.2"}
    names = names_of([{**node, "NodeID": "abcdef01"}, {**node, "NodeID": "012345ff"}, {**other, "NodeID": "9"}])
    assert names == ["h (10.0.0.1, node abcdef)", "h (10.0.0.1, node 012345)", "i (10.0.0.2)"]


# MLflow


def test_a_server_that_is_away_is_wrong_at_once(here, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    finding = bad(judge_tracking(ask_tracking(str(tmp_path)), [here]))
    assert "wrong MLflow: http://127.0.0.1:9: no server answers there" in told(finding)
    assert "mlflow server" in finding.mend


def test_a_database_is_not_made_by_looking_and_a_damaged_one_is_wrong(here, tmp_path):
    assert judge_tracking(ask_tracking(str(tmp_path)), [here])[0].level == "ok"
    assert not list(tmp_path.iterdir())
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    finding = bad(judge_tracking(ask_tracking(str(tmp_path)), [here]))
    assert "file is not a database" in finding.text
    assert "restore the file" in finding.mend


def test_an_object_store_without_a_server_is_wrong(here):
    finding = bad(judge_tracking(ask_tracking("s3://bucket/runs"), [here]))
    assert "MLflow's database cannot lie in an object store" in finding.text


def test_a_password_in_the_address_is_not_shown():
    assert without_password(f"http://me:{SECRET}@host:5000/x") == "http://host:5000/x"
    assert without_password("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_a_server_elsewhere_that_asks_nobody_for_a_password_is_a_warning(here):
    open_one = Tracking(uri="http://mlflow.example:5000", open_to_all=True, address="10.0.0.9")
    assert "--app-name basic-auth" in bad(judge_tracking(open_one, [here])).mend
    clear = Tracking(uri="http://mlflow.example:5000", password_sent=True, address="10.0.0.9")
    assert "gets our password unencrypted" in bad(judge_tracking(clear, [here])).text
    assert judge_tracking(replace(clear, uri="https://mlflow.example"), [here])[0].level == "ok"


class OpenServer(Server):
    """An `mlflow server` that listens at all addresses, or asks for a password, as its options say."""

    def __init__(self, folder: Path, *options: str, **environment: str):
        super().__init__(folder)
        self.options, self.environment = options, environment

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", f"{self.port}", "--workers", "1", *self.options,
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", f"{self.folder}/artifacts",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )


@pytest.mark.long
def test_a_server_on_this_machine_is_a_warning_where_others_reach_it_and_it_asks_for_no_password(
    here, tmp_path, monkeypatch
):
    server = OpenServer(tmp_path, "--host", "0.0.0.0")
    try:
        server.ready()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        tracking = ask_tracking(str(tmp_path))
        assert tracking == Tracking(uri=server.url, open_to_all=True, address="127.0.0.1")
        reached = replace(here, listening=doctor_machine.listening())
        finding = bad(judge_tracking(tracking, [reached]))
        assert (
            f"asks for no password, can be reached from other machines: one listens at 0.0.0.0:{server.port}"
            in finding.text
        )
        assert f"--host 127.0.0.1 --port {server.port}" in finding.mend
        assert MlflowClient(server.url).search_runs(["0"]) == []
    finally:
        server.kill()
    loopback = replace(here, listening={server.port: ("127.0.0.1",)})
    assert told(judge_tracking(tracking, [loopback])[0]) == f"ok MLflow: {server.url} (answers) -> "


@pytest.mark.long
def test_a_server_with_a_login_lets_in_who_has_the_password(here, tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="MLflow's login wants it: pip install 'mlflow[auth]'")
    keys = {"MLFLOW_AUTH_ADMIN_PASSWORD": SECRET, "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET[::-1]}
    server = OpenServer(tmp_path, "--host", "0.0.0.0", "--app-name", "basic-auth", **keys)
    try:
        server.ready()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        finding = bad(judge_tracking(ask_tracking(str(tmp_path)), [here]))
        assert f"wrong MLflow: {server.url} does not let us in -> export MLFLOW_TRACKING_USERNAME" in told(finding)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        tracking = ask_tracking(str(tmp_path))
        facts = replace(here, listening=doctor_machine.listening())
        assert [each.level for each in judge_tracking(tracking, [facts])] == ["ok"]
        assert not tracking.open_to_all
        assert SECRET not in repr(tracking)
    finally:
        server.kill()


# A real cluster


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


@pytest.mark.long
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
