"""Do two trees of this repository give the same numbers, to the last bit?

    python tests/golden/side_by_side.py --before da1b8aa                    this tree against a commit
    python tests/golden/side_by_side.py --before da1b8aa --quick            a choice of cases, in about two minutes
    python tests/golden/side_by_side.py --before da1b8aa --only export 'train-*-zero0'
    python tests/golden/side_by_side.py --before da1b8aa --after ../other   another tree, or another commit
    python tests/golden/side_by_side.py --list

Both trees run the same command lines (golden_cases.py) on the same files, in the same folder, and everything that they write is
compared: shards, metrics of each step, results, weights, scores, captions, pictures. Nothing of the package is imported, so its
modules may move. A line a case is printed, and below it what differs; the exit status is 1 if anything does.

What the tree BEFORE gives is kept in the cache, so that it runs once. The cache belongs to this machine and to the versions of
the packages that decide numbers; it may be deleted at any time.

A rebuilding that gives something another name says so in RENAMED, a line each: the tree AFTER is then asked by the new name, and
what it gives is looked for there. What is meant to be different goes into MEANT, with the reason.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import golden_inputs
import golden_observed
from golden_cases import CASES, PREPARE, Case, Command
from golden_observed import SEPARATOR, Value, Values
from golden_running import Outcome, World, core_seconds, run_case, run_command

# Old name -> new name.
RENAMED: dict[str, dict[str, str]] = {
    # Options as they are typed: "--zero": "--zero-stage"
    "options": {"--val-share": "--val-fraction", "--test-share": "--test-fraction"},
    # Other words of a command line, and values that are such a word: recipes, sources, choices. "gru-rcn-small": "gru-rcn-tiny"
    "words": {},
    # Keys of JSON and of tables, metrics, parameters and tags of MLflow: "val_top1": "top1", "train/top1": "train/accuracy".
    # With its file before it, a key is renamed in files of that name alone: "finished.json > steps": "steps_done"
    "names": {"learned": "trainable", "GRUs": "grus", "lowest": "lowest_loss", "recogniser_top1": "classifier_top1"},
    # Files and folders that are written, artifacts of MLflow too, wherever they lie: "scores.parquet": "videos.parquet"
    "files": {},
    # Whatever else: patterns of whole names (golden_observed.py), after all that is above, and what they become:
    # r"^(out/packed.json) > videos > (\w+)$": r"\1 > splits > \2 > videos"
    "patterns": {
        # state.json of format 3 (cluster/checkpoints/state.py)
        r"^(.*state\.json) > meta > told > (\d+) > at$": r"\1 > training > metrics > \2 > step",
        r"^(.*state\.json) > meta > told > (\d+) > metrics > ": r"\1 > training > metrics > \2 > values > ",
        r"^(.*state\.json) > meta > told > ": r"\1 > training > metrics > ",
        r"^(.*state\.json) > meta > stale$": r"\1 > training > validations_since",
        r"^(.*state\.json) > meta > (classes|packing|vocabulary|encoder) > ": r"\1 > training > model > \2 > ",
        r"^(.*state\.json) > meta > ": r"\1 > training > ",
        r"^(.*state\.json) > optimizer$": r"\1 > optimizer > name",
        r"^(.*state\.json) > (trainable|step_counts|loss_scale)\b": r"\1 > optimizer > \2",
        r"^(.*state\.json) > best > (?!step$|sha256$|scores\b)": r"\1 > best > scores > ",
    },
}

# Patterns of names whose values may differ, and why.
MEANT: dict[str, str] = {
    r"state\.json > (format|training > recipe > task)$": "format 3 names the task",
    r"(recipe|run)\.json > (recipe > )?task$|recipe > task$|parameters > task$|params > task$": "a recipe names its task",
    r"tags > best_model_sha256$": "by which MLflow's best model is known",
    r"verified\.json > holds$": "videos or vectors",
    r"indexed\.json > frames_per_video$": "new",
    r"rejected\.jsonl > \d+ > reason$": "plainer words",
    r"(confusion|mistakes|classes|levels|table1)\.png$": "plainer words in the pictures",
}

# Never compared: times and speeds; the commit and the command line; the source that a logged model carries with it.
IGNORED = re.compile(
    r"(^| > )(seconds|milliseconds)$|(^| > )(perf|system)/|/artifacts/(code/|environment\.txt|changes\.diff)"
    r"| > tags > (git_commit|command|mlflow\.(source\.git\.commit|note\.content|user|source\.name))$"
    r"|/MLmodel > (flavors > python_function > loader_module|model_uuid|utc_time_created|model_size_bytes)$"
    r"| > metrics > run/events > "
)
EVENT = re.compile(r" > tags > event\.\d+$")
EVENT_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, ")
BY_CHANCE = re.compile(r" is slow: ")  # events that tell of the machine: on a busy one a worker falls behind another
OBSERVED = Path(golden_observed.__file__).read_text()
LINES_SHOWN = 5
PACKAGES = ("torch", "numpy", "av", "imageio-ffmpeg", "deepspeed", "mlflow", "ray", "pillow", "matplotlib", "tyro")
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed, as after Ctrl-C
    args = parse()
    cases = chosen(args.only, args.quick)
    if args.list:
        print("\n".join(f"{case.name}{'  (quick)' if case.is_quick else ''}" for case in cases))
        return 0
    commit = git("rev-parse", "--verify", f"{args.before}^{{commit}}")
    world = World(args.cache / f"{commit[:12]}-{key_of(args.cache)}")
    started, different = time.monotonic(), []
    with world.locked(), contextlib.ExitStack() as stack:
        run_before(commit, cases, world)
        tree = args.after if args.after.is_dir() else stack.enter_context(checked_out(str(args.after)))
        print(f"{len(cases)} cases of {tree.resolve()} against {commit[:12]}", flush=True)
        for case in cases:
            if lacking := lacking_modules(case):
                print(f"passed over  {case.name}: {', '.join(lacking)} not installed", flush=True)
                continue
            before, after = read(kept(world, case)), run_case(case, tree.resolve(), world, translated)
            values = completed(renamed(before.values), after.values, world)
            if not report(case, replace(before, values=values), after):
                different.append(case.name)
    told = f"{len(different)} of {len(cases)} cases differ: {', '.join(different)}" if different else "all are equal"
    print(f"{told} ({time.monotonic() - started:.0f} s; {core_seconds():.0f} s of a core, without Ray's processes)")
    return 1 if different else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="the commit that says what is right", metavar="COMMIT")
    parser.add_argument("--after", type=Path, default=ROOT, metavar="TREE", help="folder or commit; default: this tree")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=Path.home() / ".cache" / "grurcn-golden")
    parser.add_argument("--only", nargs="+", metavar="CASE", default=["*"], help="names of cases, or patterns of them")
    parser.add_argument("--quick", action="store_true", help="a choice of fast cases")
    parser.add_argument("--list", action="store_true", help="name the cases")
    args = parser.parse_args()
    if args.before is None and not args.list:
        parser.error("--before COMMIT is wanted")
    args.cache = args.cache.resolve()
    return args


def chosen(patterns: Sequence[str], quick: bool) -> list[Case]:
    """The cases whose names match. Ends with a message if a pattern matches none."""
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in CASES], pattern):
            sys.exit(f"no case {pattern!r}; there are {', '.join(case.name for case in CASES)}")
    named = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
    return [case for case in named if case.is_quick or not quick]


def lacking_modules(case: Case) -> list[str]:
    return [name for name in case.needs if importlib.util.find_spec(name) is None]


# The tree BEFORE


def run_before(commit: str, cases: Sequence[Case], world: World) -> None:
    """Makes the world, and what the commit gives of those cases, where the cache has it not."""
    missing = [case for case in cases if not lacking_modules(case) and not kept(world, case).exists()]
    if world.prepared.exists() and not missing:
        return
    with checked_out(commit) as tree:
        if not world.prepared.exists():
            print(f"preparing videos and models with {commit[:12]}: {world.folder}", flush=True)
            prepare(tree, world)
        for case in missing:
            outcome = run_case(case, tree, world, lambda command: command)
            file = kept(world, case)
            file.with_suffix(".partial").write_text(json.dumps(outcome.to_dict(), indent=1))
            file.with_suffix(".partial").rename(file)
            failed = "".join(f"\n  {name}: {errors}" for name, errors in outcome.failed.items())
            print(f"before  {case.name}: {len(outcome.values)} values ({outcome.seconds} s){failed}", flush=True)


def prepare(tree: Path, world: World) -> None:
    shutil.rmtree(world.place, ignore_errors=True)
    world.place.mkdir(parents=True)
    golden_inputs.write_inputs(world.place)
    for command in PREPARE:
        done = run_command(command, tree, world)
        if (done.status != 0) != bool(command.stop_at):
            sys.exit(f"{' '.join(command.words)}: status {done.status}\n{done.errors[-3000:]}")
    world.keep()


def kept(world: World, case: Case) -> Path:
    """Where the cache has what the tree BEFORE gave."""
    about = repr((case.commands, case.only)) + OBSERVED
    return world.folder / f"{case.name}-{digest(about)}.json"


def key_of(cache: Path) -> str:
    """Of all that decides the world and its numbers, besides the commit."""
    about_cpu = Path("/proc/cpuinfo")
    lines = about_cpu.read_text().splitlines() if about_cpu.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model", "flags", "cpu family", "stepping"))})
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    written = Path(golden_inputs.__file__).read_text()
    return digest("\n".join([str(cache), sys.version, *processor, *versions, written, repr(PREPARE)]))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(file: Path) -> Outcome:
    return Outcome(**json.loads(file.read_text()))


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A worktree of a commit, for as long as the block takes."""
    with tempfile.TemporaryDirectory(prefix="grurcn-before-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


# Names


def translated(command: Command) -> Command:
    """The command as the tree AFTER wants it."""
    names = RENAMED["options"] | RENAMED["words"]
    return replace(command, words=tuple(names.get(word, word) for word in command.words))


def renamed(values: Values) -> Values:
    """What the tree BEFORE gave, by the names of the tree AFTER."""
    return {renamed_name(name): renamed_value(value) for name, value in values.items()}


def renamed_name(name: str) -> str:
    path, *keys = name.split(SEPARATOR)
    options, names, files = (RENAMED[kind] for kind in ("options", "names", "files"))
    file = path.rpartition("/")[2]
    keys = [names.get(f"{file}{SEPARATOR}{key}", names.get(key, options.get(key, key))) for key in keys]
    for old, new in files.items():
        path = re.sub(rf"(^|/){re.escape(old)}(?=/|$)", lambda match, new=new: match[1] + new, path)
    name = SEPARATOR.join([path, *keys])
    for pattern, new in RENAMED["patterns"].items():
        name = re.sub(pattern, new, name)
    return name


def renamed_value(value: Value) -> Value:
    """A word by its new name, and paths in texts."""
    if not isinstance(value, str):
        return value
    for old, new in RENAMED["files"].items():
        value = re.sub(rf"(?<=/){re.escape(old)}(?=/|$)", lambda _, new=new: new, value)
    return RENAMED["words"].get(value, value)


# The comparison


def completed(before: Values, after: Values, world: World) -> Values:
    """What the tree BEFORE gave, and with it the values of a prepared file that only the tree AFTER wrote anew.

    A file that is as it was prepared is not among what a case gives; one that gets a new key is, with all its values.
    """
    if after.keys() <= before.keys():
        return before
    with tempfile.TemporaryDirectory() as nothing:
        prepared = renamed(golden_observed.observe(world.prepared, Path(nothing)))
    return {name: prepared[name] for name in after.keys() & prepared.keys()} | before


def report(case: Case, before: Outcome, after: Outcome) -> bool:
    """Prints a line, and others below it for what differs. Whether all is equal."""
    then, now = comparable(before.values), comparable(after.values)
    names = sorted(then.keys() | now.keys(), key=importance)
    different = [name for name in names if not same(then, now, name)]
    meant = [name for name in different if any(re.search(pattern, name) for pattern in MEANT)]
    different = [name for name in different if name not in meant]
    other = f", {len(meant)} of them different on purpose" if meant else ""
    about = f"{len(names)} values{other} ({before.seconds:.0f} s, {after.seconds:.0f} s)"
    if not different:
        print(f"equal    {case.name}: {about}", flush=True)
        return True
    print(f"DIFFERS  {case.name}: {len(different)} of {about}", flush=True)
    for name in different[:LINES_SHOWN]:
        print(f"    {name}: before {shown(then, name)}, after {shown(now, name)}", flush=True)
    if len(different) > LINES_SHOWN:
        print(f"    and {len(different) - LINES_SHOWN} more", flush=True)
    for name, errors in after.failed.items():
        if f"{name} > status" in different or f"{name} > error output" in different:
            print("\n".join(f"    {name} of after | {line}" for line in errors.splitlines()), flush=True)
    return False


def comparable(values: Values) -> Values:
    """What is to be compared. An event is known by its text, without its time and its number."""
    kept: Values = {}
    for name, value in values.items():
        if EVENT.search(name):
            if not BY_CHANCE.search(str(value)):
                kept[EVENT.sub(f"{SEPARATOR}events{SEPARATOR}{EVENT_TIME.sub('', str(value))}", name)] = "told"
        elif not IGNORED.search(name):
            kept[name] = value
    return kept


def same(before: Values, after: Values, name: str) -> bool:
    """Whether both have it and it is the same, to the last digit; 1 is not 1.0, and a number that is none is like another."""
    return name in before and name in after and repr(before[name]) == repr(after[name])


def importance(name: str) -> tuple[int, int, str]:
    """What is shown first: how commands ended, then losses and metrics in the order of their steps."""
    if name.startswith("command"):
        return 0, 0, name
    metric = re.search(r" > metrics > (train|val)/\S+ > (\d+)$", name)
    return (1, int(metric[2]), name) if metric else (2, 0, name)


def shown(values: Values, name: str) -> str:
    if name not in values:
        return "nothing"
    text = repr(values[name])
    return text if len(text) <= 300 else f"{text[:300]}..."


if __name__ == "__main__":
    sys.exit(main())
