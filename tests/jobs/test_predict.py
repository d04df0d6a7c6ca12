"""Captions of new videos are those of the same videos in shards; attention as JSON and as pictures; and what is refused."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_runs import OFFSETS, PACKING, RECIPE, SEGMENTS, WORDS, write_checkpoint, write_run
from hypothesis import given
from hypothesis import strategies as st
from packing import packing_job
from PIL import Image

from cluster.checkpoints.run_folder import RunFolder
from cluster.tracking.mlflow_run import MlflowRun
from cluster.tracking.server import open_run, tracking_uri
from grurcn.inference.captioner import Caption, VideoCaptioner
from grurcn.inference.meta import OtherTask
from grurcn.inference.model_source import read_model
from grurcn.inference.predict import CaptionPrediction, ClassPrediction, ClassProbability, picture_paths
from grurcn.inference.videos import find_videos
from grurcn.models.beam_search import Captions, beam_search
from grurcn.models.build import build_model
from grurcn.models.config import ModelConfig
from grurcn.models.decoder import END, PADDING
from grurcn.training.recipes import Recipe
from jobs import make_shards, predict
from jobs.predict import Predict, lines_of
from shards.index import Index
from shards.reading.decode import read_frames
from shards.synthetic import COLOURS, NUM_FRAMES, draw_scene, write_video
from shards.video import Limits

FPS = 12  # of the scenes


def write_scene(path: Path, seed: int, num_frames: int = NUM_FRAMES) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, draw_scene(list(COLOURS)[seed % 4], "disc", "left", "up", rng)[:num_frames])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A folder of two folders with six videos in all, one of them shorter than there are segments."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(6):
        write_scene(folder / "ab"[number % 2] / f"{number}.avi", number, SEGMENTS - 2 if number == 3 else NUM_FRAMES)
    return folder


@pytest.fixture(scope="module")
def packed(scenes, tmp_path_factory) -> Path:
    """The same videos in shards."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    make_shards.main(packing_job(scenes, out))
    return out


def job(run: Path | str, *videos: Path, **options: Any) -> Predict:
    return Predict(videos=videos, model=str(run), **{"caption": True, **options})


def predicted(capsys, *args: Any, status: int = 0, **options: Any) -> list[list[str]]:
    """The printed lines, cut at their tabs."""
    assert predict.main(job(*args, **options)) == status
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def expected(run: Path, packed: Path, beam: int) -> dict[str, tuple[Captions, torch.Tensor]]:
    """{FOLDER-NAME: what beam search finds, which segments there are} for the videos as they are in the shards, read frame by
    frame."""
    trained = VideoCaptioner.of(read_model(str(run), ""), torch.device("cpu"))
    found = {}
    for split in ("train", "val", "test"):
        index = Index(packed, split)
        for sample in (index[number] for number in range(len(index))):
            data = (packed / sample.shard).read_bytes()[sample.offset :][: sample.size_bytes]
            planes, there = [], []
            for segment in range(SEGMENTS):
                start = segment * sample.num_frames // SEGMENTS if sample.num_frames >= SEGMENTS else segment
                there.append(start < sample.num_frames)
                frames = [min(start + offset, sample.num_frames - 1) for offset in OFFSETS]
                planes.append([read_frames(data, [frame], PACKING)[0] for frame in frames])
            with torch.inference_mode():
                vectors = trained.model.vectors(torch.from_numpy(np.array([planes])))
            captions = beam_search(trained.model.decoder, vectors, torch.tensor([there]), beam, RECIPE.max_words + 1)
            found[sample.key] = captions, torch.tensor(there)
    return found


def sentence(numbers: torch.Tensor) -> str:
    return " ".join(WORDS[number] for number in numbers.tolist() if number not in (END, PADDING))


# Captions


@pytest.mark.parametrize(("options", "beam", "number"), [({"captions": 3}, 4, 3), ({"beam": 1}, 1, 1)])
def test_a_video_gets_the_captions_that_the_model_finds_for_it_in_a_shard(
    run, scenes, packed, tmp_path, capsys, options, beam, number
):
    """By the beam of the recipe, 4, or another."""
    wanted = expected(run, packed, beam)
    lines = predicted(capsys, run, scenes, json=tmp_path / "found.json", **options)
    rows = json.loads((tmp_path / "found.json").read_text())
    videos = sorted(scenes.rglob("*.avi"))
    assert [row["video"] for row in rows] == list(map(str, videos))
    for video, row in zip(videos, rows, strict=True):
        captions, there = wanted[f"{video.parent.name}-{video.stem}"]
        assert [caption["caption"] for caption in row["captions"]] == list(map(sentence, captions.words[0, :number]))
        log_probs = [caption["log_prob"] for caption in row["captions"]]
        assert log_probs == pytest.approx(captions.log_prob[0, :number].tolist(), abs=1e-4)
        assert row["caption"] == row["captions"][0]["caption"] == " ".join(row["words"])
        attention = captions.attention[0, 0, : len(row["words"])][:, there]
        np.testing.assert_allclose(row["attention"], attention, atol=1e-5)
        np.testing.assert_allclose(np.sum(row["attention"], axis=1), 1, atol=1e-5)
    assert lines == [
        [row["video"], *([f"{caption['log_prob']:.3f}"] if number > 1 else []), caption["caption"]]
        for row in rows
        for caption in row["captions"]
    ]
    assert len({row["caption"] for row in rows}) > 1
    assert all(row["words"] for row in rows)


def test_each_segment_has_the_second_at_which_it_begins(run, scenes, tmp_path):
    predict.main(job(run, scenes / "b", json=tmp_path / "found.json"))
    short, whole, _ = sorted(json.loads((tmp_path / "found.json").read_text()), key=lambda row: len(row["seconds"]))
    assert short["seconds"] == pytest.approx([0, 1 / FPS, 2 / FPS])
    assert whole["seconds"] == pytest.approx([frame / FPS for frame in (0, 4, 9, 14, 19)])


def test_a_line_is_a_path_and_the_likeliest_sentence(run, scenes, tmp_path, capsys):
    lines = predicted(capsys, run, scenes / "a" / "4.avi", scenes / "a" / "0.avi", json=tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())
    assert lines == [[row["video"], row["caption"]] for row in rows]
    assert [line[0] for line in lines] == [str(scenes / "a" / "4.avi"), str(scenes / "a" / "0.avi")]
    assert len(rows[0]["captions"]) == 1


def test_the_beam_may_be_larger_than_the_recipes(run, scenes, capsys):
    assert predict.main(job(run, scenes / "a" / "0.avi", beam=7, captions=7)) == 0
    printed = capsys.readouterr()
    log_probs = [float(line.split("\t")[1]) for line in printed.out.splitlines()]
    assert len(log_probs) == 7
    assert log_probs == sorted(log_probs, reverse=True)


def test_places_of_a_beam_that_stay_empty_are_no_captions(run, scenes, tmp_path, capsys):
    """The end at once, or one of the six words that are not unknown, and then the end or another of them, cut off."""
    short = write_run(tmp_path / "short", recipe=dataclasses.replace(RECIPE, max_words=1))
    assert len(predicted(capsys, short, scenes / "a" / "0.avi", beam=50, captions=50)) == 1 + 6 + 36


def test_flow_that_was_packed_beside_the_training_videos_is_not_computed(run, scenes, tmp_path, capsys):
    """One frame a second with tvl1, for captions that nothing of it goes into."""
    with_flow = write_run(tmp_path / "flow", dataclasses.replace(PACKING, flow="tvl1"))
    assert VideoCaptioner.of(read_model(str(with_flow), ""), torch.device("cpu")).packing == PACKING
    assert predicted(capsys, with_flow, scenes / "a") == predicted(capsys, run, scenes / "a")


def test_one_checkpoint_of_a_run_may_be_named(run, scenes, capsys):
    video = scenes / "a" / "2.avi"
    assert predicted(capsys, run / "checkpoint-00000008", video) == predicted(capsys, run, video)


def test_a_run_may_be_named_as_mlflow_does(run, scenes, storage, capsys):
    uri = tracking_uri(storage)
    run_id = open_run(uri, storage, "predicted", "mine", None, {}, {}, {})
    with MlflowRun(uri, run_id, RunFolder(str(run))) as report:
        report.log_checkpoint("checkpoint-00000008", keep=1)
    video = scenes / "a" / "2.avi"
    wanted = predicted(capsys, run, video)
    assert predicted(capsys, f"runs:/{run_id}", video, storage=str(storage)) == wanted
    (run / "unsent.jsonl").unlink(missing_ok=True)


# Which videos


def test_videos_are_taken_as_named_and_from_folders_in_order_and_none_twice(scenes, monkeypatch):
    monkeypatch.chdir(scenes)
    a, b = ([Path(name, f"{number}.avi") for number in range(first, 6, 2)] for name, first in (("a", 0), ("b", 1)))
    assert find_videos([Path("b/5.avi"), Path()]) == [Path("b/5.avi"), *a, *b[:2]]
    assert find_videos([Path("b"), Path("b/../b/1.avi"), scenes / "a", Path("a/0.avi")]) == [
        *b, *(scenes / path for path in a)
    ]  # fmt: skip


def test_what_is_no_video_in_a_folder_is_passed_over(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("not a video")
    video = write_scene(tmp_path / "deep" / "er" / "SCENE.AVI", 1)
    [[path, _]] = predicted(capsys, run, tmp_path)
    assert path == str(video)


@given(st.sets(st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join), min_size=1, max_size=6))
def test_each_video_has_a_picture_of_its_own_in_the_folder(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("pictures")
    videos = [Path(f"videos/{name}.{suffix}") for name in sorted(names) for suffix in ("avi", "mp4")]
    places = picture_paths([*videos, Path("videos/../videos/c.avi")], folder)
    assert len(set(places.values())) == len(videos) + 1
    for video, place in places.items():
        assert place.name == f"{video.name}.png"
        assert folder in place.parents
        assert ".." not in place.parts


# The pictures


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_each_video_is_drawn_with_its_own_frames_in_their_colours(run, scenes, tmp_path, capsys):
    out = tmp_path / "new" / "attention"
    predicted(capsys, run, scenes, attention=out, json=tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == sorted(f"{folder}/{number}.avi.png" for number, folder in enumerate("ababab"))
    for row in rows:
        video = Path(row["video"])
        picture = pixels((out / video.parent.name / f"{video.name}.png").read_bytes()).astype(int)
        near = {name: (np.abs(picture - colour).max(axis=2) < 30).sum() for name, colour in COLOURS.items()}
        own = near.pop(list(COLOURS)[int(video.stem) % 4])
        assert own > 500 + 3 * max(near.values()), video


# What is refused


def test_a_broken_video_is_named_in_the_end_and_the_others_are_predicted(run, scenes, tmp_path, capsys):
    whole = write_scene(tmp_path / "1.avi", 1)
    (tmp_path / "2.mp4").write_text("not a video")
    data = whole.read_bytes()
    (tmp_path / "3.avi").write_bytes(data[: len(data) // 2])
    write_scene(tmp_path / "4.avi", 2)
    missing = tmp_path / "missing.avi"
    options: dict[str, Any] = {"json": tmp_path / "found.json", "attention": tmp_path / "attention"}
    assert predict.main(job(run, tmp_path, missing, **options)) == 1
    printed = capsys.readouterr()
    assert [line.split("\t")[0] for line in printed.out.splitlines()] == [str(whole), str(tmp_path / "4.avi")]
    first, *errors = printed.err.splitlines()[-4:]
    assert first.startswith(f"predicted 2 of 5 videos with the model {run} (step 8) in ")
    assert errors[0].startswith(f"error: {tmp_path}/2.mp4: not a video that ffmpeg reads (")
    assert errors[1].startswith(f"error: {tmp_path}/3.avi: ")
    assert errors[2] == f"error: {missing}: cannot be read (No such file or directory)"
    assert len(json.loads((tmp_path / "found.json").read_text())) == 2
    assert len(list((tmp_path / "attention").iterdir())) == 2


def test_a_video_beyond_the_limits_is_named(run, scenes, capsys):
    assert predict.main(job(run, scenes / "a" / "0.avi", limits=Limits(max_pixels=100))) == 1
    printed = capsys.readouterr()
    assert "frames of 40 x 40 pixels: expected at most 100 pixels (--max-pixels)" in printed.err
    assert not printed.out


def test_a_classification_run_is_refused(scenes, tmp_path):
    recipe = Recipe(model=ModelConfig(taps=("pool1",), hidden=(3,), width=1 / 32))
    weights = build_model(recipe.model, 2, 0).state_dict()
    classification = write_checkpoint(tmp_path / "other", dict(weights), recipe.to_dict(), {"classes": ["a", "b"]})
    with pytest.raises(
        OtherTask, match=r"captions were requested, but .*other is a classification model; use a run of"
    ):
        predict.main(job(classification, scenes))


def test_a_place_without_a_run_is_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no checkpoint in it; expected a run's folder"):
        predict.main(job(tmp_path / "nowhere", scenes))


def test_a_folder_without_videos_is_refused_by_name(run, scenes, tmp_path):
    (tmp_path / "notes.txt").write_text("not a video")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no videos found in this folder and those below it .*\.avi"):
        predict.main(job(run, scenes, tmp_path))
    with pytest.raises(ValueError, match="no videos are named; expected files, or folders"):
        predict.main(job(run))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beam": 0}, r"beam 0: expected at least 1"),
        ({"captions": 0}, r"captions 0: expected at least 1"),
        ({"top": 0}, r"top 0: expected at least 1"),
        ({"workers": -1}, r"workers -1: expected at least 0"),
        ({"heat": True}, r"--heat is drawn in the overlay; add --overlay FILE.mp4"),
    ],
)
def test_options_that_cannot_be_are_refused(scenes, options, reason):
    with pytest.raises(ValueError, match=reason):
        job("runs/mine", scenes, **options)


def test_more_captions_than_the_search_keeps_are_refused(run, scenes):
    with pytest.raises(
        ValueError, match=r"captions 5: the search keeps 4; request at most so many, or set a larger --beam"
    ):
        predict.main(job(run, scenes, captions=5))


# The command line


def test_options_may_stand_before_and_behind_the_videos():
    for words in (["--model", "m", "--caption", "a.avi", "b"], ["a.avi", "b", "--caption", "--model", "m"]):
        found = predict.COMMAND.parse(words, "predict")
        assert (found.videos, found.model, found.caption) == ((Path("a.avi"), Path("b")), "m", True)
        assert found.limits == Limits()


def of_caption(video: str, sentence: str, number: int = 1) -> CaptionPrediction:
    caption = Caption(words=tuple(sentence.split(" ")), log_prob=-1.25, attention=np.zeros((2, 1)))
    return CaptionPrediction(video=Path(video), captions=(caption,) * number, seconds=np.zeros(1))


def test_what_stands_in_names_and_captions_is_no_more_than_text():
    found = of_caption("tab\tand\nline\udc80.avi", "a b\x1b[2J")
    assert lines_of(found, ()) == ["tab\\tand\\nline\\udc80.avi\ta b\\x1b[2J"]
    assert lines_of(of_caption("x" * 300, "a"), ())[0].startswith("x" * 300 + "\t")
    best = ClassProbability(name="up\x1b[2J\t", probability=0.5)
    found = ClassPrediction(video=Path("\x1b[2J"), classes=(best,), levels={})
    assert lines_of(found, ()) == ["\\x1b[2J\tup\\x1b[2J\\t\t0.5000"]
    assert lines_of(found, (Path("a"),))[1].startswith("   0.500  up\\x1b[2J\\t  █")


def test_sentences_are_aligned_on_a_terminal():
    paths = [Path("a.avi"), Path("longer.avi")]
    assert lines_of(of_caption("a.avi", "a dog"), paths) == ["a.avi       a dog"]
    assert lines_of(of_caption("longer.avi", "a dog", 2), paths) == ["longer.avi    -1.250  a dog"] * 2


def test_the_command_prints_captions_and_nothing_else_on_its_output(run, scenes, tmp_path):
    (tmp_path / "broken.avi").write_text("not a video")
    video = scenes / "a" / "0.avi"
    command = [sys.executable, "-m", "jobs.predict", "--model", run, "--caption", video, tmp_path]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        list(map(str, command)),
        cwd=root,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{video}\t")
    assert "predicted 1 of 2 videos" in done.stderr
    assert f"error: {tmp_path}/broken.avi: not a video" in done.stderr
