"""Pictures of attention, pixel by pixel."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from grurcn.drawing.attention import BAR_HEIGHT, DARKEST, Attention, attention_sheet, context
from grurcn.drawing.text import Heading


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def sheet(words: tuple[str, ...], weights: Sequence[Sequence[float]]) -> np.ndarray:
    """The picture of a caption over three frames of one colour each: (40, 0, 0), (80, 0, 0), (120, 0, 0)."""
    frames = np.zeros((3, 20, 30, 3), np.uint8)
    frames[..., 0] = np.array([40, 80, 120])[:, None, None]
    attention = Attention(words=words, weights=np.reshape(weights, (-1, 3)), frames=frames, seconds=np.arange(3) / 2)
    return pixels(attention_sheet(Heading(title=" ".join(words), lines=("a video",)), attention))


def count(picture: np.ndarray, red: int) -> int:
    return int((picture == (red, 0, 0)).all(axis=2).sum())


def dim(red: int, share: float) -> int:
    return round(red * (DARKEST + (1 - DARKEST) * share))


def test_a_picture_has_a_row_for_each_word_and_one_for_all():
    heights = [len(sheet(("a",) * number, [[0.2, 0.5, 0.3]] * number)) for number in range(4)]
    [height] = set(np.diff(heights))
    picture = sheet(("a", "b"), [[1, 0, 0], [0, 0, 1]])
    starts = []  # of the frames that are as bright as they are
    for red in (40, 80, 120):
        rows = np.flatnonzero((picture == (red, 0, 0)).all(axis=2).any(axis=1))
        starts.append(rows[np.diff(rows, prepend=-2) > 1].tolist())
    first = starts[1][0]
    assert starts == [[first, first + height], [first], [first, first + 2 * height]]


def test_frames_are_as_bright_as_their_attention():
    picture = sheet(("a", "b"), [[0.6, 0.3, 0.1], [0.25, 0.25, 0.5]])
    cell = count(picture, 120) // 2  # in the row of all words, and that of b
    assert cell > 1000
    for red, share in ((40, 1.0), (80, 0.5), (120, 1 / 6), (40, 0.5), (80, 0.5), (120, 1.0)):
        assert count(picture, dim(red, share)) in (cell, 2 * cell), (red, share)
    assert count(picture, 40) == 2 * cell  # all words, a
    assert count(picture, 80) == cell  # all words alone
    assert count(picture, dim(80, 0.5)) == 2 * cell  # a, b


def test_bars_are_as_long_as_attention_and_of_one_scale_over_all_words():
    picture = sheet(("a", "b"), [[0.8, 0.2, 0.0], [0.4, 0.2, 0.4]])
    blue = (picture == np.array([0x2F, 0x6B, 0xD8])).all(axis=2)
    bars = []
    for red in (40, 80, 120):  # the columns, by the frames of all words
        place = (picture == (red, 0, 0)).all(axis=2)
        bars.append(blue[:, place.any(axis=0)].any(axis=1).sum())
    wanted = [0.6 + 0.8 + 0.4, 0.2 + 0.2 + 0.2, 0.2 + 0.0 + 0.4]  # all words, a, b
    assert bars == pytest.approx([BAR_HEIGHT * share / 0.8 for share in wanted], abs=1.5)


def test_of_very_many_segments_neighbours_share_a_column():
    attention = Attention(
        words=("a", "b"),
        weights=np.arange(14.0).reshape(2, 7),
        frames=np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8),
        seconds=np.arange(7.0),
    )
    few = attention.in_columns(3)
    assert few.seconds.tolist() == few.frames[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert few.weights.tolist() == [[0 + 1, 2 + 3, 4 + 5 + 6], [7 + 8, 9 + 10, 11 + 12 + 13]]
    same = attention.in_columns(7)
    assert same.weights.tolist() == attention.weights.tolist()
    heading = Heading(title="", lines=())
    wide = [
        dataclasses.replace(
            attention, weights=np.ones((2, n)), frames=np.ones((n, 2, 2, 3), np.uint8), seconds=np.arange(n)
        )
        for n in (40, 1000)
    ]
    assert pixels(attention_sheet(heading, wide[0])).shape == pixels(attention_sheet(heading, wide[1])).shape


def test_a_caption_without_words_still_has_a_picture():
    assert count(sheet((), []), 80) == count(sheet(("a",), [[0.5, 0.0, 0.5]]), 80) > 1000


def test_a_word_stands_between_its_neighbours():
    words = ["a", "man", "in", "a", "white", "shirt"]
    assert context(words, 0, 2) == ("", "a", " man in …")
    assert context(words, 2, 2) == ("a man ", "in", " a white …")
    assert context(words, 3, 1) == ("… in ", "a", " white …")
    assert context(words, 5, 9) == ("a man in a white ", "shirt", "")
    assert context(["dog"], 0, 3) == ("", "dog", "")
    assert context(["\x1b[2J"], 0, 0)[1] == "\\x1b[2J"
