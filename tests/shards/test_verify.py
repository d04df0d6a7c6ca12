"""Verification: whatever is not as it was packed is found and named, and the rest is checked all the same."""

import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from nine_videos import list_nine, pack_nine, pack_with_flow
from s3fs import S3FileSystem
from servers import RangeServer, s3_server
from spoilt import faults, flip, reindex, rewrite
from videos import TINY, pack

from grurcn.data import IndexJob, index_external
from shards.index import Index
from shards.packing.entries import Listing
from shards.store import BadShards, open_store


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack_nine(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def listing(packed) -> Listing:
    return list_nine(packed.parent)


@pytest.fixture(scope="module")
def with_flow(tmp_path_factory) -> Path:
    return pack_with_flow(tmp_path_factory.mktemp("flow"))


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return shutil.copytree(packed, tmp_path / "shards")


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
    tars, out = (str(packed / "train-{000000..000002}.tar"),), str(tmp_path / "index")
    index_external(IndexJob(url=tars, out=out, width=32, height=32, workers=0))
    assert faults(tmp_path / "index") == []
    copy = shutil.copytree(packed, tmp_path / "copy")
    rewrite(tmp_path / "index", lambda content: content.update(shards_at=str(copy)))
    flip(copy / "train-000001.tar", 600)
    assert "CRC-32 differs" in faults(tmp_path / "index")[0]


@pytest.mark.parametrize("splits", [("dev",), ("train", "test")])
def test_splits_without_samples_are_refused_by_name(splits, packed):
    with pytest.raises(BadShards, match=rf"no samples in {splits[-1]} \(splits with samples: train, val\)"):
        faults(packed, splits=splits)
