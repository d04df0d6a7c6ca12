"""How fast and how large a training is, as metrics: the same names and units for every run.

perf/clips_per_second     over all workers
perf/data_wait_fraction   fraction of the time that was spent waiting for data
perf/step_seconds_p50, _p95   50 % and 95 % of the steps took at most so long
perf/mfu                  model FLOPs utilisation: the model's own FLOP/s over the GPUs' published peak, where that is known
perf/slowest_worker, perf/slowest_ratio   rank whose own part of a step takes longest, and its seconds over the others' median
perf/memory_gib, perf/gpu_memory_gib      of the largest worker: memory of the process, and peak memory of its GPU
"""

import math
import statistics

import psutil
import torch

from cluster.precision import resolve_precision
from cluster.workers.collectives import Collectives
from grurcn.training.gpu_specs import flops_per_second
from grurcn.training.stopwatch import Stopwatch


def performance(
    collectives: Collectives, watch: Stopwatch, flops_per_clip: int | None, device: torch.device, precision: str
) -> tuple[dict[str, float], list[float]]:
    """{name: value} since the stopwatch was made, and each worker's own seconds of a step. Every rank calls it."""
    own = collectives.gather(watch.own_seconds())
    slowest, ratio = slowest_of(own)
    values = watch.read() | {"slowest_worker": slowest, "slowest_ratio": ratio}
    values["memory_gib"] = max(collectives.gather(psutil.Process().memory_info().rss / 2**30))
    if device.type == "cuda":
        values["gpu_memory_gib"] = max(collectives.gather(torch.cuda.max_memory_allocated(device) / 2**30))
    rate = sum(collectives.gather(rate_of(device, precision)))
    if flops_per_clip and not math.isnan(rate):
        values["mfu"] = flops_per_clip * values["clips_per_second"] / rate
    return values, own


def rate_of(device: torch.device, precision: str) -> float:
    """A device's published peak FLOP/s in a precision; NaN if unknown."""
    if device.type != "cuda":
        return math.nan
    return flops_per_second(torch.cuda.get_device_name(device), resolve_precision(precision, device)) or math.nan


def slowest_of(seconds: list[float]) -> tuple[int, float]:
    """The rank whose own part of a step takes longest, and how many times as long as the median of the others."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = [each for rank, each in enumerate(seconds) if rank != slowest]
    return slowest, seconds[slowest] / max(statistics.median(others), 1e-6) if others else 1.0
