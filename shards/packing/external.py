"""External tars: an index for WebDataset tars that others wrote, so that they are read where they are, as they are.

    plan_external      a folder, a bucket or names of tars -> the split of each tar
    tars_to_scan       the plan's tars that have not been read
    scan_tar           one tar -> its record; external_scan.py says what a sample may consist of
    finish_external    all records -> classes, index, rejected.jsonl, dataset.json (records.py)

The tars are read and never changed; the index lies beside them or, where that place cannot be written, elsewhere.
"""

import fnmatch
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from webdataset.shardlists import expand_urls

from shards.dataset import DESCRIPTION, EXTERNAL, DatasetInfo, read_dataset
from shards.packing.duplicates import Duplicates
from shards.packing.entries import SPLITS
from shards.packing.records import (
    RECORDS,
    IndexRow,
    Rejected,
    ShardRecord,
    finish_dataset,
    read_records,
    unfinished,
)
from shards.packing.tar_reader import ExternalTar, key_in_tar
from shards.printable import printable
from shards.sample_json import MOST_CLASSES, BadSample
from shards.store import BadShards, BadUrl, Store, absolute_url, has_file, open_store
from shards.video import Packing

SPLIT_WORDS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
LEFT_OUT = "none"  # the split of tars that are not to be read
WEB = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class ExternalPlan:
    """Which tars become which split, before any of them has been read."""

    tars_at: str
    out: str
    tars: tuple[ExternalTar, ...]
    classes: tuple[str, ...]  # in label order; empty: as found in the tars
    packing: Packing
    source: dict[str, Any]  # as JSON
    digest_of_tars: str  # decides what is found in them
    digest: str  # decides what is written


# Which tars


def plan_external(
    urls: Sequence[str],
    out: str | None,
    packing: Packing,
    rules: Sequence[tuple[str, str]] = (),
    classes: Sequence[str] = (),
    val_shards: int = 0,
) -> ExternalPlan:
    """Finds the tars and gives each its split; the last `val_shards` of train become val.

    Raises BadUrl and BadShards where that is not possible.
    """
    place, names = find_tars(urls)
    if out is None and place.startswith(WEB):
        raise BadUrl(f"{place}: a web server cannot be written to; name a place for the index with --out")
    split_of_tar = {name: split_of(name, rules) for name in names}
    unknown = [name for name, split in split_of_tar.items() if split is None]
    if unknown:
        raise BadShards(
            f"{place}: {len(unknown)} of {len(names)} tars have no split, the first: {printable(unknown[0])}; begin their "
            "names with train, val or test, or use --split-of 'PATTERN=train'"
        )
    train = [name for name, split in split_of_tar.items() if split == "train"]
    if not 0 <= val_shards < max(1, len(train)):
        raise BadShards(f"--val-shards {val_shards}: expected fewer than the {len(train)} tars of train")
    split_of_tar |= dict.fromkeys(train[len(train) - val_shards :], "val")
    tars = with_sizes(
        open_store(place), [(name, split) for split in SPLITS for name in names if split_of_tar[name] == split]
    )
    return ExternalPlan(
        tars_at=place,
        out=place if out is None else absolute_url(out),
        tars=tars,
        classes=tuple(classes),
        packing=packing,
        source={"kind": EXTERNAL, "tars": place, "split_of": [list(rule) for rule in rules], "val_shards": val_shards},
        digest_of_tars=digest_of(sorted((tar.name, tar.size_bytes) for tar in tars)),
        digest=digest_of([[asdict(tar) for tar in tars], list(classes), asdict(packing)]),
    )


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps([EXTERNAL, content]).encode()).hexdigest()


def find_tars(urls: Sequence[str]) -> tuple[str, list[str]]:
    """(where they are, their names) from a folder or bucket, or tars by name or pattern: data/train-{000000..000009}.tar.

    Raises BadUrl for other places and for tars of several servers, BadShards where there are none.
    """
    places = [absolute_url(place) for url in urls for place in expand_urls(url)]
    if len(places) == 1 and not places[0].endswith(".tar"):
        return places[0], list_tars(open_store(places[0]))
    for place in places:
        if not place.endswith(".tar"):
            raise BadUrl(f"{place}: expected one folder, or files that end in .tar")
    folders = zip(*(place.split("/")[:-1] for place in places), strict=False)
    common = "/".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, folders))
    if re.fullmatch(r"(\w+:/?)?", common) and not all(place.startswith("/") for place in places):
        raise BadUrl(f"{places[0]} and {places[-1]}: expected tars of one server or bucket")
    return common or "/", sorted({place[len(common) + 1 :] for place in places})


def list_tars(store: Store) -> list[str]:
    if store.url.startswith(WEB):
        raise BadUrl(
            f"{store.url}: a web server lists no files; name the tars, as in '{store.url}/train-{{000000..000009}}.tar'"
        )
    visible = [name for name in store.names() if not re.search(r"(^|/)\.", name)]
    tars = [name for name in visible if name.endswith(".tar")]
    if not tars:
        compressed = [name for name in visible if re.search(r"\.(tgz|tar\.\w+)$", name)]
        found = f"{len(compressed)} compressed tars; unpack them to .tar" if compressed else "no tars"
        raise BadShards(f"{store.url}: found {found}; expected a folder of tars")
    return tars


def split_of(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    """A tar's split: that of the first rule whose pattern fits, else the word that begins the file's name or a folder's.

    valid-000.tar, data/val/000.tar -> val
    """
    for pattern, split in rules:
        if fnmatch.fnmatchcase(name, pattern):
            return split
    for part in reversed(name.split("/")):
        word = re.match(r"(train|validation|valid|val|test)(?![a-zA-Z])", part)
        if word:
            return SPLIT_WORDS[word[1]]
    return None


def parse_rules(options: Sequence[str]) -> list[tuple[str, str]]:
    """PATTERN=split -> (pattern, split). Raises ValueError."""
    rules = []
    for option in options:
        pattern, _, split = option.rpartition("=")
        if not pattern or split not in (*SPLITS, LEFT_OUT):
            raise ValueError(
                f"--split-of {option!r}: expected PATTERN={', '.join(SPLITS)} or {LEFT_OUT} (leaves them out), as in "
                "'part-00*=val'"
            )
        rules.append((pattern, split))
    return rules


def with_sizes(store: Store, tars: Sequence[tuple[str, str]]) -> tuple[ExternalTar, ...]:
    """The (name, split) of tars with their sizes. Raises BadShards if any is missing, or if there are none."""
    sizes = dict(zip(tars, store.sizes([name for name, _ in tars]), strict=True))
    missing = [name for (name, _), size in sizes.items() if size is None]
    if missing or not tars:
        found = f"{len(missing)} of {len(tars)} tars are missing, the first: {missing[0]}" if missing else "no tars"
        raise BadShards(f"{store.url}: {found}")
    return tuple(ExternalTar(name=name, split=split, size_bytes=size or 0) for (name, split), size in sizes.items())


def tars_to_scan(plan: ExternalPlan) -> list[ExternalTar]:
    """Prepares the place of the index and returns the tars that are still to be read.

    Raises BadShards if it holds a packing, or an index of other tars. Deletes nothing but records of its own.
    """
    other = (
        f"{plan.out}: holds a packing, or an index of other tars or settings than these; choose another --out, or delete "
        f"{DESCRIPTION} and {RECORDS} there to index anew"
    )
    return unfinished(open_store(plan.out), plan.tars, plan.digest_of_tars, other, finished_digest=plan.digest)


# The index


def finish_external(plan: ExternalPlan) -> DatasetInfo:
    """Writes the index and dataset.json from the records of all tars.

    Raises BadShards if no sample is left, or if some labels are numbers and others names.
    """
    store = open_store(plan.out)
    if has_file(store, DESCRIPTION):
        return read_dataset(store)
    classes, with_duplicates = survey(plan, store)
    number_of = {name: number for number, name in enumerate(classes)}

    def resolve(split: str, tar: str, record: ShardRecord) -> ShardRecord:
        """The rows with the numbers of their labels."""
        rows, rejected = [], list(record.rejected)
        for row in record.samples:
            try:
                rows.append(row_with_number(row, number_of, tar if split in with_duplicates else None))
            except BadSample as error:
                reason = f"at offset {row.video_offset}: {error}"
                rejected.append(Rejected(path=f"{tar}/{row.key}", reason=reason))
        return replace(record, samples=rows, rejected=rejected)

    return finish_dataset(
        store,
        {split: names_of_split(plan, split) for split in SPLITS},
        lambda contents: DatasetInfo(
            classes=classes,
            packing=plan.packing,
            splits=contents.splits,
            plan=plan.digest,
            source={**plan.source, "num_frames": contents.num_frames},
            rejected=contents.rejected,
            shards_at=None if plan.out == plan.tars_at else plan.tars_at,
        ),
        resolve=resolve,
    )


def names_of_split(plan: ExternalPlan, split: str) -> list[str]:
    return [tar.name for tar in plan.tars if tar.split == split]


def survey(plan: ExternalPlan, store: Store) -> tuple[tuple[str, ...], set[str]]:
    """(the classes in label order, the splits in which several tars use the same keys)"""
    names_of_number: defaultdict[int, set[str]] = defaultdict(set)
    names: set[str] = set()  # labels that are no numbers
    with_duplicates: set[str] = set()
    for split in SPLITS:
        with Duplicates() as keys:
            for record in read_records(store, names_of_split(plan, split)):
                keys.add([row.key for row in record.samples], range(len(record.samples)))
                for row in record.samples:
                    if isinstance(row.label, str):
                        names.add(row.label)
                    elif row.label is not None and len(found := names_of_number[row.label]) < 2:
                        found.update([row.class_name] if row.class_name else [])
            if next(keys.found(), None) is not None:
                with_duplicates.add(split)
    return plan.classes or classes_from(plan.tars_at, names_of_number, names), with_duplicates


def classes_from(place: str, names_of_number: Mapping[int, set[str]], names: set[str]) -> tuple[str, ...]:
    """The classes of the labels in the tars: names, sorted; or numbers, with their names if each has one of its own.

    Raises BadShards where some labels are numbers and some are names, and for too many names.
    """
    if names and names_of_number:
        raise BadShards(
            f"{place}: some labels are numbers (such as {min(names_of_number)}), some are names (such as "
            f"{printable(min(names))}); use --classes FILE to number them: one name a line, in label order"
        )
    if len(names) > MOST_CLASSES:
        raise BadShards(f"{place}: {len(names)} class names; expected at most {MOST_CLASSES}; are they captions?")
    if names:
        return tuple(sorted(names))
    numbers = [str(label) for label in range(max(names_of_number, default=-1) + 1)]
    named = [next(iter(names_of_number.get(label, ())), number) for label, number in enumerate(numbers)]
    has_names = all(len(found) == 1 for found in names_of_number.values()) and len(set(named)) == len(named)
    return tuple(named if has_names else numbers)


def row_with_number(row: IndexRow, number_of: Mapping[str, int], tar: str | None) -> IndexRow:
    """The row with its label's number; its key begins with the name of its tar, if that is given.

    Raises BadSample for a label that is none of the classes.
    """
    label, key, group = row.label, row.key, row.group
    if not number_of:
        label = -1
    elif label is None:
        raise BadSample("no label, where others have one; expected KEY.cls, or KEY.json with label or class")
    elif isinstance(label, str):
        if label not in number_of:
            raise BadSample(f"{printable(label)} is none of the {len(number_of)} classes in --classes")
        label = number_of[label]
    elif label >= len(number_of):
        raise BadSample(f"label {label}; expected 0 to {len(number_of) - 1}, of the classes in --classes")
    if tar is not None:
        key, group = key_in_tar(tar, key), key_in_tar(tar, key) if group == key else group
    return replace(row, label=label, key=key, group=group)
