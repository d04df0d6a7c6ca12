"""Where shards are read from: ranges of bytes of named files. A folder here; object stores join by the same interface."""

import errno
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import IO, Protocol

from shards.index import BadShards

TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENETUNREACH})
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.2  # doubled after each attempt


class Store(Protocol):
    """Reads ranges of bytes; safe to call from many threads at once."""

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """The bytes [offset, offset + size_bytes) of a file. Raises BadShards if it is missing or ends before."""
        ...


class FolderStore:
    """Files of a local or network folder, by positioned reads; keeps the last `max_open` files open."""

    def __init__(self, folder: Path, max_open: int = 64):
        self.folder = folder
        self.max_open = max_open
        self.files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        for attempt in range(ATTEMPTS):
            try:
                return self.read_once(name, offset, size_bytes)
            except FileNotFoundError:
                raise BadShards(f"{self.folder / name}: the shard is missing; restore it, or pack again") from None
            except OSError as error:
                if error.errno not in TRANSIENT or attempt == ATTEMPTS - 1:
                    raise BadShards(
                        f"{self.folder / name}: {size_bytes} bytes at offset {offset} cannot be read after "
                        f"{attempt + 1} attempts ({error.strerror})"
                    ) from None
                self.forget(name)
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    def read_once(self, name: str, offset: int, size_bytes: int) -> bytes:
        file = self.open(name)  # held until the read is over, so that nobody else closes it
        parts = []
        missing = size_bytes
        while missing:
            part = os.pread(file.fileno(), missing, offset + size_bytes - missing)
            if not part:
                raise BadShards(
                    f"{self.folder / name}: ends {missing} bytes before the sample at offset {offset} does; "
                    "the shard was cut off: restore it, or pack again"
                )
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def open(self, name: str) -> IO[bytes]:
        with self.lock:
            if name not in self.files:
                self.files[name] = (self.folder / name).open("rb", buffering=0)
                if len(self.files) > self.max_open:
                    self.files.popitem(last=False)  # closes when its last reader lets go of it
            self.files.move_to_end(name)
            return self.files[name]

    def forget(self, name: str) -> None:
        with self.lock:
            self.files.pop(name, None)
