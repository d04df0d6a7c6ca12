"""The table: every row trained, evaluated and fused in one command, and nothing done twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from packing import packing_job

from cluster.checkpoints.run_folder import OtherRun
from cluster.tracking.server import tracking_uri
from grurcn.evaluation.table1 import (
    Cell,
    Table1Changes,
    Table1Job,
    TableRun,
    cells_of,
    markdown,
    recipe_of,
    reproduce_table1,
    run_name,
    summarize_runs,
)
from grurcn.models.trunks.base import BadWeights
from grurcn.models.trunks.mobilenet import MobileNetV2
from grurcn.training.recipes import RECIPES, over_trunk
from jobs import make_shards
from jobs.table1 import Table1Options, main
from shards.store import BadShards


@pytest.fixture(scope="module")
def flow_shards(videos: Path, tmp_path_factory) -> Path:
    """The motions packed with their optical flow."""
    pytest.importorskip("cv2")
    out = tmp_path_factory.mktemp("packed") / "with-flow"
    make_shards.main(packing_job(videos, out, flow="dis"))
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of a whole MobileNetV2, as a download would be."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.save(MobileNetV2(("pooled",)).state_dict(), path)
    return path


def tiny(shards: Path, storage: Path, weights: Path, **options) -> Table1Options:
    changes = Table1Changes(
        size=32, num_frames=3, global_batch=4, num_steps=2, val_every=2, learning_rate=1e-3, hidden=(4, 4, 4, 4, 4)
    )
    values: dict[str, Any] = {
        "trunk": "mobilenet_v2",
        "clips": 2,
        "views": 1,
        "changes": changes,
        "weights": str(weights),
    } | options
    return Table1Options(shards=(str(shards),), storage=storage, **values)


def mlflow_runs(storage: Path) -> list[Any]:
    client = MlflowClient(tracking_uri(storage))
    return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


@pytest.mark.long(minutes=3)
def test_all_rows_in_one_command_and_a_second_one_does_nothing_again(flow_shards, storage, weights, capsys):
    job = tiny(flow_shards, storage / "table", weights, rows=("frames", "gru-rcn", "bidirectional"))
    assert main(job) == 0
    result = json.loads((storage / "table" / "table1" / "table1.json").read_text())
    runs = {(row["row"], row["stream"]): [run["run"] for run in row["runs"]] for row in result["rows"]}
    assert runs["MobileNetV2, single frames", "rgb"] == ["frames-mobilenet_v2-rgb-with-flow-seed0"]
    assert runs["Stacked GRU-RCN", "rgb"] == []
    assert len(runs["MobileNetV2, RGB + flow", "rgb + flow"]) == 1
    assert len(runs["Bi-directional GRU-RCN RGB + GRU-RCN flow", "rgb + flow"]) == 1
    for row in result["rows"]:
        for run in row["runs"]:
            assert run["videos"] == 4
            assert row["top1"] == run["top1"]
    said = capsys.readouterr().out
    assert "[5 of 5]" in said
    assert "| GRU-RCN | flow |" in said
    assert (storage / "table" / "table1" / "table1.md").read_text() in said
    assert (storage / "table" / "table1" / "table1.png").read_bytes().startswith(b"\x89PNG")

    # The other rows read the trunk that was fine-tuned on frames, which is not the one that it began with.
    tuned, reader = (
        json.loads((storage / "table" / f"{row}-mobilenet_v2-rgb-with-flow-seed0" / "run.json").read_text())["recipe"]
        for row in ("frames", "bidirectional")
    )
    assert tuned["model"]["weights"] == str(weights)
    assert reader["model"]["weights"] == str(storage.absolute() / "table" / "frames-mobilenet_v2-rgb-with-flow-seed0")
    assert reader["model"]["freeze"] is None

    # A row that was cut off: its training is gone on with, the others are left alone.
    cut = storage / "table" / "gru-rcn-mobilenet_v2-rgb-with-flow-seed0"
    (cut / "finished.json").unlink()
    shutil.rmtree(cut / "evaluations")
    assert main(job) == 0
    said = capsys.readouterr().out
    assert said.count("was finished before") == said.count("was evaluated before") == 4
    assert f"going on after step 2 from {cut / 'checkpoint-00000002'}" in said
    assert json.loads((storage / "table" / "table1" / "table1.json").read_text()) == result

    # Rows of other options are no rows of this table, finished as they are.
    with pytest.raises(OtherRun, match=r"frames-.*optim\.learning_rate 0\.001 there, 0\.5 here"):
        main(replace(job, changes=replace(job.changes, learning_rate=0.5)))
    statuses = {run.info.status for run in mlflow_runs(storage / "table")}
    assert statuses == {"FINISHED"}


def test_without_flow_in_the_shards_its_cells_are_not_run(shards, weights, tmp_path):
    job = tiny(shards, tmp_path, weights)
    assert {cell.stream for cell in cells_of(job, ("rgb",))} == {"rgb"}
    with pytest.raises(BadShards, match="flow"):
        reproduce_table1(tiny(shards, tmp_path, weights, streams=("flow",), rows=("gru-rcn",)))


def test_without_fine_tuning_all_rows_read_the_same_trunk(shards, weights, tmp_path):
    job = tiny(shards, tmp_path, weights, finetune=False, rows=("rnn", "gru-rcn"))
    cells = list(cells_of(job, ("rgb",)))
    assert [cell.row for cell in cells] == ["rnn", "gru-rcn"]
    frames = Cell(row="frames", stream="rgb", shards=str(shards), seed=0)
    for cell in [*cells, frames]:
        recipe = recipe_of(job, cell)
        assert recipe.model.weights == str(weights)
        assert recipe.model.frozen
        assert recipe.clips.num_frames == 3
    assert recipe_of(job, frames).model.kind == "frames"
    assert recipe_of(job, frames).optim == recipe_of(job, cells[1]).optim


def test_changes_leave_what_they_do_not_name_as_the_recipe_has_it(tmp_path):
    recipe = over_trunk(RECIPES["gru-rcn-stacked"](), "mobilenet_v2")
    assert Table1Changes().apply(recipe, fine_tuning=False) == recipe
    changed = Table1Changes(size=96, dropout=0.5, hidden=(1, 2, 3, 4, 5)).apply(recipe, fine_tuning=False)
    assert (changed.clips.size, changed.model.dropout, changed.model.hidden) == (96, 0.5, (1, 2, 3, 4, 5))
    assert (changed.model.stacked, changed.optim, changed.global_batch) == (True, recipe.optim, recipe.global_batch)
    rnn = over_trunk(RECIPES["vgg16-rnn"](), "mobilenet_v2")
    whole = Table1Changes(crop_scales=(1.0, 0.875), test_scale=1.0).apply(recipe, fine_tuning=False).clips
    assert (whole.crop_scales, whole.test_scale) == ((1.0, 0.875), 1.0)
    assert replace(whole, crop_scales=recipe.clips.crop_scales, test_scale=recipe.clips.test_scale) == recipe.clips
    assert Table1Changes(hidden=(1, 2, 3, 4, 5)).apply(rnn, fine_tuning=False).model.hidden == (5,)
    c3d = RECIPES["c3d"]()
    assert Table1Changes(size=96, num_frames=10).apply(c3d, fine_tuning=False).clips == c3d.clips  # C3D has one size


def test_every_split_and_seed_has_a_run_of_its_own(tmp_path, weights):
    job = Table1Job(
        shards=(str(tmp_path / "one"), str(tmp_path / "two")), seeds=(0, 1), rows=("gru-rcn",), finetune=False
    )
    names = [run_name(job, cell) for cell in cells_of(job, ("rgb", "flow"))]
    assert len(set(names)) == 8
    assert "gru-rcn-flow-two-seed1" in names


def test_a_row_shows_the_mean_and_the_standard_deviation_of_its_runs():
    runs = [TableRun(run="a", shards="x", seed=seed, top1=top1, videos=4) for seed, top1 in enumerate((0.5, 0.7))]
    row = summarize_runs("GRU-RCN", "rgb", 0.799, runs)
    assert row.top1 == pytest.approx(0.6)
    assert row.spread == pytest.approx(0.1414, abs=1e-4)
    table = markdown([row, summarize_runs("C3D", "rgb", 0.823, [])])
    assert "| GRU-RCN | rgb | 60.0% ± 14.1 | 2 | 79.9% |" in table
    assert "| C3D | rgb | not yet run | - | 82.3% |" in table


def test_sizes_that_do_not_fit_are_refused_before_anything_is_trained(shards, weights, tmp_path):
    job = tiny(shards, tmp_path, weights, rows=("gru-rcn", "stacked"), changes=Table1Changes(size=40))
    with pytest.raises(ValueError, match=r"stacked taps stride8 \(5 x 5 cells\) and stride16 \(3 x 3\)"):
        reproduce_table1(job)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_trunk_are_refused(shards, tmp_path):
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    with pytest.raises(BadWeights, match=r"no features\.0\.0\.weight .*expected torchvision's mobilenet_v2 weights"):
        reproduce_table1(tiny(shards, tmp_path, tmp_path / "vgg16.pth", finetune=False, rows=("rnn",)))


@pytest.mark.parametrize("nothing", ["shards", "rows", "seeds"])
def test_a_table_of_nothing_is_refused(nothing):
    options: dict[str, Any] = {"shards": (Path("one"),), nothing: ()}
    with pytest.raises(ValueError, match="expected at least one folder of shards, one row and one seed"):
        Table1Job(**options)


def test_two_splits_of_one_name_are_refused():
    with pytest.raises(ValueError, match="shards one, one: expected different folder names"):
        Table1Job(shards=("a/one", "b/one"))
