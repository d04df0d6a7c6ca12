"""What made a run: the command, the code, the packages, the machine. Secrets of the environment are never among it."""

import getpass
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_USER

from shards.store.credentials import is_secret

SHORTEST_SECRET = 6  # letters; shorter values stand everywhere
IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+@")  # user:password@
LONGEST_DIFF = 500_000  # characters


def masked(text: str) -> str:
    """The text without the values of the environment's secrets, and without what stands before @ in URLs."""
    secrets = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return IN_URL.sub("***@", text)


def command() -> str:
    """The command line of this process, as it can be typed again."""
    return masked(shlex.join([*program().split(), *sys.argv[1:]]))


def program() -> str:
    """The command of this process without its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def user() -> str:
    """Who runs this, by the name of the system's account."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in containers
        return str(os.getuid())


def provenance_tags(code: Path) -> dict[str, str]:
    """The tags of an MLflow run by which its pages show the command, the user and the commit. code: the repository's folder."""
    commit = git_commit(code)
    return {
        "git_commit": commit,
        MLFLOW_GIT_COMMIT: commit.partition("+")[0],
        "command": command(),
        MLFLOW_SOURCE_NAME: program(),
        MLFLOW_SOURCE_TYPE: "JOB" if "RAY_JOB_ID" in os.environ else "LOCAL",
        MLFLOW_USER: user(),
    }


def git_commit(folder: Path) -> str:
    """The commit of the code that runs, with "+changes" if it has any.

    Code that was uploaded by `ray job submit` is no clone: GRURCN_COMMIT names its commit; without it, it is "unknown".
    """
    if "GRURCN_COMMIT" in os.environ:
        return os.environ["GRURCN_COMMIT"]
    try:
        commit = git(folder, "rev-parse", "HEAD")
        return f"{commit}+changes" if git(folder, "status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git_diff(folder: Path) -> str | None:
    """What the code that runs has changed since its commit, new files named; None where nothing has, or where it is no clone."""
    try:
        diff, status = git(folder, "diff", "HEAD"), git(folder, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    new = [line[3:] for line in status.splitlines() if line.startswith("??")]
    text = "\n".join([*(f"# not in git: {name}" for name in new), diff]).strip()
    if not text:
        return None
    cut = f"\n# ... and {len(text) - LONGEST_DIFF:,} more characters" if len(text) > LONGEST_DIFF else ""
    return masked(text[:LONGEST_DIFF] + cut + "\n")


def environment() -> str:
    """Versions of Python, the system, CUDA and of all packages, as lines that `pip install -r` understands."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    packages = sorted({f"{each.name}=={each.version}" for each in distributions()}, key=str.lower)
    return "\n".join(
        [
            f"# Python {platform.python_version()}, {platform.platform()}",
            f"# CUDA of torch: {torch.version.cuda or 'none'}; GPUs of the driver's machine: {', '.join(gpus) or 'none'}",
            *packages,
            "",
        ]
    )


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
