"""KEY.npy: read as NumPy saves it, refused where it is anything else."""

import numpy as np
import pytest
from captioned import npy_of
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reading import vector_files
from shards.reading.vector_files import BadVectors, read_vectors

GOOD = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_vectors_as_they_are_written_are_read_without_pythons_parser(monkeypatch):
    """Which is not safe in threads that decode side by side (SystemError, in Python 3.11)."""

    def fails(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(vector_files.npy, "read_array_header_1_0", fails)
    for shape in ((1, 1), (4, 3), (28, 2432), (7, 100_000)):
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(read_vectors(npy_of(values), shape), values)


def test_vectors_whose_header_is_padded_otherwise_are_read_too():
    data = npy_of(GOOD)
    longer = (
        data[:8] + (len(data) - 48 - 10 + 64).to_bytes(2, "little") + data[10:-48].rstrip(b"\n") + b" " * 64 + b"\n"
    )
    np.testing.assert_array_equal(read_vectors(longer + data[-48:], (4, 3)), GOOD)


class Dangerous:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a NumPy array"),
        (npy_of(GOOD)[:50], "not a NumPy array"),
        (npy_of(GOOD)[:-1], "47 bytes after its header; expected 48"),
        (npy_of(GOOD) + b"\0", "49 bytes after its header; expected 48"),
        (npy_of(GOOD.T.copy()), r"an array \(3, 4\) of float32; expected \(4, 3\)"),
        (npy_of(np.asfortranarray(GOOD)), r"an array \(4, 3\) of float32, in Fortran's order"),
        (npy_of(GOOD.astype(np.float64)), "an array .* of float64"),
        (npy_of(GOOD.astype(">f4")), "an array .* of >f4"),
        (npy_of(np.array([[Dangerous()] * 3] * 4), allow_pickle=True), "an array .* of object"),
        (npy_of(GOOD)[:6] + b"\2\0" + npy_of(GOOD)[8:], r"of format version \(2, 0\); expected \(1, 0\)"),
        (npy_of(GOOD).replace(b"(4, 3)", b"(4, 3}"), "not a NumPy array"),
        (npy_of(GOOD).replace(b"(4, 3), }", b"(9**9, )}"), "not a NumPy array"),
        (npy_of(np.where(GOOD == 5, np.inf, GOOD)), "vectors that are not finite numbers"),
    ],
)
def test_bytes_that_are_not_such_vectors_are_refused(data, message):
    with pytest.raises(BadVectors, match=message):
        read_vectors(data, (4, 3))


def test_vectors_are_read_as_numpy_saves_them():
    np.testing.assert_array_equal(read_vectors(npy_of(GOOD), (4, 3)), GOOD)


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 175), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 176),
)
def test_damaged_vectors_are_refused_or_are_still_finite_numbers(changes, cut):
    data = bytearray(npy_of(GOOD))
    assert len(data) == 176
    for place, byte in changes:
        data[place] = byte
    try:
        found = read_vectors(bytes(data[: max(cut, 100)]), (4, 3))
    except BadVectors:
        return
    assert (found.shape, found.dtype) == ((4, 3), np.float32)
    assert np.isfinite(found).all()
