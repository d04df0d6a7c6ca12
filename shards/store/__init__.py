"""Where a data set's files are: a folder, or an object store. Whole files by name, and ranges of their bytes.

    /data/mine, file:///data/mine     folder.py    positioned reads; written beside the file, then renamed
    s3://  gs://  http(s)://          objects.py   fsspec; written to a temporary file here, then uploaded whole

So a file under its final name is complete. What fails for a moment is retried for a minute (retry.py).
Credentials come from the environment, as each store's users know it (AWS_..., GOOGLE_..., .netrc). None are taken from a
URL, so none can reach a log.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import urlsplit

from shards.store.errors import BadShards, BadUrl, NoFile, error_line
from shards.store.folder import FolderStore, written_file
from shards.store.objects import REQUESTS, ObjectStore

__all__ = [
    "REQUESTS",
    "BadShards",
    "BadUrl",
    "FolderStore",
    "NoFile",
    "ObjectStore",
    "Store",
    "absolute_url",
    "error_line",
    "has_file",
    "open_store",
    "written_file",
]

EXTRAS = {  # what each kind of URL needs: a package, and our extra that brings it
    "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "http": ("aiohttp", "http"), "https": ("aiohttp", "http"),
}  # fmt: skip


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
        """All bytes of many small files, in order. An object store reads some of them ahead, side by side."""
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
        """A file to write, and to read again, that appears under its name only when the block ends without an error."""
        ...

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files. Those that are not there are no error."""
        ...


def open_store(url: str | Path) -> Store:
    """The store of a folder or URL. Nothing is asked of it yet. Raises BadUrl for what is neither."""
    scheme, location = parse_url(url)
    return FolderStore(Path(location)) if scheme == "file" else ObjectStore(scheme, location)


def has_file(store: Store, name: str) -> bool:
    return store.sizes([name]) != [None]


def absolute_url(url: str | Path) -> str:
    """The same place by a name that means the same in every process, and on every machine that can see it."""
    scheme, location = parse_url(url)
    return str(Path(location).absolute()) if scheme == "file" else location


def parse_url(url: str | Path) -> tuple[str, str]:
    """("file", folder) or (scheme, URL without a "/" at its end). Raises BadUrl."""
    text = str(url)
    if isinstance(url, Path) or not re.match(r"[a-zA-Z][\w+.-]*:", text):
        return "file", text
    if text.startswith("file:///"):
        return "file", text.removeprefix("file://")
    scheme = text.split(":", 1)[0]
    if scheme not in EXTRAS or not text.startswith(f"{scheme}://") or "::" in text:
        raise BadUrl(
            f"{scheme}:...: not a place for shards; expected a folder, or a URL that begins with file:///, s3://, gs://, "
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
        raise BadUrl(f"{text}: expected {scheme}://{'HOST' if scheme.startswith('http') else 'BUCKET'}/FOLDER")
    package, extra = EXTRAS[scheme]
    if find_spec(package) is None:
        raise BadUrl(f"{text}: {package} is not installed; pip install 'grurcn[{extra}]'")
    return scheme, text.rstrip("/")
