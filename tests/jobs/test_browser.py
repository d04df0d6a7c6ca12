"""MLflow's pages of a finished run, and Ray's dashboard with a submitted job, in a real browser.

After `make demo` the run is the demo's, else a small one of the same name. GRURCN_PICTURES names a folder for the screenshots
(docs/pictures has them); by default they go into the test's own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

pytest.importorskip("playwright", reason="no playwright (pip install 'grurcn[dev]')")
from browser import browser, needs_browser, screenshot, shows
from mlflow import MlflowClient
from small_runs import ROOT, run_train

from jobs import evaluate

pytestmark = [needs_browser, pytest.mark.long(minutes=2)]
DEMO = ROOT / "demo" / "runs"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("GRURCN_PICTURES", tmp_path)).absolute()


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(tracking URI, id) of a finished run "demo" in the experiment "demo", registered as grurcn-demo."""
    if (DEMO.parent / "result.json").exists():
        uri = f"sqlite:///{DEMO}/mlflow.db"
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("demo")
        assert experiment is not None
        [run] = client.search_runs([experiment.experiment_id], "attributes.run_name = 'demo'")
        return uri, run.info.run_id
    shards, storage = (request.getfixturevalue(name) for name in ("shards", "storage"))
    result = run_train(shards, storage, "demo", experiment="demo", register="grurcn-demo")
    assert evaluate.main(evaluate.Evaluate(run=str(storage / "demo"), shards=str(shards), clips=3, views=5)) == 0
    return result["tracking_uri"], result["mlflow_run_id"]


@contextmanager
def running(*command: str | Path, log: Path, **options: Any) -> Iterator[None]:
    """A server and its children, until the block ends."""
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, start_new_session=True, **options)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def wait_for(url: str, log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, and requires credentials
        except OSError:
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)


def test_mlflows_pages_show_a_run_with_its_curves_pictures_machines_and_models(finished, pictures, tmp_path):
    uri, run_id = finished
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    place, log = f"http://127.0.0.1:{free_port()}", tmp_path / "mlflow.log"
    program = Path(sys.executable).parent / "mlflow"
    command = [program, "ui", "--backend-store-uri", uri, "--port", place.rpartition(":")[2]]
    with running(*command, log=log, cwd=tmp_path), browser() as page:
        wait_for(f"{place}/health", log)
        page.goto(f"{place}/#/experiments")
        page.get_by_role("button", name="Close", exact=True).click()  # the assistant
        page.get_by_role("button", name="Model training").click()
        page.goto(f"{place}/#/experiments")
        page.get_by_role("link", name="demo", exact=True).first.click()
        page.locator(f"a[href*='/runs/{run_id}']").first.click()

        shows(
            page,
            run.data.tags["command"][:25],
            "Finished",
            "grurcn-demo",
            "shards",
            "val/top1",
            "git_commit",
            "checkpoint-",
        )
        screenshot(page, pictures, "mlflow-run.png")

        page.wait_for_timeout(5000)  # charts are laid out once, for the metrics that have arrived
        page.get_by_role("tab", name="Model metrics").click()
        shows(page, "clips_per_second", "data_wait_fraction", "memory_gib", "step_seconds_p50")
        page.get_by_placeholder("Search metric charts").fill("train|val")
        shows(page, "loss", "top1", "top5", "learning_rate")
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length > 3")
        screenshot(page, pictures, "mlflow-curves.png")

        if any(key.startswith("system/") for key in run.data.metrics):  # after ten seconds of training
            page.get_by_role("tab", name="System metrics").click()
            shows(
                page, "cpu_utilization_percentage", "disk_usage_percentage"
            )  # further charts are drawn when scrolled to

        page.get_by_role("tab", name="Artifacts").click()
        shows(page, "pictures", "dataset.json", "recipe.json", "environment.txt", "evaluations")
        for name in ("pictures", "val", "mistakes.png" if has(client, run_id, "mistakes.png") else "levels.png"):
            page.get_by_text(name, exact=True).first.click()
        page.wait_for_function("[...document.images].some(image => image.naturalWidth > 400)")
        screenshot(page, pictures, "mlflow-pictures.png")

        page.goto(f"{place}/#/experiments/{run.info.experiment_id}/models")
        best = client.get_logged_model(run.data.tags["best_model"])
        shows(page, best.name, re.compile(r"checkpoint-\d{8}"), "Ready")
        screenshot(page, pictures, "mlflow-models.png")

        page.goto(f"{place}/#/models/grurcn-demo")
        shows(page, "grurcn-demo", re.compile("Version 1"))


@contextmanager
def ray_head(folder: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """A Ray head with its dashboard, on free ports, with a new token: (the dashboard's URL, the token, the environment)."""
    folder.mkdir()
    token = "a-token-of-this-test-" + os.urandom(16).hex()
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    gcs, dashboard, client = (free_port() for _ in range(3))
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_ADDRESS": "",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    program, log = Path(sys.executable).parent / "ray", folder / "ray.log"
    command = [
        program, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        "--dashboard-agent-listen-port=0", f"--temp-dir=/tmp/grurcn-ray-{os.getpid()}", "--disable-usage-stats",
    ]  # fmt: skip
    place = f"http://127.0.0.1:{dashboard}"
    with running(*command, log=log, env=environment):
        wait_for(place, log)
        yield place, token, {**environment, "RAY_API_SERVER_ADDRESS": place}
    shutil.rmtree(f"/tmp/grurcn-ray-{os.getpid()}", ignore_errors=True)


def test_rays_dashboard_asks_for_the_token_and_shows_the_submitted_job(pictures, tmp_path):
    with ray_head(tmp_path / "ray") as (place, token, environment), browser() as page:
        job = [
            Path(sys.executable).parent / "ray",
            "job",
            "submit",
            "--",
            sys.executable,
            "-m",
            "jobs.describe",
            "demo",
        ]
        done = subprocess.run(
            list(map(str, job)), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout

        page.goto(place)
        page.get_by_role("textbox").first.fill(token)
        page.get_by_role("button", name=re.compile("submit|save|continue|log ?in", re.IGNORECASE)).first.click()
        page.goto(f"{place}/#/jobs")
        shows(page, "jobs.describe demo", "SUCCEEDED")
        screenshot(page, pictures, "ray-dashboard.png")


def has(client: MlflowClient, run_id: str, name: str) -> bool:
    return any(file.path.endswith(name) for file in client.list_artifacts(run_id, "pictures/val"))
