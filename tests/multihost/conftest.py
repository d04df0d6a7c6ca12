"""One cluster for all tests on several machines, the videos packed on it, and what an undisturbed training gives."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hosts import ROOT, Cluster, why_not
from trainings import RECIPE, SHARDS, losses_in


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def packed(machines: Cluster, videos: Path) -> tuple[str, int]:
    """The log of the job that packed the videos into SHARDS, and on how many machines it did so."""
    job = machines.submit([
        "python", "-m", "jobs.make_shards", "--out", SHARDS, "--width", "40", "--height", "40", "--videos-per-shard", "5",
        "--workers", "3", "folder", "--videos", str(videos), "--val-fraction", "0.17", "--test-fraction", "0.17",
    ])  # fmt: skip
    assert machines.wait(job) == "SUCCEEDED", machines.logs(job)
    return machines.logs(job), machines.machines_of_tasks("pack_shard")


@pytest.fixture(scope="session")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, float]]:
    """step -> training loss, of a training in one process that reads the same videos from a folder."""

    @cache
    def run(*options: str) -> dict[int, float]:
        folder = tmp_path_factory.mktemp("alone")
        command = [
            sys.executable, "-m", "jobs.train", *RECIPE, "--shards", str(shards), "--storage", str(folder), *options,
            "--workers", "0", "--cpus-per-worker", "1", "--json", str(folder / "result.json"),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
        return losses_in(f"sqlite:///{folder}/mlflow.db", folder / "result.json")

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have recorded: how long a training took to go on after each fault."""
    for report in terminalreporter.getreports("passed"):
        for fault, seconds in report.user_properties:
            terminalreporter.write_line(f"{fault}: {seconds}")
