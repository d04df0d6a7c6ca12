"""Commands, options, files and links that the documentation names, read from Markdown and docstrings."""

import ast
import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jobs.commands import NAMES, load

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
COMMAND_NAMES = tuple(NAMES)

# Placeholders of the documentation where a command accepts only certain words.
PLACEHOLDERS = {"N": "1", "RECIPE": "gru-rcn", "$s": "0"}
LEFT_OUT = ("...", "options")  # stand for more words
ENDS = "|><;&"  # characters that end a command in a shell
A_COMMAND = re.compile(r"(?:python -m jobs\.|(?:^|(?<=-- ))grurcn )([a-z]\w*)", re.MULTILINE)
WHAT_FOLLOWS = re.compile(r"\s{3,}\S.*")  # a remark beside a command


@dataclass(frozen=True)
class Block:
    """A block of code in a page."""

    text: str
    line: int  # its first, counted from 1
    mark: str = ""  # the HTML comment in the line above it


@dataclass(frozen=True)
class Typed:
    """A command line, as it is documented."""

    where: str  # file:line
    command: str
    text: str  # what follows the command's name


# Reading


def blocks(page: str) -> list[Block]:
    """The blocks of code of a Markdown page, fenced or indented by four spaces, without their indentation."""
    found: list[Block] = []
    lines = [*page.splitlines(), ""]
    start, fence, mark = None, "", ""
    for number, line in enumerate(lines):
        if fence:
            if line.strip() == fence:
                assert start is not None
                found.append(Block(textwrap.dedent("\n".join(lines[start:number])), start + 1, mark))
                start, fence, mark = None, "", ""
        elif start is None and line.lstrip().startswith("```"):
            start, fence = number + 1, "```"
        elif start is None and line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            start = number
        elif start is not None and line.strip() and not line.startswith("    "):
            found.append(Block(textwrap.dedent("\n".join(lines[start:number])).strip("\n"), start + 1, mark))
            start, mark = None, ""
        if start is None and line.strip():
            comment = re.fullmatch(r"<!-- (.+) -->", line.strip())
            mark = comment[1] if comment else ""
    if start is not None:
        found.append(Block(textwrap.dedent("\n".join(lines[start:])).strip("\n"), start + 1, mark))
    return found


def prose(page: str) -> str:
    """A Markdown page without its blocks of code, line for line."""
    lines = page.splitlines()
    for block in blocks(page):
        for number in range(block.line - 1, min(len(lines), block.line + block.text.count("\n"))):
            lines[number] = ""
    return "\n".join("" if line.lstrip().startswith("```") else line for line in lines)


def spans(page: str) -> list[str]:
    """What stands between backticks in a page's prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def command_lines(code: str) -> Iterator[tuple[int, str]]:
    """(line counted from 0, text) of each line of a shell; those that go on behind a backslash are one."""
    lines = code.splitlines()
    number = 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = line[:-1].rstrip() + " " + lines[number].strip()
        yield first, line
        number += 1


def typed_in(code: str, where: str, first_line: int) -> list[Typed]:
    """The commands that are called in a block of code."""
    return [
        Typed(f"{where}:{first_line + number}", found[1], line[found.end() :])
        for number, line in command_lines(code)
        for found in A_COMMAND.finditer(line)
    ]


def documented_commands() -> list[Typed]:
    """All command lines in the pages' blocks of code and in the docstrings of jobs/; each text once."""
    found = []
    for path in PAGES:
        for block in blocks(path.read_text()):
            found += typed_in(block.text, path.relative_to(ROOT).as_posix(), block.line)
    for path in sorted((ROOT / "jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
                line = node.body[0].lineno
                for block in blocks(doc):
                    found += typed_in(block.text, path.relative_to(ROOT).as_posix(), line + block.line - 1)
    return list({(each.command, each.text): each for each in reversed(found)}.values())[::-1]


def words_of(text: str) -> list[str]:
    """What a shell would pass to the command: without comments, remarks and what follows the command, placeholders filled in."""
    text = WHAT_FOLLOWS.sub("", text).replace("[", "").replace("]", "")
    shell = shlex.shlex(text, posix=True, punctuation_chars=ENDS)
    shell.whitespace_split = True
    command = itertools.takewhile(lambda word: word[0] not in ENDS, shell)
    return [PLACEHOLDERS.get(word, word) for word in command if word not in LEFT_OUT]


# The commands' own command lines


class StaleCommand(ValueError):
    """A documented command that this package does not accept."""


def parse(name: str, words: Sequence[str]) -> Any:
    """The options that a command reads from these words. Nothing runs.

    Raises StaleCommand, with what the command printed, if it does not accept them.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return load(name).parse(words, f"python -m jobs.{name}")
    except SystemExit as exit:
        if not exit.code:
            return None  # --help
        raise StaleCommand(
            f"python -m jobs.{name} {shlex.join(words)}: status {exit.code}\n{printed.getvalue()}"
        ) from None


@cache
def help_of(name: str, *words: str, columns: int = 110) -> str:
    """What `--help` prints on a terminal of this width. Raises AssertionError if it does not end with status 0."""
    printed, status = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
        None,
    )  # a terminal that has the characters of boxes
    with contextlib.redirect_stdout(printed), patch.dict(os.environ, COLUMNS=str(columns)):
        try:
            load(name).parse([*words, "--help"], f"python -m jobs.{name}")
        except SystemExit as exit:
            status = exit.code
    printed.seek(0)
    text = printed.read()
    assert status == 0, f"python -m jobs.{name} {shlex.join(words)} --help: status {status}\n{text}"
    return text


SUBCOMMANDS = {  # recipes whose options differ
    "train": ("gru-rcn", "caption"),
    "describe": ("gru-rcn",),
    "sizing": ("gru-rcn",),
}


def help_pages(name: str) -> Iterator[tuple[str, ...]]:
    """The words in front of --help: none, and each subcommand."""
    yield ()
    yield from ((each,) for each in SUBCOMMANDS.get(name) or re.findall(r"^│\s+• (\S+)", help_of(name), re.MULTILINE))


@cache
def all_options() -> frozenset[str]:
    """Every option of every command."""
    found: set[str] = {"--help", "--print-completion"}
    for name in COMMAND_NAMES:
        for words in help_pages(name):
            for line in help_of(name, *words).splitlines():
                if line.startswith("│ --"):
                    found |= set(re.findall(r"--[a-z][\w.-]*", line.split("  ")[0]))
    return frozenset(found)


# Pages of Markdown


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


# Typing


@dataclass
class Terminal:
    """A folder in which blocks of commands run one after the other, and servers in the background."""

    folder: Path
    ports: Mapping[str, int] = field(default_factory=dict)  # documented port -> a free one, as others use this machine
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / ".venv").symlink_to(sys.prefix)  # as `make venv` makes it

    def type(self, code: str, timeout_seconds: float = 240) -> str:
        """Runs a block and returns its output. Raises AssertionError, with the output, if a command fails."""
        code = self.here(code)
        done = subprocess.run(
            self.shell(code), cwd=self.folder, env=self.environment(), capture_output=True, text=True,
            timeout=timeout_seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\nstatus {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def serve(self, code: str, url: str, timeout_seconds: float = 120) -> None:
        """Starts a block in the background, and waits until the URL answers."""
        log = self.folder / f".server-{len(self.servers)}.log"
        with log.open("wb") as file:
            server = subprocess.Popen(
                self.shell(self.here(code)), cwd=self.folder, env=self.environment(), stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.servers.append(server)
        until = time.monotonic() + timeout_seconds
        while time.monotonic() < until and server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.here(url), timeout=5):
                return
            time.sleep(0.3)
        raise AssertionError(f"{code}\ndid not answer at {url}\n{log.read_text()[-3000:]}")

    def here(self, code: str) -> str:
        """The block with free ports."""
        return re.sub(r"\b\d+\b", lambda found: str(self.ports.get(found[0], found[0])), code)

    def shell(self, code: str) -> list[str]:
        return ["bash", "-c", f"set -euo pipefail\nsource .venv/bin/activate\n{code}"]

    def environment(self) -> dict[str, str]:
        """Without the settings of the tests' own process, but with a Ray of its own."""
        ours = ("MLFLOW_", "GRURCN_", "COLUMNS", "PYTHONPATH")
        return {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def close(self) -> None:
        """Ends the servers and their children."""
        for server in self.servers:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(10)
