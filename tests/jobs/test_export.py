"""Exported models: the model's numbers, from files that stand alone; what they say of themselves; what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from caption_runs import write_run as write_caption_run

from cluster.checkpoints.files import Snapshot
from cluster.checkpoints.run_folder import RunFolder
from cluster.checkpoints.state import Optimizer, Training
from cluster.checkpoints.writer import CheckpointWriter
from grurcn.inference import export
from grurcn.inference.classifier import Classifier
from grurcn.inference.export import ExportJob
from grurcn.inference.meta import OtherTask
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.gru_rcn import GRURCN
from grurcn.training.recipes import Recipe
from jobs.export import COMMAND, main
from shards.reading.clips import ClipConfig
from shards.video import Packing

GRU = ModelConfig(taps=("pool1", "pool2"), hidden=(4, 6), width=1 / 16)
CLIPS = ClipConfig(num_frames=3, stride=2, size=16)
FLOW = dataclasses.replace(CLIPS, stream="flow", flow_fields=3)
PACKING = Packing(width=48, height=32, flow="dis", flow_bound=15)
CLASSES = ["a", "b", "ü 漢", "d", "e"]

RECIPES = {
    "gru": Recipe(model=dataclasses.replace(GRU, taps=("pool2",), hidden=(6,)), clips=CLIPS),
    "stacked": Recipe(
        model=dataclasses.replace(GRU, stacked=True, bidirectional=True), clips=dataclasses.replace(CLIPS, num_frames=2)
    ),
    "frames": Recipe(model=dataclasses.replace(GRU, kind="frames"), clips=CLIPS),
    "mobilenet": Recipe(
        model=ModelConfig(kind="frames", trunk="mobilenet_v2", taps=("stride4",), width=1 / 16),
        clips=dataclasses.replace(CLIPS, size=20, num_frames=2),
    ),
    "c3d": Recipe(model=ModelConfig(kind="c3d", width=1 / 64), clips=ClipConfig(num_frames=16, size=112)),
    "flow": Recipe(model=dataclasses.replace(GRU, kind="frames"), clips=FLOW),
}
# Deep ones, whose export takes long.
DEEP = {
    "fc": Recipe(
        model=ModelConfig(taps=("pool4", "fc7"), hidden=(3, 5), width=1 / 64),
        clips=dataclasses.replace(CLIPS, size=64, num_frames=1),
    ),
    "mobilenet-gru": Recipe(
        model=ModelConfig(trunk="mobilenet_v2", taps=("stride8", "pooled"), hidden=(3, 4), width=1 / 16),
        clips=dataclasses.replace(CLIPS, size=20),
    ),
    "flow-gru": Recipe(model=GRU, clips=FLOW),
    "deep-stacked": Recipe(
        model=dataclasses.replace(GRU, stacked=True, bidirectional=True), clips=dataclasses.replace(CLIPS, num_frames=5)
    ),
}
ALL = RECIPES | DEEP
ONNX = ("gru", "c3d")  # the exporter takes seconds a model
MORE_ONNX = tuple(name for name in ALL if name not in ONNX)


def training_of(recipe: Recipe) -> Training:
    return Training(step=8, recipe=recipe.to_dict(), model={"classes": CLASSES, "packing": vars(PACKING)})


def weights_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Random weights that are sure of something else for other clips."""
    model = build_model(recipe.model, len(CLASSES), seed=1, in_channels=recipe.clips.channels)
    if isinstance(model, GRURCN):
        for head in model.heads:
            assert isinstance(head, torch.nn.Linear)
            torch.nn.init.normal_(head.weight, std=8, generator=torch.Generator().manual_seed(2))
    return model.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in ALL.items():
        write_run_of(folder / name, recipe)
    return {name: folder / name for name in ALL}


def write_run_of(folder: Path, recipe: Recipe) -> None:
    snapshot = Snapshot(
        weights=weights_of(recipe),
        frozen=None,
        moments={},
        optimizer=Optimizer(name="SGD", step_counts={}),
    )
    CheckpointWriter(RunFolder(str(folder)), keep=1).write(snapshot, training_of(recipe), {"loss": 1.0})


def clips_of(recipe: Recipe, count: int) -> np.ndarray:
    """Smooth pictures and noise, uint8, as a file takes them."""
    rng = np.random.default_rng(count)
    channels, size = (2 if recipe.clips.stream == "flow" else 3), recipe.clips.size
    coarse = rng.uniform(0, 255, (count, recipe.clips.frames_read, channels, 4, 4))
    cells = -(-size // 4)
    smooth = coarse.repeat(cells, axis=-1).repeat(cells, axis=-2)[..., :size, :size]
    return np.rint(0.8 * smooth + 0.2 * rng.uniform(0, 255, smooth.shape)).astype(np.uint8)


def wanted_of(recipe: Recipe, clips: np.ndarray) -> np.ndarray:
    """(B, L, K) float64 by each level, as the definition says: normalised by hand, in the model that is trained."""
    classifier = Classifier(weights_of(recipe), training_of(recipe), torch.device("cpu"), "fp32")
    pixels = torch.from_numpy(clips).float()
    if recipe.clips.stream == "flow":
        # Stored planes of the model's own size, of which the view is all: nothing is cut or resized.
        planes = torch.from_numpy(clips).flatten(2, 3)
        count, size = len(clips), recipe.clips.size
        box, mirror = torch.tensor([[0, 0, size, size]] * count), torch.zeros(count, dtype=torch.bool)
        pixels = model_input(planes, torch.full((count,), PACKING.flow_bound), box, mirror, recipe.clips)
    else:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.inference_mode():
        return classifier.model(pixels, torch.zeros(len(clips), dtype=torch.int64)).double().exp().numpy()


# A process that has torch, and none of our packages.
ALONE = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"grurcn", "shards", "cluster", "jobs"}:
            raise ModuleNotFoundError(f"No module named {name!r} (this machine has none)", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np, torch

try:
    import grurcn
    sys.exit("grurcn is here")
except ModuleNotFoundError:
    pass
for path, clips, out in json.load(sys.stdin):
    extra = {"grurcn.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    found = {"about": extra["grurcn.json"]}
    for name, of in np.load(clips).items():
        for kind, tensor in zip(("probabilities", "levels"), program(torch.from_numpy(of))):
            assert tensor.dtype == torch.float32
            found[f"{name}-{kind}"] = tensor.detach().numpy()
    np.savez(out, **found)
"""


def assert_right(recipe: Recipe, clips: np.ndarray, probabilities: np.ndarray, levels: np.ndarray) -> None:
    wanted = wanted_of(recipe, clips)
    assert levels.shape == wanted.shape
    np.testing.assert_allclose(levels, wanted, atol=1e-4)
    np.testing.assert_allclose(probabilities, wanted.mean(axis=1), atol=1e-4)


@pytest.fixture(scope="module")
def programs(runs, tmp_path_factory) -> tuple[dict[str, Path], dict[str, Path]]:
    """{recipe: its .pt2}, and {recipe: what it gave for 1 and for 3 clips in a process without our packages}."""
    folder = tmp_path_factory.mktemp("programs")
    files, results, asked = {}, {}, []
    for name, recipe in RECIPES.items():
        files[name], results[name] = folder / f"{name}.pt2", folder / f"{name}.npz"
        assert main(ExportJob(model=str(runs[name]), out=files[name])) == 0
        clips = folder / f"{name}-clips.npz"
        np.savez(clips, allow_pickle=False, **{f"{count}": clips_of(recipe, count) for count in (1, 3)})
        asked.append((str(files[name]), str(clips), str(results[name])))
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE],
        input=json.dumps(asked),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return files, results


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_program_gives_the_models_numbers_where_there_is_torch_alone(programs, name, count):
    found = np.load(programs[1][name])
    recipe = RECIPES[name]
    assert_right(recipe, clips_of(recipe, count), found[f"{count}-probabilities"], found[f"{count}-levels"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_program_is_of_plain_operations_and_runs_on_another_device(programs, name):
    program = torch.export.load(programs[0][name])
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(call.startswith(("aten.", "<built-in function", "sym")) for call in calls), calls
    clips = torch.from_numpy(clips_of(RECIPES[name], 3)).to("meta")  # shapes without numbers: there is no GPU here
    probabilities, levels = program.module().to("meta")(clips)
    assert levels.shape == (3, len(levels[0]), len(CLASSES))
    assert (probabilities.device.type, levels.device.type) == ("meta", "meta")


def test_a_program_says_what_it_is(programs, runs):
    about = json.loads(str(np.load(programs[1]["gru"])["about"]))
    assert about["classes"] == CLASSES
    assert about["levels"] == ["pool2"]
    assert about["recipe_digest"] == RECIPES["gru"].digest()
    assert (about["source"], about["step"], about["kind"]) == (str(runs["gru"]), 8, "gru-rcn")
    assert about["input"]["shape"] == "(B, 3, 3, 16, 16)"
    assert about["input"]["content"] == "3 RGB frames of 0 to 255, every 2 of the video"
    assert "centre square of 0.875 of the shorter side" in about["input"]["crop"]
    assert about["input"]["stored_frames"] == "48 x 32"
    flow = json.loads(str(np.load(programs[1]["flow"])["about"]))
    assert flow["input"]["shape"] == "(B, 7, 2, 16, 16)"  # 3 steps, every 2, of 3 fields each
    assert "128 + 127 * pixels / 15" in flow["input"]["content"]


@pytest.fixture(scope="module")
def onnx_files(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    files = {name: folder / f"{name}.onnx" for name in ONNX}
    for name, path in files.items():
        assert main(ExportJob(model=str(runs[name]), out=path)) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in files.values()
    )  # one file each
    return files


@pytest.mark.parametrize("name", ONNX)
def test_onnx_runtime_gives_the_models_numbers(onnx_files, name):
    assert_runs(name, onnx_files[name])


@pytest.mark.long
@pytest.mark.parametrize("name", DEEP)
def test_a_program_gives_the_numbers_of_deep_models(runs, tmp_path, name):
    assert main(ExportJob(model=str(runs[name]), out=tmp_path / "x.pt2")) == 0
    program = torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 3):
        clips = clips_of(DEEP[name], count)
        assert_right(DEEP[name], clips, *(tensor.numpy() for tensor in program(torch.from_numpy(clips))))


@pytest.mark.long
@pytest.mark.parametrize("name", MORE_ONNX)
def test_onnx_runtime_gives_the_numbers_of_every_kind_of_model(runs, tmp_path, name):
    assert main(ExportJob(model=str(runs[name]), out=tmp_path / "x.onnx")) == 0
    assert_runs(name, tmp_path / "x.onnx")


def assert_runs(name: str, path: Path) -> None:
    """An ONNX file of a recipe's model, for 1 and for 3 clips."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert (given.name, given.type) == ("clips", "tensor(uint8)")
    assert [output.name for output in session.get_outputs()] == ["probabilities", "levels"]
    for count in (1, 3):
        clips = clips_of(ALL[name], count)
        probabilities, levels = map(np.asarray, session.run(["probabilities", "levels"], {"clips": clips}))
        assert_right(ALL[name], clips, probabilities, levels)


def test_an_onnx_file_says_what_it_is(onnx_files):
    proto = onnx.load(onnx_files["gru"])
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["classes"]) == CLASSES
    assert json.loads(about["levels"]) == ["pool2"]
    assert about["recipe_digest"] == RECIPES["gru"].digest()
    assert json.loads(about["input"])["shape"] == "(B, 3, 3, 16, 16)"


def test_a_fixed_batch_is_the_only_one(runs, tmp_path):
    assert main(ExportJob(model=str(runs["frames"]), out=tmp_path / "two.pt2", batch=2)) == 0
    program = torch.export.load(tmp_path / "two.pt2").module()
    clips = clips_of(RECIPES["frames"], 2)
    assert_right(RECIPES["frames"], clips, *(tensor.numpy() for tensor in program(torch.from_numpy(clips))))
    with pytest.raises(Exception, match=r"(?i)shape|guard|expected"):
        program(torch.from_numpy(clips_of(RECIPES["frames"], 3)))


def test_the_command_line_tells_size_input_and_the_largest_difference(runs, tmp_path, capsys):
    args = ["--model", str(runs["frames"]), "--out", str(tmp_path / "new" / "x.pt2"), "--batch", "1"]
    assert main(COMMAND.parse(args, "export")) == 0
    said = capsys.readouterr().out
    assert f"to {tmp_path / 'new' / 'x.pt2'}: a program of torch.export" in said
    assert "(1, 3, 3, 16, 16) uint8; 5 classes, levels pool1, pool2;" in said
    difference = float(said.partition("differ from the model's by ")[2].split()[0])
    assert 0 <= difference < 1e-5


# What is refused


def test_a_file_whose_numbers_are_not_the_models_does_not_appear(runs, tmp_path, monkeypatch):
    def wrong(*args):
        run = export.write_pt2(*args)
        return lambda clips: tuple(tensor + 2e-4 for tensor in run(clips))

    monkeypatch.setitem(export.WRITERS, ".pt2", lambda: wrong)
    with pytest.raises(
        ValueError, match=r"differ from the model's by 2\.0e-04, expected at most 0\.0001; nothing was written"
    ):
        main(ExportJob(model=str(runs["frames"]), out=tmp_path / "x.pt2"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.pth", "model", "model.PT2"])
def test_another_suffix_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: ends with .*; expected \.pt2 or \.onnx"):
        ExportJob(model="runs/x", out=Path(name))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch 0: expected dynamic, or at least 1"):
        ExportJob(model="runs/x", out=Path("x.pt2"), batch=0)


def test_a_file_that_is_there_already_stays_as_it_is(runs, tmp_path):
    (tmp_path / "x.pt2").write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.pt2: exists already; remove it"):
        main(ExportJob(model=str(runs["gru"]), out=tmp_path / "x.pt2"))
    assert (tmp_path / "x.pt2").read_text() == "mine"


def test_a_folder_that_cannot_be_one_is_an_os_error(runs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        main(ExportJob(model=str(runs["gru"]), out=tmp_path / "file" / "x.pt2"))


def test_no_such_run_is_one_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no checkpoint in it; expected a run's folder"):
        main(ExportJob(model=str(tmp_path / "nowhere"), out=tmp_path / "out" / "x.pt2"))
    assert not list((tmp_path / "out").iterdir())


def test_a_run_of_captioning_is_refused_by_name(tmp_path):
    run = write_caption_run(tmp_path / "caption")
    with pytest.raises(OtherTask, match=r"classes were requested, but .*caption is a captioning model; use a run"):
        main(ExportJob(model=str(run), out=tmp_path / "out" / "x.pt2"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_without_onnxs_packages_the_error_names_the_extra(runs, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"package {missing}, which is not installed; pip install 'grurcn\[export\]'"):
        main(ExportJob(model=str(runs["gru"]), out=tmp_path / "x.onnx"))
    assert not list(tmp_path.iterdir())


def test_more_weights_than_one_file_of_onnx_holds_are_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MOST_ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"GiB of weights: one file of ONNX holds less than 2 GiB; write a \.pt2"):
        main(ExportJob(model=str(runs["gru"]), out=tmp_path / "x.onnx"))
