"""cluster/deploy/mlflow/server.sh for real: PostgreSQL, S3, logins; what was told is there after the server starts again."""

import base64
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from servers import environment, s3_server

SCRIPT = Path(__file__).parents[2] / "cluster" / "deploy" / "mlflow" / "server.sh"
SECRETS = {
    "database_password": "of-the/database%and+more",
    "admin_password": "of-the-administrator",
    "flask_secret_key": "0123456789abcdef0123456789abcdef",
}


class Postgres:
    """A database cluster in a folder, behind a password; as another user where this one is root, as PostgreSQL wants it."""

    def __init__(self, folder: Path):
        initdb = shutil.which("initdb")
        if initdb is None or shutil.which("postgres") is None:
            pytest.skip(
                "no PostgreSQL here: install it (Debian: apt-get install postgresql; then put its bin/ on PATH)"
            )
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        self.password = folder.with_name("password")
        self.password.write_text(SECRETS["database_password"])
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid}
            for path in (folder, self.password):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        subprocess.run(
            [initdb, "-D", folder, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={self.password}", "--no-sync"],
            check=True,
            capture_output=True,
            cwd="/",
            **self.user,
        )

    def __enter__(self) -> "Postgres":
        self.process = subprocess.Popen(
            ["postgres", "-D", self.folder, "-p", str(self.port), "-h", "127.0.0.1", "-k", self.folder, "-F"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **self.user,
        )
        wait_for_port(self.port, self.process)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)  # at once, and whole
        self.process.wait(30)

    def create(self, name: str) -> None:
        """A database."""
        from psycopg2 import connect

        until = time.monotonic() + 30
        while True:
            try:
                connection = connect(
                    host="127.0.0.1",
                    port=self.port,
                    user="mlflow",
                    dbname="postgres",
                    password=SECRETS["database_password"],
                )
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.2)
        connection.autocommit = True
        connection.cursor().execute(f"create database {name}")
        connection.close()


def wait_for_port(port: int, process: "subprocess.Popen[str] | subprocess.Popen[bytes]", seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, "it ended before it listened"
            assert time.monotonic() < until, "it does not listen"
            time.sleep(0.2)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One that another user may pass through, as pytest's are not."""
    pytest.importorskip("psycopg2", reason="no psycopg2: pip install 'grurcn[server]'")
    pytest.importorskip("flask_wtf", reason="no Flask-WTF: pip install 'grurcn[server]'")
    path = Path(tempfile.mkdtemp(prefix="grurcn-mlflow-"))
    path.chmod(0o755)
    (path / "secrets").mkdir(mode=0o700)
    for name, secret in SECRETS.items():
        (path / "secrets" / name).write_text(secret + "\n")  # as editors end a file
    yield path
    shutil.rmtree(path)


@contextmanager
def mlflow_server(folder: Path, **settings: str) -> Iterator[str]:
    """server.sh with these settings; gives its address."""
    port = free_port()
    log = (folder / "server.log").open("a")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
            "PATH": path,
            "MLFLOW_SECRETS": str(folder / "secrets"),
            "MLFLOW_SERVER_PORT": str(port),
            "MLFLOW_SERVER_WORKERS": "1",
            **settings,
        },
        stdout=log,
        stderr=log,
        text=True,
    )
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def answer(url: str, login: tuple[str, str] | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# In a process of its own, as MLflow remembers where it has been; with a login, and without keys of the store.
TELL = """
import pathlib, sys, mlflow
from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run("0")
client.log_metric(run.info.run_id, "val/top1", 0.75, step=3)
path = pathlib.Path(sys.argv[1]) / "words.txt"
path.write_text("as they were")
client.log_artifact(run.info.run_id, str(path))
client.set_terminated(run.info.run_id)
print(run.info.run_id)
"""


def tell(folder: Path, url: str) -> str:
    """A run with a metric and a file; gives its id."""
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": SECRETS["admin_password"]}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", TELL, str(folder)],
        env={**inherited, **login, "MLFLOW_TRACKING_URI": url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]  # MLflow says where to look at the run before


@pytest.mark.long
def test_a_run_and_its_files_outlive_the_server_and_nothing_is_shown_without_a_login(folder):
    with s3_server() as bucket, Postgres(folder / "database") as postgres:
        postgres.create("mlflow")
        settings = {
            **environment(),
            "MLFLOW_DATABASE_HOST": "127.0.0.1",
            "MLFLOW_DATABASE_PORT": str(postgres.port),
            "MLFLOW_ARTIFACTS_DESTINATION": f"{bucket}/artifacts",
        }
        login = ("admin", SECRETS["admin_password"])
        experiment = "mlflow/experiments/get?experiment_id=0"
        with mlflow_server(folder, **settings) as url:
            for place in (f"/api/2.0/{experiment}", f"/ajax-api/2.0/{experiment}"):
                assert answer(url + place)[0] == 401
                assert answer(url + place, ("admin", "password1234"))[0] == 401
                assert answer(url + place, login)[0] == 200
            run_id = tell(folder, url)
            shown = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
            assert "mlflow.server" in shown
            assert not [secret for secret in SECRETS.values() if secret in shown]
        # Again, by PostgreSQL's socket this time.
        with mlflow_server(folder, **{**settings, "MLFLOW_DATABASE_HOST": str(folder / "database")}) as url:
            run = json.loads(answer(f"{url}/api/2.0/mlflow/runs/get?run_id={run_id}", login)[1])["run"]
            assert [(each["key"], each["value"]) for each in run["data"]["metrics"]] == [("val/top1", 0.75)]
            file = f"{url}/get-artifact?run_uuid={run_id}&path=words.txt"
            assert answer(file)[0] == 401
            assert answer(file, login) == (200, "as they were")

        import boto3

        keys = [
            each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
        ]
        assert keys == [f"artifacts/0/{run_id}/artifacts/words.txt"]


@pytest.mark.parametrize(
    ("secrets", "settings", "message"),
    [
        (SECRETS, {"MLFLOW_DATABASE_HOST": ""}, "MLFLOW_DATABASE_HOST: is not set"),
        (SECRETS, {"MLFLOW_ARTIFACTS_DESTINATION": ""}, "MLFLOW_ARTIFACTS_DESTINATION: is not set"),
        ({"database_password": "x"}, {}, "error: {}/admin_password: no such file"),
        (
            {**SECRETS, "admin_password": "short"},
            {},
            "error: {}/admin_password: wanted at least 12 characters, found 5",
        ),
    ],
)
def test_what_is_missing_is_one_error_and_nothing_starts(tmp_path, secrets, settings, message):
    for name, secret in secrets.items():
        (tmp_path / name).write_text(secret)
    given = {"MLFLOW_DATABASE_HOST": "127.0.0.1", "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/files", **settings}
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env={"PATH": os.environ["PATH"], "MLFLOW_SECRETS": str(tmp_path), **given},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert message.format(tmp_path) in done.stderr
    assert not [secret for secret in secrets.values() if len(secret) > 8 and secret in done.stderr]
