"""What is right and wrong, against counting by hand; the pictures of it; and a painter that nothing waits for."""

import io
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grurcn.drawing.charts import MOST_BARS, Painter, class_bars, confusion_matrix, level_bars, pictures, short
from grurcn.evaluation.confusion import MISTAKES, Confusion, first_largest
from shards.index import Index
from shards.reading.clips import ClipConfig

LEVELS = ("pool2", "fc7")


def random_videos(seed: int, count: int, classes: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (N, L, K), with ties, and labels."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 4, (count, levels, classes)).astype(float)
    values /= values.sum(axis=-1, keepdims=True)
    return torch.from_numpy(values), torch.from_numpy(rng.integers(0, classes, count))


def judge(values: torch.Tensor, label: torch.Tensor, first: int = 0) -> Confusion:
    confusion = Confusion([f"class {number}" for number in range(values.shape[2])], LEVELS[: values.shape[1]])
    numbers = list(range(first, first + len(label)))
    confusion.add(values, label, [f"video {number}" for number in numbers], numbers)
    return confusion


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(2, 5))
def test_counts_are_those_of_a_loop_over_videos(seed, count, classes):
    values, label = random_videos(seed, count, classes, 2)
    confusion = judge(values, label)
    matrix = np.zeros((classes, classes), int)
    alone, without, probability, wrong = [0, 0], [0, 0], [0.0, 0.0], []
    for number in range(count):
        one, other = (values[number, level].tolist() for level in (0, 1))
        mean = ((values[number, 0] + values[number, 1]) / 2).tolist()
        own = int(label[number])
        taken = mean.index(max(mean))
        matrix[own, taken] += 1
        for level, (votes, others) in enumerate([(one, other), (other, one)]):
            alone[level] += votes.index(max(votes)) == own
            without[level] += others.index(max(others)) == own
            probability[level] += votes[own]
        if taken != own:
            wrong.append((mean[own], f"video {number}"))
    assert confusion.matrix.tolist() == matrix.tolist()
    assert confusion.alone.tolist() == alone
    # the others' sum is what is left of a sum, so that equal votes may differ in the last digit
    assert all(abs(found - wanted) <= count for found, wanted in zip(confusion.without.tolist(), without, strict=True))
    assert confusion.probability.tolist() == pytest.approx(probability)
    found = [(mistake.label_probability, mistake.key) for mistake in confusion.mistakes]
    assert [key for _, key in found] == [key for _, key in sorted(wrong)[:MISTAKES]] or len(wrong) > MISTAKES
    assert [value for value, _ in found] == pytest.approx([value for value, _ in sorted(wrong)[:MISTAKES]])


@given(st.integers(0, 2**32), st.integers(2, 40), st.data())
def test_parts_of_ranks_join_to_the_confusion_over_all_also_by_way_of_json(seed, count, data):
    values, label = random_videos(seed, count, 4, 2)
    cut = data.draw(st.integers(1, count - 1))
    whole, first, rest = judge(values, label), judge(values[:cut], label[:cut]), judge(values[cut:], label[cut:], cut)
    first.merge(Confusion.from_dict(rest.to_dict()))
    joined, wanted = first.to_dict(), whole.to_dict()
    assert joined.pop("probability") == pytest.approx(wanted.pop("probability"))
    assert joined == wanted


def test_what_a_level_contributes_by_hand():
    """Two videos of class 0: the first level is right about both, the second about none, and together they are right once."""
    values = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.1, 0.9]]], dtype=torch.float64)
    confusion = judge(values, torch.tensor([0, 0]))
    assert confusion.per_class() == {"class 0": {"videos": 2, "top1": 0.5}}
    first, second = confusion.per_level().values()
    assert first == {"top1": 1.0, "top1_without": 0.0, "probability": pytest.approx(0.75)}
    assert second == {"top1": 0.0, "top1_without": 1.0, "probability": pytest.approx(0.15)}
    [mistake] = confusion.mistakes
    assert (mistake.key, mistake.number, mistake.predicted) == ("video 1", 1, 1)
    assert mistake.label_probability == pytest.approx(0.35)


def test_of_equal_values_the_first_is_the_largest():
    assert first_largest(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])).tolist() == [1, 0]


# Pictures


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_the_cells_of_a_confusion_matrix_are_as_dark_as_their_share():
    confusion = Confusion(["left", "right"], LEVELS)
    confusion.matrix = torch.tensor([[0, 4], [4, 0]])
    mirrored = Confusion(["left", "right"], LEVELS)
    mirrored.matrix = torch.tensor([[4, 0], [0, 4]])
    one, other = pixels(confusion_matrix(confusion, "x")), pixels(confusion_matrix(mirrored, "x"))
    dark = [picture.astype(int).sum(axis=2) < 300 for picture in (one, other)]
    assert dark[0].sum() == pytest.approx(dark[1].sum(), rel=0.05)
    assert (dark[0] & dark[1]).sum() < 0.3 * dark[0].sum()  # the other cells are dark; text and scale are not


@pytest.mark.parametrize("classes", [1, 30, 130])
def test_pictures_of_any_number_of_classes_are_of_a_size_to_look_at(classes):
    values, label = random_videos(classes, 3 * classes, classes, 2)
    confusion = judge(values, label)
    for draw in (confusion_matrix, class_bars, level_bars):
        height, width, _ = pixels(draw(confusion, "a run")).shape
        assert 150 < height < 2500
        assert 400 < width < 2500
    assert MOST_BARS < 130


def test_names_of_classes_are_text_and_not_formulas():
    confusion = Confusion(["$\\frac{", "a" * 200 + "\x1b[2J"], LEVELS)
    confusion.matrix = torch.tensor([[1, 1], [0, 1]])
    for draw in (confusion_matrix, class_bars):
        draw(confusion, "$x_")
    assert len(short("a" * 200)) == 28


def test_the_worst_mistakes_are_drawn_with_their_own_frames(shards):
    index = Index(shards, "val")
    confusion = Confusion(index.info.classes, ("pool2",))
    uniform = torch.full((len(index), 1, 4), 0.1, dtype=torch.float64)
    label = torch.tensor([sample.label for sample in index.samples(list(range(len(index))))])
    uniform[torch.arange(len(index)), 0, (label + 1) % 4] = 0.7
    keys = [index[number].key for number in range(len(index))]
    confusion.add(uniform, label, keys, list(range(len(index))))
    clips = ClipConfig(num_frames=4, size=16, mirror=False)
    drawn = pictures(confusion, index, clips, "a run")
    assert set(drawn) == {"confusion.png", "classes.png", "levels.png", "mistakes.png"}
    assert len(confusion.mistakes) == len(index) == 4
    height, _, _ = pixels(drawn["mistakes.png"]).shape
    assert height > 4 * 84
    confusion.mistakes.clear()
    assert "mistakes.png" not in pictures(confusion, index, clips, "a run")


# The painter


def test_of_what_waits_only_the_newest_is_drawn():
    sent, begun, gate = [], threading.Event(), threading.Event()

    def first() -> dict[str, bytes]:
        begun.set()
        gate.wait()
        return {"first": b""}

    with Painter(lambda name, content: sent.append(name), print) as painter:
        painter.paint(first)
        begun.wait()
        painter.paint(lambda: {"second": b""})
        painter.paint(lambda: {"third": b""})
        gate.set()
    assert sent == ["first", "third"]


def test_what_cannot_be_drawn_is_said_and_ends_nothing():
    sent, said = [], []
    with Painter(lambda name, content: sent.append(name), said.append) as painter:
        painter.paint(lambda: {"x": b"%d" % (1 // 0)})
        assert painter.last is not None
        painter.last.result()
        painter.paint(lambda: {"second": b""})
    assert sent == ["second"]
    assert said == [
        "warning: pictures of the validation were not drawn: ZeroDivisionError: integer division or modulo by zero"
    ]
