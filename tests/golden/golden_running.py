"""Runs cases with one tree's code, in a world that is the same each time.

The world lies at one place for both trees, as paths are part of what is written (a data set's description, a run's tracking
URI): what differs then is not a path.
"""

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden_cases import Case, Command
from golden_observed import Values, observe, options_of

TIMEOUT_SECONDS = 900.0  # of one command
LINES_KEPT = 15  # of the error output
# pip's editable installation of another tree would lend the modules that a tree itself has not got any more.
GUARD = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable___grurcn" not in getattr(finder, "__module__", "")]
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a case with one tree."""

    values: Values
    failed: dict[
        str, str
    ]  # "command 0" -> the last lines of its error output, of those that ended with another status than 0
    seconds: float
    core_seconds: float = 0.0  # that cores computed, without those of Ray's processes

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class World:
    """FOLDER/world, where commands run, and FOLDER/as-prepared, what it begins as."""

    folder: Path

    @property
    def place(self) -> Path:
        return self.folder / "world"

    @property
    def prepared(self) -> Path:
        return self.folder / "as-prepared"

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.prepared, self.place)

    def keep(self) -> None:
        """What lies in the world now is what it begins as from now on."""
        partial = self.folder / "as-prepared.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.place, partial)
        partial.rename(self.prepared)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else uses the world meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another comparison in {self.folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Done:
    """One process has ended."""

    status: int
    output: str
    errors: str


def run_case(case: Case, tree: Path, world: World, translate: Callable[[Command], Command]) -> Outcome:
    """All commands of a case, one after the other, whatever the status of those before."""
    world.reset()
    started, computed = time.monotonic(), core_seconds()
    values: Values = {}
    failed: dict[str, str] = {}
    for number, command in enumerate(case.commands):
        done = run_command(translate(command), tree, world)
        name = f"command {number}"
        values[f"{name} > status"] = done.status
        if done.status != 0:
            lines = (done.errors.strip() or done.output.strip()).splitlines()
            failed[name] = "\n".join(lines[-LINES_KEPT:])
        if command.looks == "errors":
            values[f"{name} > error output"] = done.errors
        if command.looks == "help":
            values |= {f"{name} > {option}": value for option, value in options_of(done.output).items()}
    values |= observe(world.place, world.prepared)
    if case.only:
        values = {name: value for name, value in values.items() if any(re.search(one, name) for one in case.only)}
    return Outcome(values, failed, round(time.monotonic() - started, 1), round(core_seconds() - computed, 1))


def core_seconds() -> float:
    """What this process's children that have ended have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_command(command: Command, tree: Path, world: World) -> Done:
    """One process in the world, with the tree's modules."""
    with (world.folder / "output").open("w+") as output, (world.folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command.words],
            cwd=world.place,
            env=environment(tree, world, command),
            stdin=subprocess.DEVNULL,
            stdout=output if command.stop_at is None else subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        late = threading.Timer(TIMEOUT_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            for line in process.stdout or ():
                output.write(line)
                if re.search(command.stop_at or "(?!)", line):
                    process.send_signal(signal.SIGTERM)
            status = process.wait()
        finally:
            late.cancel()
            if process.poll() is None:  # this script was interrupted
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        errors.seek(0)
        return Done(status, output.read(), errors.read())


def environment(tree: Path, world: World, command: Command) -> dict[str, str]:
    """The same for both trees: one thread, no GPU, a Ray and an MLflow of our own."""
    guard = world.folder / "guard"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(GUARD)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_", "GRURCN_"))}
    kept |= {"MLFLOW_TRACKING_URI": f"sqlite:///{world.place}/runs/mlflow.db"} if "mlflow" in command.words else {}
    return kept | {
        "PYTHONPATH": f"{guard}{os.pathsep}{tree}",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_ADDRESS": "local",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
