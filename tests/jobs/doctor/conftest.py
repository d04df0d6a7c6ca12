"""This real machine, examined once; tests change its facts one by one."""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jobs.commands import load
from jobs.doctor import examination
from jobs.doctor.facts import MachineFacts, RayToken, Request
from jobs.doctor.machine import gather_machine


@dataclass(frozen=True)
class Examined:
    """What the command printed about this machine, and the facts that it gathered."""

    status: int
    output: str
    json: Path
    facts: MachineFacts


@pytest.fixture(scope="session")
def examined(shards, tmp_path_factory) -> Examined:
    folder, gathered, output = tmp_path_factory.mktemp("examined"), [], io.StringIO()

    def gather_and_keep(request: Request) -> MachineFacts:
        gathered.append(gather_machine(request))
        return gathered[0]

    words = ["--shards", shards, "--storage", folder / "not" / "yet" / "runs", "--json", folder / "doctor.json"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(examination, "gather_machine", gather_and_keep)
        doctor = load("doctor")
        status = doctor.main(doctor.parse(list(map(str, words)), "doctor"))
    return Examined(status, output.getvalue(), folder / "doctor.json", gathered[0])


@pytest.fixture(scope="session")
def here(examined) -> MachineFacts:
    """This machine, under another name and without its token."""
    no_token = RayToken(mode="unset", source=None, file_mode=None, digest=None)
    return replace(examined.facts, name="one", address="10.0.0.1", token=no_token)


@pytest.fixture
def two(here) -> list[MachineFacts]:
    """Two machines that could train together."""
    named = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return [
        replace(here, named_interfaces=named),
        replace(here, name="two", address="10.0.0.2", named_interfaces=named),
    ]
