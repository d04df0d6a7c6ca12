"""First weights of a trunk: ImageNet's, a file's, those of a run's folder, of a checkpoint and of an MLflow run."""

import hashlib
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.checkpoints.files import Snapshot
from cluster.checkpoints.run_folder import RunFolder, load_best
from cluster.checkpoints.state import Optimizer, Training
from cluster.checkpoints.writer import CheckpointWriter
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.models import download_best
from cluster.tracking.server import NoTracking, open_run, tracking_uri
from grurcn.inference.model_source import absolute_source
from grurcn.models import weights as weight_files
from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.trunks import mobilenet
from grurcn.models.trunks.base import TRUNKS, BadWeights, load_weights
from grurcn.models.trunks.mobilenet import MobileNetV2
from grurcn.models.trunks.vgg import VGG16
from grurcn.training import pretrained
from grurcn.training.pretrained import first_weights, read_pretrained
from grurcn.training.recipes import Recipe

VGG = Recipe(model=ModelConfig(taps=("pool1", "pool2"), hidden=(3, 4), width=1 / 32))
MOBILENET = Recipe(model=ModelConfig(trunk="mobilenet_v2", taps=("stride8",), hidden=(3,), width=1 / 8))


AWAY = "http://127.0.0.1:9"  # a tracking server that is never asked


def random_model(recipe: Recipe, seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in build_model(recipe.model, 5, seed).state_dict().items()}


def write_run(folder: Path, recipe: dict, newest: dict, best: dict | None = None) -> Path:
    """A run with its newest weights at step 8, and, if wanted, its best ones at step 4."""
    writer = CheckpointWriter(RunFolder(str(folder)), keep=2)
    writer.with_frozen = False
    optimizer, model = Optimizer(name="SGD", step_counts={}), {"classes": list("abcde")}
    for step, weights, validated in ((4, best, {"loss": 1.0}), (8, newest, None)):
        if weights is not None:
            snapshot = Snapshot(weights=weights, frozen=None, moments={}, optimizer=optimizer)
            writer.write(snapshot, Training(step=step, recipe=recipe, model=model), validated)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of VGG-16 whose best weights, of seed 1, are not its newest, of seed 2."""
    return write_run(tmp_path / "runs" / "mine", VGG.to_dict(), random_model(VGG, 2), random_model(VGG, 1))


def assert_are_the_trunks(found: dict, model: dict) -> None:
    wanted = {name.removeprefix("trunk."): tensor for name, tensor in model.items() if name.startswith("trunk.")}
    assert found.keys() == wanted.keys()
    assert found
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# ImageNet and files


@pytest.mark.parametrize(
    ("trunk", "url", "digits"),
    [
        ("vgg16", "https://download.pytorch.org/models/vgg16-397923af.pth", 64),
        ("mobilenet_v2", "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth", 8),
    ],
)
def test_imagenets_weights_are_torchvisions(monkeypatch, trunk, url, digits):
    monkeypatch.setattr(pretrained, "read_weights", lambda source: {"asked for": source})
    [found, digest] = read_pretrained("imagenet", trunk, AWAY)["asked for"].split("#sha256=")
    assert found == url
    assert len(digest) == digits
    assert url.endswith(f"-{digest[:8]}.pth")


def test_imagenets_weights_are_read_from_the_cache_where_there_is_no_network(monkeypatch, tmp_path):
    def no_network(*_args, **_options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(weight_files, "CACHE", tmp_path)
    with pytest.raises(
        BadWeights, match=r"cannot be downloaded \(Network is unreachable\); .*its path, or put it at"
    ) as error:
        read_pretrained("imagenet", "mobilenet_v2", AWAY)
    path = Path(str(error.value).split("put it at ")[1])

    torch.save({"features.0.0.weight": torch.ones(2)}, path)
    with pytest.raises(BadWeights, match=r"SHA-256 .*, (wanted|expected) b0353104"):
        read_pretrained("imagenet", "mobilenet_v2", AWAY)
    url = mobilenet.IMAGENET.split("#")[0]
    monkeypatch.setitem(TRUNKS, "mobilenet_v2", replace(mobilenet.SPEC, imagenet=f"{url}#sha256={sha256(path)}"))
    path.rename(tmp_path / f"{sha256(path)[:16]}-mobilenet_v2-b0353104.pth")
    assert torch.equal(read_pretrained("imagenet", "mobilenet_v2", AWAY)["features.0.0.weight"], torch.ones(2))


def test_a_file_is_read_by_its_path(tmp_path):
    torch.save({"features.0.weight": torch.ones(2)}, tmp_path / "mine.pth")
    assert torch.equal(read_pretrained(str(tmp_path / "mine.pth"), "vgg16", AWAY)["features.0.weight"], torch.ones(2))


def test_a_path_where_there_is_nothing_is_refused_by_name(tmp_path):
    with pytest.raises(BadWeights, match=r"nowhere: no such file"):
        read_pretrained(str(tmp_path / "nowhere"), "vgg16", AWAY)


# Runs


def test_a_runs_folder_gives_the_trunk_of_its_best_model(run):
    assert_are_the_trunks(read_pretrained(str(run), "vgg16", AWAY), random_model(VGG, 1))


def test_a_checkpoint_gives_the_trunk_of_its_best_model(run):
    assert_are_the_trunks(read_pretrained(str(run / "checkpoint-00000004"), "vgg16", AWAY), random_model(VGG, 1))


def test_a_run_that_nothing_was_validated_in_gives_its_newest(tmp_path):
    write_run(tmp_path, VGG.to_dict(), random_model(VGG, 2))
    assert_are_the_trunks(read_pretrained(str(tmp_path), "vgg16", AWAY), random_model(VGG, 2))


def test_a_runs_trunk_fills_another_models(run):
    trunk = VGG16(["pool2"], 1 / 32)
    load_weights(trunk, read_pretrained(str(run), "vgg16", AWAY), str(run))
    assert torch.equal(trunk.state_dict()["features.7.weight"], random_model(VGG, 1)["trunk.features.7.weight"])


def test_batch_norms_statistics_come_with_a_runs_trunk(tmp_path):
    model = random_model(MOBILENET, 1)
    model["trunk.features.0.1.running_mean"] += 0.25
    write_run(tmp_path, MOBILENET.to_dict(), random_model(MOBILENET, 2), model)
    found = read_pretrained(str(tmp_path), "mobilenet_v2", AWAY)
    assert_are_the_trunks(found, model)
    trunk = MobileNetV2(["stride4"], 1 / 8)
    load_weights(trunk, found, str(tmp_path))
    assert torch.equal(trunk.state_dict()["features.0.1.running_mean"], torch.full((4,), 0.25))


def test_a_path_may_start_at_home(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert_are_the_trunks(read_pretrained("~/mine", "vgg16", AWAY), random_model(VGG, 1))


def test_a_run_from_before_there_was_a_choice_is_one_of_vgg(tmp_path):
    recipe = VGG.to_dict()
    del recipe["model"]["trunk"]
    write_run(tmp_path, recipe, random_model(VGG, 2))
    assert_are_the_trunks(read_pretrained(str(tmp_path), "vgg16", AWAY), random_model(VGG, 2))
    with pytest.raises(BadWeights, match="this run's trunk is vgg16, expected mobilenet_v2"):
        read_pretrained(str(tmp_path), "mobilenet_v2", AWAY)


@pytest.mark.parametrize(
    ("recipe", "wanted", "found"), [(VGG, "mobilenet_v2", "vgg16"), (MOBILENET, "vgg16", "mobilenet_v2")]
)
def test_a_run_of_the_other_trunk_is_refused(tmp_path, recipe, wanted, found):
    write_run(tmp_path, recipe.to_dict(), random_model(recipe, 2))
    with pytest.raises(
        BadWeights, match=rf"{tmp_path}: this run's trunk is {found}, expected {wanted}; .*--model\.trunk {found}"
    ):
        read_pretrained(str(tmp_path), wanted, AWAY)


def test_a_run_of_a_model_without_a_trunk_is_refused(tmp_path):
    weights = {"conv1a.weight": torch.ones(2), "conv1a.bias": torch.ones(2), "fc8.bias": torch.ones(2)}
    write_run(tmp_path, VGG.to_dict(), weights)
    with pytest.raises(BadWeights, match=r"has no trunk \(found conv1a\.bias, conv1a\.weight, fc8\.bias, .*over vgg16"):
        read_pretrained(str(tmp_path), "vgg16", AWAY)


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in it; expected a run's folder"):
        read_pretrained(str(tmp_path), "vgg16", AWAY)


# MLflow


def open_mlflow_run(storage: Path) -> tuple[str, str]:
    uri = tracking_uri(storage)
    return uri, open_run(uri, storage, "pretrained", "mine", None, {}, {}, {})


def send_checkpoint(run: Path, uri: str, run_id: str, name: str) -> list[str]:
    """Gives back what was said."""
    said = []
    with MlflowRun(uri, run_id, RunFolder(str(run)), said.append) as report:
        report.log_checkpoint(name, keep=1)
    return said


def test_an_mlflow_run_gives_the_trunk_of_its_best_model(run, storage):
    uri, run_id = open_mlflow_run(storage)
    send_checkpoint(run, uri, run_id, "checkpoint-00000004")
    send_checkpoint(run, uri, run_id, "checkpoint-00000008")
    assert_are_the_trunks(read_pretrained(f"runs:/{run_id}", "vgg16", uri), random_model(VGG, 1))
    with pytest.raises(BadWeights, match=rf"runs:/{run_id}: this run's trunk is vgg16, expected mobilenet_v2"):
        read_pretrained(f"runs:/{run_id}", "mobilenet_v2", uri)


def test_a_damaged_best_model_is_not_sent_and_one_that_changed_on_the_way_is_refused(run, storage, tmp_path):
    uri, run_id = open_mlflow_run(storage)
    send_checkpoint(run, uri, run_id, "checkpoint-00000008")
    place = download_best(uri, run_id, tmp_path)
    damage(place / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: SHA-256 .* the file has changed"):
        load_best(place)
    damage(run / "checkpoint-00000004" / "model.safetensors")
    uri, run_id = open_mlflow_run(storage)
    [said] = send_checkpoint(run, uri, run_id, "checkpoint-00000008")
    assert "checkpoint-00000008 was not sent to MLflow" in said
    assert "the file has changed" in said


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_best_model_lies_in_the_wanted_folder(run, storage, tmp_path):
    uri, run_id = open_mlflow_run(storage)
    send_checkpoint(run, uri, run_id, "checkpoint-00000008")
    (folder := tmp_path / "here").mkdir()
    place = download_best(uri, run_id, folder)
    assert folder in place.parents
    assert {path.name for path in place.iterdir()} == {"model.safetensors", "state.json"}


def test_a_run_without_a_best_model_is_refused(storage):
    uri, run_id = open_mlflow_run(storage)
    with pytest.raises(ValueError, match=rf"MLflow run {run_id} at sqlite:.* has no best model"):
        read_pretrained(f"runs:/{run_id}", "vgg16", uri)


def test_a_run_that_mlflow_does_not_have_is_refused(storage):
    uri, _ = open_mlflow_run(storage)
    with pytest.raises(ValueError, match=rf"MLflow at sqlite:.* has no run {'0' * 32} \(.*\); set MLFLOW_TRACKING_URI"):
        read_pretrained(f"runs:/{'0' * 32}", "vgg16", uri)


def test_a_server_that_is_away_is_refused_at_once():
    with pytest.raises(NoTracking, match=r"no MLflow server at http://127\.0\.0\.1:9"):
        read_pretrained(f"runs:/{'0' * 32}", "vgg16", AWAY)


@pytest.mark.parametrize(
    "name", ["runs:/", "runs:/best", f"runs:/{'0' * 31}", f"runs:/{'0' * 32}/best", f"runs:{'0' * 32}"]
)
def test_what_is_no_runs_id_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: expected runs:/ID, with the 32 hexadecimal digits"):
        read_pretrained(name, "vgg16", AWAY)


# What a model begins with


def test_a_model_without_weights_begins_with_none():
    assert first_weights(ModelConfig(), AWAY) is None


def test_c3d_begins_with_a_file_and_has_no_imagenet(tmp_path):
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "sports1m.pth")
    found = first_weights(ModelConfig(kind="c3d", weights=str(tmp_path / "sports1m.pth")), AWAY)
    assert found is not None
    assert list(found) == ["conv1.weight"]
    with pytest.raises(BadWeights, match="imagenet: C3D has no ImageNet weights; expected a file"):
        first_weights(ModelConfig(kind="c3d", weights="imagenet"), AWAY)


def test_a_path_is_the_same_from_any_folder_and_names_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_source("runs/mine") == str(tmp_path / "runs" / "mine")
    for source in (None, "imagenet", f"runs:/{'0' * 32}", "https://example.org/vgg16.pth#sha256=00000000"):
        assert absolute_source(source) == source
