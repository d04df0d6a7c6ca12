"""Reads a tar once, from its first byte to its last: its members, and a hash of all bytes.

    |header|video ...|padding|header|JSON|padding| ... |zeros|

It is safe with the tars of strangers: no name is taken for a place on a disk, nothing is unpickled, no more of a member is
held than its reader asks for, and a header that promises what is not there is a BadTar.
"""

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from shards.store import Store
from shards.threads import ordered_map

BLOCK = tarfile.BLOCKSIZE
READ_BYTES = 8 * 2**20  # asked of the store at once
READS = 3  # of these at the same time
LONGEST_EXTENSION = 2**20  # bytes of a long name, or of what else comes before a header
PAX, PAX_GLOBAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK


class BadTar(ValueError):
    """Bytes that are not those of a whole tar. The message says where and why."""


@dataclass(frozen=True, kw_only=True)
class ExternalTar:
    """A tar that others wrote, which is to be indexed."""

    name: str
    split: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a header says of the bytes behind it."""

    name: str  # as it stands there; bytes that are not UTF-8 are lone surrogates
    kind: str  # "file", "folder", "link" or "special file"
    offset: int  # from the tar's start to its first byte
    size_bytes: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + padded(self.size_bytes)


def padded(size_bytes: int) -> int:
    """A size rounded up to whole blocks."""
    return -(-size_bytes // BLOCK) * BLOCK


class TarReader:
    """A tar's bytes from the first to the last, some of them read ahead. Close it, or its threads stay."""

    def __init__(self, store: Store, name: str, size_bytes: int):
        self.size_bytes = size_bytes
        self.position = 0
        self.hash = hashlib.sha256()  # of all bytes that have been read
        self.rest = memoryview(b"")

        def read(offset: int) -> bytes:
            return store.read(name, offset, min(READ_BYTES, size_bytes - offset))

        self.parts = ordered_map(read, range(0, size_bytes, READ_BYTES), num_threads=READS, in_flight=READS)

    def pieces(self, size_bytes: int) -> Iterator[memoryview]:
        """The next `size_bytes` bytes, in pieces. Raises BadShards if the store cannot read them."""
        assert self.position + size_bytes <= self.size_bytes
        while size_bytes:
            if not self.rest:
                part = next(self.parts)
                self.hash.update(part)
                self.rest = memoryview(part)
            piece, self.rest = self.rest[:size_bytes], self.rest[size_bytes:]
            self.position += len(piece)
            size_bytes -= len(piece)
            yield piece

    def read(self, size_bytes: int) -> bytes:
        return b"".join(self.pieces(size_bytes))

    def copy(self, size_bytes: int, file: IO[bytes] | None) -> int:
        """Reads the next `size_bytes` bytes, into a file if there is one; returns their CRC-32."""
        crc32 = 0
        for piece in self.pieces(size_bytes):
            crc32 = zlib.crc32(piece, crc32)
            if file is not None:
                file.write(piece)
        return crc32

    def skip_to(self, offset: int) -> None:
        for _ in self.pieces(offset - self.position):
            pass

    def sha256(self) -> str:
        """SHA-256 of the whole tar; reads what is left of it."""
        self.skip_to(self.size_bytes)
        return self.hash.hexdigest()

    def close(self) -> None:
        self.parts.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator

    def next_member(self, end: int | None = None) -> Member | None:
        """The next member; the reader stands at its first byte then. None at the zeros that end a tar.

        No header reaches beyond `end`, by default the tar's. The member may claim to be longer than the tar. Raises BadTar
        for bytes that are no header.
        """
        end = self.size_bytes if end is None else end
        name, size = None, None
        while True:
            start = self.position
            header = self.read_header(end)
            if header is None:
                return None
            if header.type == LONG_NAME:
                name = as_text(self.read_extension(header, end).split(b"\0", 1)[0])
            elif header.type in PAX:
                fields = pax_fields(self.read_extension(header, end), start)
                name, size = fields.get("path", name), fields.get("size", size)
                if any(field.startswith("GNU.sparse.") for field in fields):
                    raise sparse(start)
            elif header.type in (LONG_LINK, PAX_GLOBAL):
                self.read_extension(header, end)
            elif header.type == tarfile.GNUTYPE_SPARSE:
                raise sparse(start)
            else:
                break
        if header.type in WITHOUT_DATA:
            size = 0
        elif size is None:
            size = header.size
        elif not re.fullmatch(r"[0-9]{1,20}", size):
            raise BadTar(f"the header before offset {self.position} claims {size[:30]!r} bytes")
        return Member(
            name=header.name if name is None else name,
            kind=kind_of(header),
            offset=self.position,
            size_bytes=int(size),
        )

    def read_header(self, end: int) -> tarfile.TarInfo | None:
        start = self.position
        if start + BLOCK > min(end, self.size_bytes):
            if end < self.size_bytes:
                raise BadTar(f"no member begins at offset {end}")
            raise BadTar(f"ends at offset {self.size_bytes} without the zeros that end a tar: it was cut off")
        block = self.read(BLOCK)
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise BadTar(f"the bytes at offset {start} are no tar header ({error})") from None
        if header.size < 0:
            raise BadTar(f"the header at offset {start} claims {header.size} bytes")
        return header

    def read_extension(self, header: tarfile.TarInfo, end: int) -> bytes:
        """The long name, or the fields, that a header of its own holds for the next one."""
        size = padded(header.size)
        if header.size > LONGEST_EXTENSION or self.position + size > min(end, self.size_bytes):
            raise BadTar(f"the header before offset {self.position} claims a name or fields of {header.size} bytes")
        return self.read(size)[: header.size]


def sparse(offset: int) -> BadTar:
    return BadTar(
        f"the member at offset {offset} is a sparse file, of which not all bytes are stored; write the tar without them"
    )


def kind_of(header: tarfile.TarInfo) -> str:
    if header.isdir():
        return "folder"
    if header.issym() or header.islnk():
        return "link"
    return "file" if header.isreg() else "special file"


def pax_fields(content: bytes, offset: int) -> dict[str, str]:
    """{name: value} of lines "LENGTH name=value", where LENGTH is the line's own."""
    fields, place = {}, 0
    while place < len(content) and content[place]:
        match = re.match(rb"(\d{1,8}) ([^=]+)=", content[place:])
        length = int(match[1]) if match else 0
        line = content[place : place + length]
        if match is None or length <= match.end() or len(line) < length or not line.endswith(b"\n"):
            raise BadTar(f"the extended header at offset {offset} is damaged")
        fields[as_text(match[2])] = as_text(line[match.end() : -1])
        place += length
    return fields


def as_text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def key_and_suffix(name: str) -> tuple[str, str]:
    """The key of a sample and the kind of a member; no key for names that WebDataset ignores, and for hidden files.

    a/000.flow.mp4 -> a/000, flow.mp4
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()


def key_in_tar(tar: str, key: str) -> str:
    """The key of a sample where several tars use the same ones."""
    return f"{tar.removesuffix('.tar')}/{key}"
