"""One external tar -> the samples that can be read where they lie, and the reasons why others cannot.

    KEY.mp4 (.avi .webm .mkv .mov)    the video
    KEY.cls                           its label, a number
    KEY.json                          {"label": 3 or "Diving", "class": "Diving", "group": "...", "captions": ["..."]}
    KEY.txt                           captions, one a line

As in WebDataset, a key is a member's path up to the first dot of its file name, and the members of a sample lie together. A
video counts as many frames as a sandbox decodes. Members of other kinds are ignored, pickles too, and nothing is written
under a name that stands in the tar.
"""

import json
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.packing.records import IndexRow, Rejected, ShardRecord, write_record
from shards.packing.sandbox import Sandbox
from shards.packing.tar_reader import BadTar, ExternalTar, Member, TarReader, key_and_suffix
from shards.printable import printable
from shards.sample_json import MOST_CLASSES, BadSample, parse_captions, parse_object
from shards.store import open_store
from shards.video import BadVideo, Limits, Packing

VIDEOS, TEXTS = ("mp4", "avi", "webm", "mkv", "mov"), ("cls", "json", "txt")
LONGEST_NAME = 1000  # characters
LONGEST_TEXT = 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """One sample of a tar is done: it can be read, or is rejected with a reason."""

    name: str
    size_bytes: int  # of the tar that were read since the sample before
    rejected: str | None = None


@dataclass(kw_only=True)
class FoundSample:
    """The members of one key that have been read so far."""

    key: str
    offset: int  # of the first of them
    suffixes: list[str] = field(default_factory=list)  # the first ten
    video: Member | None = None
    video_crc32: int = 0
    texts: dict[str, tuple[Member, bytes]] = field(default_factory=dict)  # by suffix
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What the texts of a sample say."""

    label: int | str | None  # a number, a class's name, or nothing
    class_name: str | None  # of a label that is a number
    group: str
    captions_in: Member | None
    num_captions: int


def scan_tar(tars_at: str, out: str, tar: ExternalTar, packing: Packing, limits: Limits) -> Iterator[Scanned]:
    """Reads a tar once, from its first byte to its last, and writes its record; yields after each sample.

    A sample that cannot be used is left out; the record has its place and the reason. If a tar is cut off or damaged, the
    whole samples before that place are kept. Raises BadShards if the tar cannot be read at all.
    """
    samples: list[IndexRow] = []
    rejected: list[Rejected] = []
    with ExitStack() as opened:
        reader = opened.enter_context(closing(TarReader(open_store(tars_at), tar.name, tar.size_bytes)))
        sandbox = opened.enter_context(Sandbox(limits))
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="grurcn-index-"))
        video, read = Path(folder) / "video", 0
        for found in samples_of(reader, video, int(limits.memory_limit * 2**30)):
            name, reason = f"{tar.name}/{found.key[:LONGEST_NAME]}".rstrip("/"), None
            try:
                samples.append(row_of(found, video, packing, sandbox))
            except (BadSample, BadVideo) as error:
                reason = f"at offset {found.offset}: {error}"
                rejected.append(Rejected(path=name, reason=reason))
            yield Scanned(name=name, size_bytes=reader.position - read, rejected=reason)
            read = reader.position
        record = ShardRecord(samples=samples, rejected=rejected, size_bytes=tar.size_bytes, sha256=reader.sha256())
    write_record(open_store(out), tar.name, record)


def samples_of(reader: TarReader, video: Path, largest: int) -> Iterator[FoundSample]:
    """The samples of a tar. The file `video` holds the bytes of a sample's video until the next one is asked for."""
    found: FoundSample | None = None
    seen: set[str] = set()
    try:
        while (member := reader.next_member()) is not None:
            key, suffix = key_and_suffix(member.name) if member.kind != "folder" else ("", "")
            if key and (found is None or key != found.key):
                if found is not None:
                    yield found
                found = FoundSample(key=key, offset=member.offset)
                if key in seen:
                    found.problem = "this key was there before; the members of a sample must lie together"
                seen.add(key)
            left = reader.size_bytes - member.offset
            if member.size_bytes > left:
                raise BadTar(
                    f"the member at offset {member.offset} claims {member.size_bytes} bytes, {left} are left: the tar was "
                    "cut off, or its header is wrong"
                )
            if key and found is not None:
                found.problem = found.problem or read_member(found, member, suffix, reader, video, largest)
            reader.skip_to(min(member.end, reader.size_bytes))
    except BadTar as error:
        found = found or FoundSample(key="", offset=reader.position)
        found.problem = f"{error}; this sample and what comes after it are left out"
    if found is not None:
        yield found


def read_member(
    found: FoundSample, member: Member, suffix: str, reader: TarReader, video: Path, largest: int
) -> str | None:
    """Reads a video or a text into the sample; returns what is wrong with it, if anything."""
    if len(found.suffixes) < 10:
        found.suffixes.append(suffix)
    if reason := bad_name(member.name):
        return reason
    if suffix not in VIDEOS + TEXTS:
        return None
    if member.kind != "file":
        return f".{suffix} is a {member.kind}; expected a file"
    if suffix in found.texts or (found.video is not None and suffix in VIDEOS):
        what = "two videos" if suffix in VIDEOS else f"two members are named .{suffix}"
        return f"{what}, the second at offset {member.offset}"
    if suffix in TEXTS:
        if member.size_bytes > LONGEST_TEXT:
            return f".{suffix} has {member.size_bytes} bytes; expected at most {LONGEST_TEXT}"
        found.texts[suffix] = member, reader.read(member.size_bytes)
        return None
    if not 0 < member.size_bytes <= largest:
        return f".{suffix} has {member.size_bytes} bytes; expected at least 1 and at most {largest} (--memory-limit)"
    found.video = member
    with video.open("wb") as file:
        found.video_crc32 = reader.copy(member.size_bytes, file)
    return None


def bad_name(name: str) -> str | None:
    """What is wrong with the name of a member, if anything."""
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name)} characters; expected at most {LONGEST_NAME}"
    kinds = {unicodedata.category(letter) for letter in name}
    if "Cs" in kinds:
        return f"the name {printable(name)} is not UTF-8"
    if "Cc" in kinds:
        return f"the name {printable(name)} has control characters in it"
    if name.startswith("/") or ".." in name.split("/"):
        return f"the name {name} leads out of its folder; expected one without .. and without / at its beginning"
    return None


def row_of(found: FoundSample, video: Path, packing: Packing, sandbox: Sandbox) -> IndexRow:
    """A sample's row of the index, its label as the tar has it. Raises BadSample, BadVideo."""
    if found.problem is not None:
        raise BadSample(found.problem)
    if found.video is None:
        kinds = " ".join(f".{printable(suffix)}" for suffix in found.suffixes)
        raise BadSample(f"no video among its members ({kinds}); expected one of .{' .'.join(VIDEOS)}")
    annotations = read_annotations(found)
    if annotations.label is None and not annotations.num_captions:
        raise BadSample(
            "neither a label nor a caption; expected KEY.cls, KEY.txt, or KEY.json with label, class or captions"
        )
    stored = sandbox.store(video, packing)
    captions_in = annotations.captions_in
    return IndexRow(
        key=found.key,
        label=annotations.label,
        class_name=annotations.class_name,
        group=annotations.group or found.key,
        num_frames=stored.num_frames,
        num_captions=annotations.num_captions,
        fps=stored.fps,
        video_offset=found.video.offset,
        video_size=found.video.size_bytes,
        video_crc32=found.video_crc32,
        json_offset=captions_in.offset if captions_in else 0,
        json_size=captions_in.size_bytes if captions_in else 0,
    )


def read_annotations(found: FoundSample) -> Annotations:
    """What KEY.cls, KEY.json and KEY.txt say. Raises BadSample for what cannot be."""
    content = parse_object(found.texts["json"][1]) if "json" in found.texts else {}
    captions = {kind: parse_captions(found.texts[kind][1]) for kind in ("json", "txt") if kind in found.texts}
    kind = next((kind for kind in captions if captions[kind]), next(iter(captions), None))
    class_name = text_of(content, "class") or text_of(content, "class_name") or None
    label = label_of(found, content)
    return Annotations(
        label=class_name if label is None else label,
        class_name=class_name if isinstance(label, int) else None,
        group=text_of(content, "group"),
        captions_in=found.texts[kind][0] if kind else None,
        num_captions=len(captions[kind]) if kind else 0,
    )


def label_of(found: FoundSample, content: dict[str, Any]) -> int | str | None:
    """The number in KEY.cls, else the label in KEY.json: a number or a class's name."""
    label = content.get("label")
    if "cls" in found.texts:
        text = found.texts["cls"][1][:100].decode("utf-8", "replace").strip()
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise BadSample(f".cls holds '{printable(text)}'; expected a number of at least 0")
        label = int(text)
    if label is None:
        return None
    if isinstance(label, str):
        return text_of(content, "label") or None
    if isinstance(label, bool) or not isinstance(label, int):
        raise BadSample(f".json has the label {printable(json.dumps(label))[:50]}; expected a number or a class's name")
    if not 0 <= label < MOST_CLASSES:
        raise BadSample(f"label {str(label)[:20]}; expected 0 to {MOST_CLASSES - 1}")
    return label


def text_of(content: dict[str, Any], name: str) -> str:
    """A field of KEY.json that is a name; empty if there is none."""
    text = content.get(name)
    if not isinstance(text, str):
        return ""
    if len(text) > LONGEST_NAME or {unicodedata.category(letter) for letter in text} & {"Cc", "Cs"}:
        raise BadSample(f".json has the {name} '{printable(text)[:100]}'; expected a name without control characters")
    return text.strip()
