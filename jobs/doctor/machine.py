"""What one machine is like, before a run: everything the doctor wants to know of it, gathered on it.

    gather(Order) ──> Facts        on this machine, or in an actor on each machine of a cluster (doctor_cluster.py)
    Facts ──> findings             doctor_findings.py, which asks nothing of any machine

Nothing here judges, and nothing raises for what a machine lacks: what could not be done is told in words. A token is told as a
digest that is salted anew each time, so that machines can be compared and nobody learns of it.
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
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from cluster.progress import first_line
from jobs.doctor.device import Devices, Trial
from shards.dataset import read_dataset
from shards.store import BadShards, BadUrl, absolute_url, open_store, retry

ROOT = Path(__file__).parents[2]
PACKAGES = ("grurcn", "shards", "cluster", "jobs")  # whose code must be the same everywhere
SHOWN = ("torch", "ray", "deepspeed", "webdataset", "av", "mlflow")  # the versions that runs are made of
PATIENCE_SECONDS = 5.0  # for a store that does not answer; a run has more
READ_BYTES = 16 * 2**20  # of a shard, for its speed
MARK = ".doctor-"  # how our files in the storage begin; what is random follows


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked of every machine alike."""

    storage: str  # absolute
    shards: str | None  # absolute
    mark: str  # of this examination: in the names of its files in the storage, and the salt of digests


@dataclass(frozen=True, kw_only=True)
class Token:
    """Ray's authentication, as a process on the machine finds it."""

    mode: str  # "token", "disabled", ... ; as Ray decides it, "unset" if nothing does
    place: str | None  # the environment variable or file that the token is in; None: there is none
    file_mode: int | None  # permission bits of the file
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system that a folder is in."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How shards are read from the machine."""

    error: str | None = None
    digest: str | None = None  # of dataset.json
    shard: str | None = None
    first_byte_seconds: float = 0.0
    read_bytes: int = 0
    bytes_per_second: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One machine."""

    name: str
    address: str  # by which Ray knows it; without Ray that of its name
    versions: dict[str, str | None]  # of SHOWN, python and grurcn's dependencies; None: not installed
    code: str  # digest of our own source files
    requirements: tuple[str, ...] = ()  # of pyproject.toml, or of the installed package
    cuda: str | None  # that torch was built for
    driver: str | None  # NVIDIA's, if there is one
    nvidia_gpus: int  # that the driver tells of
    devices: Devices
    token: Token
    storage: Disk | None = None  # of a folder
    storage_error: str | None = None  # why a file cannot be written to the storage, or read or deleted there
    reading: Reading | None = None
    shared_memory: Disk | None = None  # /dev/shm
    temporary: Disk
    open_files: int  # soft limit
    open_files_most: int  # hard limit
    cores: int
    memory_bytes: int
    host_address: str | None  # what the host name resolves to, which gloo and NCCL ask; None: to nothing
    interfaces: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> IPv4 addresses
    named_interfaces: dict[str, str] = field(default_factory=dict)  # of GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
    listening: dict[int, tuple[str, ...]] = field(default_factory=dict)  # port -> addresses that something listens at


def gather(order: Order, address: str | None = None, temporary: str | None = None) -> Facts:
    """All facts of this machine. address and temporary folder: as Ray has them."""
    with Trial() as trial:  # first, as importing DeepSpeed takes longest
        return gather_beside(trial, order, address, temporary)


def gather_beside(trial: Trial, order: Order, address: str | None, temporary: str | None) -> Facts:
    driver = nvidia_driver()
    storage_error = try_storage(order)
    return Facts(
        name=socket.gethostname(),
        address=address or host_address() or "127.0.0.1",
        versions=versions(),
        code=code_digest(ROOT),
        requirements=requirements(),
        cuda=torch.version.cuda,
        driver=driver[0] if driver else None,
        nvidia_gpus=driver[1] if driver else 0,
        token=token(os.environ, Path.home(), order.mark),
        storage=None if "://" in order.storage else disk(Path(order.storage)),
        storage_error=storage_error,
        reading=read_shards(order.shards) if order.shards else None,
        shared_memory=disk(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        temporary=disk(Path(temporary or tempfile.gettempdir())),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        open_files_most=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        host_address=host_address(),
        interfaces=interfaces(),
        named_interfaces={
            name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(name)
        },
        listening=listening(),
        devices=trial.result(),
    )


def versions() -> dict[str, str | None]:
    wanted = ({requirement_name(text) for text in requirements()} | set(SHOWN)) - {"python"}
    return {"python": platform.python_version(), **{name: installed(name) for name in sorted(wanted)}}


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> tuple[str, ...]:
    """What grurcn wants: as pyproject.toml beside this code says, else as the installed package does."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return (f"python{project['requires-python']}", *project["dependencies"])
    try:
        about = importlib.metadata.metadata("grurcn")
        needs = importlib.metadata.requires("grurcn") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    return (f"python{about['Requires-Python']}", *(need for need in needs if "extra ==" not in need))


def requirement_name(text: str) -> str:
    match = re.match(r"[\w.-]+", text)
    assert match is not None
    return match[0].lower()


def code_digest(root: Path) -> str:
    """SHA-256 over the names and bytes of our source files."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".json") and path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def nvidia_driver() -> tuple[str, int] | None:
    """(the driver's version, how many GPUs it tells of); None where there is no such driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return (lines[0], len(lines)) if lines else None


def token(environment: Mapping[str, str], home: Path, salt: str) -> Token:
    """Where Ray looks for its token, in the order in which it does."""
    mode = environment.get("RAY_AUTH_MODE", "unset").lower()
    if environment.get("RAY_AUTH_TOKEN"):
        return Token(
            mode=mode, place="RAY_AUTH_TOKEN", file_mode=None, digest=salted(environment["RAY_AUTH_TOKEN"], salt)
        )
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    try:
        content, permissions = path.read_text(encoding="utf-8").strip(), stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError):
        return Token(mode=mode, place=None, file_mode=None, digest=None)
    return Token(
        mode=mode, place=str(path), file_mode=permissions, digest=salted(content, salt) if content else None
    )  # fmt: skip


def salted(secret: str, salt: str) -> str:
    return hmac.new(salt.encode(), secret.encode(), hashlib.sha256).hexdigest()


def disk(path: Path) -> Disk:
    """The file system that a folder is in, or would be if it were there."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return Disk(path=str(path), total_bytes=usage.total, free_bytes=usage.free)


def host_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def interfaces() -> dict[str, tuple[str, ...]]:
    """Those that are up."""
    up = {name for name, about in psutil.net_if_stats().items() if about.isup}
    return {
        name: tuple(each.address for each in addresses if each.family == socket.AF_INET)
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if name in up
    }


def listening() -> dict[int, tuple[str, ...]]:
    """TCP ports of this machine, and the addresses at which they are open. Nothing where the system does not tell."""
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
    """Who waits for an answer wants it now: a store that is away is given up after PATIENCE_SECONDS."""
    before = retry.PATIENCE_SECONDS
    retry.PATIENCE_SECONDS = PATIENCE_SECONDS
    try:
        yield
    finally:
        retry.PATIENCE_SECONDS = before


def try_storage(order: Order) -> str | None:
    """Writes a file, reads it back and deletes it; why one of them failed, or None."""
    name, content = f"{MARK}{order.mark}-try-{socket.gethostname()}-{os.getpid()}", os.urandom(1000)
    doing = "opening"
    try:
        with impatient():
            store = open_store(order.storage)
            doing = "writing"
            with store.written(name) as file:
                file.write(content)
            doing = "reading"
            found = store.read_file(name)
            doing = "deleting"
            store.delete([name])
            if found != content:
                return f"reading gave {len(found)} bytes that are not the {len(content)} that were written"
    except (BadShards, BadUrl, OSError) as error:
        return f"{doing}: {words(error)}"
    return None


def read_shards(url: str) -> Reading:
    """The description, the first byte of the largest shard, and READ_BYTES of it."""
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
        return Reading(error=words(error))
    return Reading(
        digest=info.digest,
        shard=largest.name,
        first_byte_seconds=first - started,
        read_bytes=size,
        bytes_per_second=size / max(seconds, 1e-9),
    )


def words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return first_line(error)


def absolute_order(storage: str, shards: str | None, mark: str) -> Order:
    """Raises BadUrl for a place that is none."""
    return Order(storage=absolute_url(storage), shards=absolute_url(shards) if shards else None, mark=mark)
