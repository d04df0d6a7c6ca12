"""The tables that a benchmark gives back and that this command prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]  # {column: text or number}; all rows of a table have the same columns
Tables = dict[str, list[Row]]  # {title: rows}


def print_tables(tables: Mapping[str, Sequence[Row]]) -> None:
    """Numbers are shown with three digits, on the right."""
    for title, rows in tables.items():
        table = Table(title=title)
        for column, value in rows[0].items():
            table.add_column(column, justify="left" if isinstance(value, str) else "right")
        for row in rows:
            table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=160).print(table)
