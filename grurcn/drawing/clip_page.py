"""An HTML page on which clips move: it needs no other file, no network and no script.

All text of the data set is escaped. T frames of S x S pixels a clip.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from grurcn.drawing.clip_frames import RenderedClip, flow_legend
from grurcn.drawing.text import Heading

PAUSE_SECONDS = 0.7  # on the last frame, before a clip begins again
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


def clip_page(heading: Heading, clips: Sequence[RenderedClip]) -> str:
    """The page of some clips."""
    size = max(clips[0].frames.shape[1], 160)
    legend = flow_legend(144)[None] if clips[0].flow is not None else None
    return PAGE.format(
        title=escaped(heading.title),
        legend="" if legend is None else f'<img alt="colours of directions" src="{animation(legend, 1)}">',
        lines="".join(f"<p>{escaped(line)}</p>" for line in heading.lines),
        card=len(clips[0].strips) * size + 28,
        cards="\n".join(card_of(clip) for clip in clips),
    )


def card_of(clip: RenderedClip) -> str:
    sample = clip.sample
    facts = {
        "key": sample.key,
        "group": sample.group,
        "clip": clip.span,
        "crop": clip.crop,
        "video": f"{sample.num_frames / sample.fps:.2f} s, {sample.size_bytes / 1000:,.1f} kB",
        "place": f"{sample.shard}, byte {sample.offset:,}",
    }
    if clip.flow is not None:
        facts["colour"] = f"full at {clip.flow_reach:.1f} pixels a frame"
    images = "".join(f'<img alt="" src="{animation(pixels, clip.seconds_between_frames)}">' for pixels in clip.strips)
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items())
    title = f"<h2>{escaped(clip.class_name)}</h2>" if clip.class_name else ""
    return f'<article><div class="clips">{images}</div>{title}{caption_list(clip.captions)}<dl>{rows}</dl></article>'


def caption_list(captions: Sequence[str]) -> str:
    """An HTML list of captions; those after the first CAPTIONS_OPEN are folded."""
    items = [f"<li>{escaped(caption)}</li>" for caption in captions]
    first, others = "".join(items[:CAPTIONS_OPEN]), "".join(items[CAPTIONS_OPEN:])
    summary = f"<summary>{len(items) - CAPTIONS_OPEN} more captions</summary>"
    folded = f"<details>{summary}<ul>{others}</ul></details>" if others else ""
    return f"<ul>{first}</ul>{folded}" if first else ""


def escaped(content: str) -> str:
    """Text of a data set for HTML: shown, never interpreted."""
    return html.escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in content))


def animation(pixels: np.ndarray, seconds_between_frames: float) -> str:
    """(T, S, S, 3) uint8 -> a data: URI of an animation at the clip's speed, with a pause at its end."""
    pictures = [Image.fromarray(each) for each in pixels]
    durations = [max(20, round(1000 * seconds_between_frames))] * len(pictures)
    durations[-1] += round(1000 * PAUSE_SECONDS)
    file = io.BytesIO()
    options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(file, "WEBP", quality=82, method=4, **options)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
