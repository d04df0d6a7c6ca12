"""What a model takes new videos for: as an evaluation of the same videos says, from files, the standard input, Ray tasks, and as
MLflow serves it."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from ports import free_port
from small_runs import TINY, run_train

from cluster.checkpoints.run_folder import load_best
from cluster.tracking.models import download_model
from grurcn.evaluation.score_files import read_scores
from grurcn.inference.classifier import Classifier
from grurcn.inference.mlflow_model import CODE, PACKAGES
from jobs import evaluate, predict
from jobs.predict import Predict

ROOT = Path(__file__).parents[3]
ON = {"clips": 3, "views": 5}


@pytest.fixture(scope="module")
def result(shards, storage) -> dict[str, Any]:
    """A run whose best model is registered as "motions"."""
    return run_train(shards, storage, "recognising", register="motions")


@pytest.fixture(scope="module")
def run(result, storage) -> Path:
    return storage / "recognising"


@pytest.fixture(scope="module")
def wanted(run, shards) -> dict[str, dict[str, float]]:
    """{name of a file of the test split: {class: probability}}, by an evaluation of its shards."""
    assert evaluate.main(evaluate.Evaluate(run=str(run), shards=str(shards), clips=ON["clips"], views=ON["views"])) == 0
    scores = read_scores(run / "evaluations" / "test-3x5")
    return {video.key: dict(zip(scores.classes, video.scores, strict=True)) for video in scores.videos}


@pytest.fixture(scope="module")
def files(wanted, videos) -> dict[str, Path]:
    """{key in the shards: the file that was packed}."""
    return {key: videos / key.split("-")[0] / f"{key.split('-')[1]}.avi" for key in wanted}


def found_in(json_file: Path) -> dict[str, dict[str, float]]:
    rows = json.loads(json_file.read_text())
    return {row["video"]: {each["class"]: each["probability"] for each in row["classes"]} for row in rows}


def job(run: Path | str, *videos: Path | str, **options: Any) -> Predict:
    return Predict(videos=tuple(map(Path, videos)), model=str(run), **{**ON, **options})


def test_a_file_gets_the_probabilities_that_an_evaluation_gives_it_in_a_shard(run, wanted, files, tmp_path, capsys):
    assert predict.main(job(run, *files.values(), json=tmp_path / "found.json", clips_at_once=4)) == 0
    found = found_in(tmp_path / "found.json")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    for line, (key, path) in zip(lines, files.items(), strict=True):
        assert found[str(path)] == pytest.approx(wanted[key], rel=1e-4)
        values = list(found[str(path)].values())
        assert values == sorted(values, reverse=True)
        assert line[0] == str(path)
        assert line[1::2] == list(found[str(path)])
        assert [float(value) for value in line[2::2]] == pytest.approx(values, abs=1e-4)
    [row, *_] = json.loads((tmp_path / "found.json").read_text())
    assert row["class"] == row["classes"][0]["class"]
    assert set(row["levels"]) == set(TINY.model.taps)
    documented = (predict.__doc__ or "").split("FILE holds")[1]
    assert all(key in documented for key in row)


def test_only_so_many_classes_are_told(run, files, capsys):
    assert predict.main(job(run, next(iter(files.values())), top=2)) == 0
    assert len(capsys.readouterr().out.split("\t")) == 5


def test_a_video_may_come_on_the_standard_input(run, wanted, files, tmp_path, monkeypatch):
    key, path = next(iter(files.items()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert predict.main(job(run, "-", json=tmp_path / "found.json")) == 0
    assert found_in(tmp_path / "found.json") == {"-": pytest.approx(wanted[key], rel=1e-4)}
    with pytest.raises(ValueError, match=r"-: other machines do not have this one's standard input"):
        predict.main(job(run, "-", workers=2))


def test_what_is_no_video_is_named_and_the_others_are_looked_at(run, files, tmp_path, capsys):
    (tmp_path / "notes.mp4").write_text("not a video")
    assert predict.main(job(run, tmp_path / "notes.mp4", next(iter(files.values())))) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert told.err.splitlines()[-1].startswith(f"error: {tmp_path}/notes.mp4: not a video that ffmpeg reads")


def test_sentences_are_not_had_from_a_model_of_classes(run, files):
    with pytest.raises(ValueError, match=r"captions were requested, but .* is a classification model"):
        predict.main(job(run, next(iter(files.values())), caption=True))


def test_more_views_than_the_recipe_allows_are_refused(run, files):
    with pytest.raises(ValueError, match=r"10 views hold mirrored ones"):
        predict.main(job(run, next(iter(files.values())), views=10))


def test_an_overlay_is_of_one_video(run, files, tmp_path):
    with pytest.raises(ValueError, match=r"--overlay draws one video file; found 2 videos; name one"):
        predict.main(job(run, *list(files.values())[:2], overlay=tmp_path / "out.mp4"))
    out = tmp_path / "out.mp4"
    assert predict.main(job(run, next(iter(files.values())), overlay=out, heat=True)) == 0
    assert out.stat().st_size > 1000


# MLflow


@pytest.mark.parametrize("name", ["models:/motions/1", "models:/motions/latest", "models:/motions@champion"])
def test_a_registered_model_says_the_same(result, storage, files, wanted, tmp_path, name):
    MlflowClient(result["tracking_uri"]).set_registered_model_alias("motions", "champion", "1")
    key, path = next(iter(files.items()))
    assert predict.main(job(name, path, storage=str(storage), json=tmp_path / "found.json")) == 0
    assert found_in(tmp_path / "found.json") == {str(path): pytest.approx(wanted[key], rel=1e-4)}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("models:/nothing/1", r"models:/nothing/1: not found in MLflow at sqlite:.*nothing"),
        ("models:/nothing/latest", r"models:/nothing/latest: no version of it is registered"),
        ("models:/motions/9", r"models:/motions/9: not found in MLflow"),
        ("models:/motions@nobody", r"models:/motions@nobody: not found in MLflow"),
        ("models:/motions", r"models:/motions: not found in MLflow"),
        ("models:/a/b/c", r"models:/a/b/c: expected models:/NAME/VERSION"),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_name(result, storage, files, name, reason):
    with pytest.raises(ValueError, match=reason):
        predict.main(job(name, next(iter(files.values())), storage=str(storage)))


def test_registering_the_best_model_again_adds_no_version(result, shards, storage):
    run_train(shards, storage, "recognising", register="motions")
    versions = MlflowClient(result["tracking_uri"]).search_model_versions("name = 'motions'")
    assert [str(version.version) for version in versions] == ["1"]


@pytest.fixture(scope="module")
def packaged(result, tmp_path_factory) -> Path:
    """The artifacts of the registered model."""
    folder = tmp_path_factory.mktemp("packaged")
    return download_model(result["tracking_uri"], "models:/motions/1", folder, whole=True)


def test_nothing_in_the_served_model_is_pickled_and_its_packages_are_pinned(packaged):
    found = {path.relative_to(packaged).as_posix() for path in packaged.rglob("*") if path.is_file()}
    assert {
        "MLmodel",
        "requirements.txt",
        "python_env.yaml",
        "data/model/model.safetensors",
        "data/model/state.json",
    } <= found
    assert {f"code/{name}/__init__.py" for name in CODE} <= found
    assert not [path for path in found if path.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    lines = (packaged / "requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines] == list(PACKAGES)
    assert all(line.count("==") == 1 for line in lines)


ALONE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "deepspeed", "webdataset", "tyro", "rich", "matplotlib", "psutil", "mlflow", "pyarrow"}:
            raise ModuleNotFoundError(f"No module named {name!r} (this machine has none)", name=name)

sys.meta_path.insert(0, Absent())
import torch
from cluster.checkpoints.run_folder import load_best
from grurcn.inference.classifier import Classifier, Sampling
from shards.packing.sandbox import Sandbox
from shards.video import Limits
from pathlib import Path

classifier = Classifier.of(load_best(sys.argv[1]), torch.device("cpu")).with_sampling(Sampling(clips=3, views=5))
with Sandbox(Limits()) as packer:
    found = classifier.predict(classifier.read(packer.store(Path(sys.argv[2]), classifier.packing)))
print(*found.probability.tolist())
"""


def test_a_model_is_used_where_there_is_no_ray_deepspeed_or_mlflow(packaged, files, wanted, tmp_path):
    """By the source that was logged with it, from another folder."""
    key, path = next(iter(files.items()))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(packaged / "data" / "model"), str(path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(packaged / "code")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    values = sorted(map(float, done.stdout.split()))
    assert values == pytest.approx(sorted(wanted[key].values()), rel=1e-4)


@contextmanager
def served(model: Path, port: int) -> Iterator[str]:
    """`mlflow models serve` of a folder."""
    bin_folder = Path(sys.executable).parent
    command = [bin_folder / "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "--port", port]
    with (model.parent / "serve.log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), cwd=model.parent, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": ""},
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").close()
                break
            except OSError:
                assert process.poll() is None, (model.parent / "serve.log").read_text()[-2000:]
                assert time.monotonic() < until, "waited two minutes"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def ask(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.cluster
def test_mlflow_serves_the_model_and_answers_with_the_labels_of_real_videos(packaged, files, wanted):
    (key, path), (other_key, other), *_ = files.items()
    params = {**ON, "top": 2}
    with served(packaged, free_port()) as url:
        video = base64.b64encode(path.read_bytes()).decode()
        rows = []
        for records in ([{"video": video}], [{"path": str(other)}, {"path": str(path)}]):
            status, told = ask(url, {"dataframe_records": records, "params": params})
            assert status == 200, told
            rows += told["predictions"]
        for row, of in zip(rows, (wanted[key], wanted[other_key], wanted[key]), strict=True):
            best = sorted(of, key=lambda name: -of[name])[:2]
            assert row["label"] == best[0]
            assert row["labels"] == best
            assert row["probability"] == row["probabilities"][0]
            assert row["probabilities"] == pytest.approx([of[name] for name in best], rel=1e-4)
        for record, reason in (
            ({"video": base64.b64encode(b"not a video").decode()}, "row 0: not a video that ffmpeg reads"),
            ({"path": "/nowhere.mp4"}, "row 0: cannot be read (No such file or directory)"),
            ({"path": str(other), "video": video}, "row 0: path and video given; expected one of path, video (bytes)"),
        ):
            status, told = ask(url, {"dataframe_records": [record], "params": params})
            assert (status, reason in told["message"]) == (400, True), told
        status, told = ask(url, {"dataframe_records": [{"video": video}], "params": {"views": 3}})
        assert (status, "3 views: expected 1 (centre)" in told["message"]) == (400, True), told


def test_a_model_that_does_not_say_how_its_videos_were_stored_is_refused(run):
    model = load_best(run)
    training = dataclasses.replace(model.training, model={"classes": model.training.model["classes"]})
    classifier = Classifier(model.weights, training, torch.device("cpu"))
    with pytest.raises(ValueError, match="does not say how its videos were stored: an older version trained it"):
        classifier.views(1)
