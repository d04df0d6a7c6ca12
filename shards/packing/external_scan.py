"""One tar of somebody else -> the samples that can be read where they lie, and the reasons why others cannot.

    KEY.mp4 (.avi .webm .mkv .mov)    the video
    KEY.cls                           its label, a number
    KEY.json                          {"label": 3 or "Diving", "class": "Diving", "group": "...", "captions": ["..."]}
    KEY.txt                           captions, one a line

A key is the path up to the first dot of its last part, and the members of a sample lie together, as WebDataset has it. A
video counts as many frames as a helper process (isolated.py) decodes of it. Members of other kinds are passed over, pickles
too, and nothing is written under a name that stands in the tar.
"""

import json
import re
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shards.packing.pack import record_name
from shards.packing.sandbox import VideoPacker
from shards.packing.tar_reader import BadTar, Member, ShardBytes, read_member
from shards.printable import printable
from shards.sample_json import BadSample, parse_captions, parse_object
from shards.store import open_store
from shards.video import BadVideo, Limits, Packing

VIDEOS, TEXTS = ("mp4", "avi", "webm", "mkv", "mov"), ("cls", "json", "txt")
LONGEST_NAME = 1000  # characters
LONGEST_TEXT = 2**20  # bytes
MOST_CLASSES = 100_000


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A tar that is to be indexed."""

    name: str
    split: str
    size_bytes: int

    @property
    def flat_name(self) -> str:
        """Of its record: tars in folders have theirs beside the others."""
        return quote(self.name, safe="")


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """One sample of a tar is done with: it is in, or refused with a reason."""

    name: str
    size_bytes: int  # of the tar that have been read since the sample before
    refused: str | None = None


@dataclass(kw_only=True)
class Found:
    """The members of one key, as far as they have come."""

    key: str
    offset: int  # of the first of them
    suffixes: list[str] = field(default_factory=list)  # the first ten
    video: Member | None = None
    video_crc32: int = 0
    texts: dict[str, tuple[Member, bytes]] = field(default_factory=dict)
    problem: str | None = None


def scan_tar(tars_at: str, out: str, tar: Tar, packing: Packing, limits: Limits) -> Iterator[Scanned]:
    """Reads a tar once, from its first byte to its last, and writes its record; yields after each sample.

    A sample that cannot be used is left out, with its place and the reason in the record. Of a tar that is cut off or
    damaged the whole samples before that place are kept. Raises BadShards if it cannot be read at all.
    """
    samples: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    with ExitStack() as opened:
        shard = opened.enter_context(closing(ShardBytes(open_store(tars_at), tar.name, tar.size_bytes)))
        packer = opened.enter_context(VideoPacker(limits))
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="grurcn-index-"))
        video, read = Path(folder) / "video", 0
        for found in samples_of(shard, video, int(limits.memory_limit * 2**30)):
            name, refused = f"{tar.name}/{found.key[:LONGEST_NAME]}".rstrip("/"), None
            try:
                samples.append(row_of(found, video, packing, packer))
            except (BadSample, BadVideo) as error:
                refused = f"at offset {found.offset}: {error}"
                rejected.append({"path": name, "reason": refused})
            yield Scanned(name=name, size_bytes=shard.position - read, refused=refused)
            read = shard.position
        record = {"samples": samples, "rejected": rejected, "size_bytes": tar.size_bytes, "sha256": shard.sha256()}
    with open_store(out).written(record_name(tar.flat_name)) as file:
        file.write(json.dumps(record).encode())


def samples_of(shard: ShardBytes, video: Path, largest: int) -> Iterator[Found]:
    """The samples of a tar. The bytes of each one's video are in the file `video` until the next one is asked for."""
    found: Found | None = None
    seen: set[str] = set()
    try:
        while (member := read_member(shard, shard.size_bytes)) is not None:
            key, suffix = key_and_suffix(member.name) if member.kind != "folder" else ("", "")
            if key and (found is None or key != found.key):
                if found is not None:
                    yield found
                found = Found(key=key, offset=member.offset)
                if key in seen:
                    found.problem = "this key was there before; the members of a sample must lie together"
                seen.add(key)
            check_end(member, shard)
            if key and found is not None:
                found.problem = found.problem or take(found, member, suffix, shard, video, largest)
            shard.skip_to(min(member.end, shard.size_bytes))
    except BadTar as error:
        found = found or Found(key="", offset=shard.position)
        found.problem = f"{error}; this sample and what comes after it are left out"
    if found is not None:
        yield found


def check_end(member: Member, shard: ShardBytes) -> None:
    """Raises BadTar for a member that claims to be longer than the shard."""
    left = shard.size_bytes - member.offset
    if member.size_bytes > left:
        raise BadTar(
            f"the member at offset {member.offset} claims {member.size_bytes} bytes, {left} are left: the tar was cut off, "
            "or its header is wrong"
        )


def key_and_suffix(name: str) -> tuple[str, str]:
    """The key of a sample and the kind of a member; no key for names that WebDataset passes over, and hidden files.

    a/000.flow.mp4 -> a/000, flow.mp4
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not stem or not dot or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()


def take(found: Found, member: Member, suffix: str, shard: ShardBytes, video: Path, largest: int) -> str | None:
    """Reads a member into the sample, if it is of a kind that counts; gives back what is wrong with it."""
    if len(found.suffixes) < 10:
        found.suffixes.append(suffix)
    if reason := bad_name(member.name):
        return reason
    if suffix not in VIDEOS + TEXTS:
        return None
    if member.kind != "file":
        return f".{suffix} is a {member.kind}: wanted a file"
    if suffix in found.texts or (found.video is not None and suffix in VIDEOS):
        what = "two videos" if suffix in VIDEOS else f"two members are named .{suffix}"
        return f"{what}, the second at offset {member.offset}"
    if suffix in TEXTS:
        if member.size_bytes > LONGEST_TEXT:
            return f".{suffix} has {member.size_bytes} bytes: wanted at most {LONGEST_TEXT}"
        found.texts[suffix] = member, shard.read(member.size_bytes)
        return None
    if not 0 < member.size_bytes <= largest:
        return f".{suffix} has {member.size_bytes} bytes: wanted at least 1 and at most {largest} (--memory-limit)"
    found.video = member
    with video.open("wb") as file:
        for piece in shard.pieces(member.size_bytes):
            found.video_crc32 = zlib.crc32(piece, found.video_crc32)
            file.write(piece)
    return None


def bad_name(name: str) -> str | None:
    """What makes a stranger's name one that is not passed on to others."""
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name)} characters: wanted at most {LONGEST_NAME}"
    kinds = {unicodedata.category(letter) for letter in name}
    if "Cs" in kinds:
        return f"the name {printable(name)} is not UTF-8"
    if "Cc" in kinds:
        return f"the name {printable(name)} has control characters in it"
    if name.startswith("/") or ".." in name.split("/"):
        return f"the name {name} leads out of its folder; wanted one without .. and without / at its beginning"
    return None


def row_of(found: Found, video: Path, packing: Packing, packer: VideoPacker) -> dict[str, Any]:
    """A sample's row of the index, but for its label, which may still be a class's name.

    Raises BadSample, BadVideo.
    """
    if found.problem is not None:
        raise BadSample(found.problem)
    if found.video is None:
        kinds = " ".join(f".{printable(suffix)}" for suffix in found.suffixes)
        raise BadSample(f"no video among its members ({kinds}); wanted one of .{' .'.join(VIDEOS)}")
    about = parse_object(found.texts["json"][1]) if "json" in found.texts else {}
    label, name = label_of(found, about)
    captions = {kind: parse_captions(found.texts[kind][1]) for kind in ("json", "txt") if kind in found.texts}
    text = next((kind for kind in captions if captions[kind]), next(iter(captions), None))
    if label is None and not any(captions.values()):
        raise BadSample(
            "neither a label nor a caption; wanted KEY.cls, KEY.txt, or KEY.json with label, class or captions"
        )
    stored = packer.store(video, packing)
    return {
        "key": found.key,
        "label": label,
        "class": name,
        "group": text_of(about, "group") or found.key,
        "num_frames": stored.num_frames,
        "num_captions": len(captions[text]) if text else 0,
        "fps": stored.fps,
        "video_offset": found.video.offset,
        "video_size": found.video.size_bytes,
        "video_crc32": found.video_crc32,
        "json_offset": found.texts[text][0].offset if text else 0,  # of what holds the captions
        "json_size": found.texts[text][0].size_bytes if text else 0,
    }


def label_of(found: Found, about: dict[str, Any]) -> tuple[int | str | None, str | None]:
    """(the label: a number, a class's name or nothing; the name of its class, where the label is a number)"""
    name = text_of(about, "class") or text_of(about, "class_name") or None
    label = about.get("label")
    if "cls" in found.texts:
        text = found.texts["cls"][1][:100].decode("utf-8", "replace").strip()
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise BadSample(f".cls holds '{printable(text)}': wanted a number of at least 0")
        label = int(text)
    if isinstance(label, str):
        label = text_of(about, "label") or None
    if label is None or isinstance(label, str):
        return label or name, None
    if isinstance(label, bool) or not isinstance(label, int):
        raise BadSample(f".json has the label {printable(json.dumps(label))[:50]}: wanted a number or a class's name")
    if not 0 <= label < MOST_CLASSES:
        raise BadSample(f"label {str(label)[:20]}: wanted 0 to {MOST_CLASSES - 1}")
    return label, name


def text_of(about: dict[str, Any], field: str) -> str:
    """A field of KEY.json that is a name; empty if there is none."""
    text = about.get(field)
    if not isinstance(text, str):
        return ""
    if len(text) > LONGEST_NAME or {unicodedata.category(letter) for letter in text} & {"Cc", "Cs"}:
        raise BadSample(f".json has the {field} '{printable(text)[:100]}': wanted a name without control characters")
    return text.strip()
