"""Where a caption's words looked: a picture with a row of a video's segments for each word, as bright as they were attended to.

    all words    the segments' first frames as they are; below each a bar, its mean attention over the words
    a            the same frames, the one attended to most as it is, the others darker; bars and shares of this word
    ...

T words, K segments, H x W the frames' size. A segment's attention before a word is 0 to 1; all of a word add up to 1.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grurcn.drawing.contact_sheet import FAINT, GAP, INK, LINE, MARGIN, PAPER, Heading, font, write_lines
from shards.printable import printable

ACCENT = "#2f6bd8"  # of the bars
TEXT_WIDTH, NARROWEST = 230, 640
STRIP_WIDTH = 1800  # of a row's frames, about
CELL_WIDTHS = (44, 160)  # of a frame: smallest and largest
MOST_COLUMNS = 40  # of more segments, neighbours share a column
BAR_HEIGHT, LABEL_HEIGHT = 28, 15
DARKEST = 0.25  # brightness of what was not attended to
WORDS_AROUND = 3  # that are shown on either side of a word


@dataclass(frozen=True, kw_only=True)
class Attended:
    """A caption, and the segments that each of its words looked at."""

    words: tuple[str, ...]  # T
    attention: np.ndarray  # (T, K) float
    frames: np.ndarray  # (K, H, W, 3) uint8, the first of each segment
    seconds: np.ndarray  # (K,) float, where each segment begins

    def in_columns(self, most: int) -> "Attended":
        """The same with at most so many columns: neighbours share one, their attention added, the first frame shown."""
        num_segments = len(self.seconds)
        firsts = np.linspace(0, num_segments, min(num_segments, most), endpoint=False).astype(int)
        return Attended(
            words=self.words,
            attention=np.add.reduceat(self.attention, firsts, axis=1),
            frames=self.frames[firsts],
            seconds=self.seconds[firsts],
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
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


def attention_sheet(heading: Heading, attended: Attended) -> bytes:
    """A PNG with a row for all words together, and one for each."""
    attended = attended.in_columns(MOST_COLUMNS)
    columns, height, width = attended.frames.shape[:3]
    cell = int(np.clip(STRIP_WIDTH // columns - GAP, *CELL_WIDTHS))
    layout = Layout(
        cell=(cell, max(1, round(cell * height / width))),
        top=MARGIN + 34 + 20 * len(heading.lines) + MARGIN // 2 + LABEL_HEIGHT,
        columns=columns,
    )
    num_rows = 1 + len(attended.words)
    sheet = Image.new("RGB", (layout.width, layout.row(num_rows) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_lines(draw, (MARGIN, MARGIN), sheet.width - 2 * MARGIN, [(heading.title, 20, True, INK)])
    lines = [(line, 13, False, FAINT) for line in heading.lines]
    write_lines(draw, (MARGIN, MARGIN + 32), sheet.width - 2 * MARGIN, lines)

    frames = [Image.fromarray(frame).resize(layout.cell, Image.Resampling.LANCZOS) for frame in attended.frames]
    highest = max(float(attended.attention.max(initial=0)), 1e-9)
    for number, attention in enumerate(rows_of(attended)):
        draw_row(sheet, layout, number, frames, attention, highest)
    write_times(draw, layout, attended.seconds)
    write_lines(draw, (MARGIN, layout.row(0)), TEXT_WIDTH - 16, [("all words", 15, True, FAINT)])
    for number, word in enumerate(attended.words):
        y = layout.row(1 + number)
        draw.line([(MARGIN, y - GAP), (sheet.width - MARGIN, y - GAP)], fill=LINE)
        write_lines(draw, (MARGIN, y), TEXT_WIDTH - 16, [(word, 15, True, INK)])
        write_context(draw, (MARGIN, y + 24), TEXT_WIDTH - 16, attended.words, number)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def rows_of(attended: Attended) -> list[np.ndarray]:
    """The attention of each row, (K,): the mean over all words, then each word's."""
    mean = attended.attention.mean(axis=0) if attended.words else np.zeros(len(attended.seconds))
    return [mean, *attended.attention]


def draw_row(
    sheet: Image.Image,
    layout: Layout,
    number: int,
    frames: Sequence[Image.Image],
    attention: np.ndarray,
    highest: float,
) -> None:
    """Frames, bars and shares of a row; those of row 0, of all words, are as bright as they are. A bar of `highest` is full."""
    draw, y = ImageDraw.Draw(sheet), layout.row(number)
    cell_width, cell_height = layout.cell
    base = y + cell_height + GAP + BAR_HEIGHT
    most = attention.max(initial=0)
    for column, (frame, share) in enumerate(zip(frames, attention.tolist(), strict=True)):
        x = layout.left(column)
        brightness = DARKEST + (1 - DARKEST) * share / most if number and most else 1.0
        sheet.paste(frame.point([round(value * brightness) for value in range(256)] * 3), (x, y))
        bar = round(BAR_HEIGHT * share / highest)
        if bar:
            draw.rectangle([x, base - bar, x + cell_width - 1, base - 1], fill=ACCENT)
        draw.line([(x, base), (x + cell_width - 1, base)], fill=LINE)
        is_most = bool(most) and share == most
        middle = (x + cell_width // 2, base + 2)
        draw.text(middle, percent(share), font=font(10, is_most), fill=INK if is_most else FAINT, anchor="ma")


def percent(share: float) -> str:
    """0.437 -> 44 %, 0.004 -> <1 %"""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def write_times(draw: ImageDraw.ImageDraw, layout: Layout, seconds: np.ndarray) -> None:
    """Above the first row, where each column begins."""
    for column, second in enumerate(seconds.tolist()):
        place = (layout.left(column), layout.top - LABEL_HEIGHT)
        draw.text(place, f"{second:.1f} s", font=font(10, False), fill=FAINT)


def write_context(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], width: int, words: Sequence[str], number: int
) -> None:
    """A word between as many of its neighbours, which are faint, as there is room for."""
    faces = [font(11, bold) for bold in (False, True, False)]
    for around in range(WORDS_AROUND, -1, -1):
        parts = context(words, number, around)
        if sum(map(length, parts, faces)) <= width:
            x, y = place
            for part, face, colour in zip(parts, faces, (FAINT, INK, FAINT), strict=True):
                draw.text((x, y), part, font=face, fill=colour)
                x += length(part, face)
            return


def context(words: Sequence[str], number: int, around: int) -> tuple[str, str, str]:
    """A word with up to so many words before and after it; dots where there are more."""
    first, last = max(0, number - around), number + 1 + around
    before, after = " ".join(words[first:number]), " ".join(words[number + 1 : last])
    before = f"{'… ' if first else ''}{before}{' ' if before else ''}"
    after = f"{' ' if after else ''}{after}{' …' if last < len(words) else ''}"
    return printable(before), printable(words[number]), printable(after)


def length(text: str, face: ImageFont.FreeTypeFont) -> int:
    return round(face.getlength(text))
