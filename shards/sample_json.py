"""What lies beside a video in a tar: KEY.json, or captions alone in KEY.txt.

KEY.json    {"key": "...", "label": 3, "class": "Diving", "group": "...", "num_frames": 90, "fps": 25.0, ...}
            {"key": "...", "captions": ["...", "..."], ...}
KEY.txt     captions, one a line; in tars that others wrote
"""

import json
from typing import Any

from shards.printable import printable


class BadSample(ValueError):
    """A sample of a tar that cannot be read. The message says why."""


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
