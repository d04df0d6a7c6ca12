"""The commands that look into a data set: what they print, write and refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from nine_videos import FRAMES, SPLITS, pack_nine, pack_with_flow
from servers import RangeServer
from spoilt import faults, flip, reindex, rewrite, write_rows

from cluster.workers.connect import start_ray
from jobs.commands import load
from jobs.inspect_shards.index import MakeIndex
from jobs.inspect_shards.info import Info
from jobs.inspect_shards.preview import Preview
from jobs.inspect_shards.verify import Verify
from shards.dataset import read_dataset
from shards.index import Index
from shards.rows import SCHEMA
from shards.store import BadShards, open_store
from shards.verify import Fault, check_index

ROOT = Path(__file__).parents[2]
inspect_shards = load("inspect_shards")


def run(job: Any) -> tuple[int, dict[str, Any]]:
    """The job in this process: its status and its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        status = inspect_shards.main(replace(job, json=file))
        result = json.loads(file.read_text())
    kind = {Info: "info", Verify: "verify", Preview: "preview", MakeIndex: "index"}[type(job)]
    documented = re.split(rf"\n  {kind} ", inspect_shards.description or "")[1].splitlines()[0]
    assert all(key in documented for key in result)
    return status, result


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack_nine(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def with_flow(tmp_path_factory) -> Path:
    return pack_with_flow(tmp_path_factory.mktemp("flow"))


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return shutil.copytree(packed, tmp_path / "shards")


# Verify


@pytest.mark.parametrize("quick", [True, False])
def test_a_data_set_as_it_was_packed_has_no_fault(quick, packed, with_flow, capsys):
    status, result = run(Verify(url=str(packed), workers=0, quick=quick))
    assert (status, result["faults"], result["fault_list"]) == (0, 0, [])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("no faults in 9 videos (train 6, val 3) of 5 shards, 0.1 MB, in ")
    assert ("nothing was decoded" in line) == quick
    assert faults(with_flow, quick=quick) == []


def test_strange_texts_reach_the_terminal_as_text(folder, capsys):
    reindex(folder, lambda _, row: row.update(key="\x1b[31mred\r\n"))
    faults(folder, quick=True)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[31mred\r\n" in out


def test_faults_are_lines_and_status_1_and_ctrl_c_leaves_nothing_behind(folder, tmp_path):
    flip(folder / "train-000000.tar", 600)
    (temporary := tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "jobs.inspect_shards", "verify", str(folder), "--workers", "0"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run([*command, "--quick"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout.count("fault: train-000000.tar: ") == 2
    assert not done.stderr

    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        helpers: list[psutil.Process] = []
        while not helpers:
            assert process.poll() is None
            helpers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("interrupted")
    assert "Traceback" not in said
    psutil.wait_procs(helpers, timeout=10)
    assert not [helper for helper in helpers if helper.is_running()]
    assert not list(temporary.iterdir())


# Info


def test_info_counts_what_was_packed(packed, capsys):
    status, result = run(Info(url=str(packed)))
    assert status == 0
    assert result["classes"] == {"a": {"train": 3, "val": 2, "test": 0}, "b": {"train": 3, "val": 1, "test": 0}}
    train, val = result["splits"]["train"], result["splits"]["val"]
    of_train = sorted(frames for number, frames in enumerate(FRAMES) if SPLITS[number % 3] == "train")
    assert (train["videos"], train["shards"], train["frames"]) == (6, 3, sum(of_train))
    assert train["hours"] == pytest.approx(sum(of_train) / 25 / 3600)
    assert train["seconds"] == {"min": of_train[0] / 25, "median": of_train[2] / 25, "max": of_train[-1] / 25}
    assert (val["videos"], val["shards"], val["captions"]) == (3, 2, 0)
    assert result["shared_groups"] == 0
    assert result["digest"] == read_dataset(open_store(packed)).digest
    out = capsys.readouterr().out
    assert re.search(r"│ a +│ +3 │ +2 │ +0 │ +5 │", out)
    assert "32 x 32; H.264, a key frame every 4 frames, crf 18" in out
    assert out.splitlines()[-1].startswith("9 videos of 2 classes, 0.00 hours, 0.1 MB: ")


def test_of_many_classes_the_ends_are_shown_unless_all_are_wanted(folder, capsys):
    rewrite(folder, lambda content: content.update(classes=["a", "b", *(f"class {number:03}" for number in range(98))]))
    run(Info(url=str(folder)))
    shown = capsys.readouterr().out
    assert "100 classes, 98 without a video" in shown
    assert "... 80 more (--all)" in shown
    assert "class 000" in shown
    assert "class 050" not in shown
    run(Info(url=str(folder), all=True))
    assert "class 050" in capsys.readouterr().out


def test_refused_videos_are_grouped_by_reasons_that_differ_in_numbers_only(folder, capsys):
    lines = [{"path": f"a/{number}.avi", "reason": f"frame {number} of 187 does not decode"} for number in range(1200)]
    lines += [{"path": "b/1.mp4", "reason": "x264 says no 12 times"}, {"path": "[red]", "reason": "\x1b[31m"}]
    (folder / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(folder, lambda content: content.update(rejected=len(lines)))
    _, result = run(Info(url=str(folder)))
    assert [(reason["count"], reason["reason"]) for reason in result["reasons"]] == [
        (1200, "frame N of N does not decode"), (1, "x264 says no 12 times"), (1, "\x1b[31m"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert re.search(r"1,200  frame N of N does not decode\n +a/0\.avi, a/1\.avi, a/2\.avi, \.\.\.\n", out)
    assert "[red]" in out
    assert "\x1b" not in out

    (folder / "rejected.jsonl").unlink()
    assert run(Info(url=str(folder)))[1]["reasons"] == []
    assert "left out      1,202 (no rejected.jsonl here that says why)" in capsys.readouterr().out
    (folder / "rejected.jsonl").write_text('{"path": "a"}\n')
    with pytest.raises(BadShards, match=r"rejected\.jsonl:1: not a path and a reason"):
        run(Info(url=str(folder)))


def test_groups_in_two_splits_are_counted(folder, capsys):
    reindex(folder, lambda _, row: row.update(group="a film"))
    reindex(folder, lambda _, row: row.update(group="a film" if row["num_frames"] > 10 else row["group"]), split="val")
    assert run(Info(url=str(folder)))[1]["shared_groups"] == 1
    assert "1 in more than one split (should be 0" in capsys.readouterr().out


def test_info_reads_a_web_server(packed):
    with RangeServer(packed) as server:
        assert run(Info(url=server.url))[1]["splits"] == run(Info(url=str(packed)))[1]["splits"]


def write_big_index(folder: Path, num_shards: int) -> Index:
    """An index of many samples, without the shards."""
    row = dict.fromkeys(SCHEMA.names, 0) | {"group": "g", "fps": 25.0, "num_frames": 10}
    row |= {name: None for name in SCHEMA.names if name.startswith("flow_")}
    write_rows(folder, {f"{n}.tar": [{**row, "key": f"{n}-{k}"} for k in range(1000)] for n in range(num_shards)})
    return Index(folder, "train")


def test_memory_does_not_grow_with_the_number_of_samples(folder):
    peaks = {}
    for num_shards in (20, 80):
        index = write_big_index(folder, num_shards)
        tracemalloc.start()
        assert list(check_index(index)) == []
        run(Info(url=str(folder)))
        peaks[num_shards] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[80] < 1.3 * peaks[20] + 2**20


# The command line


def command(*words: str) -> int:
    """The status of a command line."""
    with pytest.raises(SystemExit) as ended:
        inspect_shards.run(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--help"], ["info", "verify", "preview", "index", "--json FILE holds"]),
        (["verify", "--help"], ["--quick", "--splits", "--workers", "--memory-limit", "URL"]),
        (["preview", "--help"], ["--num-frames", "--stride", "--size", "--stream", "--samples", "--png"]),
    ],
)
def test_help_names_the_four_jobs_and_their_options(words, wanted, capsys):
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in wanted)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["info", "/nowhere"],
            1,
            "error: /nowhere/dataset.json: not found (nothing was packed there); pack videos with",
        ),
        (["verify", "/nowhere", "--workers", "0"], 1, "error: /nowhere/dataset.json: not found"),
        (
            ["preview", "{folder}", "--split", "test"],
            1,
            "no samples in the split 'test' (splits with samples: train, val)",
        ),
        (["preview", "{folder}", "--samples", "0"], 2, "expected 1 to 500 samples"),
        (["preview", "{folder}", "--stride", "0"], 2, "expected at least 1 of each"),
        (["verify", "{folder}", "--memory-limit", "0"], 2, "expected 0.5 to 1,000,000 GiB"),
        (["index"], 2, "expected a folder or bucket of tars, or their names"),
        (["index", "pipe:cat x.tar"], 1, "error: pipe:...: not a place for shards"),
        (["index", "{folder}", "--width", "33"], 1, "expected even sizes"),
        (
            ["index", "{folder}", "--split-of", "train"],
            1,
            "--split-of 'train': expected PATTERN=train, val, test or none",
        ),
        (["info", "ftp://host/x"], 1, "error: ftp:...: not a place for shards"),
    ],
)
def test_bad_input_is_one_clear_line(packed, words, status, message, capsys):
    assert command(*(word.format(folder=packed) for word in words)) == status
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert message in said


@pytest.mark.cluster
def test_ray_tasks_find_and_index_the_same_as_this_process(folder, tmp_path):
    sample = Index(folder, "train")[1]
    flip(folder / sample.shard, sample.offset + 300)
    (folder / "val-000000.tar").unlink()
    tars = (str(folder / "train-{000001..000002}.tar"),)
    start_ray()
    try:
        _, result = run(Verify(url=str(folder), workers=2))
        run(MakeIndex(url=tars, out=str(tmp_path / "ray"), width=32, height=32, workers=2))
    finally:
        ray.shutdown()
    assert sorted(str(Fault(**fault)) for fault in result["fault_list"]) == sorted(faults(folder))
    run(MakeIndex(url=tars, out=str(tmp_path / "here"), width=32, height=32, workers=0))
    for name in ("dataset.json", "train.index.arrow"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
