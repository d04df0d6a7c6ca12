"""Words of captions: as the COCO caption scripts cut them, and numbers for them and back."""

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import DATA

from grurcn.models.decoder import END, PADDING, UNKNOWN
from grurcn.models.vocabulary import BadCaptions, Vocabulary, tokenize

CAPTIONS = DATA / "captions"
WORDS = st.sampled_from(["a", "man", "dog", "runs", "don't", "the", "red", "<end>", "<unk>", ".", "half-pipe"])
SENTENCES = st.lists(WORDS, max_size=8).map(" ".join)
SETS = st.lists(SENTENCES, max_size=12).map(lambda captions: [*captions, "at least one word"])


# Words, against the tokenizer that the scripts run


def real_captions():
    """The captions of MSVD that are here, and references and captions of COCO."""
    captions = []
    for path in sorted((CAPTIONS / "msvd").glob("*_labels.json")):
        captions += [caption for video in json.loads(path.read_text()) for caption in video["caption"]]
    coco = json.loads((CAPTIONS / "fakecap_refs_hyps_published.json").read_text())
    captions += [caption for references in coco["references"].values() for caption in references]
    return [*captions, *coco["hypotheses"].values()]


def their_words(captions, folder):
    """What the Java program of the scripts makes of captions, called as they call it, without what they drop."""
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pip install 'grurcn[captions]'")
    jar = Path(tokenizer.__file__).with_name(tokenizer.STANFORD_CORENLP_3_4_1_JAR)
    lines = folder / "captions.txt"
    lines.write_text("\n".join(caption.replace("\n", " ") for caption in captions), encoding="utf-8")
    options = ["-preserveLines", "-lowerCase", str(lines)]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", *options]
    done = subprocess.run(command, capture_output=True, check=True)
    found = done.stdout.decode().split("\n")[: len(captions)]
    return [[word for word in line.split() if word not in tokenizer.PUNCTUATIONS] for line in found]


needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="the scripts' tokenizer needs Java; none on the PATH"
)


@needs_java
@pytest.mark.skipif(not CAPTIONS.is_dir(), reason=f"the real captions are not at {CAPTIONS}")
def test_real_captions_are_cut_as_the_scripts_cut_them(tmp_path):
    captions = real_captions()
    assert len(captions) > 30_000
    ours = [tokenize(caption) for caption in captions]
    differing = [
        f"{caption!r}: {words}, theirs {theirs}"
        for caption, words, theirs in zip(captions, ours, their_words(captions, tmp_path), strict=True)
        if words != theirs
    ]
    assert not differing, "\n".join(differing[:20])


CUT = [
    ("A man is playing a guitar.", "a man is playing a guitar"),
    ("  Two\tblanks \n and a line ", "two blanks and a line"),
    ("She doesn't, can't, WON'T and cannot.", "she does n't ca n't wo n't and can not"),
    ("It's the dogs' and the man's; they've said I'm", "it 's the dogs and the man 's they 've said i 'm"),
    ("don’t use ‘these’ or “those” – ever…", "do n't use these or those ever"),
    ("gonna wanna gotta 'tis y'all", "gon na wan na got ta 't is y' all"),
    ("O'Brien at 5 o'clock: jack-o'lanterns, rock'n'roll", "o'brien at 5 o'clock jack-o'lanterns rock 'n' roll"),
    ("a black-and-white T-shirt - a half-pipe -- end", "a black-and-white t-shirt a half-pipe end"),
    ("Mr. Smith of St. Louis at 5 p.m. in the U.S.", "mr. smith of st. louis at 5 p.m. in the u.s."),
    ("He hits it with a bat. The ball, a bat.", "he hits it with a bat the ball a bat"),
    ("bat., ball", "bat. ball"),
    ("in Wash. they wash. No. 5 says no. Yes.", "in wash. they wash no. 5 says no yes"),
    (
        "1,000 men, 3.5 km at 12:30, 1/2 cup, the 2nd of the '90s",
        "1,000 men 3.5 km at 12:30 1/2 cup the 2nd of the '90s",
    ),
    ("a 3.5-inch 9mm AK-47", "a 3.5-inch 9mm ak-47"),
    ("costs $5.00, £5 or 5€, 10% off #1", "costs $ 5.00 # 5 or 5 $ 10 % off # 1"),
    ("½ a cup, 1½ cups", "1/2 a cup 1 1/2 cups"),
    ("cuts,eats and/or sleeps..on:it", "cuts eats and/or sleeps on it"),
    ("home.Then he left", "home.then he left"),
    ("what?! Really?? Yes!", "what ?! really ?? yes"),
    ("a man (in red) [sic] {x}", "a man -lrb- in red -rrb- -lsb- sic -rsb- -lcb- x -rcb-"),
    ("-lrb- in red -rrb-", "-lrb- in red -rrb-"),
    ("R&B at AT&amp;T, salt & pepper, a&b", "r&b at at&t salt & pepper a & b"),
    ("mail me@example.com or www.example.com, @me #tag", "mail me@example.com or www.example.com @me #tag"),
    ("sautéed jalapeño, एक लड़का, 男人在弹吉他。", "sautéed jalapeño एक लड़का 男人在弹吉他 。"),
    ("a smile :) 😀 \ud83d\x07", "a smile :-rrb-"),
    ("woman`s, don`t", "woman s do n`t"),
    ("", ""),
    (" . , '' `` -- ... ", ""),
]


@pytest.mark.parametrize(("caption", "words"), CUT, ids=[caption for caption, _ in CUT])
def test_a_caption_is_cut_into_these_words(caption, words):
    assert tokenize(caption) == words.split()


@needs_java
def test_the_scripts_cut_these_captions_into_the_same_words(tmp_path):
    captions = [" ".join(caption.encode(errors="ignore").decode().split()) for caption, _ in CUT]
    assert their_words(captions, tmp_path) == [words.split() for _, words in CUT]


@given(st.text())
@settings(max_examples=300)
def test_words_have_no_blanks_whatever_a_caption_is(caption):
    for word in tokenize(caption):
        assert word.split() == [word]
        assert word.encode()


@given(
    st.lists(st.sampled_from(["a", "Man", "don't", "it's", "half-pipe", "3.5", "(red)", "O'Brien", "cannot", "U.S."]))
)
def test_words_joined_by_blanks_are_cut_into_the_same_words_again(words):
    once = tokenize(" ".join(words))
    assert tokenize(" ".join(once)) == once


def test_no_word_is_longer_than_200_characters_so_that_the_time_cannot_grow_with_the_square_of_a_caption():
    assert list(map(len, tokenize("a" * 450))) == [200, 200, 50]
    assert len(tokenize("a@" * 50_000)) == 500


# Numbers for words


def test_the_most_frequent_words_come_first_and_equally_frequent_ones_by_alphabet():
    vocabulary = Vocabulary.build(["A man runs.", "A dog runs", "a cat sits"])
    assert vocabulary.words == ("<end>", "<unk>", "a", "runs", "cat", "dog", "man", "sits")
    assert len(vocabulary) == 8
    assert vocabulary.encode("A man sits, then runs") == [2, 6, 7, UNKNOWN, 3, END]
    assert vocabulary.sentence([2, 6, 7, UNKNOWN, 3, END, 5, PADDING]) == "a man sits <unk> runs"
    assert vocabulary.sentence([2, 6, PADDING, 3]) == "a man"
    assert vocabulary.sentence([END]) == vocabulary.sentence([]) == ""


def test_a_caption_has_at_most_max_words_and_always_its_end():
    vocabulary = Vocabulary.build(["one two three"])
    one, three, two = range(2, 5)
    assert vocabulary.encode("one two three", max_words=3) == [one, two, three, END]
    assert vocabulary.encode("one two three", max_words=2) == [one, two, END]
    assert vocabulary.encode("", max_words=2) == vocabulary.encode("...") == [END]
    assert len(vocabulary.encode("one " * 50)) == 31


def test_the_two_words_of_no_caption_are_unknown_where_a_caption_has_them():
    vocabulary = Vocabulary.build(["<end> of <unk>", "<end> of <unk>"])
    assert vocabulary.words == ("<end>", "<unk>", "of")
    assert vocabulary.encode("<end> of <unk>") == [UNKNOWN, 2, UNKNOWN, END]


def test_rare_words_and_those_past_the_size_are_left_out():
    captions = ["a a a b b c", "d"]
    assert Vocabulary.build(captions, min_count=2).words[2:] == ("a", "b")
    assert Vocabulary.build(captions, max_words=3).words[2:] == ("a", "b", "c")
    assert Vocabulary.build(captions, max_words=3, min_count=3).words[2:] == ("a",)


@given(SETS, st.integers(1, 6), st.integers(1, 3), st.randoms())
def test_a_vocabulary_holds_the_most_frequent_words_whatever_the_order_of_the_captions(captions, size, least, random):
    counts = Counter(word for caption in captions for word in tokenize(caption) if word not in ("<end>", "<unk>"))
    ranked = sorted(sorted(counts), key=lambda word: counts[word], reverse=True)
    wanted = [word for word in ranked if counts[word] >= least][:size]
    if not wanted:
        with pytest.raises(BadCaptions, match=f"rarer than {least}"):
            Vocabulary.build(captions, size, least)
        return
    shuffled = random.sample(captions, len(captions))
    assert Vocabulary.build(iter(captions), size, least) == Vocabulary.build(shuffled, size, least)
    assert Vocabulary.build(captions, size, least).words == ("<end>", "<unk>", *wanted)


@given(SETS, SENTENCES, st.integers(1, 10))
def test_what_is_encoded_is_said_again_with_unk_for_words_that_are_not_there(captions, caption, max_words):
    vocabulary = Vocabulary.build(captions)
    known = set(vocabulary.words[2:])
    numbers = vocabulary.encode(caption, max_words)
    words = [word if word in known else "<unk>" for word in tokenize(caption)[:max_words]]
    assert numbers[-1] == END
    assert END not in numbers[:-1]
    assert vocabulary.sentence([*numbers, PADDING, PADDING]) == " ".join(words)


# What is refused


@pytest.mark.parametrize(
    ("captions", "options", "message"),
    [
        ([], {}, "no word in 0 captions"),
        (["", " ... "], {}, "no word in 2 captions"),
        (["<unk>"], {}, "no word in 1 captions"),
        (["a man", "a dog"], {"min_count": 3}, r"rarer than 3.*most frequent, 'a', occurs 2 times; lower min_count"),
        (["a man"], {"max_words": 0}, "max_words = 0.*at least 1"),
        (["a man"], {"min_count": 0}, "min_count = 0.*at least 1"),
    ],
)
def test_captions_that_make_no_vocabulary_are_refused(captions, options, message):
    with pytest.raises(BadCaptions, match=message):
        Vocabulary.build(captions, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "begins with nothing; expected '<end>', '<unk>'"),
        (["a", "b"], "begins with 'a', 'b'; expected '<end>', '<unk>'"),
        (["<unk>", "<end>", "a"], "begins with '<unk>', '<end>'; expected '<end>', '<unk>'"),
        (["<end>", "<unk>", "dog", "a", "dog"], "the word 'dog' occurs 2 times"),
        (["<end>", "<unk>", "a dog"], "'a dog'.*without blanks"),
        (["<end>", "<unk>", ""], "''.*without blanks"),
    ],
)
def test_words_that_are_no_vocabulary_are_refused(words, message):
    with pytest.raises(BadCaptions, match=message):
        Vocabulary(tuple(words))
