"""MLflow is asked as a run would ask it, and what keeps a run from it is found."""

from dataclasses import replace

import pytest
from doctor_findings import SECRET, bad, in_words
from mlflow import MlflowClient
from mlflow_servers import Server

from jobs.doctor.facts import TrackingFacts
from jobs.doctor.machine import find_listening
from jobs.doctor.tracking import gather_tracking
from jobs.doctor.tracking_checks import check_tracking
from shards.store.credentials import without_credentials


def test_a_server_that_is_away_is_an_error_at_once(here, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    finding = bad(check_tracking(gather_tracking(str(tmp_path)), [here]))
    assert "error MLflow: http://127.0.0.1:9: no server answers there" in in_words(finding)
    assert "mlflow server" in finding.fix


def test_a_database_is_not_made_by_looking_and_a_damaged_one_is_an_error(here, tmp_path):
    assert check_tracking(gather_tracking(str(tmp_path)), [here])[0].level == "ok"
    assert not list(tmp_path.iterdir())
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    finding = bad(check_tracking(gather_tracking(str(tmp_path)), [here]))
    assert "file is not a database" in finding.text
    assert "restore the file" in finding.fix


def test_an_object_store_without_a_server_is_an_error(here):
    finding = bad(check_tracking(gather_tracking("s3://bucket/runs"), [here]))
    assert "MLflow's database cannot lie in an object store" in finding.text


def test_a_password_in_the_address_is_not_shown():
    assert without_credentials(f"http://me:{SECRET}@host:5000/x") == "http://host:5000/x"
    assert without_credentials("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_a_server_elsewhere_that_requires_no_password_is_a_warning(here):
    open_one = TrackingFacts(uri="http://mlflow.example:5000", open_to_all=True, address="10.0.0.9")
    assert "--app-name basic-auth" in bad(check_tracking(open_one, [here])).fix
    clear = TrackingFacts(uri="http://mlflow.example:5000", password_sent=True, address="10.0.0.9")
    assert "gets our password unencrypted" in bad(check_tracking(clear, [here])).text
    assert check_tracking(replace(clear, uri="https://mlflow.example"), [here])[0].level == "ok"


@pytest.mark.long(of="jobs/doctor")
def test_a_server_on_this_machine_is_a_warning_where_others_reach_it_and_it_requires_no_password(
    here, tmp_path, monkeypatch
):
    server = Server(tmp_path, "--host", "0.0.0.0")
    try:
        server.ready()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        tracking = gather_tracking(str(tmp_path))
        assert tracking == TrackingFacts(uri=server.url, open_to_all=True, address="127.0.0.1")
        reached = replace(here, listening=find_listening())
        finding = bad(check_tracking(tracking, [reached]))
        assert (
            f"requires no password, can be reached from other machines: one listens at 0.0.0.0:{server.port}"
            in finding.text
        )
        assert f"--host 127.0.0.1 --port {server.port}" in finding.fix
        assert MlflowClient(server.url).search_runs(["0"]) == []
    finally:
        server.kill()
    loopback = replace(here, listening={server.port: ("127.0.0.1",)})
    assert in_words(check_tracking(tracking, [loopback])[0]) == f"ok MLflow: {server.url} (answers) -> "


@pytest.mark.long(of="jobs/doctor")
def test_a_server_with_a_login_lets_in_who_has_the_password(here, tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="MLflow's login wants it: pip install 'mlflow[auth]'")
    keys = {"MLFLOW_AUTH_ADMIN_PASSWORD": SECRET, "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET[::-1]}
    server = Server(tmp_path, "--host", "0.0.0.0", "--app-name", "basic-auth", **keys)
    try:
        server.ready()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        finding = bad(check_tracking(gather_tracking(str(tmp_path)), [here]))
        assert f"error MLflow: {server.url} denies access -> export MLFLOW_TRACKING_USERNAME" in in_words(finding)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        tracking = gather_tracking(str(tmp_path))
        facts = replace(here, listening=find_listening())
        assert [each.level for each in check_tracking(tracking, [facts])] == ["ok"]
        assert not tracking.open_to_all
        assert SECRET not in repr(tracking)
    finally:
        server.kill()
