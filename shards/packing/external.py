"""Tars that others wrote -> dataset.json and an index, by which everything here reads them where they are, as they are.

    plan_index    a folder, a bucket or names of tars -> the split of each tar
    scan_tar      one tar -> its record; in scan.py, which says what a sample may be made of
    finish_index  all records -> classes, index, rejected.jsonl, dataset.json

The tars are read and never changed; the index lies beside them or, where that place cannot be written, elsewhere.
"""

import fnmatch
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from webdataset.shardlists import expand_urls

from shards.dataset import DESCRIPTION, EXTERNAL, REJECTED, DatasetInfo, Shard, read_dataset
from shards.packing.duplicates import Repeats
from shards.packing.entries import SPLITS
from shards.packing.external_scan import MOST_CLASSES, Tar
from shards.packing.pack import RECORDS, as_line, finished_records, read_records, record_name
from shards.printable import printable
from shards.rows import written_index
from shards.sample_json import BadSample
from shards.store import BadShards, BadUrl, Store, absolute_url, has_file, open_store
from shards.video import Packing

SPLIT_WORDS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
LEFT_OUT = "none"  # the split of tars that are not wanted
WEB = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """Which tars become which split, before any of them has been read."""

    tars_at: str
    out: str
    tars: tuple[Tar, ...]
    classes: tuple[str, ...]  # in label order; empty: as found in the tars
    packing: Packing
    source: dict[str, Any]
    digest_of_tars: str  # decides what is found in them
    digest: str  # decides what is written


# Which tars


def plan_index(
    urls: Sequence[str],
    out: str | None,
    packing: Packing,
    rules: Sequence[tuple[str, str]] = (),
    classes: Sequence[str] = (),
    val_shards: int = 0,
) -> IndexPlan:
    """Finds the tars and gives each its split; the last `val_shards` of train become val.

    Raises BadUrl and BadShards where that cannot be.
    """
    place, names = tars_of(urls)
    if out is None and place.startswith(WEB):
        raise BadUrl(f"{place}: a web server cannot be written to; say with --out where the index is to go")
    split_of_tar = {name: split_of(name, rules) for name in names}
    unknown = [name for name, split in split_of_tar.items() if split is None]
    if unknown:
        raise BadShards(
            f"{place}: {len(unknown)} of {len(names)} tars are of no split, the first: {printable(unknown[0])}; begin their "
            "names with train, val or test, or say it: --split-of 'PATTERN=train'"
        )
    train = [name for name, split in split_of_tar.items() if split == "train"]
    if not 0 <= val_shards < max(1, len(train)):
        raise BadShards(f"--val-shards {val_shards}: wanted fewer than the {len(train)} tars of train")
    split_of_tar |= dict.fromkeys(train[len(train) - val_shards :], "val")
    wanted = [(name, split) for split in SPLITS for name in names if split_of_tar[name] == split]
    tars = sized(open_store(place), wanted)
    sizes = sorted((tar.name, tar.size_bytes) for tar in tars)
    about = [[asdict(tar) for tar in tars], list(classes), asdict(packing)]
    return IndexPlan(
        tars_at=place,
        out=place if out is None else absolute_url(out),
        tars=tars,
        classes=tuple(classes),
        packing=packing,
        source={"kind": EXTERNAL, "tars": place, "split_of": [list(rule) for rule in rules], "val_shards": val_shards},
        digest_of_tars=digest_of(sizes),
        digest=digest_of(about),
    )


def digest_of(about: Any) -> str:
    return hashlib.sha256(json.dumps([EXTERNAL, about]).encode()).hexdigest()


def tars_of(urls: Sequence[str]) -> tuple[str, list[str]]:
    """A folder or bucket, or tars by name or pattern (data/train-{000000..000009}.tar) -> (where they are, their names).

    Raises BadUrl for other places and for tars of several servers, BadShards where there are none.
    """
    places = [absolute_url(place) for url in urls for place in expand_urls(url)]
    if len(places) == 1 and not places[0].endswith(".tar"):
        return places[0], listed_tars(open_store(places[0]))
    for place in places:
        if not place.endswith(".tar"):
            raise BadUrl(f"{place}: wanted one folder, or files that end in .tar")
    folders = zip(*(place.split("/")[:-1] for place in places), strict=False)
    common = "/".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, folders))
    if re.fullmatch(r"(\w+:/?)?", common) and not all(place.startswith("/") for place in places):
        raise BadUrl(f"{places[0]} and {places[-1]}: wanted tars of one server or bucket")
    return common or "/", sorted({place[len(common) + 1 :] for place in places})


def listed_tars(store: Store) -> list[str]:
    if store.url.startswith(WEB):
        raise BadUrl(
            f"{store.url}: a web server lists no files; name the tars, as in '{store.url}/train-{{000000..000009}}.tar'"
        )
    visible = [name for name in store.names() if not re.search(r"(^|/)\.", name)]
    tars = [name for name in visible if name.endswith(".tar")]
    if not tars:
        zipped = [name for name in visible if re.search(r"\.(tgz|tar\.\w+)$", name)]
        found = f"{len(zipped)} compressed ones found; unpack them to .tar" if zipped else "none found"
        raise BadShards(f"{store.url}: a folder of tars is wanted, {found}")
    return tars


def split_of(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    """The split of a tar: that of the first rule whose pattern fits its name, else of the word that begins the file's name
    or a folder's.

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
            wanted = ", ".join(SPLITS)
            raise ValueError(
                f"--split-of {option!r}: wanted PATTERN={wanted} or {LEFT_OUT} (leave them out), as in 'part-00*=val'"
            )
        rules.append((pattern, split))
    return rules


def sized(store: Store, wanted: Sequence[tuple[str, str]]) -> tuple[Tar, ...]:
    """The tars with their sizes. Raises BadShards if any is missing, or if there are none."""
    sizes = dict(zip(wanted, store.sizes([name for name, _ in wanted]), strict=True))
    missing = [name for (name, _), size in sizes.items() if size is None]
    if missing or not wanted:
        found = f"{len(missing)} of {len(wanted)} tars are missing, the first: {missing[0]}" if missing else "no tars"
        raise BadShards(f"{store.url}: {found}")
    return tuple(Tar(name=name, split=split, size_bytes=size or 0) for (name, split), size in sizes.items())


def open_target(plan: IndexPlan) -> list[Tar]:
    """Makes the place of the index ready and gives back the tars that are still to be read.

    Raises BadShards if it holds a packing, or an index of other tars. Deletes nothing but records of its own.
    """
    other = BadShards(
        f"{plan.out}: holds a packing, or an index of other tars or settings than these; choose another --out, or delete "
        f"{DESCRIPTION} and {RECORDS} there to index anew"
    )
    finished = finished_records(open_store(plan.out), plan.digest_of_tars, plan.digest, other)
    return [] if finished is None else [tar for tar in plan.tars if record_name(tar.flat_name) not in finished]


# The index


def finish_index(plan: IndexPlan) -> DatasetInfo:
    """Writes rejected.jsonl, the index of each split and, last, dataset.json, from the records of all tars.

    Raises BadShards if no sample at all is left, or if labels do not fit together.
    """
    store = open_store(plan.out)
    if has_file(store, DESCRIPTION):
        return read_dataset(store)
    classes, repeating = survey(plan, store)
    number_of = {name: number for number, name in enumerate(classes)}
    splits: dict[str, tuple[Shard, ...]] = {}
    num_rejected, num_frames = 0, 0
    with store.written(REJECTED) as refusals:
        for split in SPLITS:
            shards = []
            with written_index(store, split) as index:
                for tar, record in records(plan, store, split):
                    rows, rejected = [], record.pop("rejected")
                    for sample in record.pop("samples"):
                        try:
                            rows.append(row_of_index(sample, number_of, tar.name if split in repeating else None))
                        except BadSample as error:
                            path = f"{tar.name}/{sample['key']}"
                            reason = f"at offset {sample['video_offset']}: {error}"
                            rejected.append({"path": path, "reason": reason})
                    refusals.writelines(as_line({"split": split, **refusal}) for refusal in rejected)
                    num_rejected += len(rejected)
                    num_frames += sum(row["num_frames"] for row in rows)
                    if rows:
                        shards.append(index.add(rows, name=tar.name, **record))
            splits[split] = tuple(shards)
    if not any(splits.values()):
        raise BadShards(
            f"{plan.tars_at}: none of the {num_rejected} samples can be used; the reasons are in {plan.out}/{REJECTED}"
        )
    info = DatasetInfo(
        classes=classes,
        packing=plan.packing,
        splits=splits,
        plan=plan.digest,
        source={**plan.source, "num_frames": num_frames},
        rejected=num_rejected,
        shards_at=None if plan.out == plan.tars_at else plan.tars_at,
    )
    with store.written(DESCRIPTION) as file:
        file.write(info.to_json().encode())
    store.delete(store.names(RECORDS))
    return info


def records(plan: IndexPlan, store: Store, split: str) -> Iterator[tuple[Tar, dict[str, Any]]]:
    """The tars of a split with what was found in each."""
    tars = [tar for tar in plan.tars if tar.split == split]
    return zip(tars, read_records(store, [tar.flat_name for tar in tars]), strict=True)


def survey(plan: IndexPlan, store: Store) -> tuple[tuple[str, ...], set[str]]:
    """(the classes in label order, the splits in which several tars use the same keys)"""
    names_of: defaultdict[int, set[str]] = defaultdict(set)  # of each label that is a number
    names: set[str] = set()  # labels that are none
    repeating: set[str] = set()
    for split in SPLITS:
        with Repeats() as keys:
            for _, record in records(plan, store, split):
                samples = record["samples"]
                keys.add([sample["key"] for sample in samples], range(len(samples)))
                names.update(sample["label"] for sample in samples if isinstance(sample["label"], str))
                for sample in samples:
                    if isinstance(sample["label"], int) and len(said := names_of[sample["label"]]) < 2:
                        said.update([sample["class"]] if sample["class"] else [])
            if next(keys.found(), None) is not None:
                repeating.add(split)
    return plan.classes or classes_from(plan.tars_at, names_of, names), repeating


def classes_from(place: str, names_of: Mapping[int, set[str]], names: set[str]) -> tuple[str, ...]:
    """The classes of the labels in the tars: names, sorted; or numbers, called by their names if each has one of its own.

    Raises BadShards where some labels are numbers and some are names, and for too many names.
    """
    if names and names_of:
        raise BadShards(
            f"{place}: some labels are numbers (as {min(names_of)}), some are names (as {printable(min(names))}); say with "
            "--classes FILE which is which: one name a line, in label order"
        )
    if len(names) > MOST_CLASSES:
        raise BadShards(f"{place}: {len(names)} class names, wanted at most {MOST_CLASSES}; are they captions?")
    if names:
        return tuple(sorted(names))
    numbers = [str(label) for label in range(max(names_of, default=-1) + 1)]
    called = [next(iter(names_of.get(label, ())), number) for label, number in enumerate(numbers)]
    has_names = all(len(said) == 1 for said in names_of.values()) and len(set(called)) == len(called)
    return tuple(called if has_names else numbers)


def row_of_index(sample: dict[str, Any], number_of: Mapping[str, int], tar: str | None) -> dict[str, Any]:
    """The sample's row with its label's number; its key begins with the name of its tar, if that is given.

    Raises BadSample for a label that is none of the classes.
    """
    label, key, group = sample["label"], sample["key"], sample["group"]
    if not number_of:
        label = -1
    elif label is None:
        raise BadSample("no label, where others have one; wanted KEY.cls, or KEY.json with label or class")
    elif isinstance(label, str):
        if label not in number_of:
            raise BadSample(f"{printable(label)} is none of the {len(number_of)} classes in --classes")
        label = number_of[label]
    elif label >= len(number_of):
        raise BadSample(f"label {label}: wanted 0 to {len(number_of) - 1}, of the classes in --classes")
    if tar is not None:
        key, group = in_tar(tar, key), in_tar(tar, key) if group == key else group
    return {**sample, "label": label, "key": key, "group": group}


def in_tar(tar: str, key: str) -> str:
    """The key of a sample where several tars use the same ones."""
    return f"{tar.removesuffix('.tar')}/{key}"
