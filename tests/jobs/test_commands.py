"""`grurcn` and `python -m jobs`: the list of commands, running one, and completing its words."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS, NAMES, listing
from jobs.command import wrapped

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
    script += "sys.argv = ['bin/grurcn', '--help']\nfrom jobs.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: grurcn COMMAND")


def test_a_command_that_does_not_exist_is_one_line_with_the_nearest():
    done = run("trian")
    assert done.returncode == 1
    assert done.stderr == "error: trian: no such command; did you mean train? python -m jobs lists all commands\n"


def test_the_console_script_is_this_list():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"grurcn": "jobs.__main__:main"}


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
    script = "import sys; sys.argv = ['bin/grurcn', 'fuse', '--help']; from jobs.__main__ import main; main()"
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


@pytest.fixture(scope="module")
def completion(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "grurcn"
    script = "import sys; sys.argv = ['grurcn', '--print-completion', 'bash']; from jobs.__main__ import main; main()"
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
