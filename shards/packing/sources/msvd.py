"""MSVD (Chen and Dolan 2011): 1,970 YouTube clips with about 40 captions each, and no classes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shards.packing.annotation_files import numbered_lines, read_text, require_file, require_folder
from shards.packing.entries import BadSource, Entry, Listing, hold_out, make_listing, official_group

STANDARD_SPLIT = {"train": range(1, 1201), "val": range(1201, 1301), "test": range(1301, 1971)}


@dataclass(frozen=True, kw_only=True)
class Msvd:
    """MSVD (YouTube2Text): a folder of YouTube clips and their captions. There are no classes."""

    videos: Path
    """Folder with the videos, ID_START_END.avi."""
    train: Path | None = None
    """The training videos' captions: a JSON file [{"id": "ID_START_END.avi", "caption": ["...", "..."]}, ...]."""
    val: Path | None = None
    """The validation videos' captions. Default: some of the training videos are held out."""
    test: Path | None = None
    """The test videos' captions."""
    captions: Path | None = None
    """Instead of these: all videos' captions in one such file, to be split by --mapping."""
    mapping: Path | None = None
    """youtube_mapping.txt of lines "ID_START_END vidN", for the standard split: vid1 to vid1200 are for training,
    vid1201 to vid1300 for validation, vid1301 to vid1970 for testing. Videos that it does not name are left out."""
    val_fraction: float = 0.1
    """Fraction of the YouTube ids in --train held out for validation, where there is no --val."""
    split_seed: int = 0
    """Decides which YouTube ids are held out."""

    def entries(self) -> Listing:
        """The listed videos with their captions, present on disk or not; clips of one YouTube video are a group."""
        require_folder(self.videos, "--videos")
        files = {"--train": self.train, "--val": self.val, "--test": self.test}
        standard = {"--captions": self.captions, "--mapping": self.mapping}
        given = [option for option, file in (files | standard).items() if file is not None]
        if self.captions is not None and self.mapping is not None and len(given) == 2:
            return make_listing((), self.standard_split(self.captions, self.mapping))
        if not given or not set(given) <= files.keys():
            raise BadSource(
                f"msvd: found {', '.join(given) or 'no captions'}; expected either --train, --val and --test (those that "
                "there are) or both --captions and --mapping"
            )
        entries = [
            self.entry(path, video, captions, option.removeprefix("--"))
            for option, path in files.items()
            if path is not None
            for video, captions in read_caption_file(path, option).items()
        ]
        return make_listing((), hold_out(entries, "val", 0 if self.val else self.val_fraction, self.split_seed))

    def standard_split(self, captions_file: Path, mapping_file: Path) -> list[Entry]:
        splits, captions_of = read_mapping(mapping_file), read_caption_file(captions_file, "--captions")
        listed = {PurePosixPath(video).stem: video for video in captions_of}
        bare = [name for name in splits if name not in listed]
        if bare:
            raise BadSource(
                f"{captions_file}: no captions of {bare[0]}, which {mapping_file} lists ({len(bare)} such videos); "
                "the standard split needs all of them"
            )
        videos = [(listed[name], split) for name, split in splits.items()]
        return [self.entry(captions_file, video, captions_of[video], split) for video, split in videos]

    def entry(self, file: Path, video: str, captions: tuple[str, ...], split: str) -> Entry:
        match = re.fullmatch(r"([\w-]+)_\d+_\d+\.\w+", video)
        if match is None:
            raise BadSource(f"{file}: id {video!r} is not ID_START_END.avi, the name of a file in --videos")
        group = official_group(split, match[1])
        return Entry(path=self.videos / video, name=video, label="", split=split, group=group, captions=captions)


def read_caption_file(path: Path, option: str) -> dict[str, tuple[str, ...]]:
    """{video: its captions} from a JSON file [{"id": "NAME.avi", "caption": ["...", "..."]}, ...]."""
    require_file(path, option)
    try:
        videos: Any = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise BadSource(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(videos, list) or not videos:
        raise BadSource(f'{path}: expected a list of videos, [{{"id": ..., "caption": [...]}}, ...]')
    captions_of: dict[str, tuple[str, ...]] = {}
    for number, video in enumerate(videos, start=1):
        name = video.get("id") if isinstance(video, dict) else None
        if not isinstance(name, str):
            raise BadSource(f'{path}: video {number} of {len(videos)} has no "id"; expected the name of its file')
        if name in captions_of:
            raise BadSource(f"{path}: id {name!r} is there twice; put all its captions into one list")
        captions_of[name] = checked_captions(f"{path}: id {name!r}", video.get("caption"))
    return captions_of


def checked_captions(where: str, captions: Any) -> tuple[str, ...]:
    """The captions of a video as they are, but for white space around them."""
    if not isinstance(captions, list) or not captions:
        raise BadSource(f'{where}: no captions; its "caption" must be a list of at least one; found {captions!r}')
    for number, caption in enumerate(captions, start=1):
        if not isinstance(caption, str) or not caption.strip():
            raise BadSource(f"{where}: caption {number} of {len(captions)} is {caption!r}; write one, or take it out")
    return tuple(caption.strip() for caption in captions)


def read_mapping(path: Path) -> dict[str, str]:
    """{ID_START_END: its split} from lines "ID_START_END vidN"."""
    require_file(path, "--mapping")
    splits: dict[str, str] = {}
    seen: set[int] = set()
    for where, line in numbered_lines(path):
        match = re.fullmatch(r"(\S+)\s+vid(\d+)", line)
        number = int(match[2]) if match else 0
        split = next((split for split, numbers in STANDARD_SPLIT.items() if number in numbers), None)
        if match is None or split is None:
            raise BadSource(f"{where}: {line!r} is not ID_START_END and vid1 to vid1970")
        if match[1] in splits or number in seen:
            raise BadSource(
                f"{where}: {line!r} names a video or a number that an earlier line has; take one of them out"
            )
        splits[match[1]] = split
        seen.add(number)
    return splits
