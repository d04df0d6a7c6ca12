"""How much memory a process and its children hold together, watched while they work."""

import threading

import psutil


class PeakMemory:
    """The most memory that this process and all that it started held together, shared pages counted once."""

    def __init__(self, seconds_between_looks: float = 2.0):
        self.peak_bytes = 0
        self.seconds = seconds_between_looks
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.over.wait(self.seconds):
            me = psutil.Process()
            self.peak_bytes = max(self.peak_bytes, sum(map(proportional_bytes, [me, *me.children(recursive=True)])))


def proportional_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0  # it ended in the meantime
