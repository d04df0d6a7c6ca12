"""Text on pictures: one font, the colours of ink and paper, and lines that are cut to their place.

Strangers name videos, classes and captions, so text is drawn as glyphs only: `printable` escapes everything else.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont

from shards.printable import printable

INK, FAINT, PAPER, LINE, ALARM = "#1b1f24", "#667080", "#ffffff", "#dfe3e8", "#b3261e"
MARGIN, GAP = 24, 4  # pixels: around a sheet, and between the frames on it


class TextLine(NamedTuple):
    """A line of text and how it looks."""

    text: str
    size: int = 13  # pixels
    colour: str = INK
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The title of a sheet and the lines below it."""

    title: str
    lines: tuple[str, ...]

    @property
    def bottom(self) -> int:
        """The y coordinate below which the sheet's content begins."""
        return MARGIN + 34 + 20 * len(self.lines) + MARGIN // 2


def write_heading(draw: ImageDraw.ImageDraw, heading: Heading, width: int) -> None:
    """Writes a heading at the top left of a sheet, each line cut to the width."""
    write_lines(draw, (MARGIN, MARGIN), width, [TextLine(heading.title, 20, bold=True)])
    write_lines(draw, (MARGIN, MARGIN + 32), width, [TextLine(line, 13, FAINT) for line in heading.lines])


def write_lines(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], width: int, lines: Sequence[TextLine], height: int = 10_000
) -> None:
    """Writes lines below each other, each cut to the width, as many as fit into the height."""
    x, y = place
    end = y + height
    for line in lines:
        if y + line.size > end:
            return
        write_text(draw, (x, y), line, width)
        y += round(1.45 * line.size)


def write_text(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], line: TextLine, width: int, anchor: str = "la"
) -> None:
    """Writes one line, cut to the width. anchor: which point of the text is at `place`, in Pillow's letters."""
    text = fitted(line.text, line.size, line.bold, width)
    draw.text(place, text, font=font(line.size, line.bold), fill=line.colour, anchor=anchor)


@lru_cache(maxsize=4096)
def fitted(text: str, size: int, bold: bool, width: int) -> str:
    """The text, escaped; if it is wider than `width` pixels, as much of its beginning and end as fits."""
    text, kept = printable(text), len(printable(text))
    if text_width(text, size, bold) <= width:
        return text
    while kept > 2 and text_width(shortened(text, kept), size, bold) > width:
        kept -= 1
    return shortened(text, kept)


def shortened(text: str, kept: int) -> str:
    return f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"


def text_width(text: str, size: int, bold: bool = False) -> float:
    """The width of a text in pixels."""
    return font(size, bold).getlength(text)


@cache
def font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has most alphabets."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def png_of(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
