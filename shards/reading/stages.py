"""The stages between an order of samples and its batches, shared by clips (stream.py) and captions (captions.py).

    source      (epoch, step) by (epoch, step), a request for each sample     order.py and the index's rows: no video is read
    load        + the bytes, checked by CRC-32                                at once what is in memory, the rest by many threads
    decode      bytes -> arrays                                               one thread a core
    batched     -> a batch                                                    these lanes' part of the global batch
    ahead       the stages above run this many batches ahead                  a thread

In evaluation, loading and decoding may also be done by other processes on other machines (RemoteDecoder).

Threads, not processes: PyAV releases Python's lock while it decodes, nothing is forked inside a Ray worker, and the order of
samples is kept whatever the threads do.
"""

import ctypes
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from webdataset.pipeline import DataPipeline
from zlib_ng.zlib_ng import crc32  # that of zlib, fourteen times as fast

from shards.index import Index
from shards.reading.order import PADDING, WINDOW, Order
from shards.rows import Sample
from shards.store import BadShards, FolderStore, Store
from shards.threads import ahead, ordered_map

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT_BYTES, MOST_KEPT_BYTES = 2**25, 2**28  # of one piece (glibc takes no more), and at the end of an arena
DRAWN_AT_ONCE = 128  # samples of consecutive steps: step by step would take longer

Place = tuple[int, int]  # (epoch, step)


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How much work and memory reading may take. They never change what is read."""

    decode_threads: int = 2
    """Threads that decode videos, in each worker."""
    batches_ahead: int = 2
    """Batches that each worker decodes ahead of the one in use."""
    requests: int = 16
    """Videos that each worker reads from the shards at the same time; more for stores that answer slowly."""

    def __post_init__(self) -> None:
        if min(self.decode_threads, self.batches_ahead, self.requests) < 1:
            raise ValueError(
                f"decode_threads {self.decode_threads}, batches_ahead {self.batches_ahead}, requests {self.requests}: "
                "expected at least 1 of each"
            )


class ByteRange(NamedTuple):
    """Bytes of a sample's shard."""

    offset: int
    size_bytes: int
    crc32: int | None = None  # not checked here


class Request(Protocol):
    """One sample of a batch, not yet read."""

    @property
    def place(self) -> Place:
        """The batch that it belongs to."""
        ...

    @property
    def sample(self) -> Sample: ...

    @property
    def ranges(self) -> tuple[ByteRange, ...]:
        """What is read of the sample."""
        ...

    @property
    def weight(self) -> float:
        """1, or 0 for padding."""
        ...


class Decoded(Protocol):
    """One sample of a batch, read and decoded."""

    @property
    def place(self) -> Place: ...


R = TypeVar("R", bound=Request)
D = TypeVar("D", bound=Decoded)
T = TypeVar("T")
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded(Generic[R]):
    """A sample's bytes."""

    request: R
    data: tuple[bytes, ...]  # of each of the request's ranges


class RemoteDecoder(Protocol):
    """Processes that load and decode samples in place of this one."""

    at_once: int  # how many samples

    def __call__(self, function: Callable[[Index, R], T], request: R) -> T:
        """function(the index, request), computed there. Several threads call it. Raises what the function raised."""
        ...


def batches(
    source: Callable[[], Iterator[R]],
    index: Index,
    decode: Callable[[Index, Loaded[R]], D],
    collate: Callable[[Sequence[D]], Batch],
    batch_size: int,
    options: ReadingOptions,
    stages: Sequence[Callable[[Iterator[D]], Iterator[D]]] = (),
    remote: RemoteDecoder | None = None,
) -> Generator[tuple[Place, Batch], None, None]:
    """The pipeline: the requests of a source -> ((epoch, step), batch)."""
    keep_freed_memory()
    index.hold(shards_held(batch_size))
    if remote:
        function = partial(load_and_decode, decode)
        decoding = [partial(decode_remotely, function=function, remote=remote, batch_size=batch_size)]
    else:
        decoding = [
            partial(load_all, index=index, options=options, batch_size=batch_size),
            partial(decode_all, index=index, decode=decode, options=options, batch_size=batch_size),
        ]
    yield from DataPipeline(
        source,
        *decoding,
        *stages,
        partial(batched, batch_size=batch_size, collate=collate),
        partial(ahead, depth=options.batches_ahead),
    )


def shards_held(lanes: int) -> int:
    """Shards whose rows are needed again and again: each lane reads in one window, or in two while it goes to the next."""
    return 2 * WINDOW * lanes


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that this process frees, instead of returning it to the system at once.

    Each sample takes and frees a megabyte or more. From fresh pages, that takes as long as reading and checking it.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


# The order


def training_steps(order: Order, lanes: range, start: Place) -> Iterator[tuple[int, list[Place], list[int]]]:
    """(epoch, places, numbers) of some consecutive steps, from a place on, without end.

    places: the (epoch, step) of each number; numbers: what the lanes read there, step by step.
    """
    epoch, step = start
    while True:
        steps = range(step, min(step + max(1, DRAWN_AT_ONCE // len(lanes)), order.steps_per_epoch))
        numbers = np.concatenate([order.samples(epoch, step, lanes) for step in steps]).tolist()
        yield epoch, [(epoch, step) for step in steps for _ in lanes], numbers
        epoch, step = (epoch, steps.stop) if steps.stop < order.steps_per_epoch else (epoch + 1, 0)


def evaluation_steps(index: Index, order: Order, lanes: range) -> Iterator[tuple[Place, Sample, float]]:
    """(place, sample, weight) of every sample once. Padding repeats sample 0 with weight 0, so that shapes stay equal."""
    for step in range(order.steps_per_epoch):
        numbers = order.samples(0, step, lanes)
        for number, sample in zip(numbers, index.samples(np.maximum(0, numbers).tolist()), strict=True):
            yield (0, step), sample, float(number != PADDING)


# Bytes


def load_all(
    requests: Iterator[R], index: Index, options: ReadingOptions, batch_size: int
) -> Generator[Loaded[R], None, None]:
    """The bytes of each request, in order: what is in memory at once, of the others `options.requests` at the same time."""
    store, in_flight = index.shard_store, max(options.requests, batch_size)
    yield from ordered_map(
        partial(load, store), requests, options.requests, in_flight, at_once=partial(is_in_memory, store)
    )


def is_in_memory(store: Store, request: Request) -> bool:
    """Whether loading a request takes microseconds, as the system holds its bytes in memory."""
    return isinstance(store, FolderStore) and all(
        store.in_memory(request.sample.shard, offset, size_bytes)
        for offset, size_bytes, _ in request.ranges
        if size_bytes
    )


def load(store: Store, request: R) -> Loaded[R]:
    """The bytes of a request. Raises BadShards with shard, key and offset if they are not those that were packed."""
    data = tuple([read_range(store, request.sample, part) for part in request.ranges])
    return Loaded(request=request, data=data)


def read_range(store: Store, sample: Sample, part: ByteRange) -> bytes:
    """Some bytes of a sample. Raises BadShards with shard, key and offset if they are not those that were packed."""
    if not part.size_bytes:  # a sample of an external tar may have no captions, and nothing that holds them
        return b""
    try:
        data = store.read(sample.shard, part.offset, part.size_bytes)
    except BadShards as error:
        raise BadShards(f"sample {sample.key}: {error}") from None
    if part.crc32 is not None and crc32(data) != part.crc32:
        raise BadShards(
            f"{store.url}/{sample.shard}: the {part.size_bytes} bytes at offset {part.offset} are not those of {sample.key} "
            "that were packed (CRC-32 differs); restore the shard, or pack again"
        )
    return data


# Decoding


def decode_all(
    loaded: Iterator[Loaded[R]],
    index: Index,
    decode: Callable[[Index, Loaded[R]], D],
    options: ReadingOptions,
    batch_size: int,
) -> Generator[D, None, None]:
    """Each sample decoded, in order, `options.decode_threads` of them at the same time."""
    in_flight = max(options.decode_threads, batch_size)
    yield from ordered_map(partial(decode, index), loaded, options.decode_threads, in_flight)


def decode_remotely(
    requests: Iterator[R], function: Callable[[Index, R], D], remote: RemoteDecoder, batch_size: int
) -> Generator[D, None, None]:
    """function(index, request) of each request, in order, computed by other processes."""
    yield from ordered_map(partial(remote, function), requests, remote.at_once, max(remote.at_once, batch_size))


def load_and_decode(decode: Callable[[Index, Loaded[R]], D], index: Index, request: R) -> D:
    return decode(index, load(index.shard_store, request))


# Batches


def batched(
    samples: Iterator[D], batch_size: int, collate: Callable[[Sequence[D]], Batch]
) -> Iterator[tuple[Place, Batch]]:
    """Joins `batch_size` samples of one step.

    Raises ValueError if a stage before it did not pass on each sample once, in order.
    """
    samples = iter(samples)
    while group := [sample for _, sample in zip(range(batch_size), samples, strict=False)]:
        place = group[0].place
        if len(group) < batch_size or any(sample.place != place for sample in group):
            raise ValueError(
                f"epoch {place[0]}, step {place[1]}: expected {batch_size} samples of this step, but other ones came; "
                "a stage must pass on every sample once, in order"
            )
        yield place, collate(group)
