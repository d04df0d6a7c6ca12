"""Files of a local or network folder."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from shards.store.errors import NoFile, cut_off, is_disk_full, no_space
from shards.store.retry import is_transient_of_disk, retried


class FolderStore:
    """Files of a folder, by positioned reads; keeps the last `max_open` files open."""

    def __init__(self, folder: Path, max_open: int = 64):
        self.folder = folder
        self.url = str(folder)
        self.max_open = max_open
        self.files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderStore, (self.folder, self.max_open)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        return retried(
            partial(self.read_once, name, offset, size_bytes),
            f"{self.url}/{name}: {size_bytes} bytes at offset {offset}",
            is_transient_of_disk,
            before_retry=partial(self.forget, name),
        )

    def read_once(self, name: str, offset: int, size_bytes: int) -> bytes:
        file = self.open(name)  # held until the read is over, so that no other thread closes it
        data = os.pread(file.fileno(), size_bytes, offset)
        while missing := size_bytes - len(data):  # some file systems answer in parts
            part = os.pread(file.fileno(), missing, offset + len(data))
            if not part:
                raise cut_off(str(self.folder / name), offset, missing)
            data += part
        return data

    def in_memory(self, name: str, offset: int, size_bytes: int) -> bool:
        """Whether a range can be read without waiting for a disk or a server. Its last byte stands for all."""
        try:
            file = self.open(name)
            return os.preadv(file.fileno(), [bytearray(1)], offset + size_bytes - 1, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # not in memory, not there, or a system that cannot tell
            return False

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

    def read_file(self, name: str) -> bytes:
        path = self.folder / name
        return retried(path.read_bytes, str(path), is_transient_of_disk)

    def read_files(self, names: Sequence[str]) -> Iterator[bytes]:
        return map(self.read_file, names)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        retried(path.stat, str(path), is_transient_of_disk)
        yield path

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [self.size(self.folder / name) for name in names]

    def size(self, path: Path) -> int | None:
        try:
            return retried(path.stat, str(path), is_transient_of_disk).st_size if path.is_file() else None
        except NoFile:
            return None

    def names(self, folder: str = "") -> list[str]:
        paths = (self.folder / folder).rglob("*")
        return sorted(path.relative_to(self.folder).as_posix() for path in paths if path.is_file())

    @contextmanager
    def written(self, name: str) -> Iterator[IO[bytes]]:
        with written_file(self.folder / name) as file:
            yield file
        self.forget(name)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.forget(name)
            (self.folder / name).unlink(missing_ok=True)
            parent = (self.folder / name).parent
            if parent != self.folder and parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def written_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, and to read again, that appears at `path` only when the block ends without an error.

    Raises OSError with how to fix it where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial_path.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except BaseException as error:
        partial_path.unlink(missing_ok=True)
        if is_disk_full(error):
            raise no_space(path) from None
        raise
