"""What was written before a rebuilding is read as it was, and gives the same numbers.

tests/golden/before was written by the commit that its recorded.json names (make_fixture.py). Last digits differ between
processors, so numbers are compared within 1e-4; side_by_side.py compares two trees on one machine to the last bit.

Only command lines of the package are used here, none of its modules. What has another name since then is in side_by_side.RENAMED.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from golden_cases import job
from make_fixture import CAPTION, EVALUATE, FIRST_STEPS, PACK_FOLDER, TINY, digests, metrics, versions
from mlflow import MlflowClient
from side_by_side import translated

BEFORE = Path(__file__).parent / "before"
ROOT = Path(__file__).resolve().parents[2]
RECORDED: dict[str, Any] = json.loads((BEFORE / "recorded.json").read_text())
TOLERANCE = 1e-4
# Several command lines in one process, as each would import the same packages for seconds.
SERIES = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


@dataclass(frozen=True)
class World:
    """A copy of what was written before, of which MLflow knows nothing yet but what it is told by `track`."""

    place: Path

    def run(self, line: str) -> str:
        """python -m jobs.LINE; its output."""
        return self.python(translated(job(line)).words)

    def run_all(self, lines: Sequence[str]) -> str:
        words = [translated(job(line)).words[1:] for line in lines]
        return self.python(("-c", SERIES, json.dumps(words)))

    def python(self, words: Sequence[str]) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.place,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    @property
    def database(self) -> Path:
        return self.place / "runs" / "mlflow.db"

    def track(self, name: str) -> None:
        """Gives a run of the fixture an MLflow run, as the one that it had is not part of the fixture."""
        uri = f"sqlite:///{self.database}"
        client = MlflowClient(uri)
        found = client.get_experiment_by_name("grurcn")
        experiment = (
            found.experiment_id if found else client.create_experiment("grurcn", (self.place / "artifacts").as_uri())
        )
        about = {"tracking_uri": uri, "mlflow_run_id": client.create_run(experiment, run_name=name).info.run_id}
        folder = self.place / "runs" / name
        identity = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(identity | about))
        for file in folder.glob("checkpoint-*/state.json"):
            state = json.loads(file.read_text())
            file.write_text(json.dumps(state | {"meta": state["meta"] | about}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One for all tests, each of which has a run of its own there, as creating MLflow's database takes seconds."""
    place = tmp_path_factory.mktemp("golden") / "world"
    shutil.copytree(BEFORE, place)
    return World(place)


def test_shards_of_before_are_whole_and_open(world):
    videos_of = {
        "shards": {"train": 8, "val": 4, "test": 4},
        "vectors": {"train": 10, "val": 3, "test": 4},
    }
    world.run_all([f"inspect_shards verify {name} --workers 0 --json {name}.json" for name in videos_of])
    for name, videos in videos_of.items():
        found = json.loads((world.place / f"{name}.json").read_text())
        assert (found["faults"], found["videos"]) == (0, videos)


def test_the_same_videos_are_packed_into_the_same_bytes(world):
    here = versions()
    if here != RECORDED["versions"]:
        other = {
            name: f"{here.get(name)}, then {then}"
            for name, then in RECORDED["versions"].items()
            if here.get(name) != then
        }
        pytest.skip(f"other builds than those that have packed them: {other}")
    world.run(PACK_FOLDER.format(out="packed"))
    assert digests(world.place / "packed") == RECORDED["packed"]
    described, then = (
        json.loads((folder / "dataset.json").read_text()) for folder in (world.place / "packed", BEFORE / "shards")
    )
    assert {**described, "source": None} == {**then, "source": None}  # whose options are those of the command


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_as_the_one_left_alone(world):
    world.track("interrupted")
    (stopped,) = (path.parent.name for path in (world.place / "runs/interrupted").glob("checkpoint-*/state.json"))
    assert "going on after step" in world.run(f"train demo --name interrupted {TINY}")
    step = int(stopped.removeprefix("checkpoint-"))
    assert 6 <= step < 8
    training = metrics(world.database, "interrupted", "train/loss")
    # What a checkpoint has not told MLflow before is told again from it; this MLflow run was empty.
    wanted = {key: value for key, value in RECORDED["training"].items() if key in training}
    assert [key for key in wanted if int(key) > step] == [str(number) for number in range(step + 1, 13)]
    assert training == pytest.approx(wanted, abs=TOLERANCE)
    for name, values in RECORDED["validation"].items():
        found = metrics(world.database, "interrupted", f"val/{name}")
        assert {"8", "12"} <= found.keys()
        assert found == pytest.approx({key: values[key] for key in found}, abs=TOLERANCE)
    ended, wanted = (json.loads((path / "finished.json").read_text()) for path in
                     (world.place / "runs/interrupted", BEFORE / "runs/finished"))  # fmt: skip
    assert ended == pytest.approx(wanted, abs=TOLERANCE)


def test_a_finished_run_gives_the_scores_that_it_gave(world):
    world.track("finished")
    world.run(EVALUATE)
    rows = pq.read_table(world.place / "runs/finished/evaluations/test-2x5/scores.parquet").to_pylist()
    assert sorted(row["key"] for row in rows) == sorted(RECORDED["scores"])
    for row in rows:
        assert row["scores"] == pytest.approx(RECORDED["scores"][row["key"]], abs=TOLERANCE)


def test_a_captioning_run_says_what_it_said(world):
    pytest.importorskip("pycocoevalcap")
    world.track("teller")
    world.run(CAPTION)
    (file,) = (world.place / "runs/teller/captions").glob("test-*/captions.parquet")
    assert {row["key"]: row["caption"] for row in pq.read_table(file).to_pylist()} == RECORDED["captions"]


def test_recipes_lose_as_they_lost_in_their_first_steps(world):
    world.run_all([f"train {recipe} --name {recipe} {options}" for recipe, options in FIRST_STEPS.items()])
    for recipe, losses in RECORDED["losses"].items():
        found = list(metrics(world.database, recipe, "train/loss").values())
        assert found == pytest.approx(losses, abs=TOLERANCE), recipe
