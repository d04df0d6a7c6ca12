"""What every job does alike: its command line, one line for bad input, one line and JSON for what came out."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
        return tyro.cli(job, prog=f"{prog()} {subcommand}".rstrip(), description=description, args=args, config=STYLE)
    except ValueError as error:  # a dataclass that refuses its values
        fail(error, status=2)
        raise


def prog() -> str:
    """The command as people type it."""
    return f"python -m jobs.{Path(sys.argv[0]).stem}"


def run_command(main: Callable[[], int]) -> None:
    """Runs a job: its exit status is the process's; expected errors are one line on stderr and status 1."""
    try:
        sys.exit(main())
    except EXPECTED as error:
        fail(error, status=1)
    except KeyboardInterrupt as error:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))  # as a shell says it; SIGTERM's from cluster/launch.py


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
