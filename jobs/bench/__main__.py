"""Measure speed and memory as ratios: against a peer, or a limit, in the same run.

    python -m jobs.bench model                   ConvGRU at the paper's sizes, forward and backward
    python -m jobs.bench model --batch 64        on a GPU, with the whole training step
    python -m jobs.bench order                   the order of 10^8 samples on 4,096 ranks, and how well it mixes
    python -m jobs.bench read                    random clips against webdataset + PyAV, and libavcodec alone; memory
    python -m jobs.bench pack                    packing against the bare ffmpeg program; memory
    python -m jobs.bench train --workers 2       training against the same loop on one batch in memory; a slow store

docs/benchmarks.md has results. Only `train` needs ray, deepspeed and mlflow.

--json FILE holds: bench, machine, tables {title: rows}.
"""

import platform
from pathlib import Path

import torch

from jobs.bench.model import ModelBench, bench_model
from jobs.bench.order import OrderBench, bench_order
from jobs.bench.pack import PackBench, bench_pack
from jobs.bench.read import ReadBench, bench_read
from jobs.bench.tables import print_tables
from jobs.bench.train import TrainBench, bench_train
from jobs.command import Command, finish, subcommands

Bench = ModelBench | OrderBench | ReadBench | PackBench | TrainBench
BENCHES = {"model": ModelBench, "order": OrderBench, "read": ReadBench, "pack": PackBench, "train": TrainBench}


def main(job: Bench) -> int:
    match job:
        case ModelBench():
            tables = bench_model(job)
        case OrderBench():
            tables = bench_order(job)
        case ReadBench():
            tables = bench_read(job)
        case PackBench():
            tables = bench_pack(job)
        case TrainBench():
            tables = bench_train(job)
    name = next(name for name, kind in BENCHES.items() if type(job) is kind)
    print_tables(tables)
    finish(f"measured on {machine()}", {"bench": name, "machine": machine(), "tables": tables}, job.json)
    return 0


def machine() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = next(
        (line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


COMMAND = Command(subcommands(BENCHES), main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
