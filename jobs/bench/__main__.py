"""Measure speed and memory, as ratios against a peer or a limit in the same run.

    python -m jobs.bench model                   ConvGRU at the paper's sizes, forward and backward
    python -m jobs.bench model --batch 64        on a GPU, with the whole training step
    python -m jobs.bench order                   the order of 10^8 samples on 4,096 ranks, and how well it mixes
    python -m jobs.bench read                    random clips against webdataset + PyAV and against libavcodec alone; memory
    python -m jobs.bench pack                    packing against the bare ffmpeg program; memory
    python -m jobs.bench train --workers 2       training against the same loop on one batch in memory; from a slow store
    python -m jobs.bench soak --minutes 20       training while something is killed every 20 to 60 s, against the undisturbed run

What came out, with date and machine, is in docs/benchmarks.md. All but train and soak need neither ray, deepspeed nor mlflow.

--json FILE holds: bench, machine, tables {title: rows}.
"""

import platform
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from jobs.bench.model import Model, bench_model
from jobs.bench.order import OrderBench, bench_order
from jobs.bench.pack import Pack, bench_pack
from jobs.bench.read import Read, bench_read
from jobs.bench.soak import Soak, bench_soak
from jobs.bench.train import TrainBench, bench_train
from jobs.command import STYLE, finish, prog, readable_help, run_command

Bench = Model | OrderBench | Read | Pack | TrainBench | Soak
BENCHES = {"model": Model, "order": OrderBench, "read": Read, "pack": Pack, "train": TrainBench, "soak": Soak}


def parse() -> Bench:
    with readable_help():
        return tyro.extras.subcommand_cli_from_dict(BENCHES, prog=prog(), description=__doc__, config=STYLE)


def main(job: Bench) -> int:
    match job:
        case Model():
            tables = bench_model(job)
        case OrderBench():
            tables = bench_order(job)
        case Read():
            tables = bench_read(job)
        case Pack():
            tables = bench_pack(job)
        case TrainBench():
            tables = bench_train(job)
        case Soak():
            tables = bench_soak(job)
    name = next(name for name, kind in BENCHES.items() if isinstance(job, kind))
    for title, rows in tables.items():
        show(title, rows)
    finish(f"measured on {machine()}", {"bench": name, "machine": machine(), "tables": tables}, job.json)
    return 0


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


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


if __name__ == "__main__":
    run_command(lambda: main(parse()))
