"""Storage and shards are tried on this machine, and what fails is named without a key in it."""

import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from doctor_findings import SECRET, bad, in_words
from servers import RangeServer, s3_server

import jobs.doctor.machine as doctor_machine
import shards.store as stores
from jobs.doctor.machine import absolute_request, read_shards, try_storage
from jobs.doctor.machine_checks import check_shards, check_storage


@pytest.fixture
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(doctor_machine, "PATIENCE_SECONDS", 0.3)


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may write anywhere, so root becomes another user."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(here, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    with as_another_user():
        error = try_storage(absolute_request(str(folder), None, "x"))
    assert error is not None
    finding = bad(check_storage([replace(here, storage_error=error)]))
    assert re.search(r"one: writing: .*runs.*: Permission denied", finding.text)
    assert finding.fix.startswith("mkdir -p ")


def test_a_store_refuses_a_wrong_key_and_no_key_is_shown(here, hasty):
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        assert try_storage(absolute_request(f"{url}/runs", None, "x")) is None
        assert not stores.open_store(f"{url}/runs").names()
        require_key_after(os.environ["AWS_ENDPOINT_URL"], "0")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        stores.ObjectStore("s3", url).fs.clear_instance_cache()
        try:
            error = try_storage(absolute_request(f"{url}/runs", None, "x"))
        finally:
            require_key_after(os.environ["AWS_ENDPOINT_URL"], "inf")
    assert error is not None
    finding = bad(check_storage([replace(here, storage=None, storage_error=error)]))
    assert "writing" in finding.text
    assert "AWS_SECRET_ACCESS_KEY" in finding.fix
    assert SECRET not in in_words(finding)


def require_key_after(endpoint: str, after: str) -> None:
    """Moto requires a known key after so many requests."""
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", data=after.encode(), headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()


def test_a_web_server_is_no_storage(hasty, tmp_path):
    with RangeServer(tmp_path) as server:
        error = try_storage(absolute_request(server.url, None, "x"))
    assert error is not None
    assert "a web server cannot be written to" in error


def test_shards_are_read_over_the_network_and_a_server_that_is_away_is_an_error(here, shards, hasty):
    with RangeServer(shards, delay_seconds=0.05) as server:
        far = read_shards(server.url)
    assert far.error is None
    assert here.reading is not None
    assert far.digest == here.reading.digest
    assert far.first_byte_seconds >= 0.05
    away = read_shards("http://127.0.0.1:9/shards")
    finding = bad(check_shards([replace(here, reading=away)]))
    assert finding.level == "error"
    assert "dataset.json" in finding.text


def test_a_folder_without_shards_is_an_error_that_says_what_is_missing(here, tmp_path, hasty):
    finding = bad(check_shards([replace(here, reading=read_shards(str(tmp_path)))]))
    assert "dataset.json: not found" in finding.text
