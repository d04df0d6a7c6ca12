"""What the reproductions of the paper's tables share: changes to recipes, what is already done, and the files of a table."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from cluster.checkpoints.run_folder import read_json, write_json
from grurcn.evaluation.score_files import RESULT_FILE
from shards.store import open_store

PrintLine = Callable[[str], None]
BLUE, DARK, YELLOW, RED = "#4c78a8", "#1b3a5c", "#f2b134", "#e45756"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Values that replace those of the recipes. Default: each recipe's own."""

    global_batch: int | None = None
    """Videos, or pairs of a video and a caption, in one step."""
    num_steps: int | None = None
    """Maximum number of steps."""
    val_every: int | None = None
    """Validate every N steps."""
    patience: int | None = None
    """Stop after N validations without an improvement; 0 never stops early."""
    learning_rate: float | None = None
    """Highest learning rate."""
    schedule: Literal["constant", "cosine", "steps"] | None = None
    """Learning rate after the warm-up."""
    dropout: float | None = None
    """Fraction that training drops: of each pooled state, or of each state of the decoder and each output layer's input."""

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named values that are set."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper with our numbers. FOLDER/NAME.json, NAME.md and NAME.png hold it."""

    name: str
    folder: Path
    settings: dict[str, Any]  # what was run, as JSON
    rows: Sequence[Any]  # dataclasses
    num_done: int  # rows with a number
    markdown: str

    def to_dict(self) -> dict[str, Any]:
        """As NAME.json and --json hold it."""
        return {**self.settings, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def write(self, figure: Figure) -> "PaperTable":
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(open_store(self.folder), f"{self.name}.json", self.to_dict())
        (self.folder / f"{self.name}.md").write_text(self.markdown, encoding="utf-8")
        figure.savefig(self.folder / f"{self.name}.png", dpi=120)
        return self


def read_current_result(folder: Path, best_step: int) -> dict[str, Any] | None:
    """The result.json of an earlier evaluation of a run's best model, or None."""
    result = read_json(open_store(folder), RESULT_FILE)
    return result if result is not None and result["step"] == best_step else None


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *others = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([first, "|---" * len(head) + "|\n", *others])


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Our number as a bar, the paper's as a line across it."""

    ours: float
    paper: float
    deviation: float = 0.0  # of several runs
    runs: Sequence[float] = ()  # drawn as dots


def draw_bars(
    names: Sequence[str], panels: Mapping[str, Sequence[Bar]], legend: tuple[str, str], width: float
) -> Figure:
    """Panels side by side, by title, with a bar for each name from the top. legend: of our numbers, of the paper's."""
    figure = Figure(figsize=(width, 1.6 + 0.6 * len(names)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=True):
        for place, bar in enumerate(bars):
            ours, paper = legend if not place else ("", "")
            error = bar.deviation or None
            axes.barh(place, bar.ours, xerr=error, height=0.6, color=BLUE, ecolor=DARK, capsize=4, label=ours)
            axes.plot(bar.runs, [place] * len(bar.runs), "o", color=YELLOW, markeredgecolor="black", markersize=4.7)
            axes.plot([bar.paper] * 2, [place - 0.4, place + 0.4], color=RED, linewidth=3, label=paper)
        axes.set_title(title)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
