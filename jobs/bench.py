"""Measure speed and memory, as ratios against a peer or a limit in the same run.

    python -m jobs.bench model                   ConvGRU at the paper's sizes, forward and backward
    python -m jobs.bench model --batch 64        on a GPU, with the whole training step
    python -m jobs.bench order                   the order of 10^8 samples on 4,096 ranks, and how well it mixes

What came out, with date and machine, is in docs/benchmarks.md. Needs neither ray, deepspeed nor mlflow.

--json FILE holds: bench, machine, tables {title: rows}.
"""

import platform
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from jobs.bench_model import Model, bench_model
from jobs.bench_order import OrderBench, bench_order
from jobs.command import STYLE, finish, prog, run_command


def parse() -> Model | OrderBench:
    benches = {"model": Model, "order": OrderBench}
    return tyro.extras.subcommand_cli_from_dict(benches, prog=prog(), description=__doc__, config=STYLE)


def main(job: Model | OrderBench) -> int:
    if isinstance(job, OrderBench):
        name, tables = "order", bench_order(job)
    else:
        name, tables = "model", bench_model(job)
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
