"""Finds texts that come more than once, among more than memory would hold: keys of samples, groups of splits.

Each text is kept on disk as 64 bits of its hash and a number of the caller's, in one of BUCKETS files by its hash. The files
are then sorted one after the other. Two different texts of 10^8 have the same 64 bits in 3 of 10,000 cases.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

BUCKETS = 64
ENTRY = np.dtype([("hash", "<u8"), ("number", "<i8")])


class Duplicates:
    """Takes texts in any order; finds the numbers of those that came more than once. A `with` block."""

    def __init__(self) -> None:
        self.opened = ExitStack()
        self.files = [self.opened.enter_context(tempfile.TemporaryFile()) for _ in range(BUCKETS)]  # noqa: SIM115

    def add(self, texts: Sequence[str], numbers: Sequence[int] | np.ndarray | int) -> None:
        """Adds texts with a number each, or one for all of them."""
        entries = np.empty(len(texts), ENTRY)
        entries["hash"] = [hash_of(text) for text in texts]
        entries["number"] = numbers
        buckets = entries["hash"] % BUCKETS
        for bucket in np.unique(buckets).tolist():
            self.files[bucket].write(entries[buckets == bucket].tobytes())

    def found(self) -> Iterator[list[int]]:
        """For each text that came more than once, its numbers in ascending order."""
        for file in self.files:
            file.seek(0)
            entries = np.frombuffer(file.read(), ENTRY)
            entries = entries[np.lexsort((entries["number"], entries["hash"]))]
            starts = np.flatnonzero(np.diff(entries["hash"], prepend=~entries["hash"][:1]))
            lengths = np.diff(starts, append=len(entries))
            for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
                yield entries["number"][start : start + length].tolist()

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
