"""Print a recipe's model: each level's map, parameters and multiplications, and what a fully connected GRU would need.

    python -m jobs.describe gru-rcn
    python -m jobs.describe gru-rcn --model.bidirectional --clips.size 112

Multiplications are those of the GRUs for one clip. Of a fully connected GRU, only the input matrices' parameters are counted.
Nothing is trained, and no weights are read.

--json FILE holds: recipe, levels [{tap, channels, size, hidden, parameters, multiplications, fully_connected}], parameters
{trunk, grus, heads}.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table

from grurcn.models.summary import LevelSummary, summarize
from grurcn.training.recipes import RECIPES, Recipe
from jobs.command import Command, Configurations, Flat, finish


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Options of the summary."""

    recipe: Annotated[Recipe, Flat]
    """Recipe of the model."""
    classes: int = 101
    """Number of classes."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(recipe_name: str, job: Describe) -> int:
    clips = job.recipe.clips
    model = summarize(job.recipe.model, job.classes, clips.num_frames, clips.size, clips.channels)
    if model.levels:
        print_levels(f"{recipe_name}: GRUs over {clips.num_frames} frames", model.levels)
    parameters = dataclasses.asdict(model.parameters)
    parts = ", ".join(f"{part} {count:,}" for part, count in parameters.items() if count)
    finish(
        f"{recipe_name}: {model.parameters.total:,} parameters ({parts}) for {job.classes} classes",
        {
            "recipe": recipe_name,
            "levels": [dataclasses.asdict(level) for level in model.levels],
            "parameters": parameters,
        },
        job.json,
    )
    return 0


def print_levels(title: str, levels: Sequence[LevelSummary]) -> None:
    table = Table(title=title, show_footer=True)
    table.add_column("level", "all")
    for name in ("map", "channels", "hidden"):
        table.add_column(name, justify="right")
    table.add_column("parameters", f"{sum(level.parameters for level in levels):,}", justify="right")
    table.add_column("multiplications", f"{sum(level.multiplications for level in levels):.3e}", justify="right")
    table.add_column("fully connected GRU", f"{sum(level.fully_connected for level in levels):,}", justify="right")
    for level in levels:
        table.add_row(
            level.tap,
            f"{level.size} x {level.size}",
            str(level.channels),
            str(level.hidden),
            f"{level.parameters:,}",
            f"{level.multiplications:.3e}",
            f"{level.fully_connected:,}",
        )
    Console(width=110).print(table)


COMMAND = Command[tuple[str, Describe]](
    Configurations(
        {name: ((recipe.__doc__ or "").strip(), Describe(recipe=recipe())) for name, recipe in RECIPES.items()}
    ),
    lambda chosen: main(*chosen),
    __doc__,
)

if __name__ == "__main__":
    COMMAND.run()
