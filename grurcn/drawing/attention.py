"""Where a caption's words attend to: a picture with a row of a video's segments for each word.

    all words    the segments' first frames; below each a bar, its mean attention over the words
    a            the same frames, the one attended to most as it is, the others darker; bars and percentages of this word
    ...

T words, K segments, H x W the frames' size. A word's attention to the segments is 0 to 1 each, and adds up to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from grurcn.drawing.text import (
    FAINT,
    GAP,
    INK,
    LINE,
    MARGIN,
    PAPER,
    Heading,
    TextLine,
    font,
    png_of,
    text_width,
    write_heading,
    write_text,
)
from shards.printable import printable

ACCENT = "#2f6bd8"  # of the bars
TEXT_WIDTH, NARROWEST = 230, 640
STRIP_WIDTH = 1800  # of a row's frames, about
CELL_WIDTHS = (44, 160)  # of a frame: smallest and largest
MOST_COLUMNS = 40  # of more segments, neighbours are merged into a column
BAR_HEIGHT, LABEL_HEIGHT = 28, 15
DARKEST = 0.25  # brightness of a frame without attention
WORDS_AROUND = 3  # that are written on either side of a word


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A caption, and the attention of each of its words."""

    words: tuple[str, ...]  # T
    weights: np.ndarray  # (T, K) float
    frames: np.ndarray  # (K, H, W, 3) uint8, the first of each segment
    seconds: np.ndarray  # (K,) float, where each segment begins

    def in_columns(self, most: int) -> "Attention":
        """The same with at most so many columns: neighbours are merged, with the sum of their weights and the first frame."""
        num_segments = len(self.seconds)
        firsts = np.linspace(0, num_segments, min(num_segments, most), endpoint=False).astype(int)
        return Attention(
            words=self.words,
            weights=np.add.reduceat(self.weights, firsts, axis=1),
            frames=self.frames[firsts],
            seconds=self.seconds[firsts],
        )


@dataclass(frozen=True, kw_only=True)
class SheetLayout:
    """Where things are on the sheet, in pixels."""

    cell: tuple[int, int]  # a frame's width and height
    top: int  # of the first row
    columns: int

    @property
    def row_height(self) -> int:
        return self.cell[1] + BAR_HEIGHT + LABEL_HEIGHT + 3 * GAP

    @property
    def width(self) -> int:
        return max(self.left(self.columns) - GAP + MARGIN, NARROWEST)

    def left(self, column: int) -> int:
        return MARGIN + TEXT_WIDTH + column * (self.cell[0] + GAP)

    def row(self, number: int) -> int:
        return self.top + number * self.row_height


def attention_sheet(heading: Heading, attention: Attention) -> bytes:
    """A PNG with a row for all words together, and one for each."""
    attention = attention.in_columns(MOST_COLUMNS)
    columns, height, width = attention.frames.shape[:3]
    cell = int(np.clip(STRIP_WIDTH // columns - GAP, *CELL_WIDTHS))
    layout = SheetLayout(
        cell=(cell, max(1, round(cell * height / width))), top=heading.bottom + LABEL_HEIGHT, columns=columns
    )
    num_rows = 1 + len(attention.words)
    sheet = Image.new("RGB", (layout.width, layout.row(num_rows) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_heading(draw, heading, sheet.width - 2 * MARGIN)
    frames = [Image.fromarray(frame).resize(layout.cell, Image.Resampling.LANCZOS) for frame in attention.frames]
    highest = max(float(attention.weights.max(initial=0)), 1e-9)
    for number, weights in enumerate(rows_of(attention)):
        draw_row(sheet, layout, number, frames, weights, highest)
    write_times(draw, layout, attention.seconds)
    write_text(draw, (MARGIN, layout.row(0)), TextLine("all words", 15, FAINT, bold=True), TEXT_WIDTH - 16)
    for number, word in enumerate(attention.words):
        y = layout.row(1 + number)
        draw.line([(MARGIN, y - GAP), (sheet.width - MARGIN, y - GAP)], fill=LINE)
        write_text(draw, (MARGIN, y), TextLine(word, 15, bold=True), TEXT_WIDTH - 16)
        write_context(draw, (MARGIN, y + 24), TEXT_WIDTH - 16, attention.words, number)
    return png_of(sheet)


def rows_of(attention: Attention) -> list[np.ndarray]:
    """The weights of each row, (K,): the mean over all words, then each word's."""
    mean = attention.weights.mean(axis=0) if attention.words else np.zeros(len(attention.seconds))
    return [mean, *attention.weights]


def draw_row(
    sheet: Image.Image,
    layout: SheetLayout,
    number: int,
    frames: Sequence[Image.Image],
    weights: np.ndarray,
    highest: float,
) -> None:
    """Frames, bars and percentages of a row. Row 0, of all words, keeps its brightness. A bar of `highest` is full."""
    draw, y = ImageDraw.Draw(sheet), layout.row(number)
    cell_width, cell_height = layout.cell
    base = y + cell_height + GAP + BAR_HEIGHT
    most = weights.max(initial=0)
    for column, (frame, weight) in enumerate(zip(frames, weights.tolist(), strict=True)):
        x = layout.left(column)
        brightness = DARKEST + (1 - DARKEST) * weight / most if number and most else 1.0
        sheet.paste(frame.point([round(value * brightness) for value in range(256)] * 3), (x, y))
        bar = round(BAR_HEIGHT * weight / highest)
        if bar:
            draw.rectangle([x, base - bar, x + cell_width - 1, base - 1], fill=ACCENT)
        draw.line([(x, base), (x + cell_width - 1, base)], fill=LINE)
        is_most = bool(most) and weight == most
        label = TextLine(percent(weight), 10, INK if is_most else FAINT, bold=is_most)
        write_text(draw, (x + cell_width // 2, base + 2), label, TEXT_WIDTH, anchor="ma")


def percent(fraction: float) -> str:
    """0.437 -> 44 %, 0.004 -> <1 %"""
    return "<1 %" if 0 < fraction < 0.005 else f"{100 * fraction:.0f} %"


def write_times(draw: ImageDraw.ImageDraw, layout: SheetLayout, seconds: np.ndarray) -> None:
    """Above the first row, where each column begins."""
    for column, second in enumerate(seconds.tolist()):
        place = (layout.left(column), layout.top - LABEL_HEIGHT)
        write_text(draw, place, TextLine(f"{second:.1f} s", 10, FAINT), TEXT_WIDTH)


def write_context(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], width: int, words: Sequence[str], number: int
) -> None:
    """A word between its neighbours, which are faint: as many of them as there is room for."""
    for around in range(WORDS_AROUND, -1, -1):
        parts = context(words, number, around)
        widths = [round(text_width(part, 11, bold)) for part, bold in zip(parts, (False, True, False), strict=True)]
        if sum(widths) <= width:
            x, y = place
            for part, part_width, is_word in zip(parts, widths, (False, True, False), strict=True):
                draw.text((x, y), part, font=font(11, is_word), fill=INK if is_word else FAINT)
                x += part_width
            return


def context(words: Sequence[str], number: int, around: int) -> tuple[str, str, str]:
    """A word with up to so many words before and after it; dots where there are more."""
    first, last = max(0, number - around), number + 1 + around
    before, after = " ".join(words[first:number]), " ".join(words[number + 1 : last])
    before = f"{'… ' if first else ''}{before}{' ' if before else ''}"
    after = f"{' ' if after else ''}{after}{' …' if last < len(words) else ''}"
    return printable(before), printable(words[number]), printable(after)
