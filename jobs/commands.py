"""The list of commands, and `grurcn NAME` for each of them.

    grurcn                                            lists the commands
    grurcn train gru-rcn-small --shards data/mine     the same as: python -m jobs.train gru-rcn-small --shards data/mine
    grurcn --print-completion bash                    prints what completes their names and options in a shell

Only the standard library is imported until a command is run, so that the list appears at once.
"""

import difflib
import io
import re
import shutil
import sys
import textwrap
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jobs.command import Command

COMMANDS = {
    "First steps": {
        "demo": "Run everything once on synthetic videos, in a few minutes",
        "doctor": "Check this machine or a Ray cluster before a run",
    },
    "Data": {
        "make_shards": "Pack videos into WebDataset shards",
        "inspect_shards": "Look into shards, verify them, index tars made by others",
    },
    "Training": {
        "train": "Train a recipe, or resume its run",
        "evaluate": "Evaluate a model on a split",
        "fuse": "Combine evaluations of the same videos, such as RGB and flow",
        "sync_mlflow": "Send MLflow what it missed while its server was away",
    },
    "Trained models": {
        "predict": "Classify or caption videos",
        "export": "Write a model as a PyTorch program or as ONNX",
    },
    "Captioning": {
        "encode": "Compute the encoder's vectors of all videos once",
        "caption": "Caption a split and score the captions",
    },
    "Planning": {
        "describe": "Show a recipe's layers, parameters and multiplications",
        "sizing": "Estimate the time, cost and machines that a training takes",
        "bench": "Measure speed and memory",
    },
    "The paper": {
        "table1": "Reproduce Table 1: classification on UCF-101",
        "table2": "Reproduce Table 2: captioning on MSVD",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]
SHELLS = ("bash", "zsh", "fish")


def main() -> None:
    """Runs what the command line names."""
    program = "python -m jobs" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name
    match sys.argv[1:]:
        case [] | ["-h" | "--help", *_]:
            print(listing(program, shutil.get_terminal_size().columns))
        case ["--print-completion", shell] if shell in SHELLS:
            print_completion(program, shell)
        case ["--print-completion", *_]:
            refuse(f"--print-completion takes one of {', '.join(SHELLS)}")
        case [name, *args]:
            name = name.replace("-", "_")
            if name not in NAMES:
                refuse(f"{name}: no such command; {nearest(name)}{program} lists all commands")
            load(name).run(args, f"{program} {name}")


def refuse(reason: str) -> NoReturn:
    """Ends with the status of an error in the command line."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def listing(program: str, width: int) -> str:
    """The commands, each with a line about it."""
    column = max(map(len, NAMES)) + 4
    lines = [f"usage: {program} COMMAND [OPTIONS]", f"       {program} COMMAND --help"]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:"]
        for name, about in commands.items():
            lines += textwrap.wrap(
                about, width, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column
            )
    return "\n".join(lines)


def nearest(name: str) -> str:
    """A hint at the commands whose names are similar."""
    names = difflib.get_close_matches(name, NAMES, cutoff=0.5)
    return f"did you mean {' or '.join(names)}? " if names else ""


def load(name: str) -> "Command[Any]":
    """Imports a command."""
    module = import_module(f"jobs.{name}")
    if hasattr(module, "__path__"):  # a package
        module = import_module(f"jobs.{name}.__main__")
    return module.COMMAND


def print_completion(program: str, shell: str) -> None:
    """Prints a script that completes the commands' names and options. tyro writes it."""
    from typing import Annotated, Union

    import tyro

    from jobs.command import STYLE

    options: Any = Union[
        *(Annotated[Any, tyro.conf.subcommand(name, constructor=load(name).option_type([]))] for name in NAMES)
    ]
    script = io.StringIO()
    with redirect_stdout(script), suppress(SystemExit):
        tyro.cli(options, prog=program, args=["--tyro-write-completion", shell, "-"], config=STYLE)
    # A description of several lines would be taken for several words.
    print(
        re.sub(
            r"^COMPLETION_SPEC = .*", lambda spec: spec[0].replace("\\n", " "), script.getvalue(), flags=re.MULTILINE
        )
    )
