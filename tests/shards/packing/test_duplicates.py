"""Texts that come more than once are found on disk as in memory."""

from typing import Any

import numpy as np
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from shards.packing.duplicates import Duplicates

ShardWriter: Any = wds.ShardWriter  # pyright: ignore[reportAttributeAccessIssue]  # looked up when asked for
TarWriter: Any = wds.TarWriter  # pyright: ignore[reportAttributeAccessIssue]


@given(texts=st.lists(st.text(st.sampled_from("abc"), max_size=3), max_size=60), cut=st.integers(0, 60))
def test_duplicates_are_found_as_by_counting(texts, cut):
    with Duplicates() as duplicates:
        duplicates.add(texts[:cut], range(len(texts[:cut])))
        duplicates.add(texts[cut:], np.arange(len(texts[:cut]), len(texts)))
        found = sorted(duplicates.found())
    places = {text: [number for number, each in enumerate(texts) if each == text] for text in texts}
    assert found == sorted(numbers for numbers in places.values() if len(numbers) > 1)
