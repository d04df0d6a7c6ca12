"""What a recipe's model is made of: each level's map, parameters and multiplications, and what a fully connected GRU would need.

    python -m jobs.describe gru-rcn
    python -m jobs.describe gru-rcn --model.bidirectional --clips.size 112

Multiplications are a clip's, in the GRUs; the fully connected GRU's parameters are those of its input matrices alone.
Nothing is trained, and no weights are read.

--json FILE holds: recipe, levels [{tap, channels, size, hidden, parameters, multiplications, fully_connected}], parameters
{trunk, grus, heads}.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from grurcn.models.cost import LevelCost, level_costs
from grurcn.models.gru_rcn import GRURCN, build_model
from grurcn.training.recipes import RECIPES, Recipe
from jobs.command import STYLE, Flat, finish, prog, readable_help, run_command


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Options of a description."""

    recipe: Annotated[Recipe, Flat]
    """What is described."""
    classes: int = 101
    """Classes that the heads tell apart."""
    json: Path | None = None
    """Write the same as JSON to this file."""


def parse(args: list[str] | None = None) -> tuple[str, Describe]:
    """The command line -> (the recipe's name, the job)."""
    recipes = {name: ((recipe.__doc__ or "").strip(), Describe(recipe=recipe())) for name, recipe in RECIPES.items()}
    args = sys.argv[1:] if args is None else args
    with readable_help():
        job = tyro.extras.overridable_config_cli(recipes, prog=prog(), description=__doc__, args=args, config=STYLE)
    return next(word for word in args if word in RECIPES), job


def main(recipe_name: str, job: Describe) -> int:
    clips = job.recipe.clips
    levels = level_costs(job.recipe.model, clips.num_frames, clips.size)
    parameters = count_parameters(job.recipe, job.classes)
    if levels:
        show(recipe_name, levels, clips.num_frames)
    counted = ", ".join(f"{part} {count:,}" for part, count in parameters.items() if count)
    finish(
        f"{recipe_name}: {sum(parameters.values()):,} parameters ({counted}) for {job.classes} classes",
        {"recipe": recipe_name, "levels": [dataclasses.asdict(level) for level in levels], "parameters": parameters},
        job.json,
    )
    return 0


def count_parameters(recipe: Recipe, classes: int) -> dict[str, int]:
    """Parameters of the trunk, the GRUs and the heads; C3D counts as a trunk with a head."""
    with torch.device("meta"):
        model = build_model(recipe.model, classes, recipe.seed, in_channels=recipe.clips.channels)
    grus = [*model.grus.parameters(), *model.reverse_grus.parameters()] if isinstance(model, GRURCN) else []
    heads = (model.heads if isinstance(model, GRURCN) else model.head).parameters()
    counts = {"GRUs": sum(p.numel() for p in grus), "heads": sum(p.numel() for p in heads)}
    return {"trunk": sum(p.numel() for p in model.parameters()) - sum(counts.values()), **counts}


def show(recipe_name: str, levels: list[LevelCost], num_frames: int) -> None:
    table = Table(title=f"{recipe_name}: GRUs over {num_frames} frames", show_footer=True)
    table.add_column("level", "all")
    for title in ("map", "channels", "hidden"):
        table.add_column(title, justify="right")
    sums = [
        sum(getattr(level, name) for level in levels) for name in ("parameters", "multiplications", "fully_connected")
    ]
    table.add_column("parameters", f"{sums[0]:,}", justify="right")
    table.add_column("multiplications", f"{sums[1]:.3e}", justify="right")
    table.add_column("fully connected GRU", f"{sums[2]:,}", justify="right")
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


if __name__ == "__main__":
    run_command(lambda: main(*parse()))
