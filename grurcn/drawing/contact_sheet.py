"""Clips as a person looks at them: a picture with a row of frames a sample, and a page on which they move.

T frames of S x S pixels a clip. Whatever stands in a data set is text here: escaped on the page, and no more than glyphs in
the picture.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageFont

from shards.printable import printable
from shards.reading.clips import Clip
from shards.rows import Sample

INK, FAINT, PAPER, LINE, ALARM = "#1b1f24", "#667080", "#ffffff", "#dfe3e8", "#b3261e"
MARGIN, GAP, TEXT_WIDTH = 24, 4, 300
STRIP_WIDTH = 1400  # of a row's frames, about
MOST_IN_STRIP = 24  # frames; of longer clips every so-manieth is drawn
PAUSE_SECONDS = 0.7  # on the last frame, before a clip begins again


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A clip and what is said beside it."""

    sample: Sample
    class_name: str  # empty in a data set of captions
    captions: tuple[str, ...]
    clip: Clip
    seconds_between_frames: float
    frames: np.ndarray  # (T, S, S, 3) uint8
    flow: np.ndarray | None  # (T, S, S, 3) uint8, its colours
    flow_reach: float  # pixels a frame that have the full colour
    remarks: tuple[str, ...] = ()  # what is said of it in the picture, besides

    @property
    def pictures(self) -> list[np.ndarray]:
        """The frames and, if it is shown, the flow."""
        return [self.frames] if self.flow is None else [self.frames, self.flow]

    @property
    def span(self) -> str:
        numbers = self.clip.frames
        return f"frames {numbers[0]}-{numbers[-1]} of {self.sample.num_frames}, {self.sample.fps:.4g} fps"

    @property
    def cut(self) -> str:
        top, left, height, width = self.clip.box
        return f"{width} x {height} at x {left}, y {top}{', mirrored' if self.clip.mirror else ''}"


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What is said above all clips."""

    title: str
    lines: tuple[str, ...]


def flow_colours(fields: np.ndarray) -> tuple[np.ndarray, float]:
    """Motions (T, 2, S, S), u and v in pixels -> (colours (T, S, S, 3) uint8, pixels that have the full colour).

    White is still; the hue is the direction (red right, yellow-green down, cyan left, violet up), the colour the length, up
    to that which one in a hundred exceeds.
    """
    u, v = fields[:, 0], fields[:, 1]
    length = np.hypot(u, v)
    reach = max(1.0, float(np.quantile(length, 0.99)))
    hue = np.arctan2(v, u) / (2 * np.pi) % 1
    colours = hsv_to_rgb(np.stack([hue, np.clip(length / reach, 0, 1), np.ones_like(hue)], axis=-1))
    return np.rint(colours * 255).astype(np.uint8), reach


# The picture


def contact_sheet(heading: Heading, clips: Sequence[Shown]) -> bytes:
    """A PNG with a row for each clip: what it is, and its frames; those of flow with its colours below."""
    num_frames, size = clips[0].frames.shape[:2]
    places = np.unique(np.linspace(0, num_frames - 1, min(num_frames, MOST_IN_STRIP)).round().astype(int))
    cell = int(np.clip(STRIP_WIDTH // len(places) - GAP, 56, max(128, min(size, 224))))
    strips = len(clips[0].pictures)
    row_height = max(strips * (cell + GAP) - GAP, 84) + 2 * GAP
    top = MARGIN + 34 + 20 * len(heading.lines) + MARGIN // 2
    width = 2 * MARGIN + TEXT_WIDTH + len(places) * (cell + GAP) - GAP
    sheet = Image.new("RGB", (max(width, 640), top + len(clips) * row_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_lines(draw, (MARGIN, MARGIN), sheet.width - 2 * MARGIN - 90, [(heading.title, 20, True, INK)])
    lines = [(line, 13, False, FAINT) for line in heading.lines]
    write_lines(draw, (MARGIN, MARGIN + 32), sheet.width - 2 * MARGIN - 90, lines)
    if clips[0].flow is not None:
        sheet.paste(Image.fromarray(wheel(72)), (sheet.width - MARGIN - 72, MARGIN))
    for number, clip in enumerate(clips):
        y = top + number * row_height
        draw.line([(MARGIN, y - GAP), (sheet.width - MARGIN, y - GAP)], fill=LINE)
        write_lines(draw, (MARGIN, y), TEXT_WIDTH - 16, said_beside(clip), height=row_height - 2 * GAP)
        for strip, pictures in enumerate(clip.pictures):
            for column, place in enumerate(places):
                x = MARGIN + TEXT_WIDTH + column * (cell + GAP)
                sheet.paste(resized(pictures[place], cell), (x, y + strip * (cell + GAP)))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def said_beside(clip: Shown) -> list[tuple[str, int, bool, str]]:
    """(text, size, bold, colour) of each line."""
    title = clip.class_name or next(iter(clip.captions), "no class")
    reach = [(f"full colour: {clip.flow_reach:.1f} pixels a frame", 11, False, FAINT)] if clip.flow is not None else []
    return [
        (title, 15, True, INK),
        *((remark, 12, False, ALARM) for remark in clip.remarks),
        (clip.sample.key, 12, False, INK),
        (clip.span, 11, False, FAINT),
        (f"crop {clip.cut}", 11, False, FAINT),
        *reach,
    ]


def write_lines(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    width: int,
    lines: Sequence[tuple[str, int, bool, str]],
    height: int = 10_000,
) -> None:
    """Writes lines below each other, each cut to the width, as many as fit."""
    x, y = place
    end = y + height
    for text, size, bold, colour in lines:
        face = font(size, bold)
        if y + size > end:
            return
        draw.text((x, y), fitted(printable(text), face, width), font=face, fill=colour)
        y += round(1.45 * size)


def fitted(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning and end as the width has room for."""
    if face.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and face.getlength(shortened(text, kept)) > width:
        kept -= 1
    return shortened(text, kept)


def shortened(text: str, kept: int) -> str:
    return f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"


@cache
def font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """matplotlib brings a font with it that has most alphabets."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def resized(pixels: np.ndarray, size: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((size, size), Image.Resampling.LANCZOS if size < len(pixels) else Image.Resampling.NEAREST)


def wheel(size: int) -> np.ndarray:
    """The colours of motions in all directions: (size, size, 3) uint8."""
    v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    inside = np.hypot(u, v) < 1
    colours = flow_colours(np.where(inside, np.stack([u, v]), 0)[None])[0][0]
    return np.where(inside[..., None], colours, 255).astype(np.uint8)


# The page


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --faint: #667080; --paper: #f6f7f9; --card: #fff; --line: #dfe3e8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e7eaee; --faint: #9aa4b1; --paper: #15181c; --card: #1e2227; --line: #333a42; }}
}}
body {{ margin: 2rem auto; padding: 0 1.5rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
header {{ display: flex; justify-content: space-between; gap: 1rem; }}
header p {{ margin: 0; color: var(--faint); }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({card}px, 1fr)); gap: 1rem; margin-top: 1.5rem; }}
article {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }}
.clips {{ display: flex; gap: .4rem; }}
.clips img {{ display: block; flex: 1; min-width: 0; width: 100%; height: auto; border-radius: 4px; }}
header img {{ width: 72px; height: 72px; border-radius: 50%; }}
h2 {{ font-size: 1rem; margin: .6rem 0 .1rem; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: 0 .7rem; margin: .3rem 0 0; font-size: .82rem; }}
dt {{ color: var(--faint); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
ul {{ margin: .3rem 0 0; padding-left: 1.1rem; font-size: .85rem; }}
summary {{ cursor: pointer; font-size: .82rem; color: var(--faint); margin-top: .3rem; }}
</style>
</head>
<body>
<header><div><h1>{title}</h1>{lines}</div>{legend}</header>
<main>
{cards}
</main>
</body>
</html>
"""
CAPTIONS_OPEN = 3  # the others are folded


def page(heading: Heading, clips: Sequence[Shown]) -> str:
    """An HTML page that needs no other file, no network and no script; all text in it is escaped."""
    size = max(clips[0].frames.shape[1], 160)
    legend = wheel(144)[None] if clips[0].flow is not None else None
    return PAGE.format(
        title=text(heading.title),
        legend="" if legend is None else f'<img alt="colours of directions" src="{animation(legend, 1)}">',
        lines="".join(f"<p>{text(line)}</p>" for line in heading.lines),
        card=len(clips[0].pictures) * size + 28,
        cards="\n".join(card(clip) for clip in clips),
    )


def card(clip: Shown) -> str:
    sample = clip.sample
    facts = {
        "key": sample.key,
        "group": sample.group,
        "clip": clip.span,
        "crop": clip.cut,
        "video": f"{sample.num_frames / sample.fps:.2f} s, {sample.size_bytes / 1000:,.1f} kB",
        "place": f"{sample.shard}, byte {sample.offset:,}",
    }
    if clip.flow is not None:
        facts["colour"] = f"full at {clip.flow_reach:.1f} pixels a frame"
    images = "".join(f'<img alt="" src="{animation(pixels, clip.seconds_between_frames)}">' for pixels in clip.pictures)
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    title = f"<h2>{text(clip.class_name)}</h2>" if clip.class_name else ""
    return f'<article><div class="clips">{images}</div>{title}{captions(clip.captions)}<dl>{rows}</dl></article>'


def captions(said: Sequence[str]) -> str:
    """A list of the captions, most of them folded."""
    items = [f"<li>{text(caption)}</li>" for caption in said]
    first, others = "".join(items[:CAPTIONS_OPEN]), "".join(items[CAPTIONS_OPEN:])
    summary = f"<summary>{len(items) - CAPTIONS_OPEN} more captions</summary>"
    folded = f"<details>{summary}<ul>{others}</ul></details>" if others else ""
    return f"<ul>{first}</ul>{folded}" if first else ""


def text(content: str) -> str:
    """Text of a data set as HTML shows it, and never obeys it."""
    return html.escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in content))


def animation(pixels: np.ndarray, seconds_between_frames: float) -> str:
    """(T, S, S, 3) uint8 -> a data: URI of a clip in motion, in its own time, with a pause before it begins again."""
    pictures = [Image.fromarray(each) for each in pixels]
    durations = [max(20, round(1000 * seconds_between_frames))] * len(pictures)
    durations[-1] += round(1000 * PAUSE_SECONDS)
    file = io.BytesIO()
    options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(file, "WEBP", quality=82, method=4, **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
