"""Facts of this machine, made bad one by one, are found, with how to fix them."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from doctor_findings import bad, in_words, with_second

from jobs.doctor.access_checks import check_access
from jobs.doctor.cluster_checks import check_room_here
from jobs.doctor.device import Trials, parse_output
from jobs.doctor.facts import OWN_PACKAGES, Devices, Disk, Gpu, ShardReading
from jobs.doctor.findings import GIB
from jobs.doctor.machine import code_digest
from jobs.doctor.machine_checks import (
    check_code,
    check_cores,
    check_engine,
    check_gpus,
    check_machines,
    check_open_files,
    check_shards,
    check_shared_memory,
    check_storage,
    check_temporary_disk,
    check_versions,
)


def test_two_machines_like_this_one_have_no_findings(two):
    assert not [in_words(each) for each in (*check_machines(two), *check_access(two)) if each.level != "ok"]


@pytest.mark.parametrize(
    ("package", "version", "expected"),
    [
        ("ray", "3.1.0", "<3,>=2.60"),
        ("mlflow", None, "<4,>=3.17"),
        ("av", "16.1.0", ">=17"),
        ("python", "3.10.4", ">=3.11"),
    ],
)
def test_a_package_outside_of_its_range_is_an_error_on_the_machine_that_has_it(two, package, version, expected):
    machines = with_second(two, versions={**two[1].versions, package: version})
    first = check_versions(machines)[0]
    assert f"error versions: {package} is {version or 'missing'} on two; expected {expected}" in in_words(first)
    assert "pip install" in first.fix or "Python 3.11" in first.fix


def test_versions_that_are_in_range_and_differ_are_an_error(two):
    machines = with_second(two, versions={**two[1].versions, "torch": "2.99.0"})
    finding = bad(check_versions(machines))
    assert f"torch differs: {two[0].versions['torch']} on one / 2.99.0 on two" in finding.text
    assert "pip install -c constraints.txt torch" in finding.fix


def test_builds_for_different_devices_are_a_warning(two):
    finding = bad(check_versions(with_second(two, cuda="13.0")))
    assert "warning versions: torch is built for different devices: CPUs on one / 13.0 on two" in in_words(finding)


def test_one_changed_byte_of_our_code_is_another_digest(two, tmp_path):
    for package in OWN_PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "part.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "jobs" / "__pycache__").mkdir()
    (tmp_path / "jobs" / "__pycache__" / "part.pyc").write_bytes(b"x")
    assert code_digest(tmp_path) == before
    (tmp_path / "jobs" / "part.py").write_text("x = 2\n")
    after = code_digest(tmp_path)
    finding = bad(check_code([replace(two[0], code=before), replace(two[1], code=after)]))
    assert f"differ: {before[:12]} on one / {after[:12]} on two" in finding.text
    assert "ray job submit --working-dir ." in finding.fix


def gpu_machine(count: int, error: str | None = None, **facts) -> Devices:
    gpu = Gpu(name="NVIDIA H100", memory_bytes=80 * GIB, error=None)
    return Devices(gpus=(*[gpu] * (count - 1), replace(gpu, error=error)), **facts)


def test_a_machine_without_gpus_trains_on_cpus(here):
    if here.devices.gpus:
        pytest.skip("this machine has GPUs")
    assert check_gpus([here])[0].text == "one: none, trains on CPUs"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"devices": gpu_machine(2, "CUDA error: ECC")}, r"error GPUs: one: GPU 1: CUDA error: ECC -> nvidia-smi"),
        ({"nvidia_gpus": 4}, r"warning GPUs: one has 4 GPUs .* built for CPUs -> pip install"),
        ({"nvidia_gpus": 4, "cuda": "13.0"}, r"error GPUs: .* sees 4 GPUs, torch .* 0 -> unset"),
        ({"devices": gpu_machine(1, compile_error="no gcc")}, r"warning GPUs: one: .*uncompiled.*no gcc.* -> apt-get"),
    ],
)
def test_gpus_that_cannot_be_used_are_named_with_how_to_fix_it(here, facts, words):
    machine = replace(here, **{"driver": "580.1", "cuda": None, "devices": Devices(), **facts})
    assert re.search(words, in_words(bad(check_gpus([machine]))))


def test_gpus_that_work_are_counted(here):
    machine = replace(here, devices=gpu_machine(8), nvidia_gpus=8, driver="580.1", cuda="13.0", cores=8)
    assert check_gpus([machine])[0].text == "one: 8 x NVIDIA H100, 80 GiB; driver 580.1, torch's CUDA 13.0"
    assert "8 to decode videos for 8 GPUs" in bad(check_cores([machine])).text


def test_the_devices_of_this_machine_can_train(here):
    assert here.devices.engine_error is None
    assert all(gpu.error is None for gpu in here.devices.gpus)


@pytest.mark.gpu
def test_a_gpu_multiplies_and_compiles():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    with Trials() as trials:
        devices = trials.result()
    assert devices.gpus
    assert devices == replace(devices, engine_error=None, compile_error=None)


def test_a_trial_that_dies_is_an_error_and_no_more(here):
    command = [sys.executable, "-c", "import os; print('half'); os.kill(os.getpid(), 11)"]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    devices = parse_output(died.returncode, died.stdout, died.stderr)
    finding = bad(check_engine([replace(here, devices=devices)]))
    assert "one: the trial ended with status -11" in finding.text
    assert "python -m jobs.doctor.device" in finding.fix


def test_little_shared_memory_few_open_files_and_a_full_disk_are_found(here):
    small = Disk(path="/dev/shm", total_bytes=64 * 2**20, free_bytes=64 * 2**20)
    assert "64 MiB" in bad(check_shared_memory([replace(here, shared_memory=small)])).text
    assert "ulimit -n 65536" in bad(check_open_files([replace(here, open_files=1024, open_files_hard=10**6)])).fix
    assert "limits.conf" in bad(check_open_files([replace(here, open_files=1024, open_files_hard=1024)])).fix
    for free, level in ((2, "error"), (9, "warning")):
        disk = Disk(path="/tmp/ray", total_bytes=100 * GIB, free_bytes=free * GIB)
        finding = bad(check_temporary_disk([replace(here, temporary=disk)]))
        assert finding.level == level
        assert "--temp-dir" in finding.fix


def test_shards_that_differ_or_are_slow_are_found(two):
    reading = two[0].reading
    assert reading is not None
    finding = bad(check_shards(with_second(two, reading=replace(reading, digest="f" * 64))))
    assert f"dataset.json {str(reading.digest)[:12]} on one / ffffffffffff on two" in finding.text
    slow = ShardReading(
        digest=reading.digest, shard="a.tar", first_byte_seconds=0.2, read_bytes=16 * 2**20, bytes_per_second=2e6
    )
    assert "200 ms to the first byte, 2 MB/s of a.tar" in bad(check_shards(with_second(two, reading=slow))).text


def test_little_room_in_the_storage_is_a_warning(here):
    disk = Disk(path="/data/runs", total_bytes=100 * GIB, free_bytes=GIB)
    assert "1.0 GiB free in /data/runs" in bad(check_storage([replace(here, storage=disk)])).text


def test_workers_that_do_not_fit_on_this_machine_are_an_error(here):
    assert f"--workers {here.cores}" in bad(check_room_here(here.cores + 1, 1, here)).fix
    assert check_room_here(here.cores, 1, here)[0].level == "ok"
    assert "2 GPUs" in bad(check_room_here(3, 1, replace(here, devices=gpu_machine(2)))).text
    assert not check_room_here(0, 1, here)
