"""How fast a training goes, as MLflow is told it: times of steps without pauses, the slowest worker, shares of a GPU's rate."""

import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine import start_world_of_one
from cluster.workers.collectives import Collectives
from cluster.workers.system_monitor import SystemMonitor
from grurcn.training import performance
from grurcn.training.gpu_specs import flops_per_second
from grurcn.training.performance import slowest_of
from grurcn.training.stopwatch import Stopwatch, quantile

CPU = torch.device("cpu")


@pytest.fixture
def collectives() -> Collectives:
    if not dist.is_initialized():
        start_world_of_one(CPU)
    return Collectives()


class Clock:
    """A time that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_steps_are_timed_without_the_pauses_between_them(monkeypatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch(8, CPU)
    for waiting, computing, pausing in ((1.0, 1.0, 0.0), (0.0, 3.0, 60.0), (0.0, 4.0, 0.0)):
        with watch.waiting():
            clock.now += waiting
        with watch.computing():
            clock.now += computing
        watch.step_done()
        with watch.pausing():
            clock.now += pausing
    assert watch.step_seconds == [2.0, 3.0, 4.0]
    assert watch.read() == {
        "clips_per_second": pytest.approx(24 / 9),
        "data_wait_fraction": pytest.approx(1 / 9),
        "step_seconds_p50": 3.0,
        "step_seconds_p95": 4.0,
    }
    assert watch.own_seconds() == pytest.approx(3.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.sampled_from([0.5, 0.95, 1.0]))
def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed(values, share):
    found = quantile(values, share)
    enough = [value for value in values if sum(each <= value for each in values) >= share * len(values) - 1e-9]
    assert found == min(enough)


def test_the_slowest_worker_is_compared_with_the_median_of_the_others():
    assert slowest_of([1.0, 4.0, 2.0, 1.0]) == (1, 4.0)
    assert slowest_of([3.0]) == (0, 1.0)


def test_the_share_of_a_gpus_rate_is_told_where_that_is_known(monkeypatch, collectives):
    """100 clips a second of 1e12 operations on one H100: 1e14 of 9.89e14 a second."""
    monkeypatch.setattr(
        performance, "rate_of", lambda device, precision: flops_per_second("NVIDIA H100 80GB HBM3", "bf16")
    )
    clock = Clock(monkeypatch)
    watch = Stopwatch(100, CPU)
    clock.now += 1
    watch.step_done()
    values, own = performance.performance(collectives, watch, 10**12, CPU, "bf16")
    assert values["mfu"] == pytest.approx(1e14 / 9.89e14)
    assert 0 < values["memory_gib"] < 1000
    assert "gpu_memory_gib" not in values
    assert len(own) == 1


def test_on_a_cpu_no_share_is_told(collectives):
    watch = Stopwatch(1, CPU)
    watch.step_done()
    assert "mfu" not in performance.performance(collectives, watch, 10**12, CPU, "fp32")[0]


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("some new GPU", "bf16", None),
    ],
)
def test_gpus_are_known_by_the_names_that_cuda_gives(name, precision, tera):
    assert flops_per_second(name, precision) == (None if tera is None else tera * 1e12)


def test_a_machine_tells_how_busy_it_is_under_mlflows_names():
    events = []
    with SystemMonitor(events.append, seconds=0.05):
        until = time.monotonic() + 30
        while len(events) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    event = events[1]
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= set(event.values)
    assert event.values["system_memory_usage_megabytes"] > 100
    assert all(isinstance(value, int | float) for value in event.values.values())
    assert event.host
    assert abs(event.milliseconds / 1000 - time.time()) < 60
