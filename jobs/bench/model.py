"""The ConvGRU against its peers and its limit, and the fraction of a training step that each part takes.

    ours          one convolution for the inputs of all frames, one for both gates, kernels' gradients over all steps at once
    usual cell    at every step a convolution over cat(x, h) for the gates and one for the candidate, as in most public code
    six products  the equations as they stand: six convolutions a step
    limit         bare convolutions, forward and backward, with the multiplications of ours and nothing between them

All get the same maps in the same memory format, and compute no gradient of them (the trunk is frozen).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.gru import ConvGRU
from grurcn.models.gru_rcn import GRURCN, recomputed
from grurcn.models.pixels import to_clips
from grurcn.training.losses import mean_loss
from jobs.bench.tables import Row, Tables

Level = tuple[str, int, int, int, int]  # name, side of the map, channels in, state channels, kernel size
PAPER: tuple[Level, ...] = (
    ("pool2", 56, 128, 64, 3),
    ("pool3", 28, 256, 128, 3),
    ("pool4", 14, 512, 256, 3),
    ("pool5", 7, 512, 256, 3),
    ("fc7", 1, 4096, 512, 1),
)


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """ConvGRU at the paper's sizes, forward and backward; on a GPU the whole training step too."""

    batch: int = 4
    """Clips in a batch."""
    frames: int = 10
    """Frames in a clip."""
    repeats: int = 5
    """Measurements of each, in turns; the median counts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU."""
    whole_step: bool | None = None
    """Measure the training step of frozen VGG-16 and GRU-RCN. Default: only on a GPU."""
    size: int = 224
    """Height and width of the frames of the whole step."""
    width: float = 1.0
    """Width of the whole step's trunk, as a fraction of VGG-16's."""
    json: Path | None = None
    """Write the tables as JSON to this file."""


def bench_model(job: ModelBench, levels: tuple[Level, ...] = PAPER) -> Tables:
    """Seconds, ratios and memory of each variant; a table for each level, then one for all levels in one pass."""
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if job.device == "auto"
        else torch.device(job.device)
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(job.precision)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tables = {}
    for level in levels:
        name, side, in_channels, channels, _ = level
        title = f"{name}: {in_channels} x {side} x {side} -> {channels}, {job.batch} clips of {job.frames} frames"
        tables[title] = bench_levels([level], job, device, dtype)
    tables["all levels, forward and backward"] = bench_levels(levels, job, device, dtype)
    if job.whole_step or (job.whole_step is None and device.type == "cuda"):
        tables["training step"] = bench_step(job, device, dtype)
    return tables


def bench_levels(levels: Sequence[Level], job: ModelBench, device: torch.device, dtype: torch.dtype) -> list[Row]:
    torch.manual_seed(0)
    maps = []
    for _, side, in_channels, _, _ in levels:
        x = torch.randn(job.frames * job.batch, in_channels, side, side, device=device, dtype=dtype)
        maps.append(x.contiguous(memory_format=torch.channels_last).unflatten(0, (job.frames, job.batch)))
    works = {}
    for name, variant in VARIANTS.items():
        works[name] = work_of([variant(*level[2:]).to(device, dtype) for level in levels], maps)
    seconds, memory = measure(works, job.repeats, device)
    return ratio_rows(seconds, memory)


def ratio_rows(seconds: dict[str, float], memory: dict[str, float]) -> list[Row]:
    """Seconds and bytes of each variant -> a row for each, with its ratios to the limit and to the usual cell."""
    return [
        {
            "variant": name,
            "seconds": value,
            "times the limit": value / seconds["limit"],
            "times as fast as the usual cell": seconds["usual cell"] / value,
            "memory_mib": memory[name] / 2**20,
        }
        for name, value in seconds.items()
    ]


def work_of(modules: Sequence[nn.Module], maps: Sequence[Tensor]) -> Callable[[], None]:
    """A function that runs them forward and backward, from the last states (Limit: from its output)."""

    def work() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        outs = [module(x) for module, x in zip(modules, maps, strict=True)]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])

    return work


def measure(
    works: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """({name: median seconds}, {name: peak bytes}); measured in turns, so that a busy machine slows all alike."""
    for work in works.values():
        work()  # first calls compile, tune and allocate
    memory = {name: peak_memory(work, device) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(timed(work, device))
    return {name: statistics.median(times) for name, times in taken.items()}, memory


def timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_memory(work: Callable[[], None], device: torch.device) -> float:
    """The most bytes of tensors that a call holds, less those that were held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Not the process's size: memory that one variant frees, the next one takes without asking the system.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events: list[Any] = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


class Ours(nn.Module):
    def __init__(self, in_channels: int, channels: int, kernel_size: int, recompute: bool = False):
        super().__init__()
        self.gru, self.recompute = ConvGRU(in_channels, channels, kernel_size), recompute

    def forward(self, maps: Tensor) -> Tensor:
        x = maps.transpose(0, 1)
        states = recomputed(self.gru, x, None, False) if self.recompute else self.gru(x)
        return states[:, -1]


class UsualCell(nn.Module):
    """Equations 5 to 8 as in most public code: at every step one convolution over cat(x, h)."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.channels = channels
        self.gates = nn.Conv2d(in_channels + channels, 2 * channels, kernel_size, padding="same", bias=False)
        self.candidate = nn.Conv2d(in_channels + channels, channels, kernel_size, padding="same", bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        h = maps.new_zeros(maps.shape[1], self.channels, *maps.shape[-2:])
        h = h.contiguous(memory_format=torch.channels_last)
        for x in maps:
            z, r = torch.sigmoid(self.gates(torch.cat([x, h], dim=1))).chunk(2, dim=1)
            candidate = torch.tanh(self.candidate(torch.cat([x, r * h], dim=1)))
            h = (1 - z) * h + z * candidate
        return h


class SixProducts(nn.Module):
    """Equations 5 to 8 as they stand."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.channels = channels
        self.w_z, self.w_r, self.w = (
            nn.Conv2d(in_channels, channels, kernel_size, padding="same", bias=False) for _ in range(3)
        )
        self.u_z, self.u_r, self.u = (
            nn.Conv2d(channels, channels, kernel_size, padding="same", bias=False) for _ in range(3)
        )

    def forward(self, maps: Tensor) -> Tensor:
        h = maps.new_zeros(maps.shape[1], self.channels, *maps.shape[-2:])
        h = h.contiguous(memory_format=torch.channels_last)
        for x in maps:
            z = torch.sigmoid(self.w_z(x) + self.u_z(h))
            r = torch.sigmoid(self.w_r(x) + self.u_r(h))
            candidate = torch.tanh(self.w(x) + self.u(r * h))
            h = (1 - z) * h + z * candidate
        return h


class Limit(nn.Module):
    """Only the convolutions of ours: of the inputs at all frames, of the states at all frames but the first."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        window = (kernel_size, kernel_size)
        self.w = nn.Parameter(torch.randn(3 * channels, in_channels, *window))
        self.u_gates = nn.Parameter(torch.randn(2 * channels, channels, *window))
        self.u = nn.Parameter(torch.randn(channels, channels, *window))
        self.states: Tensor | None = None  # as many maps as the recurrent convolutions see; made once

    def forward(self, maps: Tensor) -> Tensor:
        if self.states is None:
            frames, clips, _, height, width = maps.shape
            states = maps.new_zeros((frames - 1) * clips, len(self.u), height, width)
            self.states = states.contiguous(memory_format=torch.channels_last).requires_grad_()
        return BareConvolutions.apply(maps.flatten(0, 1), self.states, self.w, self.u_gates, self.u)  # pyright: ignore[reportReturnType]


class BareConvolutions(torch.autograd.Function):
    """Convolutions whose results are dropped, and gradients of the kernels and of the states."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, w: Tensor, u_gates: Tensor, u: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, h, w, u_gates, u)
        ctx.outs = [convolved(x, w), convolved(h, u_gates), convolved(h, u)]
        return x.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, w, u_gates, u = ctx.saved_tensors
        d_w = convolved_grads(ctx.outs[0], x, w, (False, True))[1]
        d_h, d_u_gates = convolved_grads(ctx.outs[1], h, u_gates, (True, True))
        _, d_u = convolved_grads(ctx.outs[2], h, u, (True, True))
        return None, d_h, d_w, d_u_gates, d_u


def convolved(maps: Tensor, kernel: Tensor) -> Tensor:
    if kernel.shape[-1] == 1 and maps.shape[-1] == 1:
        return functional.linear(maps.flatten(1), kernel.flatten(1))[..., None, None]
    return functional.conv2d(maps, kernel, padding=kernel.shape[-1] // 2)


def convolved_grads(d_out: Tensor, maps: Tensor, kernel: Tensor, needs: tuple[bool, bool]) -> list[Tensor | None]:
    if kernel.shape[-1] == 1 and maps.shape[-1] == 1:
        d_rows, rows, matrix = d_out.flatten(1), maps.flatten(1), kernel.flatten(1)
        d_maps = (d_rows @ matrix).view_as(maps) if needs[0] else None
        return [d_maps, (d_rows.T @ rows).view_as(kernel)]
    padding = [kernel.shape[-1] // 2] * 2
    grads = torch.ops.aten.convolution_backward(
        d_out, maps, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [*needs, False]
    )
    return grads[:2]


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "ours": Ours,
    "ours, recomputing": partial(Ours, recompute=True),
    "usual cell": UsualCell,
    "six products": SixProducts,
    "limit": Limit,
}


def bench_step(job: ModelBench, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Seconds and fraction of each part of a training step: pixels, trunk, ConvGRUs and heads, backward, optimizer.

    The last row: the step's operations a second as a fraction of the device's rate in a large matrix product.
    """
    model = build_model(ModelConfig(width=job.width, freeze=True), num_classes=101, seed=0).to(device)
    assert isinstance(model, GRURCN)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    planes = torch.randint(0, 256, (job.batch, job.frames, 384, 340), dtype=torch.uint8, device=device)
    box = torch.tensor([0, 0, 224, 224], device=device).expand(job.batch, 4)
    mirror = torch.zeros(job.batch, dtype=torch.bool, device=device)
    label = torch.arange(job.batch, device=device) % 101
    draw = torch.arange(job.batch, device=device)
    cast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    held: dict[str, Any] = {}

    def pixels() -> None:
        held["clips"] = to_clips(planes, box, mirror, job.size)

    def trunk() -> None:
        with cast, torch.no_grad():
            held["maps"] = model.maps(held["clips"], draw)

    def grus() -> None:
        with cast:
            held["loss"] = mean_loss(model.votes(held["maps"], draw), label)

    def backward() -> None:
        held.pop("loss").backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parts = {"pixels": pixels, "trunk": trunk, "ConvGRUs and heads": grus, "backward": backward, "optimizer": step}

    def whole() -> None:
        for part in parts.values():
            part()

    whole()
    with FlopCounterMode(display=False) as flops:
        whole()
    memory = peak_memory(whole, device)
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(job.repeats):
        for name, part in parts.items():
            taken[name].append(timed(part, device))
    total = statistics.median(timed(whole, device) for _ in range(job.repeats))
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    rows: list[Row] = [
        {"part": name, "seconds": value, "fraction": value / sum(seconds.values())} for name, value in seconds.items()
    ]
    rate, peak = flops.get_total_flops() / total, matrix_rate(device, dtype)
    return [
        *rows,
        {"part": f"whole step, {memory / 2**30:.2f} GiB at most", "seconds": total, "fraction": 1.0},
        {
            "part": f"{rate / 1e12:.2f} of {peak / 1e12:.2f} TFLOP/s (matrix product)",
            "seconds": total,
            "fraction": rate / peak,
        },
    ]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two large square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    held = [one @ other]

    def work() -> None:
        held[0] = one @ other

    return 2 * side**3 / statistics.median(timed(work, device) for _ in range(10))
