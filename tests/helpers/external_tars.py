"""Tars as others write them, good and bad, and the job that indexes them."""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from videos import numbered_planes, write_video

from jobs.inspect_shards.index import MakeIndex, make_index
from shards.video import Packing

SMALL = Packing(width=32, height=32, copy=True)


def video(folder: Path, number: int, suffix: str = "avi", num_frames: int = 8) -> bytes:
    """A video of grey frames, the first of that number."""
    path = folder / f"{number}-{num_frames}.{suffix}"
    if not path.exists():
        codec = {"webm": "libvpx"}.get(suffix, "mpeg4")
        write_video(path, numbered_planes(num_frames, first=number), codec=codec)
    return path.read_bytes()


def index(*urls: Path | str, **options: Any) -> tuple[int, dict[str, Any]]:
    """Runs the job in this process: its status and its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        job = MakeIndex(url=tuple(map(str, urls)), width=32, height=32, workers=0, json=file, **options)
        status = make_index(job)
        return status, json.loads(file.read_text())


def rejected(folder: Path) -> dict[str, str]:
    lines = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    return {line["path"]: line["reason"] for line in lines}


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def samples(folder: Path, *numbers: int) -> list[tuple[str, bytes]]:
    """Members of so many good samples."""
    return [
        member
        for number in numbers
        for member in ((f"{number:03}.avi", video(folder, number)), (f"{number:03}.cls", str(number % 2).encode()))
    ]


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)
