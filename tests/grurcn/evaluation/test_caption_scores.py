"""Scores of captions: the published ones of a set that others scored, cases worked by hand, and what cannot be scored."""

import json
import math
import re
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pycocoevalcap
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import DATA

from grurcn.evaluation import caption_scores as module
from grurcn.evaluation.caption_scores import METRICS, caption_scores, check_metrics
from grurcn.models.vocabulary import BadCaptions

PUBLISHED = DATA / "captions" / "fakecap_refs_hyps_published.json"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"the captions that others scored are not at {PUBLISHED}"
)
needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="METEOR needs Java, and there is no java on the PATH"
)

WITHOUT_JAVA = tuple(metric for metric in METRICS if metric != "meteor")
WORDS = st.sampled_from(["a", "man", "plays", "guitar", "the", "dog", "runs", "don't", "red", "."])
CAPTIONS = st.lists(WORDS, max_size=8).map(" ".join)
REFERENCES = st.lists(CAPTIONS.map("a {}".format), min_size=1, max_size=3)
SETS = st.dictionaries(st.sampled_from(["v1", "v2", "v3", "v4"]), st.tuples(REFERENCES, CAPTIONS), min_size=1)


def pair(captions):
    """{video: (references, hypothesis)} -> (references, hypotheses)."""
    return {key: pair[0] for key, pair in captions.items()}, {key: pair[1] for key, pair in captions.items()}


def no_warning(line):
    raise AssertionError(f"nothing was to be said, but: {line}")


def scores_of(captions, metrics=WITHOUT_JAVA):
    return caption_scores(*pair(captions), metrics, print_line=no_warning)


# Against others


@needs_published
def test_the_scores_of_a_set_are_those_that_others_published_for_it_to_the_printed_digit():
    content = json.loads(PUBLISHED.read_text())
    names = {f"bleu{n}": f"Bleu_{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE_L", "cider": "CIDEr"}
    found = caption_scores(content["references"], content["hypotheses"], WITHOUT_JAVA, print_line=no_warning).total
    assert {name: f"{score:.3f}" for name, score in found.items()} == {
        name: f"{content['published'][theirs]:.3f}" for name, theirs in names.items()
    }


@needs_published
@needs_java
def test_the_meteor_of_a_set_is_the_one_that_others_published_for_it_to_the_printed_digit():
    content = json.loads(PUBLISHED.read_text())
    found = caption_scores(content["references"], content["hypotheses"], ["meteor"], print_line=no_warning)
    assert f"{found.total['meteor']:.3f}" == f"{content['published']['METEOR']:.3f}"


@needs_java
@pytest.mark.long
def test_meteor_is_what_the_caption_scripts_own_wrapper_gives():
    from pycocoevalcap.meteor.meteor import Meteor

    captions = {
        "v1": (["a man plays a guitar", "someone is strumming"], "a person plays the guitar"),
        "v2": (["the dogs are running", "a dog runs"], "a puppy ran"),
        "v3": (["café au lait"], "a café"),
        "v4": (["a cat"], "an entirely different sentence"),
    }
    found = scores_of(captions, ["meteor"])
    references, hypotheses = pair(captions)
    theirs = Meteor()
    total, each = theirs.compute_score(references, {key: [caption] for key, caption in hypotheses.items()})
    assert found.total["meteor"] == pytest.approx(total, rel=1e-9)
    assert [found.each[key]["meteor"] for key in captions] == pytest.approx(each, rel=1e-9)


# By hand


def test_bleu_is_the_geometric_mean_of_the_n_gram_precisions_times_the_penalty_for_brevity():
    # n-grams of the caption that the reference has: 4 of 4, 2 of 3, 1 of 2, 0 of 1; 4 words where the reference has 5.
    found = scores_of({"v1": (["A man plays a guitar."], "a man plays guitar")}).total
    brevity = math.exp(1 - 5 / 4)
    assert found["bleu1"] == pytest.approx(brevity * 1)
    assert found["bleu2"] == pytest.approx(brevity * (1 * 2 / 3) ** (1 / 2))
    assert found["bleu3"] == pytest.approx(brevity * (1 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert found["bleu4"] == pytest.approx(0, abs=1e-3)


def test_bleu_of_a_set_adds_up_the_videos_before_it_divides_and_counts_a_word_as_often_as_a_reference_has_it():
    # v1: "the" counts twice of three times, as its second reference has it; that one's length is the nearest too.
    # v2: one of one. So 3 of 4, and no penalty: 4 words, where the nearest references have 3 + 1.
    captions = {"v1": (["the cat", "the dog the"], "the the the"), "v2": (["dogs", "dogs run far away"], "dogs")}
    found = scores_of(captions)
    assert found.total["bleu1"] == pytest.approx(3 / 4)
    assert found.each["v1"]["bleu1"] == pytest.approx(2 / 3)
    assert found.each["v2"]["bleu1"] == pytest.approx(1)


def test_rouge_l_weighs_the_longest_common_subsequences_precision_and_recall():
    # "a man guitar": 3 of the caption's 4 words, 3 of the reference's 6; recall weighs 1.2 times as much as precision.
    found = scores_of({"v1": (["a man is playing a guitar"], "a man plays guitar")})
    precision, recall = 3 / 4, 3 / 6
    by_hand = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert found.total["rouge_l"] == pytest.approx(by_hand)


def test_rouge_l_of_a_set_is_the_mean_of_its_videos():
    found = scores_of({"v1": (["a man runs"], "a man runs"), "v2": (["a dog"], "cats")})
    assert (found.each["v1"]["rouge_l"], found.each["v2"]["rouge_l"]) == (pytest.approx(1), 0)
    assert found.total["rouge_l"] == pytest.approx(1 / 2)


def test_cider_is_10_for_a_videos_own_words_which_no_other_video_has_and_0_for_anothers():
    captions = {
        "v1": (["a man plays guitar"], "a man plays guitar"),
        "v2": (["two dogs run home"], "a man plays guitar"),
    }
    found = scores_of(captions)
    assert (found.each["v1"]["cider"], found.each["v2"]["cider"]) == (pytest.approx(10), 0)
    assert found.total["cider"] == pytest.approx(5)


def test_captions_are_compared_by_their_words_not_by_case_or_punctuation():
    found = scores_of({"v1": (["A man doesn't run."], "a MAN, does n't run!"), "v2": (["two"], "one")})
    assert found.each["v1"]["bleu4"] == pytest.approx(1)
    assert found.each["v1"]["rouge_l"] == pytest.approx(1)
    assert found.each["v1"]["cider"] == pytest.approx(10)


# What holds for all


@given(SETS)
@settings(max_examples=60)
def test_each_video_has_each_metric_within_its_range_and_the_order_of_videos_does_not_matter(captions):
    found = scores_of(captions)
    turned = scores_of(dict(reversed(captions.items())))
    assert found == turned
    assert tuple(found.total) == WITHOUT_JAVA
    assert found.each.keys() == captions.keys()
    for scores in (found.total, *found.each.values()):
        assert tuple(scores) == WITHOUT_JAVA
        for metric, score in scores.items():
            assert type(score) is float
            assert 0 <= score <= (10 if metric == "cider" else 1) + 1e-6


@given(SETS, st.lists(st.sampled_from(WITHOUT_JAVA), min_size=1))
@settings(max_examples=30)
def test_one_metric_is_the_same_whichever_others_are_wanted_beside_it(captions, metrics):
    all_of_them, some = scores_of(captions), scores_of(captions, metrics)
    assert some.total == {metric: all_of_them.total[metric] for metric in WITHOUT_JAVA if metric in metrics}


def test_an_empty_caption_and_one_of_punctuation_alone_score_0():
    captions = {
        "v1": (["a man runs"], ""),
        "v2": (["a dog", "the dog"], " ... "),
        "v3": (["two cats sit"], "two cats sit"),
    }
    found = scores_of(captions)
    for metric in WITHOUT_JAVA:
        assert found.each["v1"][metric] == pytest.approx(0, abs=1e-6)
        assert found.each["v2"][metric] == pytest.approx(0, abs=1e-6)
        assert found.total[metric] > 0 or metric == "bleu4"  # three words make no 4-gram
    assert caption_scores({"v1": ["a man"]}, {"v1": ""}, WITHOUT_JAVA).total.keys() == set(WITHOUT_JAVA)


@needs_java
def test_captions_that_could_upset_meteors_lines_do_not():
    captions = {
        "v1": (["a man runs", "."], ""),
        "v2": (["a dog ||| runs | away ||||"], "a dog ||| runs"),
        "v3": (["zwei\r\nzeilen", "a\u2028b\x85c"], "zwei\nzeilen"),
        "v4": (["a lone \ud83d surrogate"], "a lone \ud83d surrogate"),
        "v5": (["SCORE ||| a ||| b"], "EVAL ||| 1"),
        "v6": (["a man runs"], "a man runs"),
    }
    found = scores_of(captions, ["meteor"])
    assert found.each["v1"]["meteor"] == 0
    assert found.each["v6"]["meteor"] == pytest.approx(1)
    assert 0 < found.each["v2"]["meteor"] <= 1
    assert 0 < found.each["v4"]["meteor"] <= 1


@needs_java
def test_scoring_prints_nothing_writes_no_file_and_leaves_no_process(capfd, tmp_path, monkeypatch):
    def files():
        package = (path for where in pycocoevalcap.__path__ for path in Path(where).rglob("*"))
        return {path for path in [*package, *tmp_path.iterdir()] if "__pycache__" not in path.parts}

    monkeypatch.chdir(tmp_path)
    before = files()
    found = scores_of({"v1": (["a man runs"], "a man runs"), "v2": (["a dog"], "a cat")}, METRICS)
    assert tuple(found.total) == METRICS
    assert files() == before
    assert capfd.readouterr() == ("", "")
    assert not meteors()


def meteors() -> list[psutil.Process]:
    """The METEORs that this process has started and that run; its other children are other tests'."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            found += [child] if "-stdio" in child.cmdline() else []
    return found


# Without Java, and with one that fails


def program(folder, text):
    """A program called java, in a folder of its own."""
    folder.mkdir()
    path = folder / "java"
    path.write_text(f"#!{sys.executable}\nimport sys, time\nif '-version' in sys.argv:\n    sys.exit(0)\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_where_there_is_no_java_meteor_is_left_out_and_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = []
    found = caption_scores({"v1": ["a man"]}, {"v1": "a man"}, print_line=lines.append)
    assert tuple(found.total) == WITHOUT_JAVA
    assert tuple(found.each["v1"]) == WITHOUT_JAVA
    assert len(lines) == 1
    assert re.search(r"METEOR is left out: .*Java.*install.*PATH", lines[0])


def test_where_meteor_is_not_wanted_nothing_is_said_of_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tuple(scores_of({"v1": (["a man"], "a man")}, ["cider", "bleu4"]).total) == ("bleu4", "cider")


def test_a_java_that_does_not_start_is_none(tmp_path, monkeypatch):
    folder = program(tmp_path / "bin", "")
    java = Path(folder) / "java"
    java.write_text(java.read_text().replace("sys.exit(0)", "sys.exit(1)"))
    monkeypatch.setenv("PATH", folder)
    with pytest.raises(ValueError, match="meteor needs Java"):
        check_metrics(["meteor"])
    assert "meteor" not in caption_scores({"v1": ["a man"]}, {"v1": "a man"}, print_line=lambda line: None).total


@pytest.mark.parametrize(
    "text",
    [
        "print('first line', file=sys.stderr); sys.exit('Could not reserve enough space')",
        "sys.stdin.readline(); sys.exit('Could not reserve enough space')",
        "print('Could not reserve enough space', file=sys.stderr, flush=True)\n"
        "for line in sys.stdin:\n    print('no number', flush=True)",
    ],
    ids=["at once", "after a line", "with answers that are no numbers"],
)
def test_a_meteor_that_fails_is_an_error_with_its_last_words_and_its_process_is_ended(tmp_path, monkeypatch, text):
    monkeypatch.setenv("PATH", program(tmp_path / "bin", text))
    captions = {f"v{number}": (["a man " * 2000], "a man " * 2000) for number in range(5)}
    with pytest.raises(ChildProcessError, match=r"METEOR's Java process failed: Could not reserve enough space; leave"):
        scores_of(captions, ["meteor"])
    assert not meteors()


def test_a_meteor_that_is_interrupted_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "time.sleep(600)"))
    running = []

    def interrupted(*pipes_and_captions):
        running.extend(meteors())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scores_of({"v1": (["a man"], "a man")}, ["meteor"])
    assert len(running) == 1
    assert not running[0].is_running()


# What is refused


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ({}, {}, "no videos to score"),
        ({"vid7": []}, {"vid7": "a man"}, "^vid7: an empty list of references"),
        ({"vid7": ["a man"]}, {"vid7": "a man", "vid8": "a dog"}, "^vid8: a caption but no references"),
        ({}, {"vid8": "a dog"}, "^vid8: a caption but no references"),
        ({"vid7": ["a"], "vid8": ["b"], "vid9": ["c"]}, {"vid8": "b"}, "^vid7 and 1 more: references but no caption"),
        ({"vid7": ["a"], "vid8": ["b"], "vid9": ["c"]}, {}, "^vid7 and 2 more: references but no caption"),
        ({"vid7": ["a"], "vid8": [" . ", "!"]}, {"vid7": "a", "vid8": "b"}, "^vid8: no word in any reference"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_the_videos_name(references, hypotheses, message):
    with pytest.raises(BadCaptions, match=message):
        caption_scores(references, hypotheses, WITHOUT_JAVA)


@pytest.mark.parametrize("check", [check_metrics, lambda metrics: caption_scores({"v": ["a"]}, {"v": "a"}, metrics)])
def test_a_metric_that_there_is_not_is_refused_by_name(check):
    with pytest.raises(ValueError, match=r"no metric 'spice'; expected some of bleu1, .*, cider"):
        check(["bleu4", "spice"])


@pytest.mark.parametrize("check", [check_metrics, lambda metrics: caption_scores({"v": ["a"]}, {"v": "a"}, metrics)])
def test_without_pycocoevalcap_the_message_says_how_to_install_it(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)  # as if it were not installed
    with pytest.raises(ValueError, match=re.escape("pip install 'grurcn[captions]'")):
        check(["bleu4"])


def test_a_metric_that_needs_java_is_refused_before_anything_is_computed_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"meteor needs Java.*install.*or choose another metric"):
        check_metrics(["bleu4", "meteor"])
    check_metrics(WITHOUT_JAVA)


@needs_java
def test_where_all_is_installed_every_metric_passes():
    check_metrics(METRICS)
