"""Work by threads keeps its order, is bounded, passes errors on, and leaves no thread behind."""

import threading
import time
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.threads import ahead, ordered_map


@pytest.fixture
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Source:
    """Counts up for ever and knows how far it was read and whether it was closed."""

    def __init__(self, fail_at=None, end=10**9):
        self.pulled, self.closed, self.fail_at, self.end = 0, False, fail_at, end

    def items(self):
        try:
            while self.pulled < self.end:
                if self.pulled == self.fail_at:
                    raise OSError(f"no item {self.pulled}")
                self.pulled += 1
                yield self.pulled - 1
        finally:
            self.closed = True


def slow_square(number):
    time.sleep(0.003 if number % 3 else 0)  # so that later ones are done before earlier ones
    return number * number


@pytest.mark.usefixtures("no_thread_stays")
@settings(max_examples=20, deadline=None)
@given(size=st.integers(0, 20), num_threads=st.integers(1, 5), in_flight=st.integers(1, 7))
def test_a_map_by_threads_keeps_the_order(size, num_threads, in_flight):
    found = ordered_map(slow_square, iter(range(size)), num_threads, in_flight)
    assert list(found) == [number * number for number in range(size)]


@pytest.mark.usefixtures("no_thread_stays")
@settings(max_examples=20, deadline=None)
@given(size=st.integers(0, 20), in_flight=st.integers(1, 7), divisor=st.integers(1, 3))
def test_the_reader_computes_what_is_done_at_once_and_threads_the_rest(size, in_flight, divisor):
    def square(number):
        return slow_square(number), threading.current_thread() is threading.main_thread()

    found = ordered_map(square, iter(range(size)), 2, in_flight, at_once=lambda number: number % divisor == 0)
    assert list(found) == [(number * number, number % divisor == 0) for number in range(size)]


@pytest.mark.usefixtures("no_thread_stays")
@settings(max_examples=20, deadline=None)
@given(size=st.integers(0, 20), depth=st.integers(0, 5))
def test_reading_ahead_keeps_the_order(size, depth):
    assert list(ahead(Source(end=size).items(), depth)) == list(range(size))


@pytest.mark.usefixtures("no_thread_stays")
def test_a_map_by_threads_takes_no_more_than_so_many_items_at_once():
    source = Source()
    mapped = ordered_map(slow_square, source.items(), num_threads=3, in_flight=5)
    for num_read in range(1, 30):
        next(mapped)
        assert source.pulled <= num_read + 5 - 1
    mapped.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator


@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_reading_ahead_is_bounded(depth):
    source = Source()
    items = ahead(source.items(), depth)
    for num_read in range(1, 6):
        next(items)
        wait_for(lambda: source.pulled >= num_read + depth)  # noqa: B023
        time.sleep(0.02)  # it would run on now
        assert source.pulled <= num_read + depth + 1  # one more is in the thread's hand
    items.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert source.closed


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fail_at_7(number):
    if number == 7:
        raise ArithmeticError("seven")
    return number


def mapped(items):
    return ordered_map(fail_at_7, items, num_threads=2, in_flight=4)


def mapped_at_once(items):
    return ordered_map(fail_at_7, items, num_threads=2, in_flight=4, at_once=lambda number: number % 7 == 0)


def read_until_error(items):
    found = []
    try:
        for item in items:
            found.append(item)
    except (ArithmeticError, OSError) as error:
        return found, str(error)
    return found, None


@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize(
    "build",
    [mapped, mapped_at_once, lambda items: ahead(mapped(items), 2), lambda items: mapped(ahead(items, 2))],
)
def test_an_error_reaches_the_reader_after_what_came_before_it(build):
    assert read_until_error(build(Source().items())) == (list(range(7)), "seven")
    found, error = read_until_error(build(Source(fail_at=6).items()))
    assert error == "no item 6"
    assert found == list(range(len(found)))


@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_a_reader_that_stops_early_leaves_no_thread_and_no_open_source(num_read):
    source = Source()
    items = ahead(ordered_map(slow_square, source.items(), num_threads=3, in_flight=4), 2)
    assert list(islice(items, num_read)) == [number * number for number in range(num_read)]
    items.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert source.closed or num_read == 0
