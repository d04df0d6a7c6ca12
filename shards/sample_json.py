"""What lies beside a video in a tar: KEY.json, or captions alone in KEY.txt.

KEY.json    {"key": "...", "label": 3, "class": "Diving", "group": "...", "num_frames": 90, "fps": 25.0, ...}
            {"key": "...", "captions": ["...", "..."], ...}
KEY.txt     captions, one a line; in tars that others wrote
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.printable import printable

MOST_CLASSES = 100_000


class BadSample(ValueError):
    """A sample of a tar that cannot be read. The message says why."""


@dataclass(frozen=True, kw_only=True)
class SampleJson:
    """What a packing writes beside a video. Fields without a value are left out of the file."""

    key: str
    captions: Sequence[str] | None = None
    label: int | None = None
    class_name: str | None = None  # "class" in the file
    group: str
    num_frames: int
    fps: float
    source: str | None = None  # the video's path in the data set that it comes from
    flow: str | None = None  # the method
    flow_bound: float | None = None

    def to_json(self) -> bytes:
        fields = {name: value for name, value in vars(self).items() if value is not None}
        return json.dumps({"class" if name == "class_name" else name: fields[name] for name in fields}).encode()


def parse_object(data: bytes) -> dict[str, Any]:
    """The object in a KEY.json. Raises BadSample if it holds anything else."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f".json is not JSON ({printable(str(error))})") from None
    if not isinstance(content, dict):
        raise BadSample(f".json holds a {type(content).__name__}; expected an object")
    return content


def parse_captions(data: bytes) -> tuple[str, ...]:
    """The captions in a KEY.json ("captions" or "caption": a text or a list of them) or in a KEY.txt (one a line).

    Raises BadSample for bytes that are neither.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        captions = content.get("captions", content.get("caption")) or []
    else:
        try:
            captions = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise BadSample(f"its captions are not UTF-8 text ({error})") from None
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        found = printable(json.dumps(captions))[:50]
        raise BadSample(f".json has the captions {found}; expected a text, or a list of texts")
    return tuple(caption.strip() for caption in captions if caption.strip())
