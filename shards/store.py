"""Where a data set's files are: a folder, or an object store. Whole files by name, and ranges of their bytes.

    /data/mine, file:///data/mine     FolderStore   positioned reads; written beside the file, then renamed
    s3://  gs://  http(s)://          ObjectStore   fsspec; written to a temporary file here, then uploaded whole

So a file under its final name is complete, and what fails for a moment is tried again until PATIENCE_SECONDS have passed.
Credentials come from the environment, as each store's users know it (AWS_..., GOOGLE_..., .netrc); none are taken from a
URL, so none can reach a log.
"""

import asyncio
import errno
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec import asyn

from shards.threads import ordered_map

T = TypeVar("T")

PATIENCE_SECONDS = 60.0  # what fails for a moment is tried again for so long
FIRST_PAUSE_SECONDS = 0.2  # doubled after each attempt
LONGEST_PAUSE_SECONDS = 5.0
REQUEST_SECONDS = 20.0  # one read of a range
TRANSFER_SECONDS = 600.0  # one upload or download of a whole file
REQUESTS = 16  # at the same time, where many small files are asked for
TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENETUNREACH})
EXTRAS = {  # what each kind of URL wants: a package, and our extra that brings it
    "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "http": ("aiohttp", "http"), "https": ("aiohttp", "http"),
}  # fmt: skip
OFF_LIMITS = re.compile(r"NoCredentials|PartialCredentials|ParamValidation|NoSuchBucket|InvalidURL|ProfileNotFound")


class BadShards(ValueError):
    """A packed data set that cannot be read or written. The message names the file, what was found and the way out."""


class NoFile(BadShards):
    """There is no such file in the store."""


class BadUrl(ValueError):
    """A place that is no folder and no store that can be reached."""


class Store(Protocol):
    """Files by name; safe to call from many threads at once. Everything raises BadShards if the store stays away."""

    url: str

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """The bytes [offset, offset + size_bytes) of a file. Raises NoFile if it is missing, BadShards if it ends before."""
        ...

    def read_file(self, name: str) -> bytes:
        """All bytes of a small file. Raises NoFile if it is missing."""
        ...

    def read_files(self, names: Sequence[str]) -> Iterator[bytes]:
        """All bytes of many small files, in order, some of them read ahead side by side."""
        ...

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """The file on this machine's disk: itself in a folder, else a copy that lasts as long as the block. Raises NoFile."""
        ...

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """How many bytes each file has; None where there is none."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """The files in a folder of the store and below, each with the folder's name before it."""
        ...

    def written(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to write, and to read again, that appears under its name only when the block ends well."""
        ...

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files; those that are not there are no error."""
        ...


def open_store(url: str | Path) -> Store:
    """The store of a folder or URL. Nothing is asked of it yet. Raises BadUrl with what is wanted instead."""
    scheme, location = parsed(url)
    return FolderStore(Path(location)) if scheme == "file" else ObjectStore(scheme, location)


def has(store: Store, name: str) -> bool:
    """Whether there is such a file."""
    return store.sizes([name]) != [None]


def absolute_url(url: str | Path) -> str:
    """The same place, named so that it means the same in every process and on every machine that can see it."""
    scheme, location = parsed(url)
    return str(Path(location).absolute()) if scheme == "file" else location


def parsed(url: str | Path) -> tuple[str, str]:
    """("file", folder) or (scheme, URL without a "/" at its end). Raises BadUrl."""
    text = str(url)
    if isinstance(url, Path) or not re.match(r"[a-zA-Z][\w+.-]*:", text):
        return "file", text
    if text.startswith("file:///"):
        return "file", text.removeprefix("file://")
    scheme = text.split(":", 1)[0]
    if scheme not in EXTRAS or not text.startswith(f"{scheme}://") or "::" in text:
        raise BadUrl(
            f"{scheme}:...: not a place for shards; wanted a folder, or a URL that begins with file:///, s3://, gs://, "
            "http:// or https://"
        )
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment:
        shown = f"{scheme}://{parts.hostname}{parts.path}"
        raise BadUrl(
            f"{shown}: the URL holds credentials, a query or a fragment (not shown); give the bare URL, and credentials "
            "by the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc"
        )
    if not parts.netloc:
        raise BadUrl(f"{text}: wanted {scheme}://{'HOST' if scheme.startswith('http') else 'BUCKET'}/FOLDER")
    package, extra = EXTRAS[scheme]
    if find_spec(package) is None:
        raise BadUrl(f"{text}: {package} is not installed; pip install 'grurcn[{extra}]'")
    return scheme, text.rstrip("/")


class FolderStore:
    """Files of a local or network folder, by positioned reads; keeps the last `max_open` files open."""

    def __init__(self, folder: Path, max_open: int = 64):
        self.folder = folder
        self.url = str(folder)
        self.max_open = max_open
        self.files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderStore, (self.folder, self.max_open)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        return persistently(
            partial(self.read_once, name, offset, size_bytes),
            f"{self.url}/{name}: {size_bytes} bytes at offset {offset}",
            is_passing,
            before_again=partial(self.forget, name),
        )

    def read_once(self, name: str, offset: int, size_bytes: int) -> bytes:
        file = self.open(name)  # held until the read is over, so that nobody else closes it
        data = os.pread(file.fileno(), size_bytes, offset)
        while missing := size_bytes - len(data):  # some file systems answer in parts
            part = os.pread(file.fileno(), missing, offset + len(data))
            if not part:
                raise BadShards(cut_off(str(self.folder / name), offset, missing))
            data += part
        return data

    def in_memory(self, name: str, offset: int, size_bytes: int) -> bool:
        """Whether a range can be read without waiting for a disk or a server, as far as its last byte tells."""
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
        return persistently(path.read_bytes, f"{path}", is_passing)

    def read_files(self, names: Sequence[str]) -> Iterator[bytes]:
        return map(self.read_file, names)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        persistently(path.stat, f"{path}", is_passing)
        yield path

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [self.size(self.folder / name) for name in names]

    def size(self, path: Path) -> int | None:
        try:
            return persistently(path.stat, f"{path}", is_passing).st_size if path.is_file() else None
        except NoFile:
            return None

    def names(self, folder: str = "") -> list[str]:
        paths = (self.folder / folder).rglob("*")
        return sorted(path.relative_to(self.folder).as_posix() for path in paths if path.is_file())

    @contextmanager
    def written(self, name: str) -> Iterator[IO[bytes]]:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial_path.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial_path.replace(path)
            self.forget(name)
        except BaseException as error:
            partial_path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_space(path) from None
            raise

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.forget(name)
            (self.folder / name).unlink(missing_ok=True)
            parent = (self.folder / name).parent
            if parent != self.folder and parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


class ObjectStore:
    """Files below a URL, through fsspec's asynchronous file systems: as many requests at once as threads ask for."""

    def __init__(self, scheme: str, url: str):
        self.scheme = scheme
        self.url = url
        self.fs: Any = fsspec.filesystem(scheme, **FILE_SYSTEMS[scheme]())

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
            if not is_behind_end(error):
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
                raise BadShards(cut_off(self.at(name), offset, offset + size_bytes - max(size, offset)))
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
                raise (no_space(local.parent) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error) from None
            yield local

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        if len(names) > 4 * REQUESTS and self.scheme in ("s3", "gs"):  # a page of a listing tells 1,000 sizes
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
        """Every file's size below a folder."""
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
            raise (no_space(folder) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error) from None
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
        return asyn.sync(self.fs.loop, function, *args, timeout=seconds, **options)

    def ask(self, action: Callable[[], T], what: str) -> T:
        return persistently(action, f"{self.url}/{what}", lambda error: not is_final(error))


# The stores' own retries are kept short, as ours follow; listings are never remembered, as others write too.
FILE_SYSTEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "s3": lambda: {
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 15, "max_pool_connections": 64, "retries": {"max_attempts": 1}},
    },
    "gs": lambda: {"use_listings_cache": False},
    "http": lambda: {"use_listings_cache": False, "client_kwargs": {"trust_env": True}},  # .netrc, proxies
    "https": lambda: {"use_listings_cache": False, "client_kwargs": {"trust_env": True}},
}  # fmt: skip


def persistently(
    action: Callable[[], T],
    what: str,
    passes: Callable[[Exception], bool],
    before_again: Callable[[], None] = lambda: None,
) -> T:
    """action(), tried again with growing pauses while its error is one that passes, for PATIENCE_SECONDS at most.

    Raises NoFile or BadShards, with what was tried, how often and the last error.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    attempts, pause = 0, FIRST_PAUSE_SECONDS
    while True:
        attempts += 1
        try:
            return action()
        except (BadShards, MemoryError):
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise NoFile(f"{what}: the file is missing; restore it, or pack again") from None
        except Exception as error:
            if is_our_bug(error):
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not passes(error) or time.monotonic() + pause > until:
                raise BadShards(f"{what}: failed{times(attempts)} ({told(error)})") from None
            logging.getLogger(__name__).info("%s: %s; trying again in %.1f s", what, told(error), pause)
        before_again()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def times(attempts: int) -> str:
    return "" if attempts == 1 else f" {attempts} times in {PATIENCE_SECONDS:g} s"


def is_passing(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in TRANSIENT


def is_final(error: Exception) -> bool:
    """Errors of a request that asking again cannot mend: no permission, no credentials, statuses 400 to 499."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 425, 429)
    return isinstance(error, PermissionError) or bool(OFF_LIMITS.search(type(error).__name__))


def is_behind_end(error: Exception) -> bool:
    """Status 416: the range begins behind the file's end. s3fs hands on its words alone."""
    return getattr(error, "status", None) == 416 or "range is not satisfiable" in str(error)


def is_our_bug(error: Exception) -> bool:
    return isinstance(error, (TypeError, AttributeError, NameError, NotImplementedError, AssertionError, KeyError))


def told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, (asyncio.TimeoutError, ConnectionError)):
        return error.strerror
    lines = str(error).strip().splitlines()
    name = re.sub(r"^FSTimeoutError$", "TimeoutError", type(error).__name__)
    return f"{name}: {lines[0]}" if lines else name


def cut_off(place: str, offset: int, missing: int) -> str:
    return (
        f"{place}: ends {missing} bytes before the sample at offset {offset} does; the file was cut off: restore it, or "
        "pack again"
    )


def no_space(path: Path) -> OSError:
    return OSError(errno.ENOSPC, "no space left on the device; make room and run the same again", str(path))
