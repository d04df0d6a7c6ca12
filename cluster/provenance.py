"""What made a run: the code's commit."""

import os
import subprocess
from pathlib import Path


def git_commit(folder: Path) -> str:
    """The commit of the code that runs, with "+changes" if it has any.

    Code that was uploaded by `ray job submit` is no clone: GRURCN_COMMIT tells its commit, else it is "unknown".
    """
    if "GRURCN_COMMIT" in os.environ:
        return os.environ["GRURCN_COMMIT"]
    try:
        commit = git(folder, "rev-parse", "HEAD")
        return f"{commit}+changes" if git(folder, "status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
