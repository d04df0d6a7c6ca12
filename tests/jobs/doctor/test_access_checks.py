"""Tokens, ports and interfaces that let others in, or keep machines from each other, are found."""

import hashlib
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_findings import SECRET, bad, in_words, with_second

from jobs.doctor.access_checks import check_authentication, check_dashboard, check_interfaces, check_token
from jobs.doctor.facts import RayToken
from jobs.doctor.machine import find_listening, find_token


def write_token(home: Path, mode: int, content: str = SECRET) -> RayToken:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return find_token({"RAY_AUTH_MODE": "token"}, home, "salt")


def test_a_token_that_others_can_read_is_found_with_how_to_fix_it(here, tmp_path):
    finding = bad(check_token([replace(here, token=write_token(tmp_path, 0o644))]))
    assert f"{tmp_path}/.ray/auth_token (mode 644)" in finding.text
    subprocess.run(finding.fix.split(), check=True)
    assert not check_token([replace(here, token=find_token({}, tmp_path, "salt"))])


def test_a_token_is_compared_and_never_shown(tmp_path):
    found = write_token(tmp_path, 0o600)
    assert SECRET not in repr(found)
    assert hashlib.sha256(SECRET.encode()).hexdigest() not in repr(found)
    assert found.digest == find_token({"RAY_AUTH_TOKEN": SECRET}, tmp_path / "nowhere", "salt").digest
    assert found.digest != find_token({"RAY_AUTH_TOKEN": SECRET}, tmp_path / "nowhere", "pepper").digest
    path = tmp_path / "elsewhere"
    path.write_text(f"{SECRET}\n")
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path / "nowhere", "salt").digest == found.digest


def test_a_machine_with_another_token_or_none_is_an_error(two, tmp_path):
    ours = write_token(tmp_path, 0o600)
    other = write_token(tmp_path, 0o600, SECRET[::-1])
    with_ours = [replace(each, token=ours) for each in two]
    assert check_token(with_ours) == []
    assert check_authentication(with_ours)[0].level == "ok"
    assert "not the same on all machines: one / two" in bad(check_token(with_second(with_ours, token=other))).text
    none = find_token({}, tmp_path / "nowhere", "salt")
    assert "there is none on two" in bad(check_token(with_second(with_ours, token=none))).text


def test_a_cluster_without_authentication_is_an_error_where_others_reach_it(two):
    assert "error token: Ray requires none: who reaches 10.0.0.1" in in_words(bad(check_authentication(two)))
    alone = [replace(two[0], address="127.0.0.1")]
    finding = bad(check_authentication(alone))
    assert finding.level == "warning"
    assert "ray get-auth-token --generate" in finding.fix


@pytest.mark.parametrize(
    ("address", "resolves"), [("127.0.1.1", "resolves to 127.0.1.1"), (None, "resolves to nothing")]
)
def test_a_host_name_that_resolves_to_the_loopback_is_an_error_unless_an_interface_is_named(two, address, resolves):
    interfaces = {"lo": ("127.0.0.1",), "ens5": ("10.0.0.2",)}
    trapped = with_second(two, host_address=address, named_interfaces={}, interfaces=interfaces)
    finding = bad(check_interfaces(trapped))
    assert f"two: its host name {resolves}; gloo would give that to the other machines, not 10.0.0.2" in finding.text
    assert "export GLOO_SOCKET_IFNAME=ens5 NCCL_SOCKET_IFNAME=ens5" in finding.fix
    named = with_second(trapped, named_interfaces={"GLOO_SOCKET_IFNAME": "ens5"})
    assert check_interfaces(named)[0].level == "ok"


def test_an_interface_that_is_named_and_not_there_is_an_error(two):
    finding = bad(
        check_interfaces(
            with_second(two, named_interfaces={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0,ib1"})
        )
    )
    assert "two: NCCL_SOCKET_IFNAME=ib0,ib1, but there is no such interface" in finding.text
    assert check_interfaces(
        with_second(two, named_interfaces={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^lo"})
    )


def test_a_port_that_others_reach_is_a_warning_and_one_on_the_loopback_is_not(here):
    for host, level in (("0.0.0.0", "warning"), ("127.0.0.1", "ok")):
        with socket.socket() as server:
            server.bind((host, 0))
            server.listen()
            port = server.getsockname()[1]
            facts = replace(here, listening=find_listening())
            [finding] = check_dashboard([facts], f"127.0.0.1:{port}")
        assert finding.level == level
    assert "ssh -L" in bad(check_dashboard([replace(here, listening={8265: ("::",)})], "10.0.0.1:8265")).fix
