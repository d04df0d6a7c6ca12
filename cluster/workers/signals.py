"""SIGINT and SIGTERM, noted so that work can end well."""

import signal
import threading
import time
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal, after everything was saved."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Signals:
    """While the block runs, a first SIGINT or SIGTERM is only noted, so that work can end well; a second one interrupts."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal; 0: none yet
        self.at = 0.0

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in a shell's background
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number, self.at = number, time.monotonic()
