"""Tries what training needs of a machine's devices, in a process of its own: python -m jobs.doctor.device

    each GPU            multiplies two matrices, and the product is right
    the ConvGRU on it   its pointwise parts are compiled
    DeepSpeed           an engine starts on the first GPU, or on the CPU, and takes one step

The engine needs no compiler: cluster/engine.py uses no op of DeepSpeed that is compiled. Our own kernels
(grurcn/models/gru_kernels.py) are compiled by torch on a GPU, with a C compiler; without one they run slower.

A driver that hangs or crashes ends this process, and not the one that asked. The last line is JSON: the fields of Devices.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.doctor.facts import Devices, Gpu
from shards.store import error_line

SECONDS = 180.0  # importing torch and DeepSpeed takes ten of them on two busy cores
SIZE = 256  # of matrices of ones: every element of their product is this number


class Trials:
    """Runs the trials in the background. Their process ends with the `with` block."""

    def __enter__(self) -> "Trials":
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.doctor.device"], env={**os.environ, "PYTHONPATH": path}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        return self

    def result(self) -> Devices:
        """Waits for the trials to end."""
        try:
            output, errors = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return Devices(engine_error=f"not started within {SECONDS:g} s")
        return parse_output(self.process.returncode, output, errors)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def parse_output(status: int, output: str, errors: str) -> Devices:
    """The results that the process printed; the last line of its errors if it failed."""
    if status:
        lines = errors.strip().splitlines() or ["no output"]
        return Devices(engine_error=f"the trial ended with status {status}: {lines[-1]}")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return Devices(**{**found, "gpus": tuple(Gpu(**gpu) for gpu in found["gpus"])})


def multiply(device: torch.device) -> str | None:
    """Multiplies two matrices; returns why that failed, or None."""
    try:
        ones = torch.ones(SIZE, SIZE, device=device)
        product = ones @ ones
        wrong = int((product != SIZE).sum())
    except RuntimeError as error:
        return kind_and_line(error)
    return f"{wrong} of {SIZE * SIZE} products are wrong" if wrong else None


def step_engine(device: torch.device) -> str | None:
    """Starts a DeepSpeed engine and takes a step; returns why that failed, or None."""
    try:
        from cluster.engine import start_engine

        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine: Any = start_engine(
            model, optimizer, zero_stage=1, global_batch=2, accumulation=1, precision="auto", clip_norm=1.0, device=device
        )  # fmt: skip
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
        engine.backward(engine(torch.ones(2, 4, device=device)).float().sum())
        engine.step()
        same = all(torch.equal(old, new) for old, new in zip(before, engine.module.parameters(), strict=True))
    except Exception as error:  # DeepSpeed raises many kinds
        return kind_and_line(error)
    return "it took a step, and no weight has changed" if same else None


def compile_gru(device: torch.device) -> str | None:
    """Runs a ConvGRU forward and backward; returns why its pointwise parts were not compiled, or None."""
    from grurcn.models.gru import ConvGRU

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            gru = ConvGRU(4, 8).to(device)
            gru(torch.randn(2, 3, 4, 6, 6, device=device)).sum().backward()
        except RuntimeError as error:
            return kind_and_line(error)
    return next((str(warning.message) for warning in caught if "torch.compile" in str(warning.message)), None)


def kind_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error_line(error)}"


def run_trials() -> Devices:
    """Runs all trials in this process."""
    cuda = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    gpus = []
    for device in cuda:
        properties = torch.cuda.get_device_properties(device)
        gpus.append(Gpu(name=properties.name, memory_bytes=properties.total_memory, error=multiply(device)))
    is_usable = bool(gpus) and gpus[0].error is None
    return Devices(
        gpus=tuple(gpus),
        engine_error=step_engine(cuda[0] if is_usable else torch.device("cpu")),
        compile_error=compile_gru(cuda[0]) if is_usable else None,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(run_trials())))
