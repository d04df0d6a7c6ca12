"""Work done by threads in a fixed order: a map that runs side by side, and a reader that runs ahead.

Both end their threads when their reader stops, by an error or by closing them.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def ordered_map(
    function: Callable[[Any], T],
    items: Iterable[Any],
    num_threads: int,
    in_flight: int,
    at_once: Callable[[Any], bool] = lambda item: False,
) -> Iterator[T]:
    """Yields function(item) of every item in order, computed by threads, at most `in_flight` of them at a time.

    Items for which at_once(item) holds are computed by the reader's thread when it comes to them: for short work that takes
    less time than giving it to another thread.
    """
    results: deque[Callable[[], T]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix=getattr(function, "__name__", "stage")) as pool:
        try:
            for item in items:
                results.append(partial(function, item) if at_once(item) else pool.submit(function, item).result)
                if len(results) >= in_flight:
                    yield results.popleft()()
            while results:
                yield results.popleft()()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, taken by another thread up to `depth` ahead. The thread ends when the reader stops."""
    handed: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=max(1, depth))
    stopped = threading.Event()

    def put(good: bool, item: Any) -> None:
        while not stopped.is_set():
            try:
                handed.put((good, item), timeout=0.1)
                return
            except queue.Full:
                continue

    def take() -> None:
        with closing(iter(items)) as taken:  # pyright: ignore[reportArgumentType]  # stages are generators
            try:
                for item in taken:
                    if stopped.is_set():
                        return
                    put(True, item)
                put(False, None)
            except BaseException as error:
                put(False, error)

    thread = threading.Thread(target=take, name="clip-batches-ahead", daemon=True)
    thread.start()
    try:
        while True:
            good, item = handed.get()
            if good:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        thread.join()
