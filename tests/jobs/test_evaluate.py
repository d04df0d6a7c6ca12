"""The evaluation job in this process: the protocol against a slow oracle, what it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from small_runs import TINY, run_evaluate, run_train

from cluster.checkpoints.run_folder import load_best
from grurcn.evaluation.evaluate import OtherData
from grurcn.models.build import build_model
from grurcn.models.pixels import to_clips
from grurcn.models.votes import log_mean_vote
from jobs import evaluate, make_shards
from shards.index import Index
from shards.reading.clips import evaluation_clips, evaluation_views
from shards.reading.decode import read_frames
from shards.store import BadShards


@pytest.fixture(scope="module")
def run(shards, storage) -> Path:
    run_train(shards, storage, "evaluated")
    return storage / "evaluated"


def test_scores_are_the_mean_probability_of_all_clips_and_views(run, shards):
    """Against the same by hand: one clip and one view at a time, frames read anew for each."""
    result = run_evaluate(run, shards, clips=3, views=5, clips_at_once=4)
    table = pq.read_table(result["scores"])
    assert json.loads(table.schema.metadata[b"classes"]) == ["down", "left", "right", "up"]
    rows = table.to_pylist()

    index, trained = Index(shards, "test"), load_best(run)
    model = build_model(TINY.model, 4, 0)
    model.load_state_dict(trained.weights)
    model.eval()
    right = 0
    for number in range(len(index)):
        sample = index[number]
        with (shards / sample.shard).open("rb") as file:
            file.seek(sample.offset)
            data = file.read(sample.size_bytes)
        votes = []
        for frames in evaluation_clips(sample.num_frames, 3, TINY.clips):
            planes = torch.from_numpy(read_frames(data, frames.tolist(), index.info.packing))[None]
            for box, mirror in evaluation_views(40, 40, 5, TINY.clips):
                with torch.no_grad():
                    clip = to_clips(planes, torch.tensor([box]), torch.tensor([mirror]), TINY.clips.size)
                    votes.append(log_mean_vote(model(clip, torch.zeros(1, dtype=torch.int64))).exp()[0])
        wanted = torch.stack(votes).mean(dim=0)
        [row] = [row for row in rows if row["key"] == sample.key]
        assert row["scores"] == pytest.approx(wanted.tolist(), rel=1e-4)
        assert row["class"] == index.info.classes[sample.label]
        assert row["predicted"] == index.info.classes[int(wanted.argmax())]
        right += int(wanted.argmax()) == sample.label
    assert result["videos"] == len(rows) == 4
    assert result["top1"] == right / 4
    assert sum(of_class["videos"] for of_class in result["per_class"].values()) == 4


def test_figures_go_to_the_run_that_made_the_model(run, shards, capsys):
    result = run_evaluate(run, shards, split="val", clips=2, views=1)
    client = MlflowClient(result["tracking_uri"])
    for key in ("loss", "top1", "top5"):  # the training logged val/ too, of other clips and at later steps
        history = client.get_metric_history(result["mlflow_run_id"], f"val/{key}")
        assert (result["step"], result[key]) in [(metric.step, metric.value) for metric in history], key
    logged = {file.path for file in client.list_artifacts(result["mlflow_run_id"], "evaluations/val-2x1")}
    files = {"scores.parquet", "result.json", "confusion.png", "classes.png", "levels.png"}
    assert {f"evaluations/val-2x1/{name}" for name in files} <= logged
    assert capsys.readouterr().out.splitlines()[-1].startswith("evaluated the best model of")
    documented = (evaluate.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in result)


def test_what_does_not_fit_is_refused(run, shards, videos, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no checkpoint in it; expected a run's folder"):
        run_evaluate(tmp_path / "nowhere", shards)
    with pytest.raises(BadShards, match="no samples in the split 'trial'"):
        run_evaluate(run, shards, split="trial")
    with pytest.raises(ValueError, match="3 views: expected 1"):
        run_evaluate(run, shards, views=3)
    with pytest.raises(ValueError, match="10 views hold mirrored ones, but this recipe was not trained to mirror"):
        run_evaluate(run, shards, views=10)
    (fewer := tmp_path / "videos").mkdir()
    for name in ("left", "right"):
        (fewer / name).symlink_to(videos / name)
    from packing import packing_job

    make_shards.main(packing_job(fewer, tmp_path / "fewer"))
    with pytest.raises(OtherData, match=r"2 classes \(left, right, \.\.\.\), but .* was trained for 4"):
        run_evaluate(run, tmp_path / "fewer")


def test_a_model_file_that_changed_is_refused(run, shards, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    best = copy / f"checkpoint-{load_best(copy).step:08}" / "model.safetensors"
    damaged = bytearray(best.read_bytes())
    damaged[-1] ^= 1
    best.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: SHA-256 \w+\.\.\. found, .* has changed since it was written"
    ):
        load_best(copy)
