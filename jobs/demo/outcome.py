"""What a demo gives back."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The scores of a demo, and how to show them."""

    scores: Any  # a dataclass
    has_learned: bool  # GRU-RCN names the motion, and single frames do not
    table: Table
    examples: tuple[str, ...] = ()  # lines of text
