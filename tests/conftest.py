"""What several test files share: a packed data set of the demo's motions, small enough to make in seconds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports a numerics library: on few cores, threads that spin in wait take time from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["RAY_ADDRESS"] = "local"  # a Ray of our own, also beside one that runs on this machine

import turns
from packing import SCENES, packing_job

from jobs import make_shards
from shards.packing.sources import Msvd
from shards.synthetic import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZE,
    draw_motion,
    draw_scene,
    scene_captions,
    write_video,
)
from shards.video import Packing

# No test is a timed one: a busy machine may take as long as it likes.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

VIDEOS_PER_CLASS = 6


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four classes with six videos each, 24 frames of 40 x 40."""
    folder = tmp_path_factory.mktemp("videos")
    for motion in list(MOTIONS)[:4]:
        (folder / motion).mkdir()
        for number in range(VIDEOS_PER_CLASS):
            rng = np.random.default_rng([number, len(motion)])
            write_video(folder / motion / f"{number}.avi", draw_motion(motion, rng))
    return folder


@pytest.fixture(scope="session")
def shards(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those videos packed: 16 for training, 4 for validation, 4 for testing."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    make_shards.main(packing_job(videos, out))
    return out


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for all runs, as creating MLflow's database takes seconds."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed captioned data set of the demo's scenes: three captions a video."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "videos").mkdir()
    for split, count in SCENES.items():
        listed = []
        for number in range(count):
            rng = np.random.default_rng([number, count])
            first, second = map(str, rng.permutation(list(DIRECTIONS))[:2])
            about = (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), first, second)
            name = f"{split}{number}_0_1.avi"
            write_video(folder / "videos" / name, draw_scene(*about, rng))
            listed.append({"id": name, "caption": scene_captions(*about)})
        (folder / f"{split}.json").write_text(json.dumps(listed))
    lists = [folder / f"{split}.json" for split in SCENES]
    source = Msvd(videos=folder / "videos", train=lists[0], val=lists[1], test=lists[2])
    packing = Packing(width=SIZE, height=SIZE)
    out = str(folder / "shards")
    make_shards.main(make_shards.MakeShards(source=source, out=out, packing=packing, videos_per_shard=5, workers=0))
    return folder / "shards"


def pytest_addoption(parser: pytest.Parser) -> None:
    turns.add_options(parser)


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    turns.select(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if said := terminalreporter.config.stash.get(turns.LEFT_OUT, ""):
        terminalreporter.write_line(said)
