"""A model's input from optical flow, and training and evaluation on it."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from moving import CLIPS, MOTIONS, SMALL, listing_of_motions, moving_planes, part, steady
from packing import packing_job
from small_runs import TINY as RECIPE
from small_runs import job as train_job
from small_runs import run_evaluate, run_train
from videos import pack

from cluster.checkpoints.run_folder import Model, load_best
from cluster.checkpoints.state import Training
from grurcn.inference.model_input import model_input
from grurcn.models.build import build_model
from grurcn.models.pixels import FLOW_SCALE, flow_to_clips, to_clips
from grurcn.models.votes import log_mean_vote
from jobs import evaluate, make_shards, train
from shards.index import Index
from shards.packing.flow import flow_planes
from shards.reading.clips import evaluation_clips, evaluation_views
from shards.reading.decode import read_flow
from shards.reading.stream import evaluation_batches
from shards.store import BadShards

NO_FLOW = r"shards: packed without optical flow, which the stream 'flow' needs; .*jobs\.make_shards --flow tvl1"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Six videos of steady motions, and their flow, in two shards."""
    folder = tmp_path_factory.mktemp("moving")
    return Index(pack(folder / "shards", listing_of_motions(folder, MOTIONS), SMALL), "train")


def test_training_and_evaluation_refuse_flow_that_was_not_packed(shards, tmp_path, monkeypatch):
    recipe = replace(RECIPE, clips=replace(RECIPE.clips, stream="flow"))
    with pytest.raises(BadShards, match=NO_FLOW):
        train.main("tiny", train_job(shards, tmp_path, "flow", recipe=recipe))
    kept = {"classes": ["down", "left", "right", "up"]}
    training = Training(step=0, recipe=recipe.to_dict(), model=kept)
    model = Model(weights={}, training=training, step=0, best=True, checkpoint=tmp_path)
    monkeypatch.setattr("grurcn.evaluation.evaluate.load_best", lambda _: model)
    with pytest.raises(BadShards, match=NO_FLOW):
        evaluate.main(evaluate.Evaluate(run=str(tmp_path), shards=str(shards)))
    assert not list(tmp_path.iterdir())


def test_the_flow_of_a_mirrored_video_is_the_mirrored_flow_of_the_video():
    """Motion to the right and down; DIS is not symmetric itself, hence the tolerance."""
    planes = moving_planes([(right, down // 2) for right, down in steady(5, 3, 4)])
    mirrored = planes.copy()
    mirrored[:, :48] = planes[:, :48, ::-1]

    def seen(planes, mirror):
        stored = torch.from_numpy(np.stack(list(flow_planes(iter(planes), "dis", 20.0)))[None, :, :96])
        box, bound = torch.tensor([[8, 8, 32, 48]]), torch.tensor([20.0])
        return flow_to_clips(stored, bound, box, torch.tensor([mirror]), 24, 2, 1, 4) / FLOW_SCALE

    assert seen(planes, False)[:, :, ::2].mean() == pytest.approx(3, abs=0.2)
    assert (seen(planes, True) - seen(mirrored, False)).abs().mean() < 0.1
    assert (seen(planes, True) - seen(planes, False)).abs().mean() > 2


def test_the_models_input_is_that_of_the_configs_stream(index):
    rgb = replace(CLIPS, stream="rgb")
    [(_, fields)], [(_, frames)] = (list(evaluation_batches(index, of, global_batch=6)) for of in (CLIPS, rgb))
    box, mirror = fields.box, torch.arange(6) % 2 == 0
    found = model_input(fields.frames, fields.flow_bound, box, mirror, CLIPS)
    wanted = flow_to_clips(fields.frames, fields.flow_bound, box, mirror, 16, 3, 2, 4)
    assert found.shape == (6, 3, CLIPS.channels, 16, 16)
    assert torch.equal(found, wanted)
    found = model_input(frames.frames, frames.flow_bound, box, mirror, rgb)
    assert found.shape == (6, 3, rgb.channels, 16, 16)
    assert torch.equal(found, to_clips(frames.frames, box, mirror, 16))


def test_a_model_is_trained_and_evaluated_on_flow(videos, storage, tmp_path):
    """Its scores against the same by hand: one clip and one view at a time, fields read anew for each."""
    job, folder = packing_job(videos, tmp_path / "shards"), tmp_path / "shards"
    packing = replace(job.packing, flow="dis", flow_bound=8.0)
    assert make_shards.main(replace(job, packing=packing)) == 0
    clips = replace(CLIPS, mirror=False, flow_fields=2)
    recipe = replace(RECIPE, clips=clips, num_steps=2, val_every=2)
    assert run_train(folder, storage, "on-flow", recipe=recipe)["steps"] == 2
    result = run_evaluate(storage / "on-flow", folder, clips=2, views=5, clips_at_once=3)
    rows = {row["key"]: row["scores"] for row in pq.read_table(result["scores"]).to_pylist()}

    index = Index(folder, "test")
    assert len(index) == len(rows) == 4
    model = build_model(recipe.model, 4, 0, in_channels=4)
    model.load_state_dict(load_best(storage / "on-flow").weights)
    model.eval()
    for number in range(len(index)):
        sample = index[number]
        assert sample.flow is not None
        assert sample.flow.bound == 8.0
        every = torch.from_numpy(read_flow(part(index, sample, sample.flow), range(sample.num_frames), packing))
        votes = []
        for fields in evaluation_clips(sample.num_frames, 2, clips):
            for box, mirror in evaluation_views(40, 40, 5, clips):
                place = torch.tensor([8.0]), torch.tensor([box]), torch.tensor([mirror])
                clip = flow_to_clips(every[fields][None], *place, 16, num_steps=3, stride=2, num_fields=2)
                with torch.no_grad():
                    votes.append(log_mean_vote(model(clip, torch.zeros(1, dtype=torch.int64))).exp()[0])
        assert rows[sample.key] == pytest.approx(torch.stack(votes).mean(dim=0).tolist(), rel=1e-4)
