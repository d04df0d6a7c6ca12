"""Fusing evaluations: sums worked by hand, and what cannot be fused."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grurcn.evaluation.fusion import FuseJob, Fusion, OtherVideos, fuse
from grurcn.evaluation.score_files import BadScores, Scores, VideoScores, read_scores, write_folder

CLASSES = ("archery", "biking", "cricket")
# key: (label, scores of one model, scores of the other). All are multiples of 1/16: sums are exact.
VIDEOS = {
    "v_1": (0, [0.5, 0.25, 0.25], [0.75, 0.125, 0.125]),  # both right
    "v_2": (1, [0.5, 0.375, 0.125], [0.125, 0.375, 0.5]),  # both wrong, together right
    "v_3": (2, [0.75, 0.0, 0.25], [0.25, 0.0, 0.75]),  # the first wrong, the second right: by its weight
    "v_4": (1, [0.5, 0.25, 0.25], [0.25, 0.375, 0.375]),  # 1 and 2: all alike
}


def write_evaluation(folder, which, classes=CLASSES, videos=VIDEOS):
    scores = [VideoScores(key=key, label=videos[key][0], scores=videos[key][which]) for key in videos]
    write_folder(folder, Scores(classes, scores), {"run": "by hand"})
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return write_evaluation(tmp_path / "one", 1), write_evaluation(tmp_path / "two", 2)


def fused(*scores, **options) -> Fusion:
    return fuse(FuseJob(scores=scores, **options))


# By hand


def test_fused_scores_are_the_weighted_mean(pair):
    fusion = fused(*pair, weights=(1, 2))
    assert fusion.scores.classes == CLASSES
    thirds = {video.key: [3 * score for score in video.scores] for video in fusion.scores.videos}
    assert thirds == {
        "v_1": pytest.approx([2.0, 0.5, 0.5]),
        "v_2": pytest.approx([0.75, 1.125, 1.125]),
        "v_3": pytest.approx([1.25, 0.0, 1.75]),
        "v_4": pytest.approx([1.0, 1.0, 1.0]),
    }
    assert [video.label for video in fusion.scores.videos] == [0, 1, 2, 1]


def test_fusion_changes_what_is_predicted_and_a_tie_goes_to_the_lower_number(pair, tmp_path):
    result = fused(*pair, out=tmp_path / "fused").to_dict()
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
    assert fused(*pair) == fused(*pair, weights=(1, 2))
    assert [one.weight for one in fused(*pair).inputs] == [1.0, 2.0]
    assert fused(*pair, weights=(3, 1)).scores.videos[2].scores == [0.625, 0.0, 0.375]  # (3 * 0.75 + 0.25) / 4
    assert fused(*pair, weights=(1, 1)).top1 == 0.5  # v_1 and v_2; v_3 is level with the lower number
    assert fused(*pair, weights=(0.5, 1)).scores == fused(*pair, weights=(1, 2)).scores  # only their ratio counts


def test_three_evaluations_are_fused_by_three_weights(pair, tmp_path):
    third = write_evaluation(
        tmp_path / "three", 2, videos={key: (label, a, a[::-1]) for key, (label, a, _) in VIDEOS.items()}
    )
    fusion = fused(*pair, third, weights=(1, 2, 5))
    assert fusion.scores.videos[0].scores == [
        (0.5 + 1.5 + 1.25) / 8,
        (0.25 + 0.25 + 1.25) / 8,
        (0.25 + 0.25 + 2.5) / 8,
    ]
    assert [one.weight for one in fusion.inputs] == [1.0, 2.0, 5.0]


def test_videos_are_matched_by_key_whatever_their_order(pair, tmp_path):
    table = pq.read_table(pair[1] / "scores.parquet")
    turned = tmp_path / "turned.parquet"
    pq.write_table(table.take([2, 0, 3, 1]), turned)
    assert fused(pair[0], turned).scores == fused(*pair).scores


def test_a_file_counts_as_its_folder(pair):
    files = [folder / "scores.parquet" for folder in pair]
    assert fused(*files).scores == fused(*pair).scores


# What comes out


def test_fused_scores_are_a_file_of_scores_that_can_be_fused_again(pair, tmp_path):
    result = fused(*pair, out=tmp_path / "deep" / "fused").to_dict()
    assert result["scores"] == str(tmp_path / "deep" / "fused" / "scores.parquet")
    assert json.loads((tmp_path / "deep" / "fused" / "result.json").read_text()) == result
    assert read_scores(tmp_path / "deep" / "fused") == fused(*pair).scores
    again = fused(pair[0], tmp_path / "deep" / "fused", weights=(3, 1))
    assert again.scores.videos[2].scores == pytest.approx([(2.25 + 1.25 / 3) / 4, 0.0, (0.75 + 1.75 / 3) / 4])


def test_without_a_folder_nothing_is_written(pair):
    before = sorted(pair[0].parent.iterdir())
    assert fused(*pair).to_dict()["scores"] is None
    assert sorted(pair[0].parent.iterdir()) == before


def test_an_earlier_fusion_is_replaced_and_nothing_else_is(pair, tmp_path):
    out = tmp_path / "fused"
    out.mkdir()  # an empty folder is free
    fused(*pair, out=out)
    fused(*pair, out=out, weights=(1, 1))
    assert json.loads((out / "result.json").read_text())["top1"] == 0.5

    other = write_evaluation(tmp_path / "other", 1)
    with pytest.raises(
        ValueError, match=r"other: holds result\.json, scores\.parquet; expected a new folder, or one from"
    ):
        fused(*pair, out=other)
    with pytest.raises(ValueError, match=r"one: holds scores to fuse; expected another folder"):
        fused(*pair, out=pair[0])
    with pytest.raises(ValueError, match="holds scores to fuse"):
        fused(*pair, out=tmp_path)
    (out / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"fused: holds notes\.txt, result\.json, scores\.parquet; expected a new folder"
    ):
        fused(*pair, out=out)
    assert (out / "notes.txt").exists()
    assert read_scores(other) == read_scores(pair[0])


# What cannot be fused


def test_a_missing_file_and_a_file_of_something_else_are_refused(pair, tmp_path):
    with pytest.raises(BadScores, match=r"nowhere: no such file; expected the folder of an evaluation"):
        fused(pair[0], tmp_path / "nowhere")
    (tmp_path / "notes.parquet").write_text("not scores")
    with pytest.raises(BadScores, match=r"notes\.parquet: not a Parquet file"):
        fused(pair[0], tmp_path / "notes.parquet")


def test_other_videos_are_refused_by_some_of_their_keys(pair, tmp_path):
    videos = {key: VIDEOS[key] for key in ("v_1", "v_4")} | {f"w_{i}": VIDEOS["v_1"] for i in range(5)}
    other = write_evaluation(tmp_path / "other", 1, videos=videos)
    with pytest.raises(
        OtherVideos,
        match=r"other: has 5 videos \(w_0, w_1, w_2, \.\.\.\) that .*one lacks, and lacks 2 videos \(v_2, v_3\) of it",
    ):
        fused(pair[0], other)
    fewer = write_evaluation(tmp_path / "fewer", 1, videos={key: VIDEOS[key] for key in ("v_1", "v_2", "v_3")})
    with pytest.raises(OtherVideos, match=r"fewer: has 0 videos that .*one lacks, and lacks 1 video \(v_4\) of it"):
        fused(*pair, fewer, weights=(1, 1, 1))


def test_other_labels_are_refused_by_the_first_video(pair, tmp_path):
    videos = VIDEOS | {key: (0, *VIDEOS[key][1:]) for key in ("v_3", "v_4")}
    other = write_evaluation(tmp_path / "other", 1, videos=videos)
    with pytest.raises(
        OtherVideos,
        match=r"other: 2 of 4 videos have other labels than in .*one: v_3 is archery here, cricket there",
    ):
        fused(pair[0], other)


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
    other = write_evaluation(tmp_path / "other", 1, classes=classes, videos=videos)
    with pytest.raises(OtherVideos, match=rf"other: {message}; expected"):
        fused(pair[0], other)


@pytest.mark.parametrize(
    ("num_scores", "weights", "message"),
    [
        (1, None, r"evaluations to fuse: 1; expected at least two"),
        (1, (1.0,), r"evaluations to fuse: 1; expected at least two"),
        (0, None, r"evaluations to fuse: 0; expected at least two"),
        (3, None, r"3 evaluations without weights: expected one each"),
        (2, (1.0,), r"weights 1 for 2 evaluations: expected one each"),
        (2, (1.0, 2.0, 3.0), r"weights 1, 2, 3 for 2 evaluations: expected one each"),
        (2, (), r"weights \(none\) for 2 evaluations: expected one each"),
        (2, (1.0, 0.0), r"weights 1, 0: expected finite numbers above 0"),
        (2, (-1.0, 2.0), r"weights -1, 2: expected finite numbers above 0"),
        (2, (1.0, math.inf), r"weights 1, inf: expected finite numbers above 0"),
        (2, (1.0, math.nan), r"weights 1, nan: expected finite numbers above 0"),
        (2, (math.nan, 1.0), r"weights nan, 1: expected finite numbers above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(num_scores, weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FuseJob(scores=(tmp_path / "never read",) * num_scores, weights=weights)
