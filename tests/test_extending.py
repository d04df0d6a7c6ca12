"""The examples of docs/extending.md as they stand there: a source, a trunk and a task, found through GRURCN_PLUGINS."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = "--num-steps 2 --val-every 2 --global-batch 4 --clips.size 32 --clips.num-frames 4 --precision fp32 --cpus-per-worker 1"


@pytest.fixture(scope="module")
def folder(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples as modules, and what they are tried on."""
    folder = tmp_path_factory.mktemp("plugins")
    page = (ROOT / "docs" / "extending.md").read_text()
    examples = re.findall(r"<!-- example: (\w+\.py) -->\n```python\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in examples] == ["lab_source.py", "tiny_trunk.py", "arrow_of_time.py"]
    for name, code in examples:
        (folder / name).write_text(code)
    (folder / "recordings").mkdir()
    lines = [
        json.dumps({"video": str(path), "label": path.parent.name, "person": path.stem})
        for path in sorted(videos.glob("*/*.avi"))
    ]
    (folder / "recordings" / "list.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, plugin: str, command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "GRURCN_PLUGINS": plugin},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_source_a_trunk_and_a_task_of_ones_own(folder: Path):
    packed = "jobs.make_shards --out lab --width 40 --height 40 --workers 0 lab --manifest recordings/list.jsonl"
    assert "packed 24 videos of 4 classes" in run(folder, "lab_source", packed)
    options = "--model.trunk tiny --model.taps half quarter --model.hidden 8 16 --model.width 1"
    trained = run(folder, "tiny_trunk", f"jobs.train gru-rcn-small --shards lab --name tiny {options} {SMALL}")
    assert "trained 2 steps" in trained
    trained = run(folder, "arrow_of_time", f"jobs.train arrow-of-time --shards lab {SMALL}")
    assert "trained 2 steps" in trained
    [checkpoint] = (folder / "runs" / "arrow-of-time").glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text())["training"]["recipe"]["task"] == "arrow-of-time"


def test_a_plugin_that_is_not_there_is_one_line(folder: Path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.describe", "gru-rcn"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "GRURCN_PLUGINS": "no_such_module"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "error: GRURCN_PLUGINS: no_such_module cannot be imported" in done.stderr
