"""A picture with a row of frames for each of some clips, and what the clips are beside them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from grurcn.drawing.clip_frames import RenderedClip, flow_legend
from grurcn.drawing.text import (
    ALARM,
    FAINT,
    GAP,
    LINE,
    MARGIN,
    PAPER,
    Heading,
    TextLine,
    png_of,
    write_heading,
    write_lines,
)

TEXT_WIDTH = 300
STRIP_WIDTH = 1400  # of a row's frames, about
MOST_IN_STRIP = 24  # frames; of longer clips some are left out, evenly
LEGEND_SIZE = 72


def contact_sheet(heading: Heading, clips: Sequence[RenderedClip]) -> bytes:
    """A PNG with a row for each clip: what it is, and its frames; those of flow with its colours below."""
    num_frames, size = clips[0].frames.shape[:2]
    places = np.unique(np.linspace(0, num_frames - 1, min(num_frames, MOST_IN_STRIP)).round().astype(int))
    cell = int(np.clip(STRIP_WIDTH // len(places) - GAP, 56, max(128, min(size, 224))))
    row_height = max(len(clips[0].strips) * (cell + GAP) - GAP, 84) + 2 * GAP
    width = 2 * MARGIN + TEXT_WIDTH + len(places) * (cell + GAP) - GAP
    sheet = Image.new("RGB", (max(width, 640), heading.bottom + len(clips) * row_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_heading(draw, heading, sheet.width - 2 * MARGIN - LEGEND_SIZE - 18)
    if clips[0].flow is not None:
        sheet.paste(Image.fromarray(flow_legend(LEGEND_SIZE)), (sheet.width - MARGIN - LEGEND_SIZE, MARGIN))
    for number, clip in enumerate(clips):
        y = heading.bottom + number * row_height
        draw.line([(MARGIN, y - GAP), (sheet.width - MARGIN, y - GAP)], fill=LINE)
        write_lines(draw, (MARGIN, y), TEXT_WIDTH - 16, lines_beside(clip), height=row_height - 2 * GAP)
        for strip, pictures in enumerate(clip.strips):
            for column, place in enumerate(places):
                x = MARGIN + TEXT_WIDTH + column * (cell + GAP)
                sheet.paste(resized(pictures[place], cell), (x, y + strip * (cell + GAP)))
    return png_of(sheet)


def lines_beside(clip: RenderedClip) -> list[TextLine]:
    """The text of a clip's row."""
    lines = [
        TextLine(clip.class_name or next(iter(clip.captions), "no class"), 15, bold=True),
        *(TextLine(remark, 12, ALARM) for remark in clip.remarks),
        TextLine(clip.sample.key, 12),
        TextLine(clip.span, 11, FAINT),
        TextLine(f"crop {clip.crop}", 11, FAINT),
    ]
    if clip.flow is not None:
        lines.append(TextLine(f"full colour: {clip.flow_reach:.1f} pixels a frame", 11, FAINT))
    return lines


def resized(pixels: np.ndarray, size: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((size, size), Image.Resampling.LANCZOS if size < len(pixels) else Image.Resampling.NEAREST)
