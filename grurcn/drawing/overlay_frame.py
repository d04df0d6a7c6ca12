"""The picture around each frame of an overlay (overlay.py): the prediction, the votes, the time.

N clips, L levels, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from grurcn.drawing.text import FAINT, INK, LINE, PAPER, TextLine, text_width, write_text
from grurcn.inference.classifier import top_classes
from shards.printable import printable
from shards.reading.clips import Box

SIDE = 640  # pixels: the least width of the picture; smaller frames are enlarged to it
MOST_BARS = 3
# Okabe and Ito 2008: also colour-blind people tell them apart. Black is used only where every class has its own colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#56b4e9", "#000000")
OTHERS = "#8b929c"  # of all classes beyond the colours
TRACK = "#eef0f3"  # of an empty bar
LEGEND_COLUMNS = 3
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
DARK = 120  # brightness of a cell below which its name is white

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class VideoVotes:
    """A model's votes for the clips of a video."""

    votes: Tensor  # (N, L, K) float64, each clip's probabilities by each level
    frames: np.ndarray  # (N, F) numbers of each clip's frames, in rising order from clip to clip
    num_frames: int  # of the video
    fps: float
    classes: tuple[str, ...]  # K
    levels: tuple[str, ...]  # L

    def ended(self, frame: int) -> int:
        """How many clips have ended when this frame is shown."""
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
        """{class: its colour}, of the classes that a level votes for, the most frequent first.

        Where there are no more classes than colours, each has the same one in all videos.
        """
        winners, counts = self.votes.argmax(dim=2).unique(return_counts=True)
        order = sorted(zip((-counts).tolist(), winners.tolist(), strict=True))
        if len(self.classes) <= len(COLOURS):
            return {number: COLOURS[number] for _, number in order}
        own = len(COLOURS) - 1  # black would look like a pale grey where it is improbable
        return {number: COLOURS[place] if place < own else OTHERS for place, (_, number) in enumerate(order)}

    def top(self, clip: int) -> list[tuple[int, float]]:
        """(class, probability) of the likeliest classes, the mean over the clips up to this one."""
        return top_classes(self.running[clip], MOST_BARS)


@dataclass(frozen=True, kw_only=True)
class OverlayLayout:
    """Where things are in the picture, in pixels. Lengths below the frame are for a picture of SIDE, and grow with it."""

    stored: tuple[int, int]  # height and width of the stored frames
    prediction: VideoVotes

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
        """Left and right of a full bar; the classes' names are to the left."""
        return self.px(230), self.width - self.px(84)

    def row(self, level: int) -> int:
        """The top of a level's cells."""
        return self.bar(min(MOST_BARS, len(self.prediction.classes))) + self.px(16 + 21 * level)

    @property
    def row_height(self) -> int:
        return self.px(18)

    @property
    def strip(self) -> tuple[int, int]:
        """Left and right of all cells."""
        return self.px(96), self.width - self.margin

    def x(self, frame: float) -> int:
        """Where on the strip a time of the video is, in frames from 0 to num_frames."""
        left, right = self.strip
        return left + round((right - left) * frame / self.prediction.num_frames)

    @property
    def legend(self) -> int:
        return self.row(len(self.prediction.levels)) + self.px(28)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, both even."""
        rows = -(-len(legend_of(self.prediction)) // LEGEND_COLUMNS)
        height = self.legend + self.px(20 * rows + 8)
        return self.width, height + height % 2


def legend_of(prediction: VideoVotes) -> list[tuple[str, str]]:
    """(colour, what it stands for)"""
    own = [(colour, prediction.classes[number]) for number, colour in prediction.colours.items() if colour != OTHERS]
    others = list(prediction.colours.values()).count(OTHERS)
    return own + ([(OTHERS, f"{others} other class{'es' if others > 1 else ''}")] if others else [])


def runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """[first, stop) of each stretch of equal values: a a b -> (0, 2), (2, 3)"""
    starts = [place for place, value in enumerate(values) if not place or values[place - 1] != value]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))


def brightness(colour: Colour) -> float:
    """The luma of a colour, 0 to 255."""
    return float(np.dot(colour, LUMA))


def shade(colour: str, strength: float) -> Colour:
    """A colour on paper: strength 0 is paper, 1 the colour itself."""
    ink = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    red, green, blue = np.rint(255 + (ink - 255) * strength).astype(int).tolist()
    return red, green, blue


class OverlayPainter:
    """Draws a video's pictures one by one."""

    def __init__(self, layout: OverlayLayout, box: Box | None = None):
        """box: of the stored frame, what the model sees; drawn if given."""
        self.prediction, self.layout, self.box = layout.prediction, layout, box
        self.base = self.background()

    def picture(self, number: int, pixels: np.ndarray, heat: np.ndarray | None = None) -> Image.Image:
        """The picture of frame `number`, whose pixels are (H, W, 3) uint8.

        heat: 0 to 1, of the drawn frame's height and width, to be laid over it.
        """
        layout = self.layout
        sheet = self.base.copy()
        height, width = layout.frame_size
        frame = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(frame if heat is None else heated(frame, heat), (layout.frame_left, 0))
        draw = ImageDraw.Draw(sheet)
        self.draw_box(draw)
        self.draw_prediction(draw, number)
        self.draw_cursor(draw, number)
        return sheet

    def background(self) -> Image.Image:
        """What is the same in all pictures: strip, times, legend."""
        layout, prediction = self.layout, self.prediction
        sheet = Image.new("RGB", layout.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        draw.rectangle([0, 0, layout.width, layout.frame_size[0] - 1], fill=INK)
        name_width = layout.strip[0] - layout.margin - layout.px(8)
        edges = [layout.x(edge) for edge in prediction.edges.tolist()]
        for level, name in enumerate(prediction.levels):
            y = layout.row(level)
            self.write(draw, (layout.margin, y + layout.row_height // 2), TextLine(name, 12), name_width, "lm")
            values, winners = (part.tolist() for part in prediction.votes[:, level].max(dim=1))
            fills = [shade(prediction.colours[winner], value) for winner, value in zip(winners, values, strict=True)]
            for fill, left, right in zip(fills, edges, edges[1:], strict=False):
                if right > left:  # there may be more clips than pixels
                    draw.rectangle([left, y, right - 1, y + layout.row_height - 1], fill=fill)
            for first, stop in runs(winners):
                name = prediction.classes[winners[first]]
                self.write_in_cells(draw, y, (edges[first], edges[stop]), name, fills[first])
        self.draw_times(draw)
        self.draw_legend(draw)
        return sheet

    def write_in_cells(self, draw: ImageDraw.ImageDraw, y: int, span: tuple[int, int], name: str, fill: Colour) -> None:
        """Writes a class's name over neighbouring cells that vote for it, if there is room: pale colours look alike."""
        left, right = span
        gap = self.layout.px(5)
        if text_width(printable(name), self.layout.px(10)) <= right - left - 2 * gap:
            line = TextLine(name, 10, PAPER if brightness(fill) < DARK else INK)
            self.write(draw, (left + gap, y + self.layout.row_height // 2), line, right - left, "lm")

    def draw_times(self, draw: ImageDraw.ImageDraw) -> None:
        layout, prediction = self.layout, self.prediction
        y = layout.row(len(prediction.levels))
        draw.line([(layout.strip[0], y), (layout.strip[1] - 1, y)], fill=LINE)
        for second in ticks(prediction.num_frames / prediction.fps):
            x = layout.x(second * prediction.fps)
            draw.line([(x, y), (x, y + layout.px(4))], fill=FAINT)
            anchor = "rt" if x > layout.strip[1] - layout.px(24) else "lt" if x == layout.strip[0] else "mt"
            line = TextLine(f"{second:g} s", 11, FAINT)
            self.write(draw, (x, y + layout.px(6)), line, layout.px(90), anchor)

    def draw_legend(self, draw: ImageDraw.ImageDraw) -> None:
        layout = self.layout
        column_width = (layout.width - 2 * layout.margin) // LEGEND_COLUMNS
        for place, (colour, name) in enumerate(legend_of(self.prediction)):
            row, column = divmod(place, LEGEND_COLUMNS)
            x, y = layout.margin + column * column_width, layout.legend + layout.px(20 * row)
            side = layout.px(12)
            draw.rectangle([x, y, x + side - 1, y + side - 1], fill=colour)
            width = column_width - layout.px(28)
            self.write(draw, (x + layout.px(18), y + side // 2), TextLine(name, 12), width, "lm")

    def draw_box(self, draw: ImageDraw.ImageDraw) -> None:
        """Outlines what the model sees of the frame."""
        if self.box is not None:
            layout = self.layout
            top, left, height, width = (side * layout.frame_size[0] / layout.stored[0] for side in self.box)
            x = layout.frame_left + left
            draw.rectangle([x, top, x + width - 1, top + height - 1], outline=PAPER)

    def draw_prediction(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        layout, prediction = self.layout, self.prediction
        ended, total = prediction.ended(number), len(prediction.votes)
        status = f"{ended:,} of {total:,} clip{'s' if total > 1 else ''} seen"
        if not ended:
            status = f"the first clip ends at {prediction.frames[0, -1] / prediction.fps:.2f} s"
        y, right = layout.head + layout.px(12), layout.width - layout.margin
        self.write(draw, (layout.margin, y), TextLine(status, 13, FAINT), layout.width // 2, "ls")
        seconds = TextLine(f"{number / prediction.fps:.2f} s", 13, FAINT)
        self.write(draw, (right, y), seconds, layout.width // 3, "rs")
        left, end = layout.bars
        top = prediction.top(ended - 1) if ended else []
        for place in range(min(MOST_BARS, len(prediction.classes))):
            y, height = layout.bar(place), layout.px(16)
            draw.rectangle([left, y, end - 1, y + height - 1], fill=TRACK)
            if not ended:
                continue
            winner, probability = top[place]
            length = round((end - left) * probability)
            if length:
                colour = prediction.colours.get(winner, OTHERS)
                draw.rectangle([left, y, left + length - 1, y + height - 1], fill=colour)
            middle, width = y + height // 2, left - layout.margin - layout.px(10)
            name = TextLine(prediction.classes[winner], 14, bold=place == 0)
            self.write(draw, (layout.margin, middle), name, width, "lm")
            self.write(draw, (right, middle), TextLine(f"{100 * probability:.1f} %"), layout.px(70), "rm")

    def draw_cursor(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        layout = self.layout
        x = layout.x(number + 0.5)
        top, end = layout.row(0) - layout.px(3), layout.row(len(self.prediction.levels)) + layout.px(1)
        half = layout.px(4)
        draw.rectangle([x - 2, top, x + 2, end], fill=PAPER)
        draw.rectangle([x - 1, top, x + 1, end], fill=INK)
        draw.polygon([(x - half, top - half), (x + half, top - half), (x, top + 1)], fill=INK)

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[int, int], line: TextLine, width: int, anchor: str) -> None:
        """Writes a line, cut to the width; its size grows with the picture."""
        write_text(draw, place, line._replace(size=self.layout.px(line.size)), width, anchor)


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
    glow.putpalette(heat_palette())
    return Image.composite(
        glow.convert("RGB"), pale, level.point([min(217, round(1.3 * value)) for value in range(256)])
    )


@cache
def heat_palette() -> bytes:
    """The colours of heat 0 to 255: from red to yellow."""
    colours = mpl.colormaps["inferno"](np.linspace(0.45, 0.95, 256))[:, :3]
    return np.rint(255 * colours).astype(np.uint8).tobytes()
