"""Pictures of a model's results for MLflow's pages: PNGs of the confusion matrix, each class, each level, the worst mistakes.

A training draws them at each best validation, an evaluation at its end. K classes, L levels.
"""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grurcn.drawing.clip_frames import middle_clip, render_clip
from grurcn.drawing.contact_sheet import contact_sheet
from grurcn.drawing.text import FAINT, INK, Heading
from grurcn.evaluation.confusion import Confusion
from shards.index import Index
from shards.printable import printable
from shards.reading.clips import ClipConfig

BLUE, PALE, RED = "#2f6bd8", "#b8cdf2", "#b3261e"
MOST_NAMED = 120  # classes whose names fit beside a confusion matrix
MOST_COUNTED = 24  # classes whose counts fit into its cells
MOST_BARS = 60  # classes that are drawn with a bar each; of more, those with the lowest accuracy
LONGEST_NAME = 28  # letters
DOTS_PER_INCH = 110


def pictures(confusion: Confusion, index: Index, clips: ClipConfig, about: str) -> dict[str, bytes]:
    """{file name: PNG} of the results on the split of `index`. about: the model and the videos, in words.

    Raises BadShards or BadVideo if the worst mistakes' videos cannot be read.
    """
    drawn: dict[str, Callable[[], bytes]] = {
        "confusion.png": lambda: confusion_matrix(confusion, about),
        "classes.png": lambda: class_bars(confusion, about),
        "levels.png": lambda: level_bars(confusion, about),
    }
    if confusion.mistakes:
        drawn["mistakes.png"] = lambda: mistakes_sheet(confusion, index, clips, about)
    return {name: draw() for name, draw in drawn.items()}


class Painter:
    """Draws in a thread, so that nothing waits for it. Of several requests that wait, only the newest is drawn.

    A `with` block ends when that is done. Pictures that cannot be drawn are a warning.
    """

    def __init__(self, send: Callable[[str, bytes], None], print_line: Callable[[str], None]):
        """send: gets each picture's name and its PNG."""
        self.send, self.print_line = send, print_line
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="painter")
        self.last: Future[None] | None = None

    def __enter__(self) -> "Painter":
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def paint(self, draw: Callable[[], dict[str, bytes]]) -> None:
        if self.last is not None:
            self.last.cancel()  # unless it has begun
        self.last = self.thread.submit(self.run, draw)

    def run(self, draw: Callable[[], dict[str, bytes]]) -> None:
        try:
            for name, content in draw().items():
                self.send(name, content)
        except Exception as error:
            self.print_line(f"warning: pictures of the validation were not drawn: {type(error).__name__}: {error}")


def confusion_matrix(confusion: Confusion, about: str) -> bytes:
    """Rows are the videos' classes, columns the predicted ones; colours are fractions of a row."""
    counts = confusion.matrix.numpy()  # (K, K)
    fractions = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    size = len(counts)
    named = size <= MOST_NAMED
    side = float(np.clip(0.42 * size, 4, 9) if size <= MOST_COUNTED else np.clip(0.15 * size, 9, 18))
    figure = Figure(figsize=(side + 3, side + 2), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.04, label="fraction of the class's videos")
    axes.set(xlabel="predicted class", ylabel="class")
    if named:
        names = [short(name) for name in confusion.classes]
        letters = 9 if size <= MOST_COUNTED else float(np.clip(700 / size, 4, 8))
        axes.set_xticks(range(size), names, rotation=90, fontsize=letters)
        axes.set_yticks(range(size), names, fontsize=letters)
    if size <= MOST_COUNTED:
        for row, column in np.argwhere(counts).tolist():
            colour = "white" if fractions[row, column] > 0.5 else INK
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=colour)
    right = int(counts.diagonal().sum())
    axes.set_title(f"{about}\n{right:,} of {counts.sum():,} videos right", fontsize=10, loc="left")
    return png(figure)


def class_bars(confusion: Confusion, about: str) -> bytes:
    """A bar for each class, the lowest accuracy first."""
    rows = sorted(confusion.per_class().items(), key=lambda item: (item[1]["top1"], item[0]))
    left_out = len(rows) - MOST_BARS
    rows = rows[:MOST_BARS]
    figure = Figure(figsize=(8, 1.6 + 0.24 * len(rows)), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [about_class["top1"] for _, about_class in rows], color=BLUE)
    axes.set_yticks(places, [short(name) for name, _ in rows], fontsize=8)
    axes.set(xlim=(0, 1.14), ylim=(len(rows) - 0.4, -0.6), xlabel="top-1 accuracy", xticks=[0, 0.25, 0.5, 0.75, 1])
    for place, (_, about_class) in zip(places, rows, strict=True):
        text = f"{about_class['top1']:.2f} of {about_class['videos']:,}"
        axes.text(about_class["top1"] + 0.01, place, text, va="center", fontsize=7, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    note = f"; {left_out} classes with higher accuracy are not drawn" if left_out > 0 else ""
    axes.set_title(f"{about}\naccuracy of each class, the lowest first{note}", fontsize=10, loc="left")
    return png(figure)


def level_bars(confusion: Confusion, about: str) -> bytes:
    """For each level: its accuracy alone, and that of all the others without it."""
    levels = confusion.per_level()
    together = confusion.matrix.diagonal().sum().item() / confusion.videos
    figure = Figure(figsize=(max(6, 3 + 1.1 * len(levels)), 4), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    places = np.arange(len(levels))
    alone = [about_level["top1"] for about_level in levels.values()]
    axes.bar(places - 0.2, alone, 0.38, color=BLUE, label="this level alone")
    without = [about_level["top1_without"] for about_level in levels.values()]
    if len(levels) > 1:
        axes.bar(places + 0.2, without, 0.38, color=PALE, label="all the others, without it")
    axes.axhline(together, color=RED, linewidth=1.2, label=f"all levels: {together:.3f}")
    for bars, inside in zip(axes.containers, ("white", INK), strict=False):
        # A number stands in its bar, where the line of all levels does not cross it, unless the bar is too low.
        for bar, value in zip(bars, alone if inside == "white" else without, strict=True):
            colour, y = (inside, value - 0.05) if value > 0.15 else (FAINT, value + 0.015)
            axes.text(bar.get_x() + bar.get_width() / 2, y, f"{value:.2f}", ha="center", fontsize=8, color=colour)
    axes.set_xticks(places, list(levels))
    axes.set(ylim=(0, 1.08), ylabel="top-1 accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=9)
    axes.set_title(f"{about}\nwhat each level contributes", fontsize=10, loc="left")
    return png(figure)


def mistakes_sheet(confusion: Confusion, index: Index, clips: ClipConfig, about: str) -> bytes:
    """The middle clips of the worst mistakes, with the true and the predicted class."""
    rows = []
    for mistake in confusion.mistakes:
        sample = index[mistake.number]
        remarks = (
            f"predicted {confusion.classes[mistake.predicted]}: {mistake.predicted_probability:.2f}",
            f"true class: {mistake.label_probability:.2g}",
        )
        rows.append(render_clip(index, sample, middle_clip(index, sample, clips), clips, remarks))
    heading = Heading(
        title="The worst mistakes",
        lines=(
            about,
            "the middle clip of each video, as the model sees it; the least probability of the true class first",
        ),
    )
    return contact_sheet(heading, rows)


def short(name: str) -> str:
    """A class's name for an axis: cut, escaped, and without the $ of matplotlib's formulas."""
    name = "".join(map(printable, name)).replace("$", r"\$")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, pil_kwargs={"optimize": True})
    return file.getvalue()
