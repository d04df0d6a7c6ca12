"""Files of an object store or a web server, through fsspec's asynchronous file systems."""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec import asyn

from shards.store.errors import BadShards, NoFile, cut_off, is_disk_full, no_space
from shards.store.retry import is_transient_of_server, retried
from shards.threads import ordered_map

T = TypeVar("T")

REQUESTS = 16  # at the same time, where many small files are asked for
REQUEST_SECONDS = 20.0  # one read of a range
TRANSFER_SECONDS = 600.0  # one upload or download of a whole file
# The file systems' own retries are kept short, as ours follow; listings are never cached, as others write too.
FILE_SYSTEMS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 15, "max_pool_connections": 64, "retries": {"max_attempts": 1}},
    },
    "gs": {"use_listings_cache": False},
    "http": {"use_listings_cache": False, "client_kwargs": {"trust_env": True}},  # .netrc, proxies
    "https": {"use_listings_cache": False, "client_kwargs": {"trust_env": True}},
}  # fmt: skip


class ObjectStore:
    """Files below a URL: as many requests at once as threads ask for."""

    def __init__(self, scheme: str, url: str):
        self.scheme = scheme
        self.url = url
        self.fs: Any = fsspec.filesystem(scheme, **copy.deepcopy(FILE_SYSTEMS[scheme]))  # botocore changes them

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.scheme, self.url)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        return self.ask(
            partial(self.read_once, name, offset, size_bytes), f"{name}: {size_bytes} bytes at offset {offset}"
        )

    def read_once(self, name: str, offset: int, size_bytes: int) -> bytes:
        if not size_bytes:
            return b""
        try:
            data = self.run(self.fs._cat_file, self.at(name), start=offset, end=offset + size_bytes)
        except Exception as error:
            if not is_beyond_end(error):
                raise
            data = b""
        if len(data) > size_bytes:
            raise BadShards(
                f"{self.at(name)}: the server sent {len(data):,} bytes where {size_bytes:,} at offset {offset:,} were asked "
                "for: it does not answer range requests; serve the shards with one that does (nginx, an object store), "
                "or copy them to a folder"
            )
        if len(data) < size_bytes:
            [size] = self.sizes([name])
            if size is not None and size < offset + size_bytes:
                raise cut_off(self.at(name), offset, offset + size_bytes - max(size, offset))
            raise ConnectionError(f"{len(data):,} of {size_bytes:,} bytes came")
        return data

    def read_file(self, name: str) -> bytes:
        return self.ask(partial(self.run, self.fs._cat_file, self.at(name)), name)

    def read_files(self, names: Sequence[str]) -> Iterator[bytes]:
        return ordered_map(self.read_file, names, num_threads=REQUESTS, in_flight=2 * REQUESTS)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="grurcn-download-") as folder:
            local = Path(folder) / "file"
            download = partial(self.run, self.fs._get_file, self.at(name), str(local), seconds=TRANSFER_SECONDS)
            try:
                self.ask(download, f"{name}: download")
            except OSError as error:
                raise (no_space(local.parent) if is_disk_full(error) else error) from None
            yield local

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        if len(names) > 4 * REQUESTS and self.scheme in ("s3", "gs"):  # a page of a listing holds 1,000 sizes
            listed = self.listing("")
            return [listed.get(name) for name in names]
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self.size, names))

    def size(self, name: str) -> int | None:
        try:
            about = self.ask(partial(self.run, self.fs._info, self.at(name)), name)
        except NoFile:
            return None
        return about["size"] if about["type"] == "file" else None

    def names(self, folder: str = "") -> list[str]:
        return sorted(self.listing(folder))

    def listing(self, folder: str) -> dict[str, int]:
        """The size of every file below a folder, by its name."""
        root = self.fs._strip_protocol(self.url)
        try:
            found = self.ask(
                partial(self.run, self.fs._find, self.at(folder), detail=True, seconds=TRANSFER_SECONDS), folder
            )
        except NoFile:
            return {}
        return {path.removeprefix(root).lstrip("/"): about["size"] for path, about in found.items()}

    @contextmanager
    def written(self, name: str) -> Iterator[IO[bytes]]:
        if self.scheme.startswith("http"):
            raise BadShards(f"{self.at(name)}: a web server cannot be written to; pack into a folder, s3:// or gs://")
        folder = Path(tempfile.mkdtemp(prefix="grurcn-upload-"))
        try:
            local = folder / "file"
            with local.open("w+b") as file:
                yield file
            upload = partial(self.run, self.fs._put_file, str(local), self.at(name), seconds=TRANSFER_SECONDS)
            self.ask(upload, f"{name}: upload of {local.stat().st_size:,} bytes")
        except NoFile:
            bucket = urlsplit(self.url).netloc
            raise BadShards(
                f"{self.url}: there is no bucket {bucket!r}, or no right to see it; create it first"
            ) from None
        except OSError as error:
            raise (no_space(folder) if is_disk_full(error) else error) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def delete(self, names: Sequence[str]) -> None:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(self.delete_one, names))

    def delete_one(self, name: str) -> None:
        try:
            self.ask(partial(self.run, self.fs._rm_file, self.at(name)), f"{name}: deletion")
        except NoFile:
            return

    def at(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = REQUEST_SECONDS, **options: Any) -> Any:
        """The result of one of the file system's coroutines."""
        return asyn.sync(self.fs.loop, function, *args, timeout=seconds, **options)

    def ask(self, action: Callable[[], T], what: str) -> T:
        return retried(action, f"{self.url}/{what}", is_transient_of_server)


def is_beyond_end(error: Exception) -> bool:
    """Whether the server answered 416: the range begins beyond the file's end. s3fs passes on its words alone."""
    return getattr(error, "status", None) == 416 or "range is not satisfiable" in str(error)
