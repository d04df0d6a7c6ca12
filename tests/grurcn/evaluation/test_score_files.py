"""Files of scores: what is written is read back, how right they are by hand, and what is no file of scores."""

import json
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from grurcn.evaluation.score_files import SCHEMA, BadScores, Scores, VideoScores, read_scores, write_folder
from grurcn.training.losses import Tally

CLASSES = ("archery", "biking", "cricket")


def video(key, label, *scores):
    return VideoScores(key=key, label=label, scores=list(scores))


def some_scores():
    return Scores(
        CLASSES,
        [video("v_3", 1, 0.5, 0.25, 0.25), video("v_1", 0, 0.75, 0.25, 0.0), video("v_2", 2, 0.25, 0.375, 0.375)],
    )


def write_table(file, videos, metadata=None, schema=SCHEMA):
    metadata = {"classes": json.dumps(CLASSES)} if metadata is None else metadata
    table = pa.Table.from_pylist(
        [{"class": "archery", "predicted": "archery", **vars(video)} for video in videos],
        schema=schema.with_metadata(metadata),
    )
    pq.write_table(table, file)
    return file


# There and back


def test_what_is_written_is_read_back_in_order_of_keys(tmp_path):
    folder = tmp_path / "evaluations" / "test-3x5"
    write_folder(folder, some_scores(), {"top1": 1 / 3})
    for path in (folder, folder / "scores.parquet"):
        found = read_scores(path)
        assert found.classes == CLASSES
        assert found.videos == sorted(some_scores().videos, key=lambda video: video.key)
    assert json.loads((folder / "result.json").read_text()) == {"top1": 1 / 3}


def test_a_file_names_each_videos_class_and_the_predicted_one_the_first_of_equals(tmp_path):
    write_folder(tmp_path / "out", some_scores(), {})
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == list(CLASSES)
    assert [(row["key"], row["label"], row["class"], row["predicted"]) for row in table.to_pylist()] == [
        ("v_1", 0, "archery", "archery"),
        ("v_2", 2, "cricket", "biking"),
        ("v_3", 1, "biking", "archery"),
    ]


def test_a_folder_is_replaced_as_a_whole_and_nothing_half_written_stays(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left by a kill").touch()
    for scores in (some_scores(), Scores(CLASSES, [video("v_9", 0, 1.0, 0.0, 0.0)])):
        write_folder(tmp_path / "out", scores, {})
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["result.json", "scores.parquet"]
        (tmp_path / "out" / "old").touch()
    assert [video.key for video in read_scores(tmp_path / "out").videos] == ["v_9"]


def test_a_file_whose_columns_stand_in_another_order_or_narrower_type_is_read(tmp_path):
    schema = pa.schema(
        [
            ("scores", pa.list_(pa.float32())),
            *((name, pa.string()) for name in ("class", "predicted", "key", "note")),
            ("label", pa.int8()),
        ]
    )
    file = write_table(tmp_path / "scores.parquet", [video("v_1", 0, 0.75, 0.25, 0.0)], schema=schema)
    assert read_scores(file).videos == [video("v_1", 0, 0.75, 0.25, 0.0)]


# How right they are


def test_accuracy_is_what_it_is_by_hand():
    assert some_scores().accuracy() == {"top1": pytest.approx(1 / 3), "top5": 1.0}
    six = [0.1, 0.3, 0.2, 0.05, 0.15, 0.2]  # best to worst: 1, 2, 5, 4, 0, 3
    scores = Scores(tuple("abcdef"), [video(str(label), label, *six) for label in range(6)])
    assert scores.accuracy() == {"top1": pytest.approx(1 / 6), "top5": pytest.approx(5 / 6)}


def test_accuracy_is_of_these_rows_alone_whatever_process_group_there_is(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda _: pytest.fail("sums were added over ranks"))
    assert some_scores().accuracy()["top5"] == 1.0


def test_per_class_accuracy_is_what_it_is_by_hand():
    scores = some_scores()
    scores.videos.append(video("v_4", 1, 0.25, 0.5, 0.25))
    assert scores.per_class() == {
        "archery": {"videos": 1, "top1": 1.0},
        "biking": {"videos": 2, "top1": 0.5},
        "cricket": {"videos": 1, "top1": 0.0},  # a tie with the class before
    }
    assert list(Scores(CLASSES, scores.videos[2:]).per_class()) == ["biking", "cricket"]  # archery has no video there


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 4), min_size=7, max_size=7)), min_size=1))
@settings(deadline=None)
def test_accuracy_is_the_trainings_tally_and_top1_the_per_class_mean(videos):
    """Few values, so that there are many ties."""
    found = [
        video(str(i), label, *(value / sum(values) for value in values)) for i, (label, values) in enumerate(videos)
    ]
    scores = Scores(tuple("abcdefg"), found)
    tally = Tally(torch.device("cpu"))
    for one in found:
        tally.add(torch.tensor([one.scores], dtype=torch.float64).log(), torch.tensor([one.label]))
    assert scores.accuracy() == pytest.approx({key: tally.read()[key] for key in ("top1", "top5")})
    of_classes = scores.per_class().values()
    assert sum(one["videos"] * one["top1"] for one in of_classes) == pytest.approx(
        scores.accuracy()["top1"] * len(found)
    )


# What is no file of scores


@pytest.mark.parametrize("name", ["nowhere", "nowhere.parquet", "."])
def test_a_file_that_is_missing_is_refused_by_name(tmp_path, name):
    with pytest.raises(BadScores, match=rf"{name.strip('.')}.*: no such file; expected the folder of an evaluation"):
        read_scores(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"key,label\nv_1,0\n", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused_by_name(tmp_path, content):
    (file := tmp_path / "notes.parquet").write_bytes(content)
    with pytest.raises(BadScores, match=r"notes\.parquet: not a Parquet file \(.+\); expected the scores\.parquet"):
        read_scores(file)


def test_half_a_file_is_refused_by_name(tmp_path):
    file = write_table(tmp_path / "half.parquet", some_scores().videos)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadScores, match=r"half\.parquet: not a Parquet file"):
        read_scores(file)


def test_a_table_of_something_else_is_refused_with_its_columns(tmp_path):
    pq.write_table(pa.table({"key": ["v_1"], "caption": ["a man runs"]}), tmp_path / "captions.parquet")
    with pytest.raises(BadScores, match=r"captions\.parquet: no list of classes in its metadata|no label, class, "):
        read_scores(tmp_path / "captions.parquet")
    pq.write_table(
        pa.table({"key": ["v_1"], "caption": ["a man runs"]}).replace_schema_metadata({"classes": "[]"}),
        tmp_path / "captions.parquet",
    )
    with pytest.raises(BadScores, match="no label, class, predicted, scores among the columns key, caption; expected"):
        read_scores(tmp_path / "captions.parquet")


def test_a_file_without_its_list_of_classes_is_refused(tmp_path):
    file = write_table(tmp_path / "old.parquet", some_scores().videos, metadata={})
    with pytest.raises(BadScores, match=r"old\.parquet: no list of classes in its metadata; .*evaluate again"):
        read_scores(file)


@pytest.mark.parametrize("classes", ["archery, biking", "3", "null"])
def test_a_list_of_classes_that_is_none_is_refused(tmp_path, classes):
    file = write_table(tmp_path / "odd.parquet", some_scores().videos, metadata={"classes": classes})
    with pytest.raises(BadScores, match=r"odd\.parquet: .+; expected the scores\.parquet"):
        read_scores(file)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([], "no videos; expected at least one"),
        (
            [video("v_1", 0, 1.0, 0.0, 0.0), video("v_1", 0, 1.0, 0.0, 0.0)],
            "the video v_1 occurs twice; expected each once",
        ),
        ([video("v_2", 3, 1.0, 0.0, 0.0)], "the video v_2 has label 3; expected 0 to 2"),
        ([video("v_2", -1, 1.0, 0.0, 0.0)], "the video v_2 has label -1; expected 0 to 2"),
        (
            [video("v_3", 0, 0.5, 0.5)],
            "the video v_3 has 2 scores, 2 of them probabilities; expected 3, one per class",
        ),
        ([video("v_3", 0, 0.5, 0.5, math.nan)], "the video v_3 has 3 scores, 2 of them probabilities; expected 3"),
        ([video("v_3", 0, 0.5, 0.5, math.inf)], "the video v_3 has 3 scores, 2 of them probabilities; expected 3"),
        ([video("v_3", 0, 0.5, -0.5, 1.0)], "the video v_3 has 3 scores, 2 of them probabilities; expected 3"),
        ([video("v_3", 0, 0.5, None, 1.0)], "the video v_3 has 3 scores, 2 of them probabilities; expected 3"),
    ],
)
def test_a_video_without_a_probability_for_each_class_is_refused_by_its_key(tmp_path, videos, message):
    file = write_table(tmp_path / "odd.parquet", videos)
    with pytest.raises(BadScores, match=rf"odd\.parquet: {message}"):
        read_scores(file)


@pytest.mark.parametrize("column", ["key", "label", "scores"])
def test_a_video_with_a_hole_is_refused(tmp_path, column):
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
    holed = replace(video("v_1", 0, 1.0, 0.0, 0.0), **{column: None})
    file = write_table(tmp_path / "odd.parquet", [holed], schema=nullable)
    with pytest.raises(BadScores, match=rf"odd\.parquet: .*'{column}'.*null"):
        read_scores(file)
