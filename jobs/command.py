"""What every job does alike: its command line, one line for bad input, one line and JSON for what came out."""

import contextlib
import io
import json
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

import tyro

T = TypeVar("T")

# Options have short names (--workers, not --on.workers), before or after a subcommand.
STYLE = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
Flat = tyro.conf.arg(name="")  # marks a group of options whose names need no prefix

# What a user, a file or a machine can cause. Everything else is a fault of ours and keeps its stack trace.
EXPECTED = (ValueError, OSError)


def command_line(
    job: Callable[..., T] | type[T], description: str, args: list[str] | None = None, subcommand: str = ""
) -> T:
    """Parses the command line into the job's dataclass. Exits with status 2 and one message if that cannot be."""
    try:
        with readable_help():
            return tyro.cli(
                job, prog=f"{prog()} {subcommand}".rstrip(), description=description, args=args, config=STYLE
            )
    except ValueError as error:  # a dataclass that refuses its values
        fail(error, status=2)
        raise


@contextlib.contextmanager
def readable_help() -> Iterator[None]:
    """Within it a command line is parsed: the lines of its --help end where the terminal does, also outside of tyro's boxes."""
    said = Said(sys.stdout)
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        sys.stdout.write(broken(said.getvalue(), shutil.get_terminal_size().columns))


class Said(io.StringIO):
    """What is printed, for a terminal: tyro asks whether it has colours and the characters of boxes."""

    def __init__(self, terminal: TextIO):
        super().__init__()
        self.terminal = terminal

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.terminal.encoding

    def isatty(self) -> bool:
        return self.terminal.isatty()


def broken(text: str, width: int) -> str:
    """Long lines of prose broken between words, one empty line for several; examples (indented by four) stay as they are."""
    lines = []
    for line in re.sub(r"\n{3,}", "\n\n", text).splitlines(keepends=True):
        if line.startswith("usage:"):
            line = re.sub(r"\{[^} ]{60,}\}", "RECIPE", line)  # all of them are named below
        if len(line) > width and not line.startswith(("    ", "│", "╭", "╰", "\x1b")):
            indent = " " * (len(line) - len(line.lstrip()))
            line = textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) + "\n"
        lines.append(line)
    return "".join(lines)


def prog() -> str:
    """The command as people type it."""
    place = Path(sys.argv[0])
    return f"python -m jobs.{place.parent.name if place.stem == '__main__' else place.stem}"


def run_command(main: Callable[[], int]) -> None:
    """Runs a job: its exit status is the process's; expected errors are one line on stderr and status 1."""
    try:
        sys.exit(main())
    except EXPECTED as error:
        fail(error, status=1)
    except KeyboardInterrupt as error:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(
            128 + getattr(error, "number", signal.SIGINT)
        )  # as a shell says it; SIGTERM's from cluster/workers/signals.py


def fail(error: BaseException, status: int) -> None:
    print(f"error: {message(error)}", file=sys.stderr)
    sys.exit(status)


def message(error: BaseException) -> str:
    """An error in words; an operating system's with the file it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def finish(line: str, result: dict[str, Any], json_file: Path | None) -> None:
    """The last line for people and, if wanted, the same for programs."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        partial = json_file.with_name(f".{json_file.name}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(json_file)
    print(line, flush=True)
