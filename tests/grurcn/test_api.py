"""The Python API: the examples of its docstrings run as they stand, and what is missing is said in one line."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from caption_runs import write_run

import grurcn
from grurcn.inference.loaded import LoadedCaptioner, LoadedClassifier
from shards.synthetic import COLOURS, draw_scene, write_video

ROOT = Path(__file__).parents[2]
FUNCTIONS = [getattr(grurcn, name) for name in ("pack", "info", "clips", "train", "evaluate", "load")]


class LastLines(doctest.OutputChecker):
    """Compares the value that an example gives; lines of progress may stand above it."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return got.endswith(want)


@pytest.fixture(scope="module")
def folder(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples have been typed, one after the other: data/videos, data/mine, runs/gru-rcn-small."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "data").mkdir()
    (folder / "data" / "videos").symlink_to(videos)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for function in FUNCTIONS:
            runner = doctest.DocTestRunner(LastLines())
            for example in doctest.DocTestFinder().find(function, globs={"grurcn": grurcn}):
                assert example.examples, f"{function.__name__} has no example"
                printed: list[str] = []
                runner.run(example, out=printed.append)
                assert not runner.failures, "".join(printed)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedClassifier:
    found = grurcn.load(folder / "runs" / "gru-rcn-small")
    assert isinstance(found, LoadedClassifier)
    return found


def test_the_examples_of_the_docstrings_give_what_they_say(folder: Path):
    assert (folder / "runs" / "gru-rcn-small" / "finished.json").exists()


def test_every_public_function_says_what_it_gives():
    for name in grurcn.__all__:
        assert inspect.getdoc(getattr(grurcn, name))


def test_frames_in_memory_get_about_the_probabilities_of_their_video(model: LoadedClassifier, folder: Path):
    """The video is stored as H.264 before it is read, the frames are not."""
    import av

    video = folder / "data/videos/left/0.avi"
    with av.open(str(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    scores = model.scores(frames)
    predicted = model.predict(video)
    assert scores.shape == (4,)
    assert scores.sum().item() == pytest.approx(1)
    expected = [predicted.probabilities[name] for name in model.classes]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=scores.dtype), atol=0.05, rtol=0)


def test_the_module_is_a_plain_one_with_its_preprocessing(model: LoadedClassifier):
    frames = np.random.default_rng(0).integers(0, 256, (10, 50, 60, 3), dtype=np.uint8)
    clips = model.module.preprocess(frames)
    assert clips.shape == (1, 10, 3, 32, 32)
    with torch.no_grad():
        probabilities = model.module(clips)
    assert probabilities.shape == (1, 4)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: model.scores(np.zeros((3, 8, 8), np.uint8)),
            r"uint8 \(3, 8, 8\): expected uint8 \(frames, height",
        ),
        (lambda model: model.scores(np.zeros((3, 8, 8, 3))), "frames float64"),
        (lambda model: model.features("x.avi", "pool5"), "tap pool5: this model reads pool2, pool3, pool4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, message, model: LoadedClassifier):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_an_unknown_option_or_recipe_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(TypeError, match=r"grurcn\.pack: no option wdith"):
        grurcn.pack(folder / "data" / "videos", tmp_path / "out", wdith=40)
    with pytest.raises(ValueError, match="recipe gru-rnc: expected one of vgg16-frames, "):
        grurcn.train("gru-rnc", folder / "data" / "mine", storage=tmp_path)


def test_a_captioning_model_is_loaded_too(tmp_path: Path):
    write_video(
        tmp_path / "scene.avi", draw_scene(next(iter(COLOURS)), "square", "left", "up", np.random.default_rng(0))
    )
    model = grurcn.load(write_run(tmp_path / "run"))
    assert isinstance(model, LoadedCaptioner)
    captions = model.captions(tmp_path / "scene.avi")
    assert captions[0].words == model.predict(tmp_path / "scene.avi").words
    assert model.features(tmp_path / "scene.avi").ndim == 2


def test_importing_it_needs_no_package_and_a_function_that_needs_one_says_so():
    script = """
import importlib.abc, sys
ABSENT = {"ray", "deepspeed", "mlflow"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import grurcn
assert not {"torch", "numpy"} & set(sys.modules)
for call in (lambda: grurcn.train("demo", "x"), lambda: grurcn.evaluate("x", "y"), lambda: grurcn.pack("x", "y")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("grurcn.") and "needs the package" in line for line in lines)
