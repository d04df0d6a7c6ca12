"""What people ask of a data set: what it holds, whether it is whole, what the model will see."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image
from s3fs import S3FileSystem
from servers import RangeServer, s3_server
from videos import TINY, frame_numbers, level, listing_of, pack

from cluster.workers.connect import start_ray
from grurcn.drawing import clip_frames as preview_clips
from grurcn.drawing.contact_sheet import flow_colours
from grurcn.drawing.preview import choose, train_clip_of
from grurcn.models.pixels import to_clips
from jobs.commands import load
from jobs.inspect_shards.index import MakeIndex
from jobs.inspect_shards.info import Info
from jobs.inspect_shards.preview import Preview
from jobs.inspect_shards.verify import Verify
from shards.dataset import read_dataset
from shards.index import Index
from shards.packing.entries import Listing
from shards.reading.clips import ClipConfig, train_clip
from shards.reading.decode import read_frames
from shards.rows import SCHEMA, written_index
from shards.store import BadShards, FolderStore, open_store
from shards.summary import quantiles
from shards.verify import Fault, check_index

inspect_shards = load("inspect_shards")

ROOT = Path(__file__).parents[2]
FRAMES = [8, 9, 10, 11, 12, 8, 9, 10, 11]
SPLITS = ("train", "train", "val")
CLIPS = ClipConfig(num_frames=3, size=24)


def run(job: Any) -> tuple[int, dict[str, Any]]:
    """The job in this process: its status and its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        status = inspect_shards.main(replace(job, json=file))
        result = json.loads(file.read_text())
    kind = {Info: "info", Verify: "verify", Preview: "preview", MakeIndex: "index"}[type(job)]
    documented = re.split(rf"\n  {kind} ", inspect_shards.description or "")[1].splitlines()[0]
    assert all(key in documented for key in result)
    return status, result


def faults(url: Path | str, **options: Any) -> list[str]:
    """What verify finds, each as a line without the folder's name."""
    status, result = run(Verify(url=str(url), workers=0, **options))
    assert (status, result["faults"]) == (min(1, len(result["fault_list"])), len(result["fault_list"]))
    return [str(Fault(**fault)).replace(f"{url}/", "") for fault in result["fault_list"]]


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> Listing:
    """Nine videos of two classes: six in train, three in val."""
    return listing_of(tmp_path_factory.mktemp("videos"), FRAMES, splits=SPLITS)


@pytest.fixture(scope="module")
def packed(listing, tmp_path_factory) -> Path:
    """Shards of two videos: three of train, two of val."""
    return pack(tmp_path_factory.mktemp("data") / "shards", listing, videos_per_shard=2)


@pytest.fixture(scope="module")
def with_flow(listing, tmp_path_factory) -> Path:
    """The videos of train, with flow."""
    entries = tuple(entry for entry in listing.entries if entry.split == "train")[:3]
    packing = replace(TINY, flow="dis")
    return pack(tmp_path_factory.mktemp("flow") / "shards", replace(listing, entries=entries), packing)


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return shutil.copytree(packed, tmp_path / "shards")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reindex(folder: Path, change: Callable[[str, dict[str, Any]], Any], split: str = "train") -> None:
    """Writes a split's index anew, with other rows and checksums that fit, as a packer with a fault would."""
    index = Index(folder, split)
    shards = []
    with written_index(FolderStore(folder), split) as file:
        for number, shard in enumerate(index.shards):
            rows = index.read_rows(number)
            columns = {**{name: text.to_pylist() for name, text in rows.texts.items()}, **rows.columns}
            samples = [{name: as_python(columns[name][row]) for name in SCHEMA.names} for row in range(shard.samples)]
            for sample in samples:
                change(shard.name, sample)
            shards.append(vars_of(file.add(samples, name=shard.name, size_bytes=shard.size_bytes, sha256=shard.sha256)))
    rewrite(folder, lambda content: content["splits"].update({split: shards}))


def as_python(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def vars_of(shard: Any) -> dict[str, Any]:
    return {name: getattr(shard, name) for name in shard.__slots__}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# Verify


@pytest.mark.parametrize("quick", [True, False])
def test_a_data_set_as_it_was_packed_has_no_fault(quick, packed, with_flow, capsys):
    assert faults(packed, quick=quick) == []
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("no faults in 9 videos (train 6, val 3) of 5 shards, 0.1 MB, in ")
    assert ("nothing was decoded" in line) == quick
    assert faults(with_flow, quick=quick) == []


def test_a_flipped_byte_of_a_video_is_found_by_its_sample_and_its_shard(folder):
    sample = Index(folder, "train")[1]
    flip(folder / sample.shard, sample.offset + 300)
    found = faults(folder)
    assert found == [
        f"train-000000.tar: {sample.key} at offset {sample.offset}: video: its {sample.size_bytes:,} bytes are not those "
        "that were packed (CRC-32 differs)",
        "train-000000.tar: its bytes are not those that dataset.json describes (SHA-256 differs); restore it, or pack again",
    ]
    assert faults(folder, quick=True) == found
    assert faults(folder, splits=("val",)) == []


def test_a_flipped_byte_of_a_flow_is_found(with_flow, tmp_path):
    folder = shutil.copytree(with_flow, tmp_path / "shards")
    sample = Index(folder, "train")[2]
    assert sample.flow is not None
    flip(folder / sample.shard, sample.flow.offset + sample.flow.size_bytes - 1)
    first, second = faults(folder)
    assert first.startswith(f"train-000000.tar: {sample.key} at offset {sample.flow.offset}: flow: its ")
    assert "SHA-256" in second


def test_a_flipped_byte_of_a_header_or_the_padding_is_found(folder):
    index = Index(folder, "train")
    flip(folder / index[1].shard, index[1].offset - 500)
    flip(folder / index[2].shard, (folder / index[2].shard).stat().st_size - 1)
    header, first_shard, second_shard = faults(folder, quick=True)
    assert header == (
        f"train-000000.tar: {index[1].key} at offset {index[1].offset}: video: the bytes at offset {index[1].offset - 512} are "
        "no tar header (bad checksum)"
    )
    assert first_shard.startswith("train-000000.tar: its bytes are not")
    assert second_shard.startswith("train-000001.tar: its bytes are not")


def test_a_json_that_says_other_than_its_row_is_found(folder):
    sample = Index(folder, "train")[0]
    path = folder / sample.shard
    data = path.read_bytes()
    about = data[sample.json_offset : sample.json_offset + sample.json_size_bytes]
    frames = sample.num_frames
    other = about.replace(b'"label": 0', b'"label": 1').replace(
        f'frames": {frames}'.encode(), f'frames": {frames - 1}'.encode()
    )
    other = other.ljust(len(about))
    path.write_bytes(data[: sample.json_offset] + other + data[sample.json_offset + len(other) :])
    found = faults(folder, quick=True)
    place = f"train-000000.tar: {sample.key} at offset {sample.json_offset}: json"
    assert found[0] == f"{place}: num_frames {frames - 1}, its row says {frames}"
    assert found[1].endswith("json: label 1, its row says 0")
    path.write_bytes(data[: sample.json_offset] + b"[" * len(other) + data[sample.json_offset + len(other) :])
    assert re.search(
        r"json: cannot be read \(.json is not JSON \(Expecting value: line 1", faults(folder, quick=True)[0]
    )


@pytest.mark.parametrize("keep", [0, 700, -2000])
def test_every_sample_of_a_truncated_shard_that_is_gone_is_named(keep, folder):
    index = Index(folder, "train")
    path = folder / "train-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: keep % len(whole)])
    found = faults(folder, quick=True)
    assert found[0] == f"train-000000.tar: {keep % len(whole):,} bytes, dataset.json says {len(whole):,} bytes"
    assert "SHA-256 differs" in found[-1]
    cut = [
        (sample.key, kind)
        for sample in index.samples(range(2))
        for kind, end in (("video", sample.offset + sample.size_bytes), ("json", sample.json_offset + sample.json_size_bytes))
        if end > keep % len(whole)
    ]  # fmt: skip
    named = [
        re.match(r"train-000000\.tar: (\S+) at offset \d+: (\w+): the shard ends [\d,]+ bytes before it does", line)
        for line in found[1:-1]
    ]
    assert [match and match.groups() for match in named] == cut


def test_a_shard_that_is_gone_is_named_and_the_others_are_checked(folder):
    index = Index(folder, "train")
    (folder / "train-000001.tar").unlink()
    flip(folder / "train-000002.tar", index[4].offset + 9)
    missing, video, shard = faults(folder, quick=True)
    assert re.fullmatch(r"train-000001\.tar: missing, dataset\.json says [\d,]+ bytes", missing)
    assert index[4].key in video
    assert "train-000002.tar" in shard


def test_the_shards_of_another_packing_are_named(folder, listing, tmp_path):
    other = pack(tmp_path / "other", listing, replace(TINY, crf=40), videos_per_shard=2)
    shutil.copy(other / "val-000000.tar", folder)
    found = faults(folder, quick=True)
    assert {line.split(":")[0] for line in found} == {"val-000000.tar"}
    assert len(found) >= 3


def test_an_index_of_another_packing_is_named_by_each_shard_of_its_rows(folder, listing, tmp_path):
    other = pack(tmp_path / "other", listing, replace(TINY, crf=40), videos_per_shard=2)
    shutil.copy(other / "train.index.arrow", folder)
    found = faults(folder, quick=True)
    assert len(found) == 3
    for number, line in enumerate(found):
        assert f"the rows of train-{number:06}.tar: train.index.arrow: the " in line
        assert "CRC-32 differs" in line


def test_an_index_that_is_gone_cut_off_or_no_arrow_file_is_named(folder):
    path = folder / "train.index.arrow"
    whole = path.read_bytes()
    path.write_bytes(b"X" + whole[1:])
    assert faults(folder, quick=True) == [
        "train.index.arrow: does not begin and end as an Arrow file does: it is damaged or cut off"
    ]
    path.write_bytes(whole[:-100])
    assert "it is damaged or cut off" in faults(folder, quick=True)[0]
    path.write_bytes(whole[:1000])
    cut = faults(folder, quick=True)
    assert re.fullmatch(r"train\.index\.arrow: 1,000 bytes, its rows alone end at byte [\d,]+; .*", cut[0])
    assert len(cut) == 4  # and each shard's rows
    path.unlink()
    assert faults(folder, quick=True)[0].startswith("train.index.arrow: missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content.pop("classes"),
            r"dataset\.json: not as a packing writes it \(KeyError\('classes'\)\); res",
        ),
        (lambda content: content.update(splits=[]), r"dataset\.json: not as a packing writes it"),
        (lambda content: content.update(classes=[1, 2]), r"dataset\.json: not as a packing writes it"),
        (lambda content: content["splits"]["train"][0].pop("sha256"), r"not as a packing writes it"),
        (lambda content: content["splits"]["train"][0].update(samples="2"), r"not as a packing writes it"),
        (lambda content: content["splits"]["train"][0].update(rows_size=-1), r"not as a packing .*-1 in train-000000"),
        (lambda content: content["packing"].update(width=-1), r"not as a packing writes it .*-1 x 32 frames"),
        (lambda content: content.update(format="other"), "not the description of a packed data set"),
        (
            lambda content: content["splits"]["val"].append(content["splits"]["train"][0]),
            "1 faults; the shards were not",
        ),
        (lambda content: content["splits"]["val"][0].update(name="../val-000000.tar"), "1 faults"),
        (lambda content: content["splits"]["val"][0].update(name="/etc/passwd"), "1 faults"),
        (lambda content: content.update(classes=["a", "a"]), "1 faults"),
    ],
)
def test_a_wrong_description_is_refused_before_any_shard_is_read(change, message, folder):
    rewrite(folder, change)
    with pytest.raises(BadShards, match=message):
        faults(folder)


def test_counts_of_the_description_that_are_not_those_of_the_rows_are_named(folder):
    rewrite(folder, lambda content: content["splits"]["train"][1].update(captions=7))
    assert faults(folder, quick=True) == [
        f"train.index.arrow: at offset {Index(folder, 'train').shards[1].rows_offset}: the rows of train-000001.tar: "
        "2 samples with 0 captions, dataset.json says 2 with 7"
    ]


def test_more_rows_than_the_description_says_are_named(folder):
    reindex(folder, lambda _, row: row.update(key="same"))
    rewrite(folder, lambda content: content["splits"]["train"][2].update(samples=1))
    found = faults(folder, quick=True)
    assert any(line.endswith("2 samples with 0 captions, dataset.json says 1 with 0") for line in found)


def test_rows_that_lead_to_wrong_places_are_named(folder):
    changes = {"train-000000.tar": 512, "train-000001.tar": 100, "train-000002.tar": 10**9}
    reindex(folder, lambda shard, row: row.update(video_offset=row["video_offset"] + changes[shard]))
    index = Index(folder, "train")
    found = faults(folder, quick=True)
    for number in range(6):
        sample = index[number]
        [line] = [
            line for line in found if f"{sample.key} at offset {sample.offset}: video:" in line and "CRC" not in line
        ]
        assert re.search(
            [r"it lies within the member \S+\.mp4", r"it lies within the member|no member begins", "the shard ends"][
                number // 2
            ],
            line,
        )
    assert not [line for line in found if "SHA-256" in line]


def test_a_row_that_leads_to_another_member_is_named(folder):
    reindex(folder, lambda _, row: row.update(video_offset=row["json_offset"], video_size=row["json_size"]))
    found = faults(folder, quick=True)
    assert len([line for line in found if re.search(r"video: the member there is \S+\.json", line)]) == 6
    assert len([line for line in found if "json: its place is within what lies before it" in line]) == 6


def test_a_size_that_is_not_the_member_s_is_named(folder):
    reindex(folder, lambda _, row: row.update(video_size=row["video_size"] - 1))
    found = faults(folder, quick=True)
    assert len([line for line in found if "video: its header says: a file of" in line]) == 6


def test_values_that_no_row_can_have_are_named(folder):
    reindex(folder, lambda _, row: row.update(label=2, fps=0.0, json_size=0))
    found = faults(folder, quick=True)
    assert len([line for line in found if "its row has the label 2, there are 2 classes" in line]) == 6
    assert len([line for line in found if re.search(r"its row has \d+ frames at 0 a second", line)]) == 6
    assert len([line for line in found if re.search(r"its row has a video of \d+ bytes and a JSON of 0", line)]) == 6
    reindex(folder, lambda _, row: row.update(label=None))
    assert "some have no label" in faults(folder, quick=True)[0]


def test_keys_that_come_more_than_once_are_named_with_both_places(folder):
    reindex(folder, lambda _, row: row.update(key="same"))
    first = Index(folder, "train")[0]
    twice = [line for line in faults(folder, quick=True) if "another sample has the same key" in line]
    assert len(twice) == 5
    for line in twice:
        assert line.endswith(f"another sample has the same key, in {first.shard} at offset {first.offset}")


def test_frames_are_counted_by_decoding(folder):
    """One less in row and JSON alike: only a decoder can tell."""
    sample = Index(folder, "train")[0]
    path, frames = folder / sample.shard, sample.num_frames
    data, end = path.read_bytes(), sample.json_offset + sample.json_size_bytes
    said, other = f'frames": {frames}', f'frames": {frames - 1}'
    about = data[sample.json_offset : end].replace(said.encode(), other.ljust(len(said)).encode())
    path.write_bytes(data[: sample.json_offset] + about + data[end:])
    reindex(folder, lambda _, row: row.update(num_frames=frames - 1) if row["key"] == sample.key else None)
    assert len(faults(folder, quick=True)) == 1  # the SHA-256
    decoded = f"{sample.key} at offset {sample.offset}: video: decodes to {frames} frames, its row says {frames - 1}"
    assert faults(folder)[0] == f"{sample.shard}: {decoded}"


def test_fields_of_flow_are_counted_and_what_does_not_decode_is_named(with_flow, tmp_path):
    """Bytes that a packer with a fault would have written, and checksummed."""
    folder = shutil.copytree(with_flow, tmp_path / "shards")
    index = Index(folder, "train")
    one, other, third = index.samples(range(3))
    assert one.flow is not None
    assert other.flow is not None
    path = folder / one.shard
    data = bytearray(path.read_bytes())
    data[other.offset + 100 : other.offset + other.size_bytes] = bytes(other.size_bytes - 100)
    path.write_bytes(data)
    spoilt = zlib.crc32(data[other.offset : other.offset + other.size_bytes])
    at = {
        one.key: {"flow_offset": one.offset, "flow_size": one.size_bytes, "flow_crc32": one.crc32},
        other.key: {"video_crc32": spoilt},
    }
    reindex(
        folder,
        lambda _, row: row.update(at.get(row["key"], {}), num_frames=row["num_frames"] + (row["key"] == third.key)),
    )
    found = "\n".join(faults(folder))
    assert re.search(rf"{other.key} at offset {other.offset}: video: .*(decode|not a video)", found)
    assert f"flow: decodes to {third.num_frames} fields, its row says {third.num_frames + 1}" in found
    assert f"{one.key} at offset {one.offset}: flow: its place is within what lies before it" in found


def test_the_same_faults_are_found_over_http_and_s3(folder):
    sample = Index(folder, "train")[1]
    flip(folder / sample.shard, sample.offset + 300)
    (folder / "val-000000.tar").unlink()
    here = faults(folder)
    assert len(here) == 3
    with RangeServer(folder) as server:
        assert faults(server.url) == here
    with s3_server() as bucket:
        S3FileSystem.clear_instance_cache()  # it remembers the servers of other tests
        store = open_store(f"{bucket}/shards")
        for path in folder.iterdir():
            with store.written(path.name) as file:
                file.write(path.read_bytes())
        assert faults(store.url) == here
    S3FileSystem.clear_instance_cache()


def test_an_indexed_data_set_is_verified_where_its_tars_are(packed, tmp_path):
    run(
        MakeIndex(
            url=(str(packed / "train-{000000..000002}.tar"),),
            out=str(tmp_path / "index"),
            width=32,
            height=32,
            workers=0,
        )
    )
    assert faults(tmp_path / "index") == []
    copy = shutil.copytree(packed, tmp_path / "copy")
    rewrite(tmp_path / "index", lambda content: content.update(shards_at=str(copy)))
    flip(copy / "train-000001.tar", 600)
    assert "CRC-32 differs" in faults(tmp_path / "index")[0]


def test_strange_texts_reach_the_terminal_as_text(folder, capsys):
    reindex(folder, lambda _, row: row.update(key="\x1b[31mred\r\n"))
    faults(folder, quick=True)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[31mred\r\n" in out


@pytest.mark.parametrize("splits", [("dev",), ("train", "test")])
def test_splits_without_samples_are_refused_by_name(splits, packed):
    with pytest.raises(BadShards, match=rf"no samples in {splits[-1]} \(splits with samples: train, val\)"):
        faults(packed, splits=splits)


def test_faults_are_lines_and_status_1_and_ctrl_c_leaves_nothing_behind(folder, tmp_path):
    flip(folder / "train-000000.tar", 600)
    (temporary := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "jobs.inspect_shards", "verify", str(folder), "--workers", "0"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run([*command, "--quick"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.count("fault: train-000000.tar: ") == 2
    assert not done.stderr

    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        helpers: list[psutil.Process] = []
        while not helpers:
            assert process.poll() is None
            helpers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("interrupted")
    assert "Traceback" not in said
    psutil.wait_procs(helpers, timeout=10)
    assert not [helper for helper in helpers if helper.is_running()]
    assert not list(temporary.iterdir())


@contextmanager
def big_index(folder: Path, num_shards: int) -> Iterator[Index]:
    """An index of many samples, without the shards."""
    row = dict.fromkeys(SCHEMA.names, 0) | {"group": "g", "fps": 25.0, "num_frames": 10}
    row |= {name: None for name in SCHEMA.names if name.startswith("flow_")}
    with written_index(FolderStore(folder), "train") as file:
        shards = [
            vars_of(
                file.add([{**row, "key": f"{n}-{k}"} for k in range(1000)], name=f"{n}.tar", size_bytes=0, sha256="")
            )
            for n in range(num_shards)
        ]
    info = {**json.loads((folder / "dataset.json").read_text()), "splits": {"train": shards}}
    (folder / "dataset.json").write_text(json.dumps(info))
    yield Index(folder, "train")


def test_memory_does_not_grow_with_the_number_of_samples(folder):
    peaks = {}
    for num_shards in (20, 80):
        with big_index(folder, num_shards) as index:
            tracemalloc.start()
            assert list(check_index(index)) == []
            run(Info(url=str(folder)))
            peaks[num_shards] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peaks[80] < 1.3 * peaks[20] + 2**20


# Info


def test_info_counts_what_was_packed(packed, capsys):
    status, result = run(Info(url=str(packed)))
    assert status == 0
    assert result["classes"] == {"a": {"train": 3, "val": 2, "test": 0}, "b": {"train": 3, "val": 1, "test": 0}}
    train, val = result["splits"]["train"], result["splits"]["val"]
    of_train = sorted(frames for number, frames in enumerate(FRAMES) if SPLITS[number % 3] == "train")
    assert (train["videos"], train["shards"], train["frames"]) == (6, 3, sum(of_train))
    assert train["hours"] == pytest.approx(sum(of_train) / 25 / 3600)
    assert train["seconds"] == {"min": of_train[0] / 25, "median": of_train[2] / 25, "max": of_train[-1] / 25}
    assert (val["videos"], val["shards"], val["captions"]) == (3, 2, 0)
    assert result["shared_groups"] == 0
    assert result["digest"] == read_dataset(open_store(packed)).digest
    out = capsys.readouterr().out
    assert re.search(r"│ a +│ +3 │ +2 │ +0 │ +5 │", out)
    assert "32 x 32; H.264, a key frame every 4 frames, crf 18" in out
    assert out.splitlines()[-1].startswith("9 videos of 2 classes, 0.00 hours, 0.1 MB: ")


def test_of_many_classes_the_ends_are_shown_unless_all_are_wanted(folder, capsys):
    rewrite(folder, lambda content: content.update(classes=["a", "b", *(f"class {number:03}" for number in range(98))]))
    run(Info(url=str(folder)))
    shown = capsys.readouterr().out
    assert "100 classes, 98 without a video" in shown
    assert "... 80 more (--all)" in shown
    assert "class 000" in shown
    assert "class 050" not in shown
    run(Info(url=str(folder), all=True))
    assert "class 050" in capsys.readouterr().out


def test_refused_videos_are_grouped_by_reasons_that_differ_in_numbers_only(folder, capsys):
    lines = [{"path": f"a/{number}.avi", "reason": f"frame {number} of 187 does not decode"} for number in range(1200)]
    lines += [{"path": "b/1.mp4", "reason": "x264 says no 12 times"}, {"path": "[red]", "reason": "\x1b[31m"}]
    (folder / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(folder, lambda content: content.update(rejected=len(lines)))
    _, result = run(Info(url=str(folder)))
    assert [(reason["count"], reason["reason"]) for reason in result["reasons"]] == [
        (1200, "frame N of N does not decode"), (1, "x264 says no 12 times"), (1, "\x1b[31m"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"1,200  frame N of N does not decode\n +a/0\.avi, a/1\.avi, a/2\.avi, \.\.\.\n", out)
    assert "[red]" in out
    assert "\x1b" not in out

    (folder / "rejected.jsonl").unlink()
    assert run(Info(url=str(folder)))[1]["reasons"] == []
    assert "left out      1,202 (no rejected.jsonl here that says why)" in capsys.readouterr().out
    (folder / "rejected.jsonl").write_text('{"path": "a"}\n')
    with pytest.raises(BadShards, match=r"rejected\.jsonl:1: not a path and a reason"):
        run(Info(url=str(folder)))


def test_groups_in_two_splits_are_counted(folder, capsys):
    reindex(folder, lambda _, row: row.update(group="a film"))
    reindex(folder, lambda _, row: row.update(group="a film" if row["num_frames"] > 10 else row["group"]), split="val")
    assert run(Info(url=str(folder)))[1]["shared_groups"] == 1
    assert "1 in more than one split (should be 0" in capsys.readouterr().out


def test_info_reads_a_web_server(packed):
    with RangeServer(packed) as server:
        assert run(Info(url=server.url))[1]["splits"] == run(Info(url=str(packed)))[1]["splits"]


def test_medians_are_of_videos_and_not_of_lengths():
    assert quantiles({100: 1, 200: 1, 300: 5}) == (1.0, 3.0, 3.0)  # pyright: ignore[reportArgumentType]
    assert quantiles({100: 5, 200: 1}) == (1.0, 1.0, 2.0)  # pyright: ignore[reportArgumentType]
    assert quantiles({}) == (0.0, 0.0, 0.0)  # pyright: ignore[reportArgumentType]


# Preview


class Page(HTMLParser):
    """The tags of a page, its pictures, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def pictures(self) -> list[Image.Image]:
        sources = [value or "" for name, value in self.attributes if name == "src"]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def frames_of(picture: Image.Image) -> np.ndarray:
    frames = []
    for number in range(picture.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
        picture.seek(number)
        frames.append(np.asarray(picture.convert("RGB")))
    return np.stack(frames)


def preview(url: Path | str, out: Path, **options: Any) -> tuple[Page, Image.Image, dict[str, Any]]:
    status, result = run(Preview(url=str(url), out=out / "p.html", **{"clips": CLIPS, **options}))
    assert status == 0
    return Page(out / "p.html"), Image.open(out / "p.png"), result


def test_a_preview_shows_the_clips_that_training_reads(packed, listing, tmp_path):
    page, picture, result = preview(packed, tmp_path, samples=6, seed=3)
    index = Index(packed, "train")
    by_key = {sample.key: sample for sample in index.samples(range(6))}
    assert [sample["key"] for sample in result["samples"]] == sorted(
        by_key, key=lambda key: (by_key[key].label, by_key[key].number)
    )
    moving = page.pictures()
    for number, shown in enumerate(result["samples"]):
        sample = by_key[shown["key"]]
        clip = train_clip(sample.num_frames, 32, 32, CLIPS, 3, 0, sample.number)
        assert (shown["frames"], tuple(shown["box"]), shown["mirror"]) == (clip.frames.tolist(), clip.box, clip.mirror)
        data = (packed / sample.shard).read_bytes()[sample.offset : sample.offset + sample.size_bytes]
        planes = read_frames(data, clip.frames.tolist(), index.info.packing)
        grey = np.array([(level(each) - 16) * 255 / 219 for each in frame_numbers(planes)])
        np.testing.assert_allclose(frames_of(moving[number]).mean(axis=(1, 2, 3)), grey, atol=3)
        cells = [
            picture.getpixel((24 + 300 + 10 + column * 132, 24 + 34 + 40 + 12 + 10 + number * 136))
            for column in range(3)
        ]
        np.testing.assert_allclose(np.array(cells).mean(axis=1), grey, atol=3)
    first, frames = by_key[result["samples"][0]["key"]], result["samples"][0]["frames"]
    for word in ("a", "b", first.group, f"frames {frames[0]}-{frames[-1]} of {first.num_frames}, 25 fps"):
        assert any(word in words for words in page.words)


def test_what_is_drawn_is_what_the_model_gets(packed):
    """Taken back from the model's input, of any colour."""
    index = Index(packed, "train")
    shown = train_clip_of(index, 0, CLIPS, 0)
    planes = np.random.default_rng(0).integers(16, 236, (1, 3, 48, 32), np.uint8)
    box, mirror = torch.tensor([shown.clip.box]), torch.tensor([False])
    clips = to_clips(torch.from_numpy(planes), box, mirror, 24)
    pixels = torch.from_numpy(preview_clips.as_pixels(clips[0])).movedim(-1, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (preview_clips.MEAN, preview_clips.STD))
    torch.testing.assert_close((pixels - mean) / std, clips[0], atol=0.01, rtol=0)


def test_a_preview_is_one_page_that_asks_for_nothing(packed, tmp_path):
    page, picture, _ = preview(packed, tmp_path, samples=2)
    assert picture.format == "PNG"
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset", "action", "style")
    ]
    text = (tmp_path / "p.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert not list(tmp_path.glob(".*"))
    [moving, _] = page.pictures()
    assert moving.n_frames == 3  # pyright: ignore[reportAttributeAccessIssue]


def test_hostile_names_and_captions_are_text(packed, tmp_path):
    evil = '<script>alert("1")</script><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e'
    folder = shutil.copytree(packed, tmp_path / "shards")
    rewrite(folder, lambda content: content.update(classes=[evil, evil + "2"]))
    reindex(folder, lambda _, row: row.update(key=f"'\"><script>{row['key']}", group="</dd></dl>" + evil))
    page, _, _ = preview(folder, tmp_path, samples=4)
    assert "script" not in page.tags
    assert page.tags.count("img") == 4
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any('<script>alert("1")</script><img src=x onerror=alert(2)>&amp;' in words for words in page.words)
    assert "\x1b" not in (tmp_path / "p.html").read_text()


def test_captions_stand_beside_their_clip(packed, listing, tmp_path):
    captions = tuple(f"<b>caption</b> {number}" for number in range(5))
    entries = tuple(replace(entry, label="", captions=captions) for entry in listing.entries[:2])
    folder = pack(tmp_path / "shards", Listing(classes=(), entries=entries))
    assert faults(folder) == []
    page, _, result = preview(folder, tmp_path, samples=5)
    assert [sample["class"] for sample in result["samples"]] == ["", ""]
    assert page.tags.count("li") == 10
    assert page.tags.count("details") == 2
    assert "b" not in page.tags
    assert run(Info(url=str(folder)))[1]["splits"]["train"]["captions"] == 10


def test_flow_is_drawn_in_colours_below_its_frames(with_flow, tmp_path):
    clips = ClipConfig(num_frames=2, stride=2, size=24, stream="flow", flow_fields=3)
    page, picture, result = preview(with_flow, tmp_path, samples=3, clips=clips)
    assert len(page.pictures()) == 2 * 3 + 1  # and the wheel
    assert picture.height > 3 * 2 * 128
    for sample in result["samples"]:
        assert len(sample["frames"]) == 2
        assert sample["frames"][1] - sample["frames"][0] in (0, 2)


def test_flow_that_was_not_packed_cannot_be_drawn(packed, tmp_path):
    with pytest.raises(BadShards, match=r"packed without optical flow"):
        preview(packed, tmp_path, clips=replace(CLIPS, stream="flow"))


def test_colours_of_motion_are_its_direction_and_length():
    fields = np.zeros((1, 2, 1, 5), np.float32)
    fields[0, 0, 0] = [0, 4, -4, 0, 2]
    fields[0, 1, 0, 3] = 4
    colours, reach = flow_colours(fields)
    assert reach == pytest.approx(4)
    white, red, cyan, down, half = colours[0, 0].tolist()
    assert (white, red, cyan) == ([255, 255, 255], [255, 0, 0], [0, 255, 255])
    assert half == [255, 128, 128]
    assert down[1] == 255
    assert flow_colours(fields * 0)[1] == 1.0  # noise of a still video is no colour


@pytest.fixture(scope="module")
def uneven(packed, tmp_path_factory) -> Path:
    """Rows of 40 shards: class 0 has 90 of 100 samples, classes 1 and 2 share the rest, class 3 has none."""
    folder = shutil.copytree(packed, tmp_path_factory.mktemp("uneven") / "shards")
    rewrite(folder, lambda content: content.update(classes=list("abcd")))
    row = dict.fromkeys(SCHEMA.names, 0) | {"group": "g", "fps": 25.0}
    with written_index(FolderStore(folder), "train") as file:
        shards = [
            vars_of(file.add(
                [{**row, "key": f"{n}-{k}", "label": 0 if k < 90 else 1 + k % 2} for k in range(100)],
                name=f"{n}.tar", size_bytes=0, sha256="",
            )) for n in range(40)
        ]  # fmt: skip
    rewrite(folder, lambda content: content["splits"].update(train=shards))
    return folder


@pytest.mark.parametrize(("count", "wanted"), [(12, [4, 4, 4]), (2, [1, 1]), (13, [4, 4, 5]), (3, [1, 1, 1])])
def test_samples_are_drawn_evenly_over_the_classes_by_the_seed(count, wanted, uneven):
    index = Index(uneven, "train")
    drawn = [choose(index, count, seed) for seed in (0, 0, 1, 2)]
    for numbers in drawn:
        labels = [index[number].label for number in numbers]
        assert labels == sorted(labels)
        assert sorted(labels.count(label) for label in set(labels)) == wanted
        assert len(set(numbers)) == count
    assert drawn[0] == drawn[1]
    assert len({tuple(numbers) for numbers in drawn}) == 3


def test_all_samples_are_drawn_where_there_are_fewer(packed):
    assert sorted(choose(Index(packed, "val"), 16, seed=0)) == [0, 1, 2]


# The command


def command(*words: str) -> int:
    """The status of a command line."""
    with pytest.raises(SystemExit) as ended:
        inspect_shards.run(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--help"], ["info", "verify", "preview", "index", "--json FILE holds"]),
        (["verify", "--help"], ["--quick", "--splits", "--workers", "--memory-limit", "URL"]),
        (["preview", "--help"], ["--num-frames", "--stride", "--size", "--stream", "--samples", "--png"]),
    ],
)
def test_help_names_the_four_jobs_and_their_options(words, wanted, capsys):
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in wanted)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["info", "/nowhere"],
            1,
            "error: /nowhere/dataset.json: not found (nothing was packed there); pack videos with",
        ),
        (["verify", "/nowhere", "--workers", "0"], 1, "error: /nowhere/dataset.json: not found"),
        (
            ["preview", "{folder}", "--split", "test"],
            1,
            "no samples in the split 'test' (splits with samples: train, val)",
        ),
        (["preview", "{folder}", "--samples", "0"], 2, "expected 1 to 500 samples"),
        (["preview", "{folder}", "--stride", "0"], 2, "wanted at least 1 of each"),
        (["verify", "{folder}", "--memory-limit", "0"], 2, "expected 0.5 to 1,000,000 GiB"),
        (["index"], 2, "expected a folder or bucket of tars, or their names"),
        (["index", "pipe:cat x.tar"], 1, "error: pipe:...: not a place for shards"),
        (["index", "{folder}", "--width", "33"], 1, "expected even sizes"),
        (
            ["index", "{folder}", "--split-of", "train"],
            1,
            "--split-of 'train': expected PATTERN=train, val, test or none",
        ),
        (["info", "ftp://host/x"], 1, "error: ftp:...: not a place for shards"),
    ],
)
def test_bad_input_is_one_clear_line(packed, words, status, message, capsys):
    assert command(*(word.format(folder=packed) for word in words)) == status
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert message in said


@pytest.mark.cluster
def test_ray_tasks_find_and_index_the_same_as_this_process(folder, tmp_path):
    sample = Index(folder, "train")[1]
    flip(folder / sample.shard, sample.offset + 300)
    (folder / "val-000000.tar").unlink()
    tars = (str(folder / "train-{000001..000002}.tar"),)
    start_ray()
    try:
        _, result = run(Verify(url=str(folder), workers=2))
        run(MakeIndex(url=tars, out=str(tmp_path / "ray"), width=32, height=32, workers=2))
    finally:
        ray.shutdown()
    assert sorted(str(Fault(**fault)) for fault in result["fault_list"]) == sorted(faults(folder))
    run(MakeIndex(url=tars, out=str(tmp_path / "here"), width=32, height=32, workers=0))
    for name in ("dataset.json", "train.index.arrow"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
