"""Which texts come more than once, of more than memory would hold: keys of samples, groups of splits.

Of each text 64 bits of its hash lie on disk, with a number of the caller's, in one of BUCKETS files by the hash; one file
after the other is then sorted. Two different texts of 10^8 have the same 64 bits in 3 of 10,000 cases.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

BUCKETS = 64
ENTRY = np.dtype([("hash", "<u8"), ("number", "<i8")])


class Repeats:
    """Takes texts in any order and gives back the numbers of those that came more than once. A `with` block."""

    def __init__(self) -> None:
        self.opened = ExitStack()
        self.files = [self.opened.enter_context(tempfile.TemporaryFile()) for _ in range(BUCKETS)]  # noqa: SIM115

    def add(self, texts: Sequence[str], numbers: Sequence[int] | np.ndarray | int) -> None:
        """A number of each text, or one of all."""
        entries = np.empty(len(texts), ENTRY)
        entries["hash"] = [hash_of(text) for text in texts]
        entries["number"] = numbers
        buckets = entries["hash"] % BUCKETS
        for bucket in np.unique(buckets).tolist():
            self.files[bucket].write(entries[buckets == bucket].tobytes())

    def found(self) -> Iterator[list[int]]:
        """Of each text that came more than once, its numbers from the lowest on."""
        for file in self.files:
            file.seek(0)
            entries = np.frombuffer(file.read(), ENTRY)
            entries = entries[np.lexsort((entries["number"], entries["hash"]))]
            starts = np.flatnonzero(np.diff(entries["hash"], prepend=~entries["hash"][:1]))
            lengths = np.diff(starts, append=len(entries))
            for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
                yield entries["number"][start : start + length].tolist()

    def __enter__(self) -> "Repeats":
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
