"""Checks of machines: packages, code, GPUs, DeepSpeed, limits, disks, storage and shards. They ask nothing of any machine."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from packaging.requirements import Requirement

from jobs.doctor.facts import MAIN_PACKAGES, OWN_PACKAGES, MachineFacts
from jobs.doctor.findings import GIB, Finding, by_value, error, everywhere, megabytes, names, ok, size, warning

MIN_SHARED_MEMORY_BYTES = 1 * GIB  # Docker gives 64 MiB
MIN_FREE_BYTES = 10 * GIB
RAY_DISK_LIMIT = 0.95  # a fuller disk takes no more of Ray's objects (local_fs_capacity_threshold)
MIN_OPEN_FILES = 4096
MIN_CORES_PER_GPU = 4  # they decode for it
SLOW_READ_BYTES = 20 * 2**20  # a second, of a shard
MIN_READ_BYTES = 4 * 2**20  # a speed of fewer bytes says little


def check_machines(machines: Sequence[MachineFacts]) -> list[Finding]:
    """All checks of each machine, and of several against each other."""
    checks: list[Callable[[Sequence[MachineFacts]], list[Finding]]] = [
        check_versions, check_code, check_gpus, check_engine, check_cores, check_shared_memory, check_open_files,
        check_temporary_disk, check_storage, check_shards,
    ]  # fmt: skip
    return [finding for check in checks for finding in check(machines)]


# Packages


def check_versions(machines: Sequence[MachineFacts]) -> list[Finding]:
    """Versions are within pyproject.toml's ranges, and the same on all machines."""
    found = [*check_ranges(machines), *check_same_versions(machines)]
    first = machines[0]
    shown = ", ".join(
        f"{name} {first.versions[name]}" for name in ("python", *MAIN_PACKAGES) if first.versions.get(name)
    )
    build = f"CUDA {first.cuda}" if first.cuda else "built for CPUs"
    return found or [ok("versions", f"{shown} ({build}){everywhere(machines)}")]


def check_ranges(machines: Sequence[MachineFacts]) -> list[Finding]:
    found = []
    for requirement in map(Requirement, machines[0].requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name, allowed = requirement.name.lower(), requirement.specifier
        bad = [
            each for each in machines
            if (version := each.versions.get(name)) is None or not allowed.contains(version, prereleases=True)
        ]  # fmt: skip
        if bad:
            version = bad[0].versions.get(name) or "missing"
            fix = f"pip install -c constraints.txt '{requirement.name}{allowed}'"
            if name == "python":
                fix = "install Python 3.11 or newer, and run make venv with it"
            found.append(error("versions", f"{name} is {version} on {names(bad)}; expected {allowed or 'any'}", fix))
    return found


def check_same_versions(machines: Sequence[MachineFacts]) -> list[Finding]:
    found = []
    for name in ("python", *MAIN_PACKAGES):
        by_version = grouped(machines, lambda each, name=name: each.versions.get(name))
        if len(by_version) > 1:
            fix = f"pip install -c constraints.txt {name}  # with the same constraints.txt on all machines"
            if name == "python":
                fix = "install the same Python on all machines: Ray sends functions between them"
            found.append(error("versions", f"{name} differs: {by_value(by_version)}", fix))
    by_build = grouped(machines, lambda each: each.cuda or "CPUs")
    if len(by_build) > 1:
        text = f"torch is built for different devices: {by_value(by_build)}"
        found.append(warning("versions", text, "use machines of one kind in a run, or the same build of torch on all"))
    return found


def check_code(machines: Sequence[MachineFacts]) -> list[Finding]:
    by_digest = grouped(machines, lambda each: each.code[:12])
    if len(by_digest) > 1:
        text = f"{', '.join(OWN_PACKAGES)} differ: {by_value(by_digest)}"
        return [error("code", text, "submit jobs with the code: ray job submit --working-dir . -- python -m jobs...")]
    return [ok("code", f"{next(iter(by_digest))}{everywhere(machines)}")]


def grouped(
    machines: Sequence[MachineFacts], key: Callable[[MachineFacts], str | None]
) -> dict[str | None, list[MachineFacts]]:
    groups: dict[str | None, list[MachineFacts]] = defaultdict(list)
    for each in machines:
        groups[key(each)].append(each)
    return groups


# Devices


def check_gpus(machines: Sequence[MachineFacts]) -> list[Finding]:
    found = []
    for each in machines:
        found.append(check_gpus_of(each))
        if each.devices.compile_error:
            text = f"{each.name}: the ConvGRU's kernels run uncompiled, slower ({each.devices.compile_error})"
            found.append(warning("GPUs", text, "apt-get install gcc python3-dev"))
    return found


def check_gpus_of(machine: MachineFacts) -> Finding:
    gpus, name, driver = machine.devices.gpus, machine.name, machine.driver
    broken = [f"GPU {number}: {gpu.error}" for number, gpu in enumerate(gpus) if gpu.error]
    if broken:
        text = f"{name}: {'; '.join(broken)}"
        return error("GPUs", text, "nvidia-smi  # and restart the machine if that does not say why")
    if machine.nvidia_gpus > len(gpus) and machine.cuda is None:
        text = f"{name} has {machine.nvidia_gpus} GPUs (driver {driver}), and a torch that is built for CPUs"
        return warning("GPUs", text, "pip install torch  # the build for CUDA, see https://pytorch.org/get-started")
    if machine.nvidia_gpus > len(gpus):
        text = f"{name}: the driver {driver} sees {machine.nvidia_gpus} GPUs, torch (CUDA {machine.cuda}) {len(gpus)}"
        return error("GPUs", text, "unset CUDA_VISIBLE_DEVICES, or install a driver for torch's CUDA")
    if not gpus:
        return ok("GPUs", f"{name}: none, trains on CPUs")
    kinds = sorted({f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB" for gpu in gpus})
    return ok("GPUs", f"{name}: {len(gpus)} x {' and '.join(kinds)}; driver {driver}, torch's CUDA {machine.cuda}")


def check_engine(machines: Sequence[MachineFacts]) -> list[Finding]:
    found = [
        error(
            "DeepSpeed", f"{each.name}: {each.devices.engine_error}", "python -m jobs.doctor.device  # shows all output"
        )
        for each in machines
        if each.devices.engine_error
    ]
    return found or [ok("DeepSpeed", f"an engine starts and takes a step{everywhere(machines)}, no compiler needed")]


def check_cores(machines: Sequence[MachineFacts]) -> list[Finding]:
    found = []
    for each in machines:
        count = len(each.devices.gpus)
        if count and each.cores < MIN_CORES_PER_GPU * count:
            text = f"{each.name}: {each.cores} to decode videos for {count} GPUs; expected {MIN_CORES_PER_GPU} a GPU"
            fix = "use fewer GPUs there, or more cores; `perf/data_wait_fraction` in MLflow shows whether it matters"
            found.append(warning("CPU cores", text, fix))
    cores = " + ".join(str(each.cores) for each in machines)
    memory = " + ".join(f"{each.memory_bytes / GIB:.0f}" for each in machines)
    return found or [ok("CPU cores", f"{cores}; memory {memory} GiB")]


# Limits


def check_shared_memory(machines: Sequence[MachineFacts]) -> list[Finding]:
    sizes = [(each.name, each.shared_memory.total_bytes) for each in machines if each.shared_memory]
    fix = "docker run --shm-size=8g ...  # or: mount -o remount,size=8g /dev/shm"
    found = [
        warning("/dev/shm", f"{name}: {size(total)}; Ray and NCCL exchange data there, expected 1 GiB or more", fix)
        for name, total in sizes
        if total < MIN_SHARED_MEMORY_BYTES
    ]
    return found or ([ok("/dev/shm", " + ".join(size(total) for _, total in sizes))] if sizes else [])


def check_open_files(machines: Sequence[MachineFacts]) -> list[Finding]:
    found = []
    for each in machines:
        if not 0 <= each.open_files < MIN_OPEN_FILES:
            continue
        hard = each.open_files_hard
        fix = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}  # before `ray start`"
        if 0 < hard < MIN_OPEN_FILES:
            fix = (
                f"the hard limit is {hard}: raise it in /etc/security/limits.conf, or docker run --ulimit nofile=65536"
            )
        found.append(warning("open files", f"{each.name}: at most {each.open_files}; expected {MIN_OPEN_FILES}", fix))
    return found or [ok("open files", f"{min(each.open_files for each in machines):,} or more")]


def check_temporary_disk(machines: Sequence[MachineFacts]) -> list[Finding]:
    found, fix = [], "make room, or: ray start --temp-dir /A/LARGER/DISK"
    for each in machines:
        disk = each.temporary
        if disk.free_bytes < (1 - RAY_DISK_LIMIT) * disk.total_bytes:
            used = 1 - disk.free_bytes / disk.total_bytes
            text = (
                f"{each.name}: {disk.path} is {used:.0%} full; beyond {RAY_DISK_LIMIT:.0%} Ray stores no more objects"
            )
            found.append(error("Ray's disk", text, fix))
        elif disk.free_bytes < MIN_FREE_BYTES:
            text = f"{each.name}: {size(disk.free_bytes)} free in {disk.path}, for Ray's logs and for objects beyond memory"
            found.append(warning("Ray's disk", text, fix))
    return found or [ok("Ray's disk", f"{size(min(each.temporary.free_bytes for each in machines))} or more free")]


# Storage and shards


def check_storage(machines: Sequence[MachineFacts]) -> list[Finding]:
    """Each machine can write, read and delete there; a folder has room."""
    found = []
    for each in machines:
        if each.storage_error:
            found.append(error("storage", f"{each.name}: {each.storage_error}", storage_fix(each)))
        elif each.storage and each.storage.free_bytes < MIN_FREE_BYTES:
            text = f"{each.name}: {size(each.storage.free_bytes)} free in {each.storage.path}"
            found.append(
                warning("storage", text, "make room, or choose another --storage, or keep fewer checkpoints: --keep")
            )
    free = [each.storage.free_bytes for each in machines if each.storage]
    room = f", {size(min(free))} free" if free else ""
    return found or [ok("storage", f"files can be written, read and deleted{everywhere(machines)}{room}")]


def storage_fix(machine: MachineFacts) -> str:
    if machine.storage is not None:
        path = machine.storage.path
        return f"mkdir -p {path} && touch {path}/x  # as the user that Ray runs as there"
    return (
        "give that machine the right to write there, before `ray start`: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_ENDPOINT_URL (s3://), GOOGLE_APPLICATION_CREDENTIALS (gs://)"
    )


def check_shards(machines: Sequence[MachineFacts]) -> list[Finding]:
    """Each machine reads the same shards, fast enough."""
    found = []
    for each in machines:
        reading = each.reading
        if reading is None:
            continue
        if reading.error:
            found.append(error("shards", f"{each.name}: {reading.error}", shards_fix(reading.error)))
            continue
        speed = f"{1000 * reading.first_byte_seconds:.0f} ms to the first byte, {megabytes(reading.bytes_per_second)}/s"
        text = f"{each.name}: {speed} of {reading.shard}"
        if reading.bytes_per_second < SLOW_READ_BYTES and reading.read_bytes >= MIN_READ_BYTES:
            fix = "move the shards nearer, if perf/data_wait_fraction in MLflow shows that a training waits for them"
            found.append(warning("shards", text, fix))
        else:
            found.append(ok("shards", text))
    read = [each for each in machines if each.reading and not each.reading.error]
    by_digest = grouped(read, lambda each: str(each.reading and each.reading.digest)[:12])
    if len(by_digest) > 1:
        text = f"not the same on all machines: dataset.json {by_value(by_digest)}"
        found.append(error("shards", text, "choose one place that all machines see"))
    return found


def shards_fix(reason: str) -> str:
    if "dataset.json: not found" in reason:
        return "choose a place that all machines see (a network folder, s3://, gs://, https://)"
    return "reach it from there first: python -m jobs.inspect_shards info SHARDS"
