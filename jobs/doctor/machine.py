"""Facts about one machine, gathered on it: on this machine, or in an actor on each machine of a cluster (cluster.py).

Nothing raises for what a machine lacks: facts say in words what failed. A token becomes a digest with a new salt each time, so
that machines can be compared and the token stays secret.
"""

import hashlib
import hmac
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from jobs.doctor.device import Trials
from jobs.doctor.facts import MAIN_PACKAGES, OWN_PACKAGES, Disk, MachineFacts, RayToken, Request, ShardReading
from shards.dataset import read_dataset
from shards.store import BadShards, BadUrl, absolute_url, error_line, open_store, retry

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 5.0  # for a store that does not answer; a run waits longer
READ_BYTES = 16 * 2**20  # of a shard, to measure the speed
PREFIX = ".doctor-"  # of our files in the storage; Request.marker follows


def gather_machine(request: Request, address: str | None = None, temporary: str | None = None) -> MachineFacts:
    """All facts about this machine. address and temporary folder: Ray's, where it runs."""
    with Trials() as trials:  # first, as importing DeepSpeed takes longest
        return gather_during(trials, request, address, temporary)


def gather_during(trials: Trials, request: Request, address: str | None, temporary: str | None) -> MachineFacts:
    driver = nvidia_driver()
    storage_error = try_storage(request)
    return MachineFacts(
        name=socket.gethostname(),
        address=address or find_host_address() or "127.0.0.1",
        versions=installed_versions(),
        code=code_digest(ROOT),
        requirements=own_requirements(),
        cuda=torch.version.cuda,
        driver=driver[0] if driver else None,
        nvidia_gpus=driver[1] if driver else 0,
        token=find_token(os.environ, Path.home(), request.marker),
        storage=None if "://" in request.storage else disk_of(Path(request.storage)),
        storage_error=storage_error,
        reading=read_shards(request.shards) if request.shards else None,
        shared_memory=disk_of(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        temporary=disk_of(Path(temporary or tempfile.gettempdir())),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        open_files_hard=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        host_address=find_host_address(),
        interfaces=find_interfaces(),
        named_interfaces={
            name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(name)
        },
        listening=find_listening(),
        devices=trials.result(),
    )


def installed_versions() -> dict[str, str | None]:
    packages = ({requirement_name(text) for text in own_requirements()} | set(MAIN_PACKAGES)) - {"python"}
    return {"python": platform.python_version(), **{name: installed(name) for name in sorted(packages)}}


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_requirements() -> tuple[str, ...]:
    """The requirements of grurcn: of pyproject.toml beside this code, or of the installed package."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return (f"python{project['requires-python']}", *project["dependencies"])
    try:
        metadata = importlib.metadata.metadata("grurcn")
        requirements = importlib.metadata.requires("grurcn") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    return (f"python{metadata['Requires-Python']}", *(each for each in requirements if "extra ==" not in each))


def requirement_name(text: str) -> str:
    match = re.match(r"[\w.-]+", text)
    assert match is not None
    return match[0].lower()


def code_digest(root: Path) -> str:
    """SHA-256 over the names and bytes of our source files."""
    digest = hashlib.sha256()
    for package in OWN_PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".json") and path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def nvidia_driver() -> tuple[str, int] | None:
    """(the driver's version, the number of GPUs it sees); None without a driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return (lines[0], len(lines)) if lines else None


def find_token(environment: Mapping[str, str], home: Path, salt: str) -> RayToken:
    """Looks for the token where Ray does, in its order."""
    mode = environment.get("RAY_AUTH_MODE", "unset").lower()
    if environment.get("RAY_AUTH_TOKEN"):
        digest = salted(environment["RAY_AUTH_TOKEN"], salt)
        return RayToken(mode=mode, source="RAY_AUTH_TOKEN", file_mode=None, digest=digest)
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    try:
        content, permissions = path.read_text(encoding="utf-8").strip(), stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError):
        return RayToken(mode=mode, source=None, file_mode=None, digest=None)
    digest = salted(content, salt) if content else None
    return RayToken(mode=mode, source=str(path), file_mode=permissions, digest=digest)


def salted(secret: str, salt: str) -> str:
    return hmac.new(salt.encode(), secret.encode(), hashlib.sha256).hexdigest()


def disk_of(path: Path) -> Disk:
    """The file system of a folder, which need not exist yet."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(existing)
    return Disk(path=str(path), total_bytes=usage.total, free_bytes=usage.free)


def find_host_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def find_interfaces() -> dict[str, tuple[str, ...]]:
    """{interface that is up: its IPv4 addresses}"""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: tuple(each.address for each in addresses if each.family == socket.AF_INET)
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if name in up
    }


def find_listening() -> dict[int, tuple[str, ...]]:
    """{open TCP port of this machine: its addresses}; empty where the system does not say."""
    found: dict[int, set[str]] = {}
    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr:
                found.setdefault(each.laddr.port, set()).add(each.laddr.ip)
    except (psutil.Error, OSError):
        return {}
    return {port: tuple(sorted(addresses)) for port, addresses in sorted(found.items())}


# Stores


@contextmanager
def impatient() -> Iterator[None]:
    """Gives up a store that does not answer after PATIENCE_SECONDS, not after the minute of a run."""
    before = retry.PATIENCE_SECONDS
    retry.PATIENCE_SECONDS = PATIENCE_SECONDS
    try:
        yield
    finally:
        retry.PATIENCE_SECONDS = before


def try_storage(request: Request) -> str | None:
    """Writes a file, reads it and deletes it; returns why that failed, or None."""
    name, content = f"{PREFIX}{request.marker}-try-{socket.gethostname()}-{os.getpid()}", os.urandom(1000)
    doing = "opening"
    try:
        with impatient():
            store = open_store(request.storage)
            doing = "writing"
            with store.written(name) as file:
                file.write(content)
            doing = "reading"
            found = store.read_file(name)
            doing = "deleting"
            store.delete([name])
            if found != content:
                return f"reading gave {len(found)} bytes other than the {len(content)} written"
    except (BadShards, BadUrl, OSError) as error:
        return f"{doing}: {error_line(error)}"
    return None


def read_shards(url: str) -> ShardReading:
    """Reads dataset.json, the first byte of the largest shard, and READ_BYTES of it."""
    try:
        with impatient():
            store = open_store(url)
            info = read_dataset(store)
            at = open_store(info.shards_at) if info.shards_at else store
            largest = max(
                (shard for split in info.splits.values() for shard in split), key=lambda shard: shard.size_bytes
            )
            started = time.perf_counter()
            at.read(largest.name, 0, 1)
            first = time.perf_counter()
            size = min(READ_BYTES, largest.size_bytes)
            at.read(largest.name, largest.size_bytes - size, size)
            seconds = time.perf_counter() - first
    except (BadShards, BadUrl, OSError) as error:
        return ShardReading(error=error_line(error))
    return ShardReading(
        digest=info.digest,
        shard=largest.name,
        first_byte_seconds=first - started,
        read_bytes=size,
        bytes_per_second=size / max(seconds, 1e-9),
    )


def absolute_request(storage: str, shards: str | None, marker: str) -> Request:
    """Raises BadUrl for a URL of an unknown kind."""
    return Request(storage=absolute_url(storage), shards=absolute_url(shards) if shards else None, marker=marker)
