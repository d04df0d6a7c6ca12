"""The memory that a process and its children hold together, sampled while they work."""

import threading

import psutil


class PeakMemory:
    """The most memory that this process and all its children held together; shared pages count once."""

    def __init__(self, seconds_between_samples: float = 2.0):
        self.peak_bytes = 0
        self.seconds_between_samples = seconds_between_samples
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def sample(self) -> None:
        while not self.ended.wait(self.seconds_between_samples):
            me = psutil.Process()
            self.peak_bytes = max(self.peak_bytes, sum(map(proportional_bytes, [me, *me.children(recursive=True)])))


def proportional_bytes(process: psutil.Process) -> int:
    """Memory of a process; of pages that several processes share, its part."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0  # it has ended
