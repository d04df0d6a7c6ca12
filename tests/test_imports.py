"""Which package may import what (docs/, the design): grurcn/, shards/ and cluster/ know nothing of each other, jobs/ joins
them, and the first two work on a machine without ray, deepspeed or mlflow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = ("grurcn", "shards", "cluster", "jobs")

# Besides the standard library and the package itself.
ALLOWED = {
    "grurcn": {"torch"},
    "shards": {"torch", "numpy", "pyarrow", "webdataset", "ffmpeg", "imageio_ffmpeg", "av", "fsspec", "zlib_ng"},
    "cluster": {"torch", "ray", "deepspeed", "mlflow", "safetensors", "rich", "fsspec", "pyarrow"},
    "jobs": {
        *("grurcn", "shards", "cluster"),
        *("torch", "ray", "deepspeed", "mlflow", "tyro", "rich", "numpy", "pyarrow", "psutil", "av", "matplotlib"),
    },
}
# What one file may import that the rest of its package may not.
ALLOWED_IN = {
    "shards/sources.py": {"tyro"},
    "shards/flow.py": {"cv2"},
    "cluster/checkpoint.py": {"shards.store"},  # runs lie in stores too
    "cluster/runs.py": {"shards.store"},
    "cluster/report.py": {"shards.store"},
    "cluster/sending.py": {"shards.store"},
    "cluster/tracking.py": {"shards.store"},
    "jobs/attention.py": {"PIL"},
    "jobs/served.py": {"pandas"},
    "jobs/export.py": {"onnx", "onnxruntime", "onnxscript"},
    "jobs/doctor_findings.py": {"packaging"},
    "jobs/preview.py": {"PIL"},
    "jobs/overlay_picture.py": {"PIL"},
    "jobs/caption_scores.py": {"pycocoevalcap"},
    "jobs/bench_read.py": {"webdataset", "imageio_ffmpeg"},  # the peers that it measures
    "jobs/bench_pack.py": {"imageio_ffmpeg"},
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import statement, also of those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def breaches(path: str, source: str) -> list[str]:
    """file:line and the import, for each that the table does not allow. `path` is relative to the repository."""
    package = path.split("/")[0]
    allowed = sys.stdlib_module_names | {package} | ALLOWED[package] | ALLOWED_IN.get(path, set())
    return [
        f"{path}:{line}: {package}/ may not import {name}"
        for line, name in imports(source)
        if name.split(".")[0] not in allowed and name not in allowed
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
        ("grurcn/gru.py", "import numpy as np"),
        ("grurcn/gru.py", "from shards.clips import Clip"),
        ("shards/stream.py", "import ray.data"),
        ("shards/stream.py", "import tyro"),
        ("shards/stream.py", "from grurcn.frames import to_clips"),
        ("cluster/report.py", "from jobs.recipes import Recipe"),
        ("cluster/report.py", "from shards.index import Index"),
        ("jobs/train.py", "import torchvision"),
    ],
)
def test_an_import_against_the_table_is_named_with_file_and_line(path, statement):
    name = statement.split()[1]
    source = f'"""A module."""\n\nimport json\n\ndef f():\n    {statement}\n'
    assert breaches(path, source) == [f"{path}:6: {path.split('/')[0]}/ may not import {name}"]


def test_what_the_table_allows_is_allowed():
    assert not breaches("shards/sources.py", "import tyro\nimport os.path\nfrom shards.video import Packing")
    assert not breaches("jobs/train.py", "from shards import video\nfrom grurcn import gru\nimport ray.train")


ALONE = """
import importlib, importlib.abc, pkgutil, sys

ABSENT = {"ray", "deepspeed", "mlflow", "cv2", "cluster", "jobs"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} (this machine has none)", name=name)

sys.meta_path.insert(0, Absent())
for package in ("grurcn", "shards"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
try:
    import ray
except ModuleNotFoundError:
    print("and no ray")
"""


def test_grurcn_and_shards_import_on_a_machine_without_ray_deepspeed_and_mlflow():
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = done.stdout.splitlines()
    assert names[-1] == "and no ray"
    for package in ("grurcn", "shards"):
        files = {f"{package}.{path.stem}" for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}
        assert files <= set(names)


def test_the_benchmark_of_the_model_runs_where_there_is_no_ray_deepspeed_or_mlflow():
    script = (
        ALONE.split("for package in")[0].replace(', "cluster", "jobs"', "") + "import jobs.bench\nprint('imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "imported", done.stderr[-2000:]
