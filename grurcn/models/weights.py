"""Reads files of pretrained weights: from a path, or from a URL, downloaded once and checked by its SHA-256."""

import hashlib
import http.client
import os
import re
import shutil
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from grurcn.models.trunks.base import BadWeights

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grurcn"
TIMEOUT_SECONDS = 60


def read_weights(source: str) -> dict[str, Tensor]:
    """A path, or URL#sha256=HEX, of a PyTorch file of named tensors -> the tensors, on the CPU.

    HEX: the 64 digits of its SHA-256, or at least the first 8, as in torchvision's file names. Nothing in the file is executed
    (weights_only). Raises BadWeights if it is missing, cannot be downloaded, has another SHA-256 or is no such file.
    """
    path = fetch(source) if "://" in source else Path(source).expanduser()
    if not path.is_file():
        raise BadWeights(f"{path}: no such file; expected a file of weights")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is not its own
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadWeights(f"{path}: not a PyTorch file of tensors ({first_line})") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise BadWeights(
            f"{path}: holds a {type(weights).__name__}; expected a dictionary of named tensors (a state_dict)"
        )
    return weights


def fetch(source: str) -> Path:
    """Downloads URL#sha256=HEX into the cache, once, and returns the file. A cached file is checked too."""
    match = re.fullmatch(r"(?P<url>[^#]+)#sha256=(?P<digest>[0-9a-f]{8,64})", source)
    if match is None:
        raise BadWeights(
            f"{source}: a download must name its SHA-256: URL#sha256=<64 hexadecimal digits, or the first 8 or more>"
        )
    url, expected = match["url"], match["digest"]
    path = CACHE / f"{expected[:16]}-{Path(urlsplit(url).path).name}"
    if path.is_file():
        check_sha256(path, expected, str(path), "delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
        check_sha256(partial, expected, url, "the file was not kept")
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = str(getattr(error, "reason", error)).strip()
        raise BadWeights(
            f"{url}: cannot be downloaded ({reason}); fetch it elsewhere and give its path, or put it at {path}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_sha256(path: Path, expected: str, name: str, advice: str) -> None:
    """Raises BadWeights if a file's SHA-256 does not begin with the expected digits."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise BadWeights(f"{name}: SHA-256 {found}, expected {expected}; {advice}")
