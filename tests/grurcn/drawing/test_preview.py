"""A preview shows the clips that a model will see, and nothing in a data set can harm its reader."""

import base64
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nine_videos import list_nine, pack_nine, pack_with_flow
from PIL import Image
from spoilt import faults, reindex, rewrite, write_rows
from videos import frame_numbers, level, pack

from grurcn.drawing import clip_frames as preview_clips
from grurcn.drawing.clip_frames import flow_colours
from grurcn.drawing.preview import PreviewJob, PreviewResult, choose, draw_preview, train_clip_of
from grurcn.models.pixels import to_clips
from shards.index import Index
from shards.packing.entries import Listing
from shards.reading.clips import ClipConfig, train_clip
from shards.reading.decode import read_frames
from shards.rows import SCHEMA
from shards.store import BadShards
from shards.summary import summarize_dataset

CLIPS = ClipConfig(num_frames=3, size=24)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack_nine(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def listing(packed) -> Listing:
    return list_nine(packed.parent)


@pytest.fixture(scope="module")
def with_flow(tmp_path_factory) -> Path:
    return pack_with_flow(tmp_path_factory.mktemp("flow"))


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


def preview(url: Path | str, out: Path, **options: Any) -> tuple[Page, Image.Image, PreviewResult]:
    result = draw_preview(PreviewJob(url=str(url), out=out / "p.html", **{"clips": CLIPS, **options}))
    return Page(out / "p.html"), Image.open(out / "p.png"), result


def test_a_preview_shows_the_clips_that_training_reads(packed, listing, tmp_path):
    page, picture, result = preview(packed, tmp_path, samples=6, seed=3)
    index = Index(packed, "train")
    by_key = {sample.key: sample for sample in index.samples(range(6))}
    assert [clip.key for clip in result.samples] == sorted(
        by_key, key=lambda key: (by_key[key].label, by_key[key].number)
    )
    moving = page.pictures()
    for number, shown in enumerate(result.samples):
        sample = by_key[shown.key]
        clip = train_clip(sample.num_frames, 32, 32, CLIPS, 3, 0, sample.number)
        assert (shown.frames, tuple(shown.box), shown.mirror) == (clip.frames.tolist(), clip.box, clip.mirror)
        data = (packed / sample.shard).read_bytes()[sample.offset : sample.offset + sample.size_bytes]
        planes = read_frames(data, clip.frames.tolist(), index.info.packing)
        grey = np.array([(level(each) - 16) * 255 / 219 for each in frame_numbers(planes)])
        np.testing.assert_allclose(frames_of(moving[number]).mean(axis=(1, 2, 3)), grey, atol=3)
        cells = [
            picture.getpixel((24 + 300 + 10 + column * 132, 24 + 34 + 40 + 12 + 10 + number * 136))
            for column in range(3)
        ]
        np.testing.assert_allclose(np.array(cells).mean(axis=1), grey, atol=3)
    first, frames = by_key[result.samples[0].key], result.samples[0].frames
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
    assert [clip.class_name for clip in result.samples] == ["", ""]
    assert page.tags.count("li") == 10
    assert page.tags.count("details") == 2
    assert "b" not in page.tags
    assert summarize_dataset(str(folder)).splits["train"].captions == 10


def test_flow_is_drawn_in_colours_below_its_frames(with_flow, tmp_path):
    clips = ClipConfig(num_frames=2, stride=2, size=24, stream="flow", flow_fields=3)
    page, picture, result = preview(with_flow, tmp_path, samples=3, clips=clips)
    assert len(page.pictures()) == 2 * 3 + 1  # and the wheel
    assert picture.height > 3 * 2 * 128
    for clip in result.samples:
        assert len(clip.frames) == 2
        assert clip.frames[1] - clip.frames[0] in (0, 2)


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
    rows = [{**row, "label": 0 if k < 90 else 1 + k % 2} for k in range(100)]
    write_rows(folder, {f"{n}.tar": [{**row, "key": f"{n}-{k}"} for k, row in enumerate(rows)] for n in range(40)})
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
