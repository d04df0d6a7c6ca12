"""Facts of machines -> what is well, doubtful or wrong, with the line that mends it. Pure: nothing is asked here.

ok        as a run wants it
warning   a run will work, but slower, less safely, or not as long as it could
wrong     a run will fail, or end in what nobody wants
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement

from jobs.doctor.machine import PACKAGES, SHOWN, Disk, Facts

GIB = 2**30
LEAST_SHARED_MEMORY = 1 * GIB  # Docker gives 64 MiB
LEAST_FREE = 10 * GIB
RAY_DISK_LIMIT = 0.95  # beyond which Ray makes no more objects (local_fs_capacity_threshold)
LEAST_OPEN_FILES = 4096
LEAST_CORES_PER_GPU = 4  # that decode for it
SLOW_READ_BYTES = 20 * 2**20  # a second, of a shard
ENOUGH_READ_BYTES = 4 * 2**20  # that a speed can be told from
SLOW_NETWORK_BYTES = 12 * 2**20  # a second, of a sum over all machines: 100 Mbit/s
CLOCK_WARNING_SECONDS, CLOCK_WRONG_SECONDS = 2.0, 300.0  # stores refuse what was signed 15 minutes off

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of what came out."""

    check: str
    level: Level
    text: str
    mend: str = ""  # a command where there is one, else what to do


def ok(check: str, text: str) -> Finding:
    return Finding(check=check, level="ok", text=text)


def warning(check: str, text: str, mend: str) -> Finding:
    return Finding(check=check, level="warning", text=text, mend=mend)


def wrong(check: str, text: str, mend: str) -> Finding:
    return Finding(check=check, level="wrong", text=text, mend=mend)


def judge(machines: Sequence[Facts]) -> list[Finding]:
    """All that each machine's facts, and those of several side by side, tell."""
    checks: list[Callable[[Sequence[Facts]], list[Finding]]] = [
        versions, code, gpus, engine, cpus, shared_memory, open_files, temporary_disk, storage, shards,
    ]  # fmt: skip
    return [finding for check in checks for finding in check(machines)]


# Packages


def versions(machines: Sequence[Facts]) -> list[Finding]:
    """Within pyproject.toml's ranges, and the same on all machines."""
    found = [*out_of_range(machines), *different(machines)]
    first = machines[0].versions
    shown = ", ".join(f"{name} {first[name]}" for name in ("python", *SHOWN) if first.get(name))
    build = machines[0].cuda
    cuda = f"CUDA {build}" if build else "built for CPUs"
    return found or [ok("versions", f"{shown} ({cuda}){everywhere(machines)}")]


def out_of_range(machines: Sequence[Facts]) -> list[Finding]:
    found = []
    wanted = [Requirement(text) for text in machines[0].requirements]
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate():
            continue
        name = need.name.lower()
        bad = [
            each for each in machines
            if (version := each.versions.get(name)) is None or not need.specifier.contains(version, prereleases=True)
        ]  # fmt: skip
        if bad:
            has = bad[0].versions.get(name) or "not there"
            way = (
                "install Python 3.11 or newer, and make venv with it"
                if name == "python"
                else f"pip install -c constraints.txt '{need.name}{need.specifier}'"
            )
            found.append(wrong("versions", f"{name} is {has} on {listed(bad)}; wanted {need.specifier or 'any'}", way))
    return found


def different(machines: Sequence[Facts]) -> list[Finding]:
    found = []
    for name in ("python", *SHOWN):
        here = {}
        for each in machines:
            here.setdefault(each.versions.get(name), []).append(each)
        if len(here) > 1:
            way = f"pip install -c constraints.txt {name}  # with the same constraints.txt on all machines"
            if name == "python":
                way = "install the same Python on all machines: Ray sends functions between them"
            found.append(wrong("versions", f"{name} differs: {sides(here)}", way))
    builds = {}
    for each in machines:
        builds.setdefault(each.cuda or "CPUs", []).append(each)
    if len(builds) > 1:
        found.append(
            warning(
                "versions",
                f"torch is built for different devices: {sides(builds)}",
                "use machines of one kind in a run, or the same build of torch on all",
            )
        )
    return found


def code(machines: Sequence[Facts]) -> list[Finding]:
    here: dict[str | None, list[Facts]] = {}
    for each in machines:
        here.setdefault(each.code[:12], []).append(each)
    if len(here) > 1:
        return [
            wrong(
                "code",
                f"{', '.join(PACKAGES)} differ: {sides(here)}",
                "submit jobs with the code: ray job submit --working-dir . -- python -m jobs...",
            )
        ]
    return [ok("code", f"{next(iter(here))}{everywhere(machines)}")]


# Devices


def gpus(machines: Sequence[Facts]) -> list[Finding]:
    found = []
    for each in machines:
        seen, told = len(each.devices.gpus), each.nvidia_gpus
        broken = [f"GPU {number}: {gpu.error}" for number, gpu in enumerate(each.devices.gpus) if gpu.error]
        if broken:
            found.append(
                wrong(
                    "GPUs",
                    f"{each.name}: {'; '.join(broken)}",
                    "nvidia-smi  # and restart the machine if it says no more",
                )
            )
        elif told > seen and each.cuda is None:
            text = f"{each.name} has {told} GPUs (driver {each.driver}), and a torch that is built for CPUs"
            found.append(
                warning("GPUs", text, "pip install torch  # the build for CUDA, see https://pytorch.org/get-started")
            )
        elif told > seen:
            text = f"{each.name}: the driver {each.driver} tells of {told} GPUs, torch (CUDA {each.cuda}) sees {seen}"
            found.append(wrong("GPUs", text, "unset CUDA_VISIBLE_DEVICES, or install a driver for torch's CUDA"))
        elif seen:
            kinds = sorted({f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB" for gpu in each.devices.gpus})
            found.append(
                ok(
                    "GPUs",
                    f"{each.name}: {seen} x {' and '.join(kinds)}; driver {each.driver}, torch's CUDA {each.cuda}",
                )
            )
        else:
            found.append(ok("GPUs", f"{each.name}: none, trains on CPUs"))
        if each.devices.fused:
            text = f"{each.name}: the ConvGRU's kernels run uncompiled, slower ({each.devices.fused})"
            found.append(warning("GPUs", text, "apt-get install gcc python3-dev"))
    return found


def engine(machines: Sequence[Facts]) -> list[Finding]:
    broken = [each for each in machines if each.devices.engine]
    found = [
        wrong(
            "DeepSpeed", f"{each.name}: {each.devices.engine}", "python -m jobs.doctor.device  # shows all that is said"
        )
        for each in broken
    ]
    return found or [ok("DeepSpeed", f"an engine starts and takes a step{everywhere(machines)}, no compiler needed")]


def cpus(machines: Sequence[Facts]) -> list[Finding]:
    found = []
    for each in machines:
        count = len(each.devices.gpus)
        if count and each.cores < LEAST_CORES_PER_GPU * count:
            found.append(
                warning(
                    "CPU cores",
                    f"{each.name}: {each.cores} for {count} GPUs, which decode the videos; wanted {LEAST_CORES_PER_GPU} a GPU",
                    "use fewer GPUs of the machine, or one with more cores; `perf/data_wait` in MLflow tells whether it matters",
                )
            )
    cores = " + ".join(str(each.cores) for each in machines)
    memory = " + ".join(f"{each.memory_bytes / GIB:.0f}" for each in machines)
    return found or [ok("CPU cores", f"{cores}; memory {memory} GiB")]


# Limits


def shared_memory(machines: Sequence[Facts]) -> list[Finding]:
    small = [each for each in machines if each.shared_memory and each.shared_memory.total_bytes < LEAST_SHARED_MEMORY]
    found = [
        warning(
            "/dev/shm",
            f"{each.name}: {size(each.shared_memory.total_bytes)}, which Ray and NCCL exchange data in; wanted 1 GiB or more",
            "docker run --shm-size=8g ...  # or: mount -o remount,size=8g /dev/shm",
        )
        for each in small
        if each.shared_memory
    ]
    sizes = [size(each.shared_memory.total_bytes) for each in machines if each.shared_memory]
    return found or ([ok("/dev/shm", " + ".join(sizes))] if sizes else [])


def open_files(machines: Sequence[Facts]) -> list[Finding]:
    small = [each for each in machines if 0 <= each.open_files < LEAST_OPEN_FILES]
    found = []
    for each in small:
        most = each.open_files_most
        way = f"ulimit -n {min(most, 65536) if most > 0 else 65536}  # before `ray start`"
        if 0 < most < LEAST_OPEN_FILES:
            way = (
                f"the hard limit is {most}: raise it in /etc/security/limits.conf, or docker run --ulimit nofile=65536"
            )
        found.append(warning("open files", f"{each.name}: {each.open_files} at most; wanted {LEAST_OPEN_FILES}", way))
    return found or [ok("open files", f"{min(each.open_files for each in machines):,} or more")]


def temporary_disk(machines: Sequence[Facts]) -> list[Finding]:
    found = []
    for each in machines:
        disk = each.temporary
        if disk.free_bytes < (1 - RAY_DISK_LIMIT) * disk.total_bytes:
            text = f"{each.name}: {disk.path} is {used(disk):.0%} full; beyond {RAY_DISK_LIMIT:.0%} Ray takes no more objects"
            found.append(wrong("Ray's disk", text, "make room, or: ray start --temp-dir /A/LARGER/DISK"))
        elif disk.free_bytes < LEAST_FREE:
            text = f"{each.name}: {size(disk.free_bytes)} free in {disk.path}; Ray's logs and what memory cannot hold go there"
            found.append(warning("Ray's disk", text, "make room, or: ray start --temp-dir /A/LARGER/DISK"))
    least = min(each.temporary.free_bytes for each in machines)
    return found or [ok("Ray's disk", f"{size(least)} or more free")]


# Storage and shards


def storage(machines: Sequence[Facts]) -> list[Finding]:
    """Whether each machine can write, read and delete; and the room in a folder."""
    found = [
        wrong("storage", f"{each.name}: {each.storage_error}", storage_way_out(each)) for each in machines if each.storage_error
    ]  # fmt: skip
    for each in machines:
        if each.storage and not each.storage_error and each.storage.free_bytes < LEAST_FREE:
            found.append(
                warning(
                    "storage",
                    f"{each.name}: {size(each.storage.free_bytes)} free in {each.storage.path}",
                    "make room, or name another --storage; --keep says how many checkpoints stay",
                )
            )
    free = [each.storage.free_bytes for each in machines if each.storage]
    room = f", {size(min(free))} free" if free else ""
    return found or [ok("storage", f"can be written, read and cleared{everywhere(machines)}{room}")]


def storage_way_out(machine: Facts) -> str:
    if machine.storage is not None:
        return (
            f"mkdir -p {machine.storage.path} && touch {machine.storage.path}/x  # as the user that Ray runs as there"
        )
    return (
        "give that machine the right to write there, before `ray start`: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_ENDPOINT_URL (s3://), GOOGLE_APPLICATION_CREDENTIALS (gs://)"
    )


def shards(machines: Sequence[Facts]) -> list[Finding]:
    """Whether each machine reads the same shards, and how fast."""
    found, digests = [], {}
    for each in machines:
        reading = each.reading
        if reading is None:
            continue
        if reading.error:
            found.append(wrong("shards", f"{each.name}: {reading.error}", shards_way_out(reading.error)))
            continue
        digests.setdefault(reading.digest, []).append(each)
        speed = f"{1000 * reading.first_byte_seconds:.0f} ms to the first byte, {megabytes(reading.bytes_per_second)}/s"
        text = f"{each.name}: {speed} of {reading.shard}"
        if reading.bytes_per_second < SLOW_READ_BYTES and reading.read_bytes >= ENOUGH_READ_BYTES:
            way = "python -m jobs.bench read  # and compare perf/data_wait in MLflow; bring the shards nearer"
            found.append(warning("shards", text, way))
        else:
            found.append(ok("shards", text))
    if len(digests) > 1:
        names = {str(digest)[:12]: each for digest, each in digests.items()}
        found.append(
            wrong(
                "shards",
                f"are not the same everywhere: dataset.json {sides(names)}",
                "name one place that all machines see",
            )
        )
    return found


def shards_way_out(error: str) -> str:
    if "dataset.json: not found" in error:
        return "name a place that all machines see (a network folder, s3://, gs://, https://)"
    return "reach it from there first: python -m jobs.inspect_shards info SHARDS"


# Words


def listed(machines: Iterable[Facts]) -> str:
    return ", ".join(each.name for each in machines)


def sides(groups: dict) -> str:
    """3.11.7 on one, two / 3.12.1 on three"""
    return " / ".join(f"{value or 'not there'} on {listed(machines)}" for value, machines in groups.items())


def everywhere(machines: Sequence[Facts]) -> str:
    return f" on all {len(machines)} machines" if len(machines) > 1 else ""


def used(disk: Disk) -> float:
    return 1 - disk.free_bytes / disk.total_bytes


def size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:,.0f} MiB"


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
