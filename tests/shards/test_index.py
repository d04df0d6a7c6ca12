"""The index says where each sample lies, and refuses files that do not belong together."""

import json
import shutil
import zlib
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from videos import TINY, listing_of, pack

from shards.dataset import FORMAT_VERSION, DatasetInfo, Shard, read_dataset
from shards.index import Index
from shards.reading.order import WINDOW
from shards.rows import SCHEMA, Flow, written_index
from shards.store import BadShards, open_store

FRAMES = [8, 9, 10, 11, 12, 8, 9]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Seven videos in train (three shards of 3, 3, 1), none in val."""
    folder = tmp_path_factory.mktemp("data")
    return pack(folder / "shards", listing_of(folder / "videos", FRAMES))


@pytest.fixture
def folder(packed, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(packed, tmp_path / "shards")


def rewrite(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_sample_lies_where_the_index_says(packed):
    index = Index(packed, "train")
    assert len(index) == 7
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    keys = []
    for number in range(7):
        sample = index[number]
        data = (packed / sample.shard).read_bytes()[sample.offset : sample.offset + sample.size_bytes]
        assert sample.number == number
        assert data[4:8] == b"ftyp"  # an mp4 begins so
        assert zlib.crc32(data) == sample.crc32
        of_video = int(sample.key[-2:])
        assert (sample.num_frames, sample.fps, sample.label) == (FRAMES[of_video], 25, of_video % 2)
        assert sample.group == f"{'ab'[of_video % 2]}/video_{of_video:02}.avi"
        assert sample.shard == f"train-{number // 3:06}.tar"
        keys.append(sample.key)
    assert len(set(keys)) == 7
    assert keys[:3] == sorted(keys[:3])
    assert keys != sorted(keys)  # entries are shuffled before they are cut into shards


@pytest.mark.parametrize("number", [-1, 7, 100])
def test_a_number_outside_the_split_is_an_index_error(number, packed):
    with pytest.raises(IndexError, match=rf"sample {number} of 7"):
        Index(packed, "train")[number]


def test_the_right_row_is_found_in_shards_of_uneven_sizes(tmp_path):
    """Sizes as they come where videos were refused; the rows' keys count up."""
    sizes = [2, 1, 4, 3]
    row = dict.fromkeys(SCHEMA.names, 0) | {"group": "", "fps": 25.0, "flow_bound": None}
    with written_index(open_store(tmp_path), "val") as file:
        shards = tuple(
            file.add(
                [{**row, "key": f"{n}.{within}"} for within in range(size)], name=f"{n}.tar", size_bytes=0, sha256=""
            )
            for n, size in enumerate(sizes)
        )
    (tmp_path / "dataset.json").write_text(info_of(val=shards).to_json())
    index = Index(tmp_path, "val")
    wanted = [(shard, within) for shard, size in enumerate(sizes) for within in range(size)]
    found = [(index[number].shard, index[number].key) for number in range(len(index))]
    assert found == [(f"{shard}.tar", f"{shard}.{within}") for shard, within in wanted]


def test_a_sample_says_what_its_row_does(tmp_path):
    row = {name: number for number, name in enumerate(SCHEMA.names)} | {"key": "k", "group": "g"}
    plain = dict(row, flow_offset=None, flow_size=None, flow_crc32=None, flow_bound=None)
    with written_index(open_store(tmp_path), "val") as file:
        shard = file.add([row, plain], name="0.tar", size_bytes=0, sha256="")
    (tmp_path / "dataset.json").write_text(info_of(val=(shard,)).to_json())
    wanted = {
        "number": 0, "key": "k", "label": 1, "group": "g", "num_frames": 3, "num_captions": 4, "fps": 5.0, "shard": "0.tar",
        "offset": 6, "size_bytes": 7, "crc32": 8, "flow": Flow(offset=9, size_bytes=10, crc32=11, bound=12.0),
        "json_offset": 13, "json_size_bytes": 14,
    }  # fmt: skip
    index = Index(tmp_path, "val")
    assert index[0]._asdict() == wanted
    assert index[1]._asdict() == wanted | {"number": 1, "flow": None}
    assert all(type(value) in (int, float, str, Flow) for value in index[0])


def info_of(**splits):
    return DatasetInfo(classes=("a", "b"), packing=TINY, splits=splits, plan="p", source={"kind": "x"}, rejected=0)


def test_the_description_survives_writing_and_reading(tmp_path):
    shard = Shard(
        name="train-000000.tar",
        samples=3,
        captions=0,
        size_bytes=10240,
        sha256="ab",
        rows_offset=8,
        rows_size=9,
        rows_crc32=7,
    )
    info = info_of(train=(shard,), val=())
    (tmp_path / "dataset.json").write_text(info.to_json())
    assert read_dataset(open_store(tmp_path)) == info
    assert read_dataset(open_store(tmp_path)).digest == info.digest


def test_the_digest_is_that_of_every_shard(packed):
    info = read_dataset(open_store(packed))
    assert info.digest == read_dataset(open_store(packed)).digest
    first, *others = info.splits["train"]
    changed = replace(info, splits={**info.splits, "train": (replace(first, sha256="0" * 64), *others)})
    assert changed.digest != info.digest
    assert replace(info, packing=replace(TINY, crf=20)).digest != info.digest
    assert replace(info, classes=("b", "a")).digest != info.digest


def test_a_digest_never_changes_for_the_same_description():
    """Runs remember it: another one would refuse to resume them."""
    assert info_of(train=()).digest == "313dee04c45854ee47c5b286d53b71c292abe0de201ca43dda84f08fbe15d53f"


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, None])
def test_another_format_version_is_refused(version, folder):
    rewrite(folder, version=version)
    message = (
        rf"dataset\.json: format version {version}; this program reads version {FORMAT_VERSION}; pack .* again, or"
    )
    with pytest.raises(BadShards, match=message):
        read_dataset(open_store(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"dataset\.json: not a JSON file"),
        ("[1, 2]", r"dataset\.json: not the description of a packed data set"),
        ('{"classes": []}', r"no format 'grurcn-shards'"),
    ],
)
def test_another_file_by_that_name_is_refused(content, message, folder):
    (folder / "dataset.json").write_text(content)
    with pytest.raises(BadShards, match=message):
        read_dataset(open_store(folder))


def test_a_folder_without_a_description_is_refused_with_what_was_done_there(folder):
    (folder / "dataset.json").unlink()
    with pytest.raises(BadShards, match=r"dataset\.json: not found \(nothing was packed there\); .*jobs\.make_shards"):
        Index(folder, "train")
    (folder / ".packing").mkdir()
    (folder / ".packing" / "plan").write_text("digest")
    with pytest.raises(BadShards, match=r"its packing was not finished"):
        Index(folder, "train")


@pytest.mark.parametrize("split", ["val", "holdout"])
def test_a_split_without_samples_is_refused_with_those_that_have(split, packed):
    with pytest.raises(BadShards, match=rf"no samples in the split '{split}' \(splits with samples: train\)"):
        Index(packed, split)


def test_a_missing_index_is_refused(folder):
    (folder / "train.index.arrow").unlink()
    with pytest.raises(BadShards, match=r"train\.index\.arrow: .*the file is missing; restore it, or pack again"):
        Index(folder, "train").check_files()


@pytest.mark.parametrize("kept", [0, 100, 1000])
def test_an_index_that_was_cut_off_is_refused(kept, folder):
    path = folder / "train.index.arrow"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadShards, match=r"train\.index\.arrow: ends \d+ bytes before"):
        Index(folder, "train").check_files()


def test_whole_files_pass_the_check(packed):
    Index(packed, "train").check_files()


@pytest.mark.parametrize("frames", [[8, 8], [*FRAMES[:-1], 20]])
def test_an_index_of_another_packing_is_found_by_the_check_and_when_read(frames, folder, tmp_path):
    other = pack(tmp_path / "other", listing_of(tmp_path / "videos", frames))
    shutil.copy(other / "train.index.arrow", folder)
    with pytest.raises(BadShards, match=r"train\.index\.arrow: "):
        Index(folder, "train").check_files()
    with pytest.raises(BadShards, match=r"train\.index\.arrow: "):
        Index(folder, "train").samples(range(len(FRAMES)))


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_one_flipped_bit_among_a_shards_rows_is_found_when_they_are_read(shard, folder):
    index, path = Index(folder, "train"), folder / "train.index.arrow"
    rows = index.shards[shard]
    content = bytearray(path.read_bytes())
    content[rows.rows_offset + rows.rows_size // 2] ^= 1
    path.write_bytes(content)
    message = rf"the [\d,]+ bytes at offset [\d,]+ are not the rows of {rows.name} that dataset\.json describes \(CRC"
    with pytest.raises(BadShards, match=message):
        index.samples(range(len(FRAMES)))


def test_the_index_is_an_arrow_file_that_any_reader_reads(packed):
    table = pa.ipc.open_file(packed / "train.index.arrow").read_all()
    assert table.schema == SCHEMA
    index = Index(packed, "train")
    assert table["key"].to_pylist() == [index[number].key for number in range(len(index))]
    assert table["json_size"].to_pylist() == [index[number].json_size_bytes for number in range(len(index))]


def test_only_the_rows_that_are_wanted_are_read_and_a_bounded_number_is_kept(packed, monkeypatch):
    index, read = Index(packed, "train"), []
    read_rows = index.read_rows
    monkeypatch.setattr(index, "read_rows", lambda shard: read.append(shard) or read_rows(shard))
    index.samples([0, 1, 2, 0])
    assert read == [0]
    index.most_held = 1
    index[3]
    assert list(index.held) == [1]
    index.samples([0, 6])  # more than are kept, as they are wanted together
    assert sorted(read) == [0, 0, 1, 2]
    index.hold(2 * WINDOW)
    index.samples(range(7))
    assert sorted(index.held) == [0, 1, 2]


def test_a_missing_shard_is_found_by_the_check(folder):
    (folder / "train-000001.tar").unlink()
    with pytest.raises(BadShards, match=r"train-000001\.tar: missing; expected [\d,]+ bytes by the index; restore"):
        Index(folder, "train").check_files()


def test_a_shard_of_another_length_is_found_by_the_check(folder):
    with (folder / "train-000002.tar").open("r+b") as file:
        file.truncate(1234)
    with pytest.raises(BadShards, match=r"train-000002\.tar: 1,234 bytes; expected [\d,]+ bytes by the index"):
        Index(folder, "train").check_files()


# Captions


def counted(folder, counts, **about):
    """An index of shards whose videos have so many captions each, without the shards; keys count up."""
    row = dict.fromkeys(SCHEMA.names, 0) | {"group": "", "fps": 25.0, "flow_bound": None}
    with written_index(open_store(folder), "train") as file:
        shards = tuple(
            file.add(
                [{**row, "key": f"{n}.{within}", "num_captions": count} for within, count in enumerate(of_shard)],
                name=f"{n}.tar", size_bytes=0, sha256="",
            ) for n, of_shard in enumerate(counts)
        )  # fmt: skip
    (folder / "dataset.json").write_text(replace(info_of(train=shards), **about).to_json())
    return Index(folder, "train")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=7),
    most_held=st.integers(1, 8),
    data=st.data(),
)
def test_pairs_are_numbered_shard_by_shard_video_by_video_caption_by_caption(counts, most_held, data, tmp_path):
    """Beside a list of all pairs; videos and whole shards without captions have none in it."""
    index = counted(tmp_path, counts)
    index.most_held = most_held
    videos = [(f"{n}.tar", f"{n}.{k}", count) for n, of_shard in enumerate(counts) for k, count in enumerate(of_shard)]
    pairs = [
        (number, shard, key, caption)
        for number, (shard, key, count) in enumerate(videos)
        for caption in range(count)
    ]  # fmt: skip
    assert index.num_captions == len(pairs)
    numbers = data.draw(st.lists(st.integers(0, len(pairs) - 1))) if pairs else []
    found = [(sample.number, sample.shard, sample.key, caption) for sample, caption in index.pairs(numbers)]
    assert found == [pairs[number] for number in numbers]
    for sample, caption in index.pairs(range(len(pairs))):
        assert sample == index[sample.number]
        assert type(caption) is int


@pytest.mark.parametrize("number", [-1, 6])
def test_a_number_of_no_pair_is_an_index_error(number, tmp_path):
    with pytest.raises(IndexError, match=rf"pair {number} of 6"):
        counted(tmp_path, [[1, 2], [3]]).pairs([0, number])


def test_only_the_rows_that_hold_the_wanted_pairs_are_read(tmp_path, monkeypatch):
    index, read = counted(tmp_path, [[1, 2], [0], [3], [1]]), []
    read_rows = index.read_rows
    monkeypatch.setattr(index, "read_rows", lambda shard: read.append(shard) or read_rows(shard))
    index.pairs([2, 6, 0])
    assert sorted(read) == [0, 3]
    index.pairs([3, 5])
    assert sorted(read) == [0, 2, 3]


def test_captions_that_the_rows_do_not_have_are_named_by_their_shard(tmp_path):
    counted(tmp_path, [[1, 2], [3]])
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["splits"]["train"][1]["captions"] = 5
    rewrite(tmp_path, splits=content["splits"])
    index = Index(tmp_path, "train")
    assert [caption for _, caption in index.pairs(range(3))] == [0, 0, 1]
    with pytest.raises(BadShards, match=r"1\.tar has 3 captions by its rows, 5 by dataset\.json; restore the files"):
        index.pairs([7])


def test_videos_with_captions_pass_the_check(tmp_path):
    counted(tmp_path, [[1, 2], [3]]).check_captions()


def test_a_data_set_without_captions_is_refused_with_the_way_out(packed):
    message = r"no video of the split train has a caption; expected videos with captions, as jobs\.make_shards packs them from m"
    with pytest.raises(BadShards, match=message):
        Index(packed, "train").check_captions()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 0], [2]], r"1 of 3 videos of the split train have no caption, the first: 0\.1 in 0\.tar; give each"),
        (
            [[1, 5], [0, 2, 0], [0]],
            r"3 of 6 videos of the split train have no caption, the first: 1\.0 in 1\.tar; give",
        ),
    ],
)
def test_the_first_video_without_a_caption_is_named_and_how_many_there_are(counts, message, tmp_path):
    with pytest.raises(BadShards, match=message):
        counted(tmp_path, counts).check_captions()


@pytest.mark.parametrize("bare", [0, 2, 4])
def test_of_many_shards_some_are_checked_for_captions(bare, tmp_path, monkeypatch):
    monkeypatch.setattr("shards.index.SHARDS_CHECKED", 3)
    index = counted(tmp_path, [[1], [0], [1], [0], [1]])
    index.check_captions()  # of five, the first, the third and the last
    index = counted(tmp_path, [[0 if shard == bare else 1] for shard in range(5)])
    with pytest.raises(BadShards, match=rf"1 of 3 videos of the split train have no caption, the first: {bare}\.0"):
        index.check_captions()


# Vectors instead of videos

ENCODER = {"segments": 4, "size": 3, "digest": "abc", "parts": [{"kind": "frame", "offsets": [0]}]}


def test_the_encoder_survives_writing_and_reading_and_is_part_of_the_digest(tmp_path):
    index = counted(tmp_path, [[1]], encoder=ENCODER)
    assert index.info.encoder == ENCODER
    assert replace(index.info, encoder={**ENCODER, "size": 4}).digest != index.info.digest
    assert replace(index.info, encoder=None).digest != index.info.digest


def test_a_description_of_videos_says_nothing_of_encoders(packed):
    """So that the digests of data sets that were packed before are what they were."""
    content = json.loads((packed / "dataset.json").read_text())
    assert "encoder" not in content
    assert list(content) == [
        "format", "version", "classes", "packing", "splits", "plan", "source", "rejected", "shards_at",
    ]  # fmt: skip
    assert read_dataset(open_store(packed)).encoder is None
    Index(packed, "train").check_videos()


@pytest.mark.parametrize(
    "encoder", [{}, "vgg16", [1], {**ENCODER, "segments": 0}, {**ENCODER, "size": "3"}, {**ENCODER, "digest": 1}]
)
def test_an_encoder_that_says_too_little_is_refused(encoder, folder):
    rewrite(folder, encoder=encoder)
    with pytest.raises(
        BadShards, match=r"dataset\.json: not as a packing writes it \(.*; restore the file, or pack again"
    ):
        read_dataset(open_store(folder))


def test_vectors_are_no_videos(tmp_path):
    index = counted(tmp_path, [[1]], encoder=ENCODER)
    message = (
        r"holds vectors that an encoder computed \(python -m jobs\.encode\), no videos; name the shards that jobs\.make"
    )
    with pytest.raises(BadShards, match=message):
        index.check_videos()
    with pytest.raises(BadShards, match=message):
        index.check_stream("rgb")
