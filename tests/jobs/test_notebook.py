"""The jobs as functions: what README shows, as it stands there, and each function in small."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import ROOT, TINY

from jobs.notebook import clips, pack, predict, train
from shards.index import Index
from shards.reading.clips import evaluation_clips
from shards.store import BadShards


def test_clips_of_a_split_are_each_videos_middle_clip_once_and_labelled(shards):
    index = Index(shards, "val")
    batches = list(clips(str(shards), "val", batch_size=3, num_frames=4, size=16))
    assert all(frames.shape[1:] == (4, 3, 16, 16) and frames.dtype == torch.float32 for frames, _ in batches)
    assert all(len(frames) == len(label) <= 3 for frames, label in batches)
    labels = torch.cat([label for _, label in batches]).tolist()
    assert sorted(labels) == sorted(sample.label for sample in index.samples(list(range(len(index)))))
    assert len(evaluation_clips(24, 1, TINY.clips)[0]) == 4


def test_clips_of_training_go_on_for_ever_and_are_the_same_for_a_seed(shards):
    def first(seed: int, count: int) -> list[torch.Tensor]:
        batches = clips(str(shards), "train", batch_size=5, seed=seed, num_frames=4, size=16)
        found = [next(batches)[0] for _ in range(count)]
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
        return found

    one, same, other = first(0, 8), first(0, 2), first(1, 2)  # of 16 videos: eight batches are more than two epochs
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], other[0])


def test_videos_are_packed_learned_from_and_recognised(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = pack(videos, "mine", test_share=0.2, val_share=0.2)
    assert shards == str(tmp_path / "mine")
    run = train(TINY, shards, num_steps=2, val_every=2)
    assert run == str(tmp_path / "runs" / "own")
    video = next(videos.rglob("*.avi"))
    [row] = predict(run, video, clips=2)
    assert row["video"] == str(video)
    assert np.isclose(sum(each["probability"] for each in row["classes"]), 1)


def test_what_cannot_be_is_one_clear_error(shards, tmp_path):
    with pytest.raises(
        ValueError, match=r"resnet: no recipe of this name; wanted one of vgg16-frames, .*gru-rcn-small"
    ):
        train("resnet", str(shards))
    with pytest.raises(BadShards, match="nothing was packed there"):
        next(clips(str(tmp_path)))
    with pytest.raises(ValueError, match=r"no checkpoint in it"):
        predict(str(tmp_path), "video.avi")


@pytest.mark.long
def test_readmes_lines_do_what_they_say(videos, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?jobs\.notebook.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(videos, tmp_path / "data" / "videos")
    shutil.copy(next(Path(videos).rglob("*.avi")), tmp_path / "video.avi")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["frames"].shape == (16, 10, 3, 64, 64)  # pyright: ignore[reportAttributeAccessIssue]
    [row] = predict(str(names["run"]), "video.avi")
    assert row["class"] in ("down", "left", "right", "up")
