"""The picture that stands around each frame of an overlay (overlay.py): the prediction, the votes, the time.

N clips, L levels, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from grurcn.drawing.contact_sheet import FAINT, INK, LINE, PAPER, fitted, font
from grurcn.drawing.heat import HeatPainter
from shards.printable import printable
from shards.reading.clips import Box

SIDE = 640  # pixels: the least width of the picture, and what small frames are enlarged to
MOST_BARS = 3
# Okabe and Ito 2008: told apart by people who do not see red or green as others do. Black is used only where no class goes
# without a colour of its own.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#56b4e9", "#000000")
OTHERS = "#8b929c"  # classes beyond the colours
LEGEND_COLUMNS = 3
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
DARK = 120  # brightness of a cell below which its name is white

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the model says of a video's clips."""

    votes: Tensor  # (N, L, K) float64, each clip's probabilities by each level
    frames: np.ndarray  # (N, F) numbers of each clip's frames, in rising order from clip to clip
    num_frames: int  # of the video
    fps: float
    classes: tuple[str, ...]  # K
    levels: tuple[str, ...]  # L

    def ended(self, frame: int) -> int:
        """How many clips have shown their last frame once this one is shown."""
        return int(np.searchsorted(self.frames[:, -1], frame, side="right"))

    @cached_property
    def running(self) -> Tensor:
        """(N, K): the mean over the first 1 ... N clips and their levels."""
        count = torch.arange(1, len(self.votes) + 1, dtype=torch.float64)
        return self.votes.mean(dim=1).cumsum(dim=0) / count[:, None]

    @cached_property
    def edges(self) -> np.ndarray:
        """(N + 1,) where each clip's cells begin, and where the last ones end, in frames from 0 to num_frames."""
        middles = (self.frames[:, 0] + self.frames[:, -1] + 1) / 2
        return np.concatenate([[0], (middles[:-1] + middles[1:]) / 2, [self.num_frames]])

    @cached_property
    def colours(self) -> dict[int, str]:
        """{class: its colour}, of the classes that a level votes for, those it is most often first.

        Where there are no more classes than colours, each has the same one in all videos.
        """
        winners, counts = self.votes.argmax(dim=2).unique(return_counts=True)
        order = sorted(zip((-counts).tolist(), winners.tolist(), strict=True))
        if len(self.classes) <= len(COLOURS):
            return {number: COLOURS[number] for _, number in order}
        own = len(COLOURS) - 1  # black would look like a pale grey where it is improbable
        return {number: COLOURS[place] if place < own else OTHERS for place, (_, number) in enumerate(order)}

    def top(self, clip: int) -> list[tuple[int, float]]:
        """(class, probability) of the likeliest, the mean over the clips up to this one; of equal ones the lower number."""
        values = self.running[clip].tolist()
        order = sorted(range(len(values)), key=lambda number: -values[number])
        return [(number, values[number]) for number in order[:MOST_BARS]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things are in the picture, in pixels. Lengths below the frame are drawn for a picture of SIDE, and grow with it."""

    stored: tuple[int, int]  # height and width of the stored frames
    told: Told

    @cached_property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the drawn frame, of the stored one's aspect."""
        scale = max(1.0, SIDE / max(self.stored))
        height, width = (max(1, round(side * scale)) for side in self.stored)
        return height, width

    @property
    def width(self) -> int:
        return max(SIDE, self.frame_size[1] + self.frame_size[1] % 2)

    @property
    def frame_left(self) -> int:
        return (self.width - self.frame_size[1]) // 2

    def px(self, length: float) -> int:
        return round(length * self.width / SIDE)

    @property
    def margin(self) -> int:
        return self.px(16)

    @property
    def head(self) -> int:
        return self.frame_size[0] + self.px(12)

    def bar(self, place: int) -> int:
        """The top of a bar's line."""
        return self.head + self.px(26 + 23 * place)

    @property
    def bars(self) -> tuple[int, int]:
        """Left and right of a full bar; what is left of it is the classes' names'."""
        return self.px(230), self.width - self.px(84)

    def row(self, level: int) -> int:
        """The top of a level's cells."""
        return self.bar(min(MOST_BARS, len(self.told.classes))) + self.px(16 + 21 * level)

    @property
    def row_height(self) -> int:
        return self.px(18)

    @property
    def strip(self) -> tuple[int, int]:
        """Left and right of all cells."""
        return self.px(96), self.width - self.margin

    def x(self, frame: float) -> int:
        """Where on the strip a place in the video lies, in frames from 0 to num_frames."""
        left, right = self.strip
        return left + round((right - left) * frame / self.told.num_frames)

    @property
    def legend(self) -> int:
        return self.row(len(self.told.levels)) + self.px(28)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, both even."""
        rows = -(-len(legend_of(self.told)) // LEGEND_COLUMNS)
        height = self.legend + self.px(20 * rows + 8)
        return self.width, height + height % 2


def legend_of(told: Told) -> list[tuple[str, str]]:
    """(colour, what it stands for)"""
    own = [(colour, told.classes[number]) for number, colour in told.colours.items() if colour != OTHERS]
    others = list(told.colours.values()).count(OTHERS)
    return own + ([(OTHERS, f"{others} other class{'es' if others > 1 else ''}")] if others else [])


def runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """[first, stop) of each stretch of equal values: a a b -> (0, 2), (2, 3)"""
    starts = [place for place, value in enumerate(values) if not place or values[place - 1] != value]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def brightness(colour: Colour) -> float:
    """0 to 255, as an eye takes it."""
    return float(np.dot(colour, LUMA))


def shade(colour: str, share: float) -> Colour:
    """A colour on paper, as strong as the share says: 0 is paper, 1 the colour itself."""
    ink = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    red, green, blue = np.rint(255 + (ink - 255) * share).astype(int).tolist()
    return red, green, blue


class Drawing:
    """Draws a video's pictures one by one."""

    def __init__(self, told: Told, layout: Layout):
        self.told, self.layout = told, layout
        self.heat: HeatPainter | None = None
        self.box: Box | None = None  # of the stored frame: what the model sees, drawn with the heat
        self.base = self.standing()

    def picture(self, number: int, pixels: np.ndarray) -> Image.Image:
        """The picture of a frame, of which pixels (H, W, 3) uint8 are given."""
        layout = self.layout
        sheet = self.base.copy()
        height, width = layout.frame_size
        frame = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        if self.heat is not None:
            frame = heated(frame, self.heat.heat(number))
        sheet.paste(frame, (layout.frame_left, 0))
        draw = ImageDraw.Draw(sheet)
        self.draw_box(draw)
        self.draw_prediction(draw, number)
        self.draw_cursor(draw, number)
        return sheet

    def standing(self) -> Image.Image:
        """What is the same in all pictures: strip, times, colours."""
        layout, told = self.layout, self.told
        sheet = Image.new("RGB", layout.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        draw.rectangle([0, 0, layout.width, layout.frame_size[0] - 1], fill=INK)
        name_width = layout.strip[0] - layout.margin - layout.px(8)
        edges = [layout.x(edge) for edge in told.edges.tolist()]
        for level, name in enumerate(told.levels):
            y = layout.row(level)
            place = (layout.margin, y + layout.row_height // 2)
            self.write(draw, place, name, 12, name_width, INK, "lm")
            shares, winners = (part.tolist() for part in told.votes[:, level].max(dim=1))
            paint = [shade(told.colours[winner], share) for winner, share in zip(winners, shares, strict=True)]
            for colour, left, right in zip(paint, edges, edges[1:], strict=False):
                if right > left:  # there may be more clips than pixels
                    draw.rectangle([left, y, right - 1, y + layout.row_height - 1], fill=colour)
            for first, stop in runs(winners):
                self.write_in_cells(draw, y, (edges[first], edges[stop]), told.classes[winners[first]], paint[first])
        self.draw_times(draw)
        self.draw_legend(draw)
        return sheet

    def write_in_cells(self, draw: ImageDraw.ImageDraw, y: int, span: tuple[int, int], name: str, fill: Colour) -> None:
        """A class's name over neighbouring cells that vote for it, if there is room: pale colours are hard to tell apart."""
        left, right = span
        size, gap = self.layout.px(10), self.layout.px(5)
        if font(size, False).getlength(printable(name)) <= right - left - 2 * gap:
            colour = PAPER if brightness(fill) < DARK else INK
            self.write(draw, (left + gap, y + self.layout.row_height // 2), name, 10, right - left, colour, "lm")

    def draw_times(self, draw: ImageDraw.ImageDraw) -> None:
        layout, told = self.layout, self.told
        y = layout.row(len(told.levels))
        draw.line([(layout.strip[0], y), (layout.strip[1] - 1, y)], fill=LINE)
        for second in ticks(told.num_frames / told.fps):
            x = layout.x(second * told.fps)
            draw.line([(x, y), (x, y + layout.px(4))], fill=FAINT)
            anchor = "rt" if x > layout.strip[1] - layout.px(24) else "lt" if x == layout.strip[0] else "mt"
            self.write(draw, (x, y + layout.px(6)), f"{second:g} s", 11, layout.px(90), FAINT, anchor)

    def draw_legend(self, draw: ImageDraw.ImageDraw) -> None:
        layout = self.layout
        column_width = (layout.width - 2 * layout.margin) // LEGEND_COLUMNS
        for place, (colour, name) in enumerate(legend_of(self.told)):
            row, column = divmod(place, LEGEND_COLUMNS)
            x, y = layout.margin + column * column_width, layout.legend + layout.px(20 * row)
            side = layout.px(12)
            draw.rectangle([x, y, x + side - 1, y + side - 1], fill=colour)
            width = column_width - layout.px(28)
            self.write(draw, (x + layout.px(18), y + side // 2), name, 12, width, INK, "lm")

    def draw_box(self, draw: ImageDraw.ImageDraw) -> None:
        """What the model sees of the frame."""
        if self.box is not None:
            layout = self.layout
            top, left, height, width = (side * layout.frame_size[0] / layout.stored[0] for side in self.box)
            x = layout.frame_left + left
            draw.rectangle([x, top, x + width - 1, top + height - 1], outline=PAPER)

    def draw_prediction(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        layout, told = self.layout, self.told
        ended, total = told.ended(number), len(told.votes)
        seconds = f"{number / told.fps:.2f} s"
        said = f"{ended:,} of {total:,} clip{'s' if total > 1 else ''} seen"
        if not ended:
            said = f"the first clip ends at {told.frames[0, -1] / told.fps:.2f} s"
        self.write(draw, (layout.margin, layout.head + layout.px(12)), said, 13, layout.width // 2, FAINT, "ls")
        right = layout.width - layout.margin
        self.write(draw, (right, layout.head + layout.px(12)), seconds, 13, layout.width // 3, FAINT, "rs")
        left, end = layout.bars
        for place in range(min(MOST_BARS, len(told.classes))):
            y, height = layout.bar(place), layout.px(16)
            draw.rectangle([left, y, end - 1, y + height - 1], fill="#eef0f3")
            if ended:
                winner, share = told.top(ended - 1)[place]
                full = round((end - left) * share)
                if full:
                    colour = told.colours.get(winner, OTHERS)
                    draw.rectangle([left, y, left + full - 1, y + height - 1], fill=colour)
                middle = y + height // 2
                width = left - layout.margin - layout.px(10)
                name = told.classes[winner]
                self.write(draw, (layout.margin, middle), name, 14, width, INK, "lm", bold=place == 0)
                self.write(draw, (right, middle), f"{100 * share:.1f} %", 13, layout.px(70), INK, "rm")

    def draw_cursor(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        layout = self.layout
        x = layout.x(number + 0.5)
        top, end = layout.row(0) - layout.px(3), layout.row(len(self.told.levels)) + layout.px(1)
        half = layout.px(4)
        draw.rectangle([x - 2, top, x + 2, end], fill=PAPER)
        draw.rectangle([x - 1, top, x + 1, end], fill=INK)
        draw.polygon([(x - half, top - half), (x + half, top - half), (x, top + 1)], fill=INK)

    def write(
        self,
        draw: ImageDraw.ImageDraw,
        place: tuple[int, int],
        text: str,
        size: int,
        width: int,
        colour: str,
        anchor: str,
        bold: bool = False,
    ) -> None:
        """One line, cut to the width."""
        pixels = self.layout.px(size)
        draw.text(place, line_of(text, pixels, bold, width), font=font(pixels, bold), fill=colour, anchor=anchor)


@lru_cache(maxsize=4096)
def line_of(text: str, size: int, bold: bool, width: int) -> str:
    return fitted(printable(text), font(size, bold), width)


def ticks(seconds: float, most: int = 8) -> list[float]:
    """Round times from 0 on, up to `seconds`."""
    step = 10 ** math.floor(math.log10(seconds / most))
    step = next(step * times for times in (1, 2, 5, 10, 20) if seconds / (step * times) <= most)
    return [round(step * number, 9) for number in range(math.floor(seconds / step + 1e-9) + 1)]


def heated(frame: Image.Image, heat: np.ndarray) -> Image.Image:
    """The frame with less colour, and the heat (H, W), 0 to 1, over it."""
    pale = Image.blend(frame.convert("L").convert("RGB"), frame, 0.35)
    level = Image.fromarray(np.rint(255 * heat).astype(np.uint8))
    glow = level.copy()
    glow.putpalette(glow_palette())
    return Image.composite(
        glow.convert("RGB"), pale, level.point([min(217, round(1.3 * value)) for value in range(256)])
    )


@cache
def glow_palette() -> bytes:
    """Of heat 0 to 255: from red to yellow."""
    colours = mpl.colormaps["inferno"](np.linspace(0.45, 0.95, 256))[:, :3]
    return np.rint(255 * colours).astype(np.uint8).tobytes()
