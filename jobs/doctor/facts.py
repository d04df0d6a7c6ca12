"""What the doctor finds out about machines, a cluster and MLflow. Nothing here judges.

machine.py   ──> MachineFacts    of one machine
cluster.py   ──> ClusterFacts    of the machines of a Ray cluster together
tracking.py  ──> TrackingFacts   of MLflow
"""

from dataclasses import dataclass, field

OWN_PACKAGES = ("grurcn", "shards", "cluster", "jobs")  # their code must be the same on all machines
MAIN_PACKAGES = ("torch", "ray", "deepspeed", "webdataset", "av", "mlflow")  # their versions must be the same


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every machine is asked for."""

    storage: str  # absolute
    shards: str | None  # absolute
    marker: str  # random: names the files in the storage, and salts digests


# A machine


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as torch sees it."""

    name: str
    memory_bytes: int
    error: str | None  # why it cannot multiply matrices


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Results of the trials on one machine."""

    gpus: tuple[Gpu, ...] = ()
    engine_error: str | None = None  # why a DeepSpeed engine did not take a step
    compile_error: str | None = None  # why the ConvGRU's kernels are not compiled; None if they are, or without a GPU


@dataclass(frozen=True, kw_only=True)
class RayToken:
    """Ray's authentication, as a process on the machine finds it."""

    mode: str  # RAY_AUTH_MODE: "token", "disabled", ...; "unset" without it
    source: str | None  # the environment variable or file with the token; None: there is none
    file_mode: int | None  # permission bits of the file
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system of a folder."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardReading:
    """How a machine reads shards."""

    error: str | None = None
    digest: str | None = None  # of dataset.json
    shard: str | None = None
    first_byte_seconds: float = 0.0
    read_bytes: int = 0
    bytes_per_second: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """One machine."""

    name: str
    address: str  # as Ray knows it; without Ray the address of its host name
    versions: dict[str, str | None]  # of Python, grurcn's dependencies and MAIN_PACKAGES; None: not installed
    code: str  # digest of our own source files
    requirements: tuple[str, ...] = ()  # of pyproject.toml, or of the installed package
    cuda: str | None  # version that torch was built for
    driver: str | None  # version of NVIDIA's driver
    nvidia_gpus: int  # that the driver sees
    devices: Devices
    token: RayToken
    storage: Disk | None = None  # None for a URL
    storage_error: str | None = None  # why a file cannot be written, read or deleted in the storage
    reading: ShardReading | None = None
    shared_memory: Disk | None = None  # /dev/shm
    temporary: Disk
    open_files: int  # soft limit
    open_files_hard: int  # hard limit
    cores: int
    memory_bytes: int
    host_address: str | None  # what the host name resolves to, which gloo and NCCL use; None: nothing
    interfaces: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> IPv4 addresses
    named_interfaces: dict[str, str] = field(default_factory=dict)  # GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
    listening: dict[int, tuple[str, ...]] = field(default_factory=dict)  # port -> addresses that are listened at


# A cluster


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What one process saw of a process group."""

    error: str | None = None
    bytes_per_second: float = 0.0  # of a tensor that is added up over all processes


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """Machines together. Keys are the machines' names."""

    unanswered: dict[str, str]  # machines that are alive for Ray and did not answer: why
    clock_offsets: dict[str, float]  # seconds that a clock is ahead of this machine's
    clock_errors: dict[str, float]  # seconds that the offset may be wrong by
    unseen_files: dict[str, tuple[str, ...]]  # machine -> machines whose files in the storage it does not see
    groups: dict[str, dict[str, GroupResult]]  # backend -> machine -> result
    dashboard: str | None = None  # HOST:PORT


# MLflow


@dataclass(frozen=True, kw_only=True)
class TrackingFacts:
    """The place that tracks runs."""

    uri: str
    error: str | None = None  # why it cannot be used
    access_denied: bool = False  # it answers, and wants other credentials
    open_to_all: bool = False  # it answers requests without credentials
    artifacts_error: str | None = None  # why files cannot be sent there
    password_sent: bool = False  # with each of our requests
    address: str | None = None  # of the server
