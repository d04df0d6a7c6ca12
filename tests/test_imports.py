"""Which package may import what (docs/, the design): grurcn/, shards/ and cluster/ know nothing of each other, jobs/ joins
them, and the first two work on a machine without ray, deepspeed or mlflow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("grurcn", "shards", "cluster", "jobs")

TORCH = {"torch"}
SHARDS = {"numpy", "pyarrow", "webdataset", "ffmpeg", "imageio_ffmpeg", "av", "fsspec", "zlib_ng"}
# What packing writes and reading relies on: these files know neither of them.
CONTRACT = {
    f"shards.{name}"
    for name in ("threads", "printable", "store", "video", "frames", "sample_json", "dataset", "rows", "index")
}
LIBRARY = {"grurcn", "shards", "cluster", "torch", "ray", "deepspeed", "mlflow", "numpy", "pyarrow", "av", "matplotlib"}
# A folder, or a file, and what its files may import besides the standard library. The longest one that fits a file counts.
ALLOWED = {
    "grurcn": LIBRARY | {"psutil", "tyro"},  # tyro: options of jobs only
    "grurcn/models": TORCH | {"grurcn.models", "grurcn.plugins"},
    "grurcn/drawing": LIBRARY | {"PIL", "tyro"},
    "grurcn/evaluation/caption_scores.py": LIBRARY | {"pycocoevalcap"},
    "grurcn/inference/serving.py": LIBRARY | {"pandas"},  # in which MLflow hands over requests
    "grurcn/inference/export.py": LIBRARY | {"onnx", "onnxruntime", "onnxscript"},  # one of the two file formats
    "shards": SHARDS | TORCH | {"shards"},
    **dict.fromkeys((name.replace(".", "/") + ".py" for name in CONTRACT), SHARDS | CONTRACT),
    "shards/store": SHARDS | CONTRACT,
    "shards/packing": SHARDS | CONTRACT | {"shards.packing"},
    "shards/packing/flow.py": SHARDS | CONTRACT | {"cv2"},
    "shards/reading": SHARDS | TORCH | CONTRACT | {"shards.reading"},
    "cluster": {"cluster", "torch", "ray", "deepspeed", "mlflow", "safetensors", "rich", "fsspec", "pyarrow"}
    | {"shards.store"},  # runs lie in the same stores as shards
    "jobs": LIBRARY | {"jobs", "tyro", "rich", "psutil"},
    "jobs/doctor": LIBRARY | {"jobs", "rich", "psutil", "packaging"},
    "jobs/bench": LIBRARY
    | {"jobs", "tyro", "rich", "psutil", "webdataset", "imageio_ffmpeg"},  # the peers that it measures
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import statement, also of those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def allowed_in(path: str) -> set[str]:
    """What a file may import, by the longest entry of the table that fits it."""
    entry = max((entry for entry in ALLOWED if f"{path}/".startswith(f"{entry}/")), key=len)
    return ALLOWED[entry] | sys.stdlib_module_names


def is_allowed(name: str, allowed: set[str]) -> bool:
    """Whether a dotted name, or a package that it is in, is allowed."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))


def breaches(path: str, source: str) -> list[str]:
    """file:line and the import, for each that the table does not allow. `path` is relative to the repository."""
    allowed = allowed_in(path)
    folder = path.rpartition("/")[0]
    return [
        f"{path}:{line}: {folder}/ may not import {name}"
        for line, name in imports(source)
        if not is_allowed(name, allowed)
    ]


@pytest.mark.parametrize("package", OWN)
def test_every_import_is_one_that_its_package_may_make(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"no {package}/*.py under {ROOT}"
    found = [breach for path in paths for breach in breaches(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("grurcn/models/gru.py", "import numpy as np"),
        ("grurcn/models/gru.py", "from shards.reading.clips import Clip"),
        ("shards/reading/stream.py", "import ray.data"),
        ("shards/reading/stream.py", "import tyro"),
        ("shards/reading/stream.py", "from grurcn.models.pixels import to_clips"),
        ("shards/index.py", "from shards.reading.clips import Clip"),
        ("shards/store/folder.py", "from shards.packing.pack import pack_shard"),
        ("shards/reading/captions.py", "from shards.packing.external import plan_index"),
        ("shards/packing/pack.py", "import torch"),
        ("shards/packing/pack.py", "from shards.reading.decode import read_frames"),
        ("cluster/tracking/mlflow_run.py", "from grurcn.training.recipes import Recipe"),
        ("cluster/tracking/mlflow_run.py", "from shards.index import Index"),
        ("jobs/train.py", "import torchvision"),
    ],
)
def test_an_import_against_the_table_is_named_with_file_and_line(path, statement):
    name = statement.split()[1]
    source = f'"""A module."""\n\nimport json\n\ndef f():\n    {statement}\n'
    assert breaches(path, source) == [f"{path}:6: {path.rpartition('/')[0]}/ may not import {name}"]


def test_nothing_imports_from_a_main_module():
    """A command is what runs; what others need of it is in a module with a name."""
    found = []
    for path in sorted(path for folder in (*OWN, "tests") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[-1] == "__main__"]
    assert not found


def test_what_the_table_allows_is_allowed():
    assert not breaches("shards/packing/sources/folder.py", "import os.path\nfrom shards.video import Packing")
    assert not breaches("jobs/train.py", "from shards import video\nfrom grurcn import gru\nimport ray.train")


ALONE = """
import importlib, importlib.abc, pkgutil, sys

ABSENT = {"ray", "deepspeed", "mlflow", "cv2", "cluster", "jobs"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} (this machine has none)", name=name)

sys.meta_path.insert(0, Absent())
for package in ("grurcn.models", "shards"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
try:
    import ray
except ModuleNotFoundError:
    print("and no ray")
"""


def test_models_and_shards_import_on_a_machine_without_ray_deepspeed_and_mlflow():
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = done.stdout.splitlines()
    assert names[-1] == "and no ray"
    paths = [*(ROOT / "grurcn" / "models").rglob("*.py"), *(ROOT / "shards").rglob("*.py")]
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem != "__init__"}
    assert files <= set(names)


def test_the_benchmark_of_the_model_runs_where_there_is_no_ray_deepspeed_or_mlflow():
    script = (
        ALONE.split("for package in")[0].replace(', "cluster", "jobs"', "")
        + "from jobs.commands import load\nload('bench')\nprint('imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "imported", done.stderr[-2000:]
