"""What training wants of a machine's devices, tried in a process of its own: python -m jobs.doctor.device

    each GPU            multiplies two matrices, and the product is right
    the ConvGRU on it   its pointwise parts are compiled here, or it is said why they cannot be
    DeepSpeed           an engine starts on the first GPU, else on the CPU, and takes one step

The engine needs no compiler, neither on CPUs nor on GPUs: cluster/engine.py tells DeepSpeed of no op that could be compiled. What
is compiled on a GPU are our own kernels (grurcn/models/gru_kernels.py), by torch, which wants a C compiler; where there is none
they run as they stand, slower.

A driver that hangs or crashes takes this process along, and not who asked. Its last line is JSON: gpus, engine, fused.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

SECONDS = 180.0  # importing torch and DeepSpeed takes ten of them on two busy cores
SIZE = 256  # of the matrices: every product of ones is this number, exactly


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    memory_bytes: int
    error: str | None  # why it does not multiply


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What came of the trials on one machine."""

    gpus: tuple[Gpu, ...] = ()
    engine: str | None = None  # why DeepSpeed's engine does not start; None: it took a step
    fused: str | None = None  # why the ConvGRU's kernels are not compiled; None: they are, or there is no GPU


class Trial:
    """The trials, running beside other work; their process ends with the block, whatever ends that."""

    def __enter__(self) -> "Trial":
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.doctor.device"], env={**os.environ, "PYTHONPATH": path}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        return self

    def result(self) -> Devices:
        """Waits for what comes of them."""
        try:
            output, errors = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return Devices(engine=f"not started within {SECONDS:g} s")
        return from_output(self.process.returncode, output, errors)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def from_output(status: int, output: str, errors: str) -> Devices:
    """What the process wrote; if it ended otherwise than well, with its last words."""
    if status:
        said = errors.strip().splitlines()
        return Devices(engine=f"the trial ended with status {status}: {said[-1] if said else 'it said nothing'}")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return Devices(**{**found, "gpus": tuple(Gpu(**gpu) for gpu in found["gpus"])})


def multiply(device: torch.device) -> str | None:
    """Why the device does not multiply; None if it does."""
    try:
        ones = torch.ones(SIZE, SIZE, device=device)
        product = ones @ ones
        wrong = int((product != SIZE).sum())
    except RuntimeError as error:
        return first_line(error)
    return f"{wrong} of {SIZE * SIZE} products are wrong" if wrong else None


def start_and_step(device: torch.device) -> str | None:
    """Why DeepSpeed's engine does not take a step; None if it does."""
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
    except Exception as error:  # whatever the machine lacks
        return first_line(error)
    return "it took a step, and no weight has changed" if same else None


def fuse(device: torch.device) -> str | None:
    """Why the ConvGRU's pointwise parts are not compiled on this GPU; None if they are, forward and backward."""
    from grurcn.models.gru import ConvGRU

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            gru = ConvGRU(4, 8).to(device)
            gru(torch.randn(2, 3, 4, 6, 6, device=device)).sum().backward()
        except RuntimeError as error:
            return first_line(error)
    return next((str(warning.message) for warning in caught if "torch.compile" in str(warning.message)), None)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no words'])[0]}"


def trials() -> Devices:
    """All of it, in this process."""
    cuda = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    gpus = []
    for device in cuda:
        about = torch.cuda.get_device_properties(device)
        gpus.append(Gpu(name=about.name, memory_bytes=about.total_memory, error=multiply(device)))
    usable = bool(gpus) and gpus[0].error is None
    return Devices(
        gpus=tuple(gpus),
        engine=start_and_step(cuda[0] if usable else torch.device("cpu")),
        fused=fuse(cuda[0]) if usable else None,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(trials())))
