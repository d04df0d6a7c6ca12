"""cluster/deploy/slurm.sh with a real Ray and Slurm's two programs in their simplest form: every "node" is this machine.

What srun and scontrol do to processes (start them, on which node; name the nodes; put a job in the queue again) is played here by
two short shell scripts; what the script itself does is real: token, ports, Ray's nodes, signals, exit status, cleaning up.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "deploy" / "slurm.sh"

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None, reason="no bash: install it, as Slurm's scripts are bash's"
)

# Runs the command here, in the place of srun's own process, so that a signal to srun reaches it, as Slurm forwards it.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$SAID"
while [ "${1#-}" != "$1" ]; do
    if [ "$1" = -w ]; then shift; node=$1; fi
    shift
done
[ "${node:-}" != "${BROKEN_NODE:-}" ] || [ -z "${node:-}" ] || { echo "slurmstepd: error: no such thing" >&2; exit 1; }
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$SAID"
[ "$1" = requeue ] || printf '%s\\n' one two
"""
# What runs in the job: looks around, says so, and ends as it is told.
COMMAND = """
import json, os, pathlib, signal, sys, time, urllib.error, urllib.request
import psutil, ray

folder, ends = pathlib.Path(sys.argv[1]), int(sys.argv[2])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
context = ray.init(log_to_driver=False)
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # Ray has taken it
token_path = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])

def answer(token):  # of the jobs' port
    headers = {"Authorization": "Bearer " + token} if token else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(f"http://{context.dashboard_url}/api/jobs/", headers=headers)).status
    except urllib.error.HTTPError as error:
        return error.code

seen = {
    "nodes": sum(node["Alive"] for node in ray.nodes()),
    "cpus": ray.cluster_resources()["CPU"],
    "token": token_path.read_text(),
    "token_mode": oct(token_path.stat().st_mode & 0o777),
    "umask": oct(os.umask(0o22)),
    "command_lines": [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])],
    "answers": [answer(token) for token in (None, "0" * 64, token_path.read_text())],
    "squared": ray.get(ray.remote(num_cpus=1)(lambda: 7 * 7).remote()),
}
partial = folder / "seen.partial"
partial.write_text(json.dumps(seen))
partial.rename(folder / "seen.json")
if ends >= 0:
    sys.exit(ends)
while not stopped:
    time.sleep(0.1)
time.sleep(2)  # that saving takes
(folder / "saved").write_text("all")
sys.exit(143)
"""


@pytest.fixture
def job(tmp_path: Path):
    """Gives start(*command, **environment) -> the batch script's process; ends what is left of it afterwards."""
    (tmp_path / "bin").mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "command.py").write_text(COMMAND)
    number = str(os.getpid() * 100 + int(time.time()) % 100)  # its temporary folder is of this test alone
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **environment: str) -> subprocess.Popen[str]:
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        slurm = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}
        own = {"PATH": path, "SAID": str(tmp_path / "said"), "GRURCN_SLURM_DIR": str(tmp_path / "jobs")}
        started.append(
            subprocess.Popen(
                ["bash", "-c", 'umask 022; exec bash "$@"', "sbatch", str(SCRIPT), *command],
                env={
                    **inherited,
                    **slurm,
                    **own,
                    "GLOO_SOCKET_IFNAME": "lo",
                    "SLURM_CPUS_PER_TASK": "2",
                    **environment,
                },
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
    assert not left_of(number)


def left_of(number: str) -> list[str]:
    """What is still there of a job: its temporary folder, processes that have it in their command line."""
    folder = f"/tmp/ray-{number}"
    running = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in running if folder in line] + [folder] * Path(folder).exists()


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.terminate()
            raise AssertionError(f"no {path.name}: {process.communicate(timeout=60)}")
        time.sleep(0.2)


def said(folder: Path) -> list[str]:
    return (folder / "said").read_text().splitlines()


def requeued(folder: Path) -> list[str]:
    return [line for line in said(folder) if line.startswith("scontrol requeue")]


@pytest.mark.long
def test_a_command_finds_all_nodes_behind_a_token_and_at_the_time_limit_saves_and_is_queued_again(tmp_path, job):
    process = job(
        "python", str(tmp_path / "command.py"), str(tmp_path), "-1", SLURM_JOB_END_TIME=str(int(time.time()) + 100)
    )
    wait_for(tmp_path / "seen.json", process)
    process.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120 does
    _, stderr = process.communicate(timeout=120)

    assert process.returncode == 143, stderr
    assert (tmp_path / "saved").read_text() == "all"
    [line] = requeued(tmp_path)
    assert line.startswith("scontrol requeue ")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["nodes"], seen["cpus"], seen["squared"]) == (2, 4, 49)
    assert seen["token_mode"] == "0o600"
    assert len(seen["token"]) == 64
    assert not [line for line in seen["command_lines"] if seen["token"] in line]
    assert seen["answers"] == [401, 403, 200], "without a token, with a wrong one, with the job's"
    assert seen["umask"] == "0o22", "what the command writes is as open as its user wants it"
    [folder] = (tmp_path / "jobs").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not (folder / "token").exists()
    assert (folder / "one.log").exists()
    assert (folder / "two.log").exists()


# A pod's last act, cluster/deploy/kuberay/leave.sh, on a node of this cluster; ends with status 3 by itself.
LEAVE = """
import json, os, pathlib, subprocess, sys, time
import ray
from ray._private.state import state

@ray.remote(num_cpus=1)
class RayTrainWorker:  # named as Ray Train's is, by which the script knows that a training runs
    def pid(self):
        return os.getpid()

folder, script = map(pathlib.Path, sys.argv[1:])
ray.init(log_to_driver=False)
worker = RayTrainWorker.remote()
ray.get(worker.pid.remote())
leaving = subprocess.Popen(["bash", script], env=dict(os.environ, GRURCN_LEAVE_SECONDS="600"))
until = time.monotonic() + 90
while not state.get_draining_nodes() and time.monotonic() < until:
    time.sleep(0.2)
time.sleep(2)
seen = {"draining": len(state.get_draining_nodes()), "waits": leaving.poll() is None}
ray.kill(worker)
seen["status"] = leaving.wait(60)
(folder / "seen.json").write_text(json.dumps(seen))
sys.exit(3)
"""


@pytest.mark.long
def test_a_pod_that_leaves_tells_ray_and_waits_for_training_and_the_jobs_status_is_its_commands(tmp_path, job):
    (tmp_path / "leave.py").write_text(LEAVE)
    script = ROOT / "cluster" / "deploy" / "kuberay" / "leave.sh"
    soon = str(int(time.time()) + 150)
    process = job("python", str(tmp_path / "leave.py"), str(tmp_path), str(script), SLURM_JOB_END_TIME=soon)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 3, stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == {"draining": 1, "waits": True, "status": 0}
    assert not requeued(tmp_path), "it ended by itself"


@pytest.mark.long
def test_two_jobs_on_one_node_do_not_meet_and_one_that_its_user_ends_is_not_queued_again(tmp_path, job):
    second = str(os.getpid() * 100 + 99)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    command = ("python", str(tmp_path / "command.py"))
    later = str(int(time.time()) + 9000)
    jobs = [
        job(*command, str(tmp_path / "first"), "-1", SLURM_JOB_END_TIME=later),
        job(*command, str(tmp_path / "second"), "-1", SLURM_JOB_END_TIME=later, SLURM_JOB_ID=second),
    ]
    for name, process in zip(("first", "second"), jobs, strict=True):
        wait_for(tmp_path / name / "seen.json", process, seconds=240)
    for process in jobs:
        process.send_signal(signal.SIGTERM)  # as scancel --batch --signal=TERM does
        process.communicate(timeout=120)
        assert process.returncode == 143
    assert not requeued(tmp_path)
    seen = [json.loads((tmp_path / name / "seen.json").read_text()) for name in ("first", "second")]
    assert [each["nodes"] for each in seen] == [2, 2]
    assert seen[0]["token"] != seen[1]["token"]
    assert not left_of(second)


@pytest.mark.long
def test_a_node_on_which_ray_does_not_start_is_named(tmp_path, job: Callable[..., subprocess.Popen[str]]):
    process = job("true", BROKEN_NODE="two")
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "error: ray start ended on two: slurmstepd: error: no such thing" in stderr, (stdout, stderr)


@pytest.mark.parametrize(
    ("command", "environment", "status", "message"),
    [
        ([], {}, 2, "error: no command; usage: sbatch"),
        (["true"], {"SLURM_JOB_ID": ""}, 1, "SLURM_JOB_ID: is not set; start this script by sbatch"),
        (["true"], {"SLURM_SUBMIT_DIR": "/"}, 2, "no cluster/deploy/environment.sh; submit from the clone"),
        (["true"], {"BROKEN_NODE": "one"}, 1, "error: no step could be started on one"),
    ],
)
def test_what_cannot_work_is_one_error(job, command, environment, status, message):
    process = job(*command, **environment)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert message in stderr
    assert "Traceback" not in stderr
