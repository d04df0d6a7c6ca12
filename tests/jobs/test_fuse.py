"""Fusing two runs' evaluations, as people type it, against numpy."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from small_runs import TINY, run_evaluate, run_train

from jobs import fuse


def test_two_runs_evaluations_are_fused_as_numpy_would(shards, storage):
    folders = []
    for name, seed in (("rgb", 0), ("flow", 1)):
        run_train(shards, storage, f"fused-{name}", recipe=dataclasses.replace(TINY, seed=seed))
        result = run_evaluate(storage / f"fused-{name}", shards, clips=2, views=1)
        folders.append(Path(result["scores"]).parent)

    def fuse_by_command(*scores, options=()):
        command = [sys.executable, "-m", "jobs.fuse", "--scores", *map(str, scores), *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = fuse_by_command(*folders, options=["--out", storage / "fused", "--json", storage / "fusion.json"])
    assert done.returncode == 0, done.stderr
    assert re.match(r"fused 2 evaluations of \d+ videos: top-1 0\.\d{4}, top-5 ", done.stdout.splitlines()[-1])
    result = json.loads((storage / "fusion.json").read_text())
    documented = (fuse.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in [*result, *result["inputs"][0]])

    tables = [pq.read_table(folder / "scores.parquet").to_pylist() for folder in folders]
    one, two = (np.array([row["scores"] for row in rows]) for rows in tables)
    label = np.array([row["label"] for row in tables[0]])
    assert not np.allclose(one, two), "both models score alike: nothing is fused"
    found = pq.read_table(result["scores"]).to_pylist()
    np.testing.assert_allclose([row["scores"] for row in found], np.average([one, two], axis=0, weights=[1, 2]))
    assert result["top1"] == np.mean((one + 2 * two).argmax(axis=1) == label)
    for folder, of_input in zip(folders, result["inputs"], strict=True):
        evaluated = json.loads((folder / "result.json").read_text())
        assert {key: of_input[key] for key in ("top1", "top5")} == {key: evaluated[key] for key in ("top1", "top5")}

    refused = fuse_by_command(*folders, options=["--weights", "3"])
    assert refused.returncode == 2
    assert "weights 3 for 2 evaluations: expected one each" in refused.stderr
    nowhere = fuse_by_command(folders[0], storage / "nowhere")
    assert nowhere.returncode == 1
    assert re.fullmatch(r"error: \S+nowhere: no such file; expected .*\n", nowhere.stderr)
