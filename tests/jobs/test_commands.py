"""`grurcn` and `python -m jobs`: the list of commands, running one, and completing its words."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.command import Command, Configurations, finish, wrapped
from jobs.commands import COMMANDS, NAMES, listing

ROOT = Path(__file__).parents[2]
SLOW_PACKAGES = ("torch", "ray", "tyro", "numpy")


def run(*words: str, module: str = "jobs", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, env={**os.environ, "COLUMNS": "80", **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_command_is_listed_in_a_line():
    modules = {path.stem for path in (ROOT / "jobs").glob("*.py") if "\nCOMMAND = " in path.read_text()}
    packages = {path.parent.name for path in (ROOT / "jobs").glob("*/__main__.py")}
    assert set(NAMES) == modules | packages
    lines = listing("grurcn", 80).splitlines()
    for group in COMMANDS.values():
        for name, about in group.items():
            assert f"  {name}".ljust(18) + about in lines


def test_the_list_needs_no_package():
    script = f"import sys\nfor name in {SLOW_PACKAGES}: sys.modules[name] = None\n"
    script += "sys.argv = ['bin/grurcn', '--help']\nfrom jobs.commands import main\nmain()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: grurcn COMMAND")


def test_a_command_that_does_not_exist_is_one_line_with_the_nearest():
    done = run("trian")
    assert done.returncode == 2
    assert done.stderr == "error: trian: no such command; did you mean train? python -m jobs lists all commands\n"


def test_the_console_script_is_this_list():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"grurcn": "jobs.commands:main"}


@pytest.mark.parametrize(
    ("program", "module", "words"),
    [
        ("python -m jobs fuse", "jobs", ["fuse"]),
        ("python -m jobs.fuse", "jobs.fuse", []),
        ("python -m jobs inspect_shards", "jobs", ["inspect-shards"]),
    ],
)
def test_help_names_the_program_as_it_was_called(program, module, words):
    done = run(*words, "--help", module=module)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {program} [-h]")


def test_examples_of_the_console_script_are_typed_as_it_is():
    script = "import sys; sys.argv = ['bin/grurcn', 'fuse', '--help']; from jobs.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: grurcn fuse [-h]")
    assert "\n    grurcn fuse " in done.stdout
    assert "python -m" not in done.stdout


def test_prose_and_entries_of_help_are_wrapped_and_boxes_and_examples_are_not():
    text = """usage: python -m jobs.fuse [-h] [OPTIONS]

Fuse evaluations of
(the same) videos.

    python -m jobs.fuse --scores A B --weights 1 2

FILE holds:
  one   a, b, c, d, e
        f
  two   g

│ --scores STR ... │
"""
    assert wrapped(text, "grurcn fuse", 20).splitlines() == [
        "usage: python -m",
        "       jobs.fuse",
        "       [-h]",
        "       [OPTIONS]",
        "",
        "Fuse evaluations of",
        "(the same) videos.",
        "",
        "    grurcn fuse --scores A B --weights 1 2",
        "",
        "FILE holds:",
        "  one   a, b, c, d,",
        "        e f",
        "  two   g",
        "",
        "│ --scores STR ... │",
    ]


@dataclass(frozen=True, kw_only=True)
class Add:
    """Options of a command."""

    number: int = 1
    """A number."""
    json: Path | None = None
    """Write the result to this file."""


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("a.mp4: no video"), 1, "error: a.mp4: no video\n"),
        (FileNotFoundError(2, "No such file or directory", "a.mp4"), 1, "error: a.mp4: No such file or directory\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
    ],
)
def test_an_expected_error_is_one_line_and_a_status(error, status, printed, capsys):
    def fails(job: Add) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        Command(Add, fails, "Adds.").run([], "add")
    assert ended.value.code == status
    assert capsys.readouterr().err == printed


def test_a_fault_of_ours_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        Command(Add, lambda job: 1 // 0, "Adds.").run([], "add")


def test_the_result_is_a_line_and_json(tmp_path, capsys):
    def add(job: Add) -> int:
        finish(f"one more is {job.number + 1}", {"sum": job.number + 1}, job.json)
        return 3

    with pytest.raises(SystemExit) as ended:
        Command(Add, add, "Adds.").run(["--number", "2", "--json", str(tmp_path / "new" / "sum.json")], "add")
    assert ended.value.code == 3
    assert capsys.readouterr().out == "one more is 3\n"
    assert json.loads((tmp_path / "new" / "sum.json").read_text()) == {"sum": 3}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sum.json"]


def test_configurations_are_a_name_and_options_with_changes():
    options = Configurations({"small": ("Small.", Add(number=2)), "large": ("Large.", Add(number=9))})
    command = Command[tuple[str, Add]](options, lambda chosen: 0, "Adds.")
    assert command.parse(["large"], "add") == ("large", Add(number=9))
    assert command.parse(["small", "--number", "3"], "add") == ("small", Add(number=3))


@pytest.fixture(scope="module")
def completion(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "grurcn"
    script = "import sys; sys.argv = ['grurcn', '--print-completion', 'bash']; from jobs.commands import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["tr"], {"train"}),
        (["train", "gru-rcn-s"], {"gru-rcn-small", "gru-rcn-stacked"}),
        (["train", "gru-rcn", "--optim.lea"], {"--optim.learning-rate"}),
        (["inspect_shards", "verify", "--qui"], {"--quick"}),
        (["export", "--mod"], {"--model"}),
    ],
)
def test_a_shell_completes_commands_and_their_options(typed, completed, completion):
    words = ["grurcn", *typed]
    script = f"source {completion}\nCOMP_WORDS=({' '.join(words)})\nCOMP_CWORD={len(typed)}\n"
    script += "$(complete -p grurcn | sed 's/.*-F \\([^ ]*\\).*/\\1/')\nprintf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert {word.strip() for word in done.stdout.split()} == completed, done.stderr
