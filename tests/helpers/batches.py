"""Batches of several ranks as one, and told apart to the last bit."""

from collections.abc import Sequence
from typing import Any

import torch

Place = tuple[int, int]


def joined(parts: Sequence[tuple[Place, Any]]) -> tuple[Place, dict[str, Any]]:
    """A step's (place, batch) of each rank -> (place, the columns of the global batch)."""
    places, batches = zip(*parts, strict=True)
    assert len(set(places)) == 1
    columns = {name: [getattr(batch, name) for batch in batches] for name in vars(batches[0])}
    return places[0], {
        name: torch.cat(column) if isinstance(column[0], torch.Tensor) else sum(column, ())
        for name, column in columns.items()
    }


def assert_equal(batch: dict[str, Any], other: dict[str, Any], check_dtype: bool = True) -> None:
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, check_dtype=check_dtype, msg=name)
        else:
            assert value == other[name]
