"""The packing job as people run it: what it prints, writes and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packing import packing_job

from grurcn.training.recipes import RECIPES
from jobs import make_shards, train
from shards.store import BadShards

ROOT = Path(__file__).parents[2]


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.make_shards", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_last_line_and_the_json_say_what_came_out(videos, tmp_path, capsys):
    (videos_with_faults := tmp_path / "videos").symlink_to(videos)
    out, json_file = tmp_path / "out", tmp_path / "deep" / "result.json"

    assert make_shards.main(packing_job(videos_with_faults, out, json=json_file)) == 0

    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("packed 24 videos of 4 classes (train 16, val 4, test 4) into 6 shards")
    assert last.endswith(str(out))
    result = json.loads(json_file.read_text())
    assert result["videos"] == {"train": 16, "val": 4, "test": 4}
    assert result["rejected"] == 0
    documented = (make_shards.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in result)


def test_refused_videos_are_counted_named_and_fail_only_a_strict_packing(videos, tmp_path, capsys):
    faulty = tmp_path / "videos" / "left"
    faulty.mkdir(parents=True)
    for path in (videos / "left").iterdir():
        (faulty / path.name).write_bytes(path.read_bytes())
    (faulty / "notes.avi").write_text("not a video")

    assert make_shards.main(packing_job(tmp_path / "videos", tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "left out left/notes.avi: not a video that ffmpeg reads" in printed
    assert f"1 left out (reasons in {tmp_path / 'out' / 'rejected.jsonl'})" in printed.splitlines()[-1]
    [refused] = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert refused["path"] == "left/notes.avi"

    assert make_shards.main(packing_job(tmp_path / "videos", tmp_path / "out", strict=True)) == 1


def test_a_second_run_packs_nothing_and_says_the_same(videos, shards, capsys):
    before = contents(shards)
    assert make_shards.main(packing_job(videos, shards)) == 0
    assert contents(shards) == before
    assert capsys.readouterr().out.count("packed 24 videos") == 1


def test_both_ways_to_start_it_print_the_same_help():
    as_module = run("--help")
    as_file = subprocess.run(
        [sys.executable, ROOT / "jobs" / "make_shards.py", "--help"], cwd="/", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert as_module.returncode == as_file.returncode == 0
    for done in (as_module, as_file):
        assert "Pack videos into WebDataset shards." in done.stdout
    assert as_module.stdout.partition("Pack videos")[2] == as_file.stdout.partition("Pack videos")[2]
    for word in ("ucf101", "folder", "csv", "--out", "--gop", "--crf", "--copy", "--workers", "--strict"):
        assert word in as_module.stdout


def test_a_data_set_of_captions_is_packed_and_training_refuses_it(videos, tmp_path):
    files = sorted(videos.rglob("*.avi"))[:3]
    for split, paths in (("train", files[:2]), ("val", files[2:])):
        for number, path in enumerate(paths):
            (tmp_path / "clips").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "clips" / f"{split}-id_{number}_9.avi")
        labels = [{"id": f"{split}-id_{n}_9.avi", "caption": ["a shape moves", "it moves"]} for n in range(len(paths))]
        (tmp_path / f"{split}.json").write_text(json.dumps(labels))
    words = ("--train", tmp_path / "train.json", "--val", tmp_path / "val.json")
    done = run("--workers", "0", "--out", tmp_path / "out", "msvd", "--videos", tmp_path / "clips", *words)
    assert "packed 3 videos with 6 captions (train 2, val 1, test 0) into 2 shards" in done.stdout, done.stderr
    with pytest.raises(BadShards, match="packed with captions and without classes"):
        train.main(
            "demo", train.Train(recipe=RECIPES["demo"](), shards=str(tmp_path / "out"), storage=tmp_path / "runs")
        )


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["folder", "--videos", "/nowhere"], 1, "error: --videos /nowhere: found nothing; expected a folder"),
        (["folder", "--videos", "{empty}"], 1, "found no videos in 0 class folders"),
        (["folder", "--videos", "{videos}", "--width", "127"], 2, "expected even sizes"),
        (["folder", "--videos", "{videos}", "--gop", "0"], 2, "gop 0: expected at least 1"),
        (["folder", "--videos", "{videos}", "--videos-per-shard", "0"], 1, "0 videos per shard; expected at least 1"),
        (["folder", "--videos", "{videos}", "--colour", "red"], 2, "Unrecognized options: --colour"),
        (["csv", "--table", "{table}"], 1, "table.csv:3: label 'crawl' is none of the 1 classes"),
    ],
)
def test_bad_input_is_one_clear_line_and_no_stack_trace(videos, tmp_path, words, status, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("path,label,split\na.avi,walk,train\nb.avi,crawl,test\n")
    places = {"videos": videos, "empty": tmp_path / "empty", "table": tmp_path / "table.csv"}

    done = run("--workers", "0", "--out", tmp_path / "out", *(word.format(**places) for word in words))

    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*.tar"))


def test_a_target_that_cannot_be_written_is_named(videos):
    done = run("--workers", "0", "--out", "/proc/shards", "folder", "--videos", videos)
    assert done.returncode == 1
    assert done.stderr.startswith("error: /proc/shards")
    assert "Traceback" not in done.stderr


def test_a_ray_cluster_that_is_away_is_said_at_once(videos, tmp_path):
    done = run("--out", tmp_path / "out", "folder", "--videos", videos, RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Ray cluster at RAY_ADDRESS=127.0.0.1:9 (Connection refused)")
    assert "ray start --head" in done.stderr
