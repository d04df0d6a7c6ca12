"""KEY.npy, the vectors that an encoder computed of a video's segments: a NumPy array (K, D) float32.

K segments of a video, D a vector's length.
"""

import io
import threading
from collections.abc import Mapping
from functools import lru_cache
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from shards.rows import Sample

# NumPy reads a header by Python's parser, of which two threads at once can raise SystemError in Python 3.11.
PARSING = threading.Lock()


class BadVectors(ValueError):
    """Vectors that are not those of a video's segments. The message says what was found and what was expected."""


def padded_vectors(data: bytes, sample: Sample, encoder: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of KEY.npy -> (vectors (K, D) float32, zeros where there is no segment; segments (K,) bool)."""
    shape = vectors_shape(sample, encoder)
    vectors = np.zeros((encoder["segments"], encoder["size"]), np.float32)
    vectors[: shape[0]] = read_vectors(data, shape)
    return vectors, np.arange(len(vectors)) < shape[0]


def vectors_shape(sample: Sample, encoder: Mapping[str, Any]) -> tuple[int, int]:
    """(how many segments the video has, a vector's length)"""
    return min(sample.num_frames, encoder["segments"]), encoder["size"]


def read_vectors(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The array of a KEY.npy: float32 of that shape, all of it finite. Raises BadVectors for anything else.

    Nothing is allocated for what the header may claim, and nothing is unpickled.
    """
    start = header_of(shape)
    if data.startswith(start) and len(data) == len(start) + 4 * shape[0] * shape[1]:
        offset = len(start)
    else:
        offset = checked_offset(data, shape)
    vectors = np.frombuffer(data, "<f4", offset=offset).reshape(shape)
    if not np.isfinite(vectors).all():
        raise BadVectors("vectors that are not finite numbers")
    return vectors


@lru_cache(maxsize=64)
def header_of(shape: tuple[int, int]) -> bytes:
    """What np.save writes before float32 of that shape."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    return file.getvalue()


def checked_offset(data: bytes, shape: tuple[int, int]) -> int:
    """Where the numbers of a KEY.npy begin, whose header another version of NumPy may have written. Raises BadVectors."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        with PARSING:
            header = npy.read_array_header_1_0(file) if version == (1, 0) else None
    except (ValueError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise BadVectors(f"not a NumPy array ({str(error).splitlines()[0][:100]})") from None
    if header is None:
        raise BadVectors(f"a NumPy array of format version {version}; expected (1, 0), as encoding writes it")
    found, is_fortran, dtype = header
    if found != shape or is_fortran or dtype != np.dtype("<f4"):
        order = ", in Fortran's order" if is_fortran else ""
        raise BadVectors(f"an array {found} of {dtype}{order}; expected {shape} of float32")
    if len(data) - file.tell() != 4 * shape[0] * shape[1]:
        raise BadVectors(f"{len(data) - file.tell():,} bytes after its header; expected {4 * shape[0] * shape[1]:,}")
    return file.tell()
