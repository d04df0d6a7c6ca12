"""How busy a machine is while a job runs: one worker on each machine reports it, under the names of MLflow's "System metrics"."""

import socket
import threading
import time
from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from cluster.workers.events import Report, SystemMetrics

SECONDS_BETWEEN_LOOKS = 10.0


class SystemMonitor:
    """Reports SystemMetrics every ten seconds, in a thread, while its `with` block runs."""

    def __init__(self, report: Report, seconds: float = SECONDS_BETWEEN_LOOKS):
        self.report, self.seconds = report, seconds
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="system", daemon=True)

    def __enter__(self) -> "SystemMonitor":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def watch(self) -> None:
        kinds = monitors()
        look(kinds)  # a first look at the CPUs shows nothing: they are counted from one look to the next
        while not self.over.wait(self.seconds):
            milliseconds = round(time.time() * 1000)
            self.report(SystemMetrics(host=socket.gethostname(), values=look(kinds), milliseconds=milliseconds))


def monitors() -> list[BaseMetricsMonitor]:
    """MLflow's own; those of GPUs where NVIDIA's library finds any."""
    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # a machine without GPUs, or without their driver
        found.append(GPUMonitor())
    return found


def look(kinds: list[BaseMetricsMonitor]) -> dict[str, float]:
    """The values of this moment."""
    values: dict[str, float] = {}
    for monitor in kinds:
        monitor.collect_metrics()
        values |= monitor.aggregate_metrics() or {}
        monitor.clear_metrics()
    return values
