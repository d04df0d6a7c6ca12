"""Adds to docs/commands.md, while the site is built, the help of every command as the command itself prints it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = "commands.md"
COLUMNS = 80
# Commands that take a second word have their options below it.
SECOND_WORDS = {
    "train": ["gru-rcn-small", "caption-small"],
    "make_shards": ["folder", "csv", "ucf101", "hmdb51", "kinetics", "msvd"],
    "inspect_shards": ["info", "verify", "preview", "index"],
    "bench": ["model", "order", "read", "pack", "train"],
}


def on_page_markdown(markdown: str, page, **_) -> str:
    """Called by MkDocs for each page."""
    if page.file.src_uri != PAGE:
        return markdown
    sys.path.insert(0, str(ROOT))
    from jobs.commands import NAMES

    calls = [call for name in NAMES for call in [(name,), *((name, word) for word in SECOND_WORDS.get(name, []))]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pages = list(pool.map(help_of, calls))
    return markdown + "".join(
        f"\n{'##' if len(call) == 1 else '###'} {' '.join(call)}\n\n```text\n{text}\n```\n"
        for call, text in zip(calls, pages, strict=True)
    )


def help_of(call: tuple[str, ...]) -> str:
    """What `grurcn CALL --help` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *call, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(call)} --help: {done.stderr[-500:]}")
    return done.stdout.strip().replace("python -m jobs.", "grurcn ").replace("python -m jobs", "grurcn")
