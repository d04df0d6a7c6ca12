"""Machines for the tests: Ray nodes in network namespaces of their own, joined by a switch, and what may go wrong with them.

                  switch (a bridge)
      ┌────────────┬──────┴─────┬────────────┐
     eth0         eth0         eth0         eth0
     head         one          two         store
    10.77.0.1    10.77.0.2    10.77.0.3    10.77.0.4
    Ray's head   a node       a node       S3 and MLflow, no Ray

Each host has its own name, address, processes, HOME, TMPDIR and Ray folder; the file system is everybody's. The switch is in
a namespace too: nothing of this can be seen, or reached, from outside, and several clusters do not meet.

A test of a machine that dies in the middle of a training; what it broke is made whole after each test (Cluster.heal):

    job = cluster.submit(train_command("unlucky"))
    cluster.wait_for_log(job, "step      4")
    cluster.one.kill()
    assert cluster.wait(job) == "SUCCEEDED", cluster.logs(job)
    assert losses(cluster.tracking_file, FOLDER / "unlucky.json") == pytest.approx(alone, rel=1e-5)

Or in the place of kill():

    os.kill(cluster.one.workers()[0], signal.SIGKILL)                           one training worker
    cluster.one.link_down(); time.sleep(5); cluster.one.link_up()               a cable that is loose
    cluster.one.link_down()                                                     one that is cut
    cluster.drain(cluster.one)                                                  a machine that says it is about to go
    cluster.store.freeze(); time.sleep(30); cluster.store.thaw()                servers that hang
    for pid in cluster.drivers(): os.kill(pid, signal.SIGKILL)                  the command; then submit it again
    cluster.stop(job)                                                           `ray job stop`
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PREFIX = "grurcn-hosts"  # of all namespaces and folders; the id of the process that made them follows
OURS = f"{PREFIX}-{os.getpid()}"
FOLDER = Path("/tmp") / OURS  # short, as the path of a socket in Ray's folder may have 107 characters
BUCKET = "bucket"
RAY_PORT, DASHBOARD_PORT, S3_PORT, MLFLOW_PORT = 6379, 8265, 9000, 5000

# As a user would who wants to know soon: a killed node is noted after threshold x period, one that does not answer after
# threshold x (period + time-out); 15 and 65 seconds by default.
FAILURE_DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
T = TypeVar("T")


def why_not() -> str | None:
    """Why this machine cannot make such hosts; None if it can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces are made by root"
    missing = [tool for tool in ("ip", "tc", "iptables", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install iproute2 iptables util-linux"
    probe = f"{OURS}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    link = ["ip", "-n", probe, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
    linked = subprocess.run(link, capture_output=True, text=True)
    system("ip", "netns", "del", probe)
    return f"no virtual network links here: {linked.stderr.strip()}" if linked.returncode else None


def system(*words: object) -> str:
    """What the command wrote. Raises RuntimeError with what it said if it failed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def until(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.2) -> Any:
    """The condition's first true value. Raises TimeoutError if there was none in so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(every)
    return value


def processes(namespace: str) -> list[int]:
    return [int(pid) for pid in system("ip", "netns", "pids", namespace).split()]


def kill_all(namespace: str) -> None:
    """Until there is none: some may be starting others."""

    def none_left() -> bool:
        found = processes(namespace)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    until(none_left, 20, f"all processes in {namespace} are gone", every=0.05)


def remove(namespace: str) -> None:
    kill_all(namespace)
    system("ip", "netns", "del", namespace)  # and with it its end of each link, hence the other
    shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def namespaces() -> list[str]:
    return [line.split()[0] for line in system("ip", "netns", "list").splitlines()]


def remove_leftovers() -> None:
    """Of earlier runs that were killed: those whose maker is no more."""
    made = re.compile(rf"{PREFIX}-(\d+)(-\w+)?")
    for name in namespaces():
        if (match := made.fullmatch(name)) and not psutil.pid_exists(int(match[1])):
            remove(name)
    for folder in Path("/tmp").glob(f"{PREFIX}-*"):
        if (match := made.fullmatch(folder.name)) and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


class Host:
    """A machine: a network namespace with an eth0 and the processes that run in it."""

    def __init__(self, cluster: "Cluster", name: str, number: int):
        self.cluster, self.name = cluster, name
        self.namespace = f"{OURS}-{name}"
        self.address = f"10.77.0.{number}"
        self.folder = FOLDER / name
        self.children: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        """The namespace, its link to the switch, and its folders."""
        switch, port = self.cluster.switch, self.name
        system("ip", "netns", "add", self.namespace)
        system("ip", "-n", self.namespace, "link", "set", "lo", "up")
        system("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        system("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        system("ip", "-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        system("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        for folder in (self.home, self.folder / "tmp"):
            folder.mkdir(parents=True)
        hosts = Path("/etc/netns") / self.namespace / "hosts"  # `ip netns exec` puts it in the place of /etc/hosts
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, less what would lead elsewhere, and what a user sets on such a machine."""
        elsewhere = re.compile(r"RAY_.*|AWS_.*|MLFLOW_.*|PYTHONPATH|.*_proxy", re.IGNORECASE)
        ours = {name: value for name, value in os.environ.items() if not elsewhere.fullmatch(name)}
        return {
            **ours,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "TMPDIR": str(self.folder / "tmp"),
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "token",
            **FAILURE_DETECTION,
            **self.cluster.services,
        }

    def popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Starts a command on this host, in its own session: it does not get the terminal's Ctrl-C."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        child = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *named, *command],
            env={**self.environment, **(env or {})}, text=True, start_new_session=True, stdin=subprocess.DEVNULL, **options,
        )  # fmt: skip
        self.children.append(child)
        return child

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, seconds: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end; what it wrote is in stdout, errors included.

        Raises RuntimeError with that if it fails and `check` is set, TimeoutExpired if it takes longer.
        """
        child = self.popen(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = child.communicate(timeout=seconds)
        finally:
            child.kill()
        if check and child.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: status {child.returncode}\n{output}")
        return subprocess.CompletedProcess(command, child.returncode, output)

    def serve(self, name: str, command: Sequence[str]) -> subprocess.Popen[str]:
        """Starts a command that stays; what it says goes to the host's folder."""
        with (self.folder / f"{name}.log").open("a") as log:
            return self.popen(command, stdout=log, stderr=subprocess.STDOUT)

    def inside(self, function: Callable[[], T]) -> T:
        """function() in a thread of this process that is on this host: the sockets that it opens are the host's."""

        def enter_and_call() -> T:
            with (Path("/run/netns") / self.namespace).open() as namespace:
                if LIBC.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the namespace {self.namespace}")
            return function()

        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(enter_and_call).result()

    def listens(self, port: int) -> bool:
        """Whether something listens at this port of the host's address."""
        try:
            self.inside(lambda: socket.create_connection((self.address, port), timeout=5).close())
        except OSError:
            return False
        return True

    def start(self, gpus: int = 0) -> None:
        """Starts the Ray node. The cluster knows of it some seconds later: Cluster.wait_for_nodes.

        gpus: that it says it has, whatever is there.
        """
        head = self.cluster.head
        role = ["--address", f"{head.address}:{RAY_PORT}"]
        if self is head:
            role = ["--head", "--port", str(RAY_PORT), "--dashboard-host", self.address]
        self.serve("ray", [
            "ray", "start", *role, "--node-ip-address", self.address, "--num-cpus", "1",
            "--num-gpus", str(gpus), "--block",
            "--temp-dir", str(self.folder / "ray"), "--object-store-memory", "100000000", "--disable-usage-stats",
        ])  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to all its processes, as when its power fails. start() starts its Ray node again."""
        kill_all(self.namespace)
        for child in self.children:
            child.wait()
        self.children.clear()

    def freeze(self) -> None:
        """Stops all its processes where they are: connections stay, and nothing answers, until thaw()."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        """A signal to all its processes."""
        for pid in processes(self.namespace):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def workers(self) -> list[int]:
        """Processes of Ray Train workers."""
        return self.processes_titled("ray::RayTrainWorker")

    def processes_titled(self, words: str) -> list[int]:
        """Processes whose command line holds these words."""
        found = []
        for pid in processes(self.namespace):
            with suppress(psutil.NoSuchProcess):
                if words in " ".join(psutil.Process(pid).cmdline()):
                    found.append(pid)
        return found

    def link_down(self) -> None:
        """Pulls the cable: what is sent to or from the host is lost, and nobody is told."""
        system("ip", "-n", self.cluster.switch, "link", "set", self.name, "down")

    def link_up(self) -> None:
        system("ip", "-n", self.cluster.switch, "link", "set", self.name, "up")

    def slow_link(self, megabits: float) -> None:
        """So many megabits a second, each way, until heal_link()."""
        for namespace, device in self.ends():
            shape = ["tbf", "rate", f"{megabits:g}mbit", "burst", "64kb", "latency", "200ms"]
            system("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape)

    def lossy_link(self, percent: float) -> None:
        """So much of what comes in is dropped, at random, until heal_link()."""
        chance = ["-m", "statistic", "--mode", "random", "--probability", f"{percent / 100:g}"]
        self.iptables("--append", "INPUT", "--in-interface", "eth0", *chance, "--jump", "DROP")

    def heal_link(self) -> None:
        """Up, as fast as it was made, without losses."""
        self.link_up()
        self.iptables("--flush", "INPUT")
        for namespace, device in self.ends():
            if "tbf" in system("tc", "-n", namespace, "qdisc", "show", "dev", device):
                system("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")

    def ends(self) -> list[tuple[str, str]]:
        """Namespace and device of both ends of the link."""
        return [(self.namespace, "eth0"), (self.cluster.switch, self.name)]

    def iptables(self, *words: str) -> None:
        system("ip", "netns", "exec", self.namespace, "iptables", *words)


class Cluster:
    """Three Ray nodes (head, one, two) with one CPU each, and `store` with an S3 server and an MLflow server."""

    def __init__(self) -> None:
        self.switch = f"{OURS}-switch"
        self.head, self.one, self.two, self.store = self.hosts = [
            Host(self, name, number) for number, name in enumerate(("head", "one", "two", "store"), start=1)
        ]
        self.nodes = [self.head, self.one, self.two]
        self.drained: list[Host] = []
        self.services = {
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "never/to+be/seen+anywhere",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.store.address}:{S3_PORT}",
            "MLFLOW_TRACKING_URI": f"http://{self.store.address}:{MLFLOW_PORT}",
        }
        self.tracking_file = f"sqlite:///{self.store.folder}/mlflow.db"  # the same, for who cannot reach the server

    def __enter__(self) -> "Cluster":
        remove_leftovers()
        try:
            self.make_hosts()
            self.start_services()
            self.make_token(self.nodes)
            self.start_nodes()
            self.wait_for_services()
        except BaseException:  # Ctrl-C too
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in namespaces():
            if name.startswith(f"{OURS}-"):
                remove(name)
        for host in self.hosts:
            for child in host.children:
                child.wait()
        shutil.rmtree(FOLDER, ignore_errors=True)

    def make_hosts(self) -> None:
        system("ip", "netns", "add", self.switch)
        system("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        system("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for host in self.hosts:
            host.make()

    def add_host(self, name: str) -> Host:
        """One more machine on the switch, without Ray and without the token."""
        host = Host(self, name, len(self.hosts) + 1)
        self.hosts.append(host)
        host.make()
        return host

    def make_token(self, members: Iterable[Host]) -> None:
        """As the README says: made once, the same on all machines."""
        self.token = self.head.run(["ray", "get-auth-token", "--generate"]).stdout.split()[-1]
        for host in members:
            (host.home / ".ray").mkdir(exist_ok=True)
            (host.home / ".ray" / "auth_token").write_text(self.token)

    def start_services(self) -> None:
        store = self.store
        store.serve("s3", [f"{BIN}/moto_server", "-H", store.address, "-p", str(S3_PORT)])
        store.serve("mlflow", [
            "mlflow", "server", "--host", store.address, "--port", str(MLFLOW_PORT), "--workers", "1",
            "--backend-store-uri", self.tracking_file, "--artifacts-destination", f"{store.folder}/artifacts",
        ])  # fmt: skip

    def wait_for_services(self) -> None:
        until(lambda: self.store.listens(S3_PORT), 60, "the S3 server listens")
        self.store.run([sys.executable, "-c", f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')"])
        until(lambda: self.store.listens(MLFLOW_PORT), 120, "the MLflow server listens")

    def start_nodes(self) -> None:
        self.head.start()
        until(lambda: self.head.listens(DASHBOARD_PORT), 120, "Ray's dashboard listens")
        self.one.start()
        self.two.start()
        self.wait_for_nodes(3)

    def ask(self, path: str, method: str = "GET") -> Any:
        """What Ray's dashboard answers, asked on the head node."""
        request = urllib.request.Request(
            f"http://{self.head.address}:{DASHBOARD_PORT}{path}",
            method=method,
            headers={"Authorization": f"Bearer {self.token}"},
        )

        def answer() -> Any:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())

        return self.head.inside(answer)

    def alive(self) -> dict[str, str]:
        """Address -> id of the Ray nodes that the cluster holds for alive."""
        nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    def drain(self, host: Host, seconds: int = 60) -> None:
        """Tells Ray that the host will be taken away in so many seconds, as a cloud does with a machine lent for little."""
        self.drained.append(host)
        self.head.run([
            "ray", "drain-node", "--address", f"{self.head.address}:{RAY_PORT}", "--node-id", self.alive()[host.address],
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
            "--deadline-remaining-seconds", str(seconds),
        ])  # fmt: skip

    def machines_of_tasks(self, name: str) -> int:
        """On how many nodes tasks of this name have run."""
        tasks = self.ask("/api/v0/tasks?detail=True&limit=1000")["data"]["result"]["result"]
        return len({task["node_id"] for task in tasks if task["name"] == name})

    def wait_for_nodes(self, count: int, seconds: float = 60) -> None:
        until(lambda: len(self.alive()) == count, seconds, f"the cluster has {count} nodes")

    def submit(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """`ray job submit` on the head node, with the code as it lies here; gives back the job's id."""
        code = FOLDER / "code"
        if not code.exists():
            copy_code(code)
        job = f"job-{uuid.uuid4().hex[:8]}"
        commit = system("git", "-C", ROOT, "rev-parse", "HEAD").strip()
        self.head.run([
            "ray", "job", "submit", "--address", f"http://{self.head.address}:{DASHBOARD_PORT}", "--no-wait",
            "--submission-id", job, "--working-dir", str(code),
            "--runtime-env-json", json.dumps({"env_vars": {"GRURCN_COMMIT": commit, **(env or {})}}),
            "--", *command,
        ])  # fmt: skip
        return job

    def status(self, job: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return self.ask(f"/api/jobs/{job}")["status"]

    def wait(self, job: str, seconds: float = 180) -> str:
        """Waits for the job's end; gives back its status."""
        try:
            until(lambda: self.status(job) not in ("PENDING", "RUNNING"), seconds, f"{job} ends", every=1)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.logs(job)}") from None
        return self.status(job)

    def logs(self, job: str) -> str:
        """What the job has written so far."""
        return self.ask(f"/api/jobs/{job}/logs")["logs"]

    def wait_for_log(self, job: str, words: str, seconds: float = 120) -> None:
        """Waits until the job has written these words."""
        self.wait_in(job, lambda: words in self.logs(job), seconds, f"{job} writes {words!r}")

    def wait_for_workers(self, job: str, hosts: int, seconds: float = 120) -> None:
        """Waits until the job has Ray Train workers on so many hosts."""
        found = lambda: sum(bool(host.workers()) for host in self.nodes) == hosts  # noqa: E731
        self.wait_in(job, found, seconds, f"{job} has workers on {hosts} hosts")

    def wait_in(self, job: str, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits for what is to come while the job runs. Raises AssertionError with the log if the job ends before."""

        def reached() -> bool:
            running = self.status(job) in ("PENDING", "RUNNING")
            if condition():
                return True
            assert running, f"over before {what}:\n{self.logs(job)}"
            return False

        until(reached, seconds, what, every=0.5)

    def heal(self) -> None:
        """What a test broke is whole again: nothing is frozen, no job runs, links are up, three Ray nodes are alive and stay."""
        for host in self.hosts:
            host.thaw()
            host.heal_link()
        while self.drained:
            self.drained.pop().kill()
        if not self.head.listens(DASHBOARD_PORT):
            for node in self.nodes:
                node.kill()
            self.start_nodes()
        for job in self.ask("/api/jobs/"):
            if job["submission_id"] and job["status"] in ("PENDING", "RUNNING"):
                self.stop(job["submission_id"])
        for node in self.nodes:
            if not node.processes_titled("raylet/raylet") or node.address not in self.alive():
                node.kill()
                until(lambda node=node: node.address not in self.alive(), 60, f"{node.name} is missed")
                node.start()
        self.wait_for_nodes(3)

    def stop(self, job: str) -> None:
        """As `ray job stop`, and waits for its end."""
        self.ask(f"/api/jobs/{job}/stop", "POST")
        self.wait(job)

    def drivers(self) -> list[int]:
        """Processes of the submitted commands (`python -m jobs...`, or paced.py's): those that wait for Ray."""
        return [pid for module in ("jobs.", "tests.multihost.") for pid in self.head.processes_titled(f"-m {module}")]


def copy_code(to: Path) -> None:
    """What a clean clone would hold, and what is changed or new here: whatever git does not ignore."""
    listed = system("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
