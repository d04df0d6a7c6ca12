"""What the doctor says about facts.

ok        as a run needs it
warning   a run will work, but slower, less safely, or not as long as it could
error     a run will fail, or its result will be wrong
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.doctor.facts import MachineFacts

GIB = 2**30
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    check: str
    level: Level
    text: str
    fix: str = ""  # a command where there is one, else what to do


def ok(check: str, text: str) -> Finding:
    return Finding(check=check, level="ok", text=text)


def warning(check: str, text: str, fix: str) -> Finding:
    return Finding(check=check, level="warning", text=text, fix=fix)


def error(check: str, text: str, fix: str) -> Finding:
    return Finding(check=check, level="error", text=text, fix=fix)


# Words


def names(machines: Iterable[MachineFacts]) -> str:
    return ", ".join(each.name for each in machines)


def by_value(machines_by_value: Mapping[str | None, Sequence[MachineFacts]]) -> str:
    """3.11.7 on one, two / 3.12.1 on three"""
    return " / ".join(f"{value or 'missing'} on {names(machines)}" for value, machines in machines_by_value.items())


def everywhere(machines: Sequence[MachineFacts]) -> str:
    return f" on all {len(machines)} machines" if len(machines) > 1 else ""


def size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:,.0f} MiB"


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
