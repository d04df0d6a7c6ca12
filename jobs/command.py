"""What every command shares: its command line, an error in one line, and its result as a line and as JSON."""

import contextlib
import io
import json
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TextIO, TypeVar, Union

import tyro

from grurcn.plugins import import_plugins
from shards.store import error_line, open_store

Options = TypeVar("Options")

# Options have short names (--workers, not --on.workers), before or after a subcommand.
STYLE = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
Flat = tyro.conf.arg(name="")  # marks a group of options whose names need no prefix
PROGRAM = "grurcn"

# What a user, a file or a machine can cause. Everything else is a fault of ours and keeps its stack trace.
EXPECTED_ERRORS = (ValueError, OSError)


@dataclass(frozen=True)
class Command(Generic[Options]):
    """A command of this package. Each module of jobs/ that is one has it under the name COMMAND."""

    options: Any  # what tyro reads from the command line: a dataclass, subcommands() or Configurations
    main: Callable[[Options], int]  # does the work and returns the exit status
    description: str | None  # the help: what the command does, with an example

    def option_type(self, args: Sequence[str]) -> Any:
        """What tyro reads."""
        return self.options.option_type(args) if isinstance(self.options, Configurations) else self.options

    def parse(self, args: Sequence[str], program: str) -> Options:
        """Reads the command line. Exits with status 0 after --help, and with status 2 after printing an error in it."""
        try:
            with wrapped_help(program):
                return tyro.cli(
                    self.option_type(args), prog=program, description=self.description, args=list(args), config=STYLE
                )
        except ValueError as error:  # a dataclass refuses its values
            fail(error, status=2)

    def run(self, args: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
        """Parses, works and ends the process. An expected error is one line on stderr and status 1.

        args: default: those of this process. program: how the user called the command, for --help and errors.
        """
        try:
            import_plugins()  # whose sources, trunks and tasks may be among the options
            sys.exit(self.main(self.parse(sys.argv[1:] if args is None else args, program or program_name())))
        except EXPECTED_ERRORS as error:
            fail(error, status=1)
        except KeyboardInterrupt as error:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            # As a shell counts: 128 and the signal's number. cluster/workers/signals.py says when it was SIGTERM.
            sys.exit(128 + getattr(error, "number", signal.SIGINT))


def subcommands(types: Mapping[str, type], default: str | None = None) -> Any:
    """{name: dataclass} -> options of a command that takes one of these names. default: what it does without a name."""
    return Union[
        *(Annotated[kind, tyro.conf.subcommand(name, is_default=name == default)] for name, kind in types.items())
    ]


@dataclass(frozen=True)
class Configurations:
    """Options of a command that takes the name of a configuration, then changes to its values.

    They are parsed as the pair (name, dataclass).
    """

    # {name: (description, dataclass)}, or what gives it when the command line is parsed: plugins may add some
    defaults: Mapping[str, tuple[str, Any]] | Callable[[], Mapping[str, tuple[str, Any]]]

    @property
    def known(self) -> Mapping[str, tuple[str, Any]]:
        return self.defaults() if callable(self.defaults) else self.defaults

    def option_type(self, args: Sequence[str]) -> Any:
        """What tyro reads. Where no name is given yet, --help lists them with the first paragraph of their descriptions."""
        known = self.known
        is_named = not known.keys().isdisjoint(args)
        return Union[
            *(
                Annotated[
                    Any,
                    tyro.conf.subcommand(
                        name,
                        constructor=named(name, default),
                        description=description if is_named else description.partition("\n\n")[0],
                    ),
                ]
                for name, (description, default) in known.items()
            )
        ]


def named(name: str, default: Any) -> Callable[..., tuple[str, Any]]:
    """A function whose parameters tyro reads as the fields of the dataclass."""

    def pair(options: Any = default) -> tuple[str, Any]:
        return name, options

    pair.__annotations__["options"] = Annotated[type(default), Flat, tyro.conf.AvoidSubcommands]
    return pair


def program_name() -> str:
    """How this process was called: "python -m jobs.train", or "python jobs/make_shards.py"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"


def fail(error: BaseException, status: int) -> NoReturn:
    """Prints an error in one line and ends the process."""
    print(f"error: {error_line(error)}", file=sys.stderr)
    sys.exit(status)


def finish(line: str, result: Mapping[str, Any], json_file: Path | None) -> None:
    """Writes the result as JSON if a file is named, and prints the last line."""
    if json_file is not None:
        with open_store(json_file.absolute().parent).written(json_file.name) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print(line, flush=True)


# Help


@contextlib.contextmanager
def wrapped_help(program: str) -> Iterator[None]:
    """Wraps what is printed in this block to the terminal's width. tyro wraps its boxes, but not the description."""
    printed = PrintedHelp(sys.stdout)
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write(wrapped(printed.getvalue(), program, shutil.get_terminal_size().columns))


class PrintedHelp(io.StringIO):
    """Collects what is printed. tyro asks it whether the terminal has colours and the characters of boxes."""

    def __init__(self, terminal: TextIO):
        super().__init__()
        self.terminal = terminal

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.terminal.encoding

    def isatty(self) -> bool:
        return self.terminal.isatty()


def wrapped(text: str, program: str, width: int) -> str:
    """Joins and wraps the lines of a paragraph, and of an entry ("name  text", indented by up to three spaces).

    Boxes, and examples (indented by four or more), are not wrapped. Examples call commands as the user called this one.
    """
    parts: list[tuple[str, int | None]] = []  # (text, indentation of its further lines; None: not wrapped)
    for line in re.sub(r"\n{3,}", "\n\n", text).splitlines():
        indent = len(line) - len(line.lstrip())
        if line.startswith("usage:"):
            parts.append((re.sub(r"\{[^} ]{60,}\}", "RECIPE", line), len("usage: ")))  # all of them are listed below
        elif not line or line.startswith(("│", "╭", "╰", "\x1b")):
            parts.append((line, None))
        elif entry := re.match(r" {0,3}\S+ {2,}(?=\S)", line):
            parts.append((line, entry.end()))
        elif parts and parts[-1][1] == indent:
            parts[-1] = (f"{parts[-1][0]} {line.lstrip()}", indent)
        elif indent >= 4:
            parts.append(
                (line.replace("python -m jobs.", f"{PROGRAM} ") if program.startswith(PROGRAM) else line, None)
            )
        else:
            parts.append((line, indent))
    return "".join(
        (part if hang is None else textwrap.fill(part, width, subsequent_indent=" " * hang, break_on_hyphens=False))
        + "\n"
        for part, hang in parts
    )
