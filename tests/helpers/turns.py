"""Which of the tests that take minutes run now: `pytest -m "long or multihost" --turn`, as .ci/run calls it.

All of them together take longer than a change should wait. So a commit runs

1. those whose subject it changes: the files named by the marker's `of`, or the test's own file,
2. a third of the others, chosen by the commit,

until their minutes, as the markers give them (`@pytest.mark.long(minutes=3, of="shards/store.py")`), use up --minutes. What is
left out is counted in the last lines; `make test-all` runs everything.
"""

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THIRDS = 3
MINUTES = 12.0  # beside which lint, the demo and `make test` have room in 45 minutes
MARKERS = ("long", "multihost")
HOURS_OF_A_CHANGE = 6  # commits so close together are one change


@dataclass(frozen=True, kw_only=True)
class LongTest:
    """A test that takes minutes."""

    name: str
    minutes: float
    subjects: tuple[str, ...]  # path prefixes below the repository
    file: str = ""

    def is_touched(self, changed: Iterable[str]) -> bool:
        return any(path == self.file or path.startswith(self.subjects) for path in changed)


def choose(tests: Sequence[LongTest], turn: int, changed: Sequence[str], minutes: float) -> list[LongTest]:
    """The tests of a turn, the touched ones first; at least one, and beyond that no more than fit into `minutes`."""
    parts = [rotated(part, turn // THIRDS) for part in thirds(tests)]
    ordered = [test for number in range(THIRDS) for test in parts[(turn + number) % THIRDS]]
    touched = [test for test in ordered if test.is_touched(changed)]
    others = [test for test in parts[turn % THIRDS] if test not in touched]
    chosen: list[LongTest] = []
    for test in touched + others:
        if not chosen or sum(each.minutes for each in chosen) + test.minutes <= minutes:
            chosen.append(test)
    return chosen


def thirds(tests: Sequence[LongTest]) -> list[list[LongTest]]:
    """Three parts of about the same minutes, each test in one of them; they depend on nothing but the tests."""
    parts: list[list[LongTest]] = [[] for _ in range(THIRDS)]
    for test in sorted(tests, key=lambda test: (-test.minutes, test.name)):
        min(parts, key=lambda part: sum(each.minutes for each in part)).append(test)
    return parts


def rotated(part: Sequence[LongTest], places: int) -> list[LongTest]:
    """By name, begun at another place each time: where not all fit, each has its turn."""
    ordered = sorted(part, key=lambda test: test.name)
    start = places % len(ordered) if ordered else 0
    return ordered[start:] + ordered[:start]


def turn_of_commit() -> int:
    """A number that differs from commit to commit; or GRURCN_TURN, to run another turn."""
    if "GRURCN_TURN" in os.environ:
        return int(os.environ["GRURCN_TURN"])
    return int(git("rev-parse", "HEAD")[:8] or "0", 16)


def changed_files() -> list[str]:
    """The files that the change at HEAD touches: since GRURCN_BASE, or else since the last commit that is hours older."""
    base = os.environ.get("GRURCN_BASE")
    if not base:
        newest = int(git("log", "-1", "--format=%ct") or "0")
        base = git("rev-list", "-1", f"--before={newest - 3600 * HOURS_OF_A_CHANGE}", "HEAD")
    return git("diff", "--name-only", base, "HEAD").splitlines() if base else []


def git(*arguments: str) -> str:
    """What a git command prints; nothing where this is no clone."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


# The hooks of pytest, called by conftest.py


def add_options(parser: pytest.Parser) -> None:
    parser.addoption(
        "--turn", action="store_true", help="of the selected tests, run this commit's turn (tests/helpers/turns.py)"
    )
    parser.addoption("--minutes", type=float, default=MINUTES, help="what a turn may take, by the tests' own estimates")


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the items of this commit's turn; to be called after -m has had its say."""
    if not config.getoption("--turn"):
        return
    tests = {item.nodeid: describe(item) for item in items}
    changed = changed_files()
    turn = choose(list(tests.values()), turn_of_commit(), changed, float(str(config.getoption("--minutes"))))
    chosen = {test.name for test in turn}
    dropped = [item for item in items if item.nodeid not in chosen]
    touched = sum(tests[item.nodeid].is_touched(changed) for item in dropped)
    config.stash[LEFT_OUT] = (
        f"{len(dropped)} of {len(items)} tests that take minutes are left to other turns, {touched} of them about files that "
        "this change touches; make test-all runs everything"
    )
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item.nodeid in chosen]


LEFT_OUT = pytest.StashKey[str]()


def describe(item: pytest.Item) -> LongTest:
    markers = [marker for name in MARKERS for marker in item.iter_markers(name)]
    file = item.path.relative_to(ROOT).as_posix()
    return LongTest(
        name=item.nodeid,
        minutes=next((marker.kwargs["minutes"] for marker in markers if "minutes" in marker.kwargs), 1.0),
        subjects=tuple(
            next((marker.kwargs["of"] for marker in markers if "of" in marker.kwargs), subject(file)).split()
        ),
        file=file,
    )


def subject(file: str) -> str:
    """The product's file that a test's file is about by its place: tests/cluster/test_engine.py -> cluster/engine.py."""
    return file.removeprefix("tests/").replace("test_", "")
