"""Fusing evaluations: sums worked by hand, real evaluations against numpy, and what cannot be fused."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_runs import TINY, run_evaluate, run_train

from grurcn.evaluation.score_files import BadScores, Row, Scores, read_scores, write_folder
from jobs import fuse
from jobs.fuse import Fuse, OtherVideos

CLASSES = ("archery", "biking", "cricket")
# key: (label, scores of one model, scores of the other). All are multiples of 1/16: sums are exact.
VIDEOS = {
    "v_1": (0, [0.5, 0.25, 0.25], [0.75, 0.125, 0.125]),  # both right
    "v_2": (1, [0.5, 0.375, 0.125], [0.125, 0.375, 0.5]),  # both wrong, together right
    "v_3": (2, [0.75, 0.0, 0.25], [0.25, 0.0, 0.75]),  # the first wrong, the second right: by its weight
    "v_4": (1, [0.5, 0.25, 0.25], [0.25, 0.375, 0.375]),  # 1 and 2: all alike
}


def write(folder, which, classes=CLASSES, videos=VIDEOS, order=sorted):
    rows = [Row(key=key, label=videos[key][0], scores=videos[key][which]) for key in order(videos)]
    write_folder(folder, Scores(classes, rows), {"run": "by hand"})
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return write(tmp_path / "one", 1), write(tmp_path / "two", 2)


def run_fuse(*scores, **options) -> dict:
    json_file = scores[0].parent / "fusion.json"
    assert fuse.main(Fuse(scores=scores, json=json_file, **options)) == 0
    return json.loads(json_file.read_text())


# By hand


def test_fused_scores_are_the_weighted_mean(pair):
    fusion = fuse.fuse(pair, (1, 2))
    assert fusion.scores.classes == CLASSES
    thirds = {row["key"]: [3 * score for score in row["scores"]] for row in fusion.scores.rows}
    assert thirds == {
        "v_1": pytest.approx([2.0, 0.5, 0.5]),
        "v_2": pytest.approx([0.75, 1.125, 1.125]),
        "v_3": pytest.approx([1.25, 0.0, 1.75]),
        "v_4": pytest.approx([1.0, 1.0, 1.0]),
    }
    assert [row["label"] for row in fusion.scores.rows] == [0, 1, 2, 1]


def test_fusion_changes_what_is_predicted_and_a_tie_goes_to_the_lower_number(pair, tmp_path):
    result = run_fuse(*pair, out=tmp_path / "fused")
    rows = pq.read_table(result["scores"]).to_pylist()
    assert {row["key"]: row["predicted"] for row in rows} == {
        "v_1": "archery",
        "v_2": "biking",  # as neither alone; level with cricket
        "v_3": "cricket",
        "v_4": "archery",  # level with both others: wrong
    }
    assert [one["top1"] for one in result["inputs"]] == [0.25, 0.75]
    assert result["top1"] == 0.75
    assert result["top5"] == 1.0
    assert result["videos"] == 4
    assert result["per_class"] == {
        "archery": {"videos": 1, "top1": 1.0},
        "biking": {"videos": 2, "top1": 0.5},
        "cricket": {"videos": 1, "top1": 1.0},
    }


def test_two_evaluations_get_the_papers_weights_and_others_change_what_comes_out(pair):
    assert fuse.fuse(pair) == fuse.fuse(pair, (1, 2))
    assert [one.weight for one in fuse.fuse(pair).inputs] == [1.0, 2.0]
    assert fuse.fuse(pair, (3, 1)).scores.rows[2]["scores"] == [0.625, 0.0, 0.375]  # (3 * 0.75 + 0.25) / 4
    assert fuse.fuse(pair, (1, 1)).top1 == 0.5  # v_1 and v_2; v_3 is level with the lower number
    assert fuse.fuse(pair, (0.5, 1)).scores == fuse.fuse(pair, (1, 2)).scores  # only their ratio counts


def test_three_evaluations_are_fused_by_three_weights(pair, tmp_path):
    third = write(tmp_path / "three", 2, videos={key: (label, a, a[::-1]) for key, (label, a, _) in VIDEOS.items()})
    fusion = fuse.fuse([*pair, third], (1, 2, 5))
    assert fusion.scores.rows[0]["scores"] == [
        (0.5 + 1.5 + 1.25) / 8,
        (0.25 + 0.25 + 1.25) / 8,
        (0.25 + 0.25 + 2.5) / 8,
    ]
    assert [one.weight for one in fusion.inputs] == [1.0, 2.0, 5.0]


def test_videos_are_matched_by_key_whatever_their_order(pair, tmp_path):
    table = pq.read_table(pair[1] / "scores.parquet")
    turned = tmp_path / "turned.parquet"
    pq.write_table(table.take([2, 0, 3, 1]), turned)
    assert fuse.fuse((pair[0], turned)).scores == fuse.fuse(pair).scores


def test_a_file_counts_as_its_folder(pair):
    files = [folder / "scores.parquet" for folder in pair]
    assert fuse.fuse(files).scores == fuse.fuse(pair).scores


# What comes out


def test_fused_scores_are_a_file_of_scores_that_can_be_fused_again(pair, tmp_path):
    result = run_fuse(*pair, out=tmp_path / "deep" / "fused")
    assert result["scores"] == str(tmp_path / "deep" / "fused" / "scores.parquet")
    assert json.loads((tmp_path / "deep" / "fused" / "result.json").read_text()) == result
    assert read_scores(tmp_path / "deep" / "fused") == fuse.fuse(pair).scores
    again = fuse.fuse((pair[0], tmp_path / "deep" / "fused"), (3, 1))
    assert again.scores.rows[2]["scores"] == pytest.approx([(2.25 + 1.25 / 3) / 4, 0.0, (0.75 + 1.75 / 3) / 4])


def test_without_a_folder_nothing_is_written_but_the_figures_are_said(pair, capsys):
    before = sorted(pair[0].parent.iterdir())
    assert fuse.main(Fuse(scores=pair)) == 0
    assert sorted(pair[0].parent.iterdir()) == before
    assert capsys.readouterr().out == (
        f"fused 2 evaluations of 4 videos: top-1 0.7500, top-5 1.0000 ({pair[0]} x 1: top-1 0.2500, top-5 1.0000; "
        f"{pair[1]} x 2: top-1 0.7500, top-5 1.0000)\n"
    )


def test_the_result_is_what_is_documented(pair):
    result = run_fuse(*pair)
    assert result["scores"] is None
    documented = (fuse.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in [*result, *result["inputs"][0]])
    assert [one["scores"] for one in result["inputs"]] == [str(folder / "scores.parquet") for folder in pair]


def test_an_earlier_fusion_is_replaced_and_nothing_else_is(pair, tmp_path):
    out = tmp_path / "fused"
    out.mkdir()  # an empty folder is free
    run_fuse(*pair, out=out)
    run_fuse(*pair, out=out, weights=(1, 1))
    assert json.loads((out / "result.json").read_text())["top1"] == 0.5

    other = write(tmp_path / "other", 1)
    with pytest.raises(
        ValueError, match=r"other: holds result\.json, scores\.parquet; wanted a new folder, or one that"
    ):
        run_fuse(*pair, out=other)
    with pytest.raises(ValueError, match=r"one: holds scores that are to be fused; wanted another folder"):
        run_fuse(*pair, out=pair[0])
    with pytest.raises(ValueError, match="holds scores that are to be fused"):
        run_fuse(*pair, out=tmp_path)
    (out / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"fused: holds notes\.txt, result\.json, scores\.parquet; wanted a new folder"
    ):
        run_fuse(*pair, out=out)
    assert (out / "notes.txt").exists()
    assert read_scores(other) == read_scores(pair[0])


# Real evaluations


def test_two_runs_evaluations_are_fused_as_numpy_would(shards, storage):
    folders = []
    for name, seed in (("rgb", 0), ("flow", 1)):
        run_train(shards, storage, f"fused-{name}", recipe=dataclasses.replace(TINY, seed=seed))
        result = run_evaluate(storage / f"fused-{name}", shards, clips=2, views=1)
        folders.append(Path(result["scores"]).parent)
    result = run_fuse(*folders, out=storage / "fused")

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


# What cannot be fused


def test_a_missing_file_and_a_file_of_something_else_are_refused(pair, tmp_path):
    with pytest.raises(BadScores, match=r"nowhere: no such file; wanted the folder of an evaluation"):
        run_fuse(pair[0], tmp_path / "nowhere")
    (tmp_path / "notes.parquet").write_text("not scores")
    with pytest.raises(BadScores, match=r"notes\.parquet: not a Parquet file"):
        run_fuse(pair[0], tmp_path / "notes.parquet")


def test_other_videos_are_refused_by_some_of_their_keys(pair, tmp_path):
    videos = {key: VIDEOS[key] for key in ("v_1", "v_4")} | {f"w_{i}": VIDEOS["v_1"] for i in range(5)}
    other = write(tmp_path / "other", 1, videos=videos)
    with pytest.raises(
        OtherVideos,
        match=r"other: 5 videos \(w_0, w_1, w_2, \.\.\.\) that .*one has not, and lacks 2 videos \(v_2, v_3\) that it has",
    ):
        run_fuse(pair[0], other)
    fewer = write(tmp_path / "fewer", 1, videos={key: VIDEOS[key] for key in ("v_1", "v_2", "v_3")})
    with pytest.raises(OtherVideos, match=r"fewer: 0 videos that .*one has not, and lacks 1 video \(v_4\) that it has"):
        run_fuse(*pair, fewer, weights=(1, 1, 1))


def test_other_labels_are_refused_by_the_first_video(pair, tmp_path):
    videos = VIDEOS | {key: (0, *VIDEOS[key][1:]) for key in ("v_3", "v_4")}
    other = write(tmp_path / "other", 1, videos=videos)
    with pytest.raises(
        OtherVideos,
        match=r"other: 2 of 4 videos have other labels than in .*one: v_3 is archery, there cricket",
    ):
        run_fuse(pair[0], other)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("archery", "boxing", "cricket"), r"class 1 is boxing, but biking in .*one \(3 and 3 classes\)"),
        (("archery", "cricket", "biking"), r"class 1 is cricket, but biking in .*one \(3 and 3 classes\)"),
        (("archery", "biking", "cricket", "diving"), r"class 3 is diving, but \(none\) in .*one \(4 and 3 classes\)"),
    ],
)
def test_other_classes_are_refused_by_the_first_that_differs(pair, tmp_path, classes, message):
    videos = {key: (label, [*a, 0.0][: len(classes)], b) for key, (label, a, b) in VIDEOS.items()}
    other = write(tmp_path / "other", 1, classes=classes, videos=videos)
    with pytest.raises(OtherVideos, match=rf"other: {message}; wanted"):
        run_fuse(pair[0], other)


@pytest.mark.parametrize(
    ("num_scores", "weights", "message"),
    [
        (1, None, r"evaluations to fuse: 1; wanted at least two"),
        (1, (1.0,), r"evaluations to fuse: 1; wanted at least two"),
        (0, None, r"evaluations to fuse: 0; wanted at least two"),
        (3, None, r"3 evaluations without weights: wanted one each"),
        (2, (1.0,), r"weights 1 for 2 evaluations: wanted one each"),
        (2, (1.0, 2.0, 3.0), r"weights 1, 2, 3 for 2 evaluations: wanted one each"),
        (2, (), r"weights \(none\) for 2 evaluations: wanted one each"),
        (2, (1.0, 0.0), r"weights 1, 0: wanted finite numbers above 0"),
        (2, (-1.0, 2.0), r"weights -1, 2: wanted finite numbers above 0"),
        (2, (1.0, math.inf), r"weights 1, inf: wanted finite numbers above 0"),
        (2, (1.0, math.nan), r"weights 1, nan: wanted finite numbers above 0"),
        (2, (math.nan, 1.0), r"weights nan, 1: wanted finite numbers above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused_as_options_and_as_arguments(num_scores, weights, message, tmp_path):
    paths = (tmp_path / "never read",) * num_scores
    with pytest.raises(ValueError, match=message):
        Fuse(scores=paths, weights=weights)
    with pytest.raises(ValueError, match=message):
        fuse.fuse(paths, weights)


def test_as_people_type_it(pair):
    def run(*scores, options=()):
        command = [sys.executable, "-m", "jobs.fuse", "--scores", *map(str, scores), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = run(*pair, options=["--weights", "1", "1", "--out", str(pair[0].parent / "fused")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("fused 2 evaluations of 4 videos: top-1 0.5000, top-5 1.0000 (")
    assert read_scores(pair[0].parent / "fused") == fuse.fuse(pair, (1, 1)).scores
    refused = run(*pair, options=["--weights", "3"])
    assert refused.returncode == 2
    assert "weights 3 for 2 evaluations: wanted one each" in refused.stderr
    nowhere = run(pair[0], pair[0].parent / "nowhere")
    assert nowhere.returncode == 1
    assert re.fullmatch(r"error: \S+nowhere: no such file; wanted .*\n", nowhere.stderr)
