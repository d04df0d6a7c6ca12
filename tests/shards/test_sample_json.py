"""What lies beside a video: captions in every form."""

from typing import Any

import pytest
import webdataset as wds

from shards.sample_json import BadSample, parse_captions

ShardWriter: Any = wds.ShardWriter  # pyright: ignore[reportAttributeAccessIssue]  # looked up when asked for
TarWriter: Any = wds.TarWriter  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"", ()), (b"a\n b \n\n", ("a", "b")), (b'{"captions": "x"}', ("x",)), (b'{"captions": null, "caption": "x"}', ()),
        (b'{"caption": ["x", " "]}', ("x",)), (b'"quoted"', ('"quoted"',)), (b"42", ("42",)), (b"\xef\xbb\xbfa", ("a",)),
        (b"[" * 100_000, ("[" * 100_000,)),
    ],
)  # fmt: skip
def test_captions_of_each_form(data, captions):
    assert parse_captions(data) == captions


@pytest.mark.parametrize("data", [b'{"captions": [1]}', b'{"caption": {"en": "x"}}', b"\xff\xfe"])
def test_captions_that_are_none_are_refused(data):
    with pytest.raises(BadSample, match="captions"):
        parse_captions(data)
