"""Beam search against all captions there are, and against a search with lists, one video, one caption and one word at a time."""

import itertools

import pytest
import torch
from decoders import random_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from grurcn.models.beam_search import beam_search
from grurcn.models.decoder import END, PADDING, UNKNOWN, DecoderConfig, word_nll

SIZE = 3
TINY = DecoderConfig(hidden=4, embedding=5, attention=6)


def videos(num=3, num_segments=4, seed=0):
    """Vectors (B, K, D) and random segments (B, K), at least one of each video."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num, num_segments, SIZE, generator=generator, dtype=torch.float64)
    segments = torch.rand(num, num_segments, generator=generator) < 0.6
    segments[:, seed % num_segments] = True
    return vectors, segments


def decoder_of(seed, num_words):
    return random_decoder(seed, TINY, SIZE, num_words).eval()


def decoder_that_says(word, num_words=5, much=100.0):
    """One that finds a word far likelier than others, or, for less than 0, less likely."""
    decoder = decoder_of(0, num_words)
    with torch.no_grad():
        decoder.b_out[word] += much
    return decoder


def decoder_of_equals(num_words):
    """One to which all words are equally likely."""
    decoder = decoder_of(0, num_words)
    with torch.no_grad():
        decoder.w_out.zero_()
        decoder.b_out.zero_()
    return decoder


def scores_of(decoder, vectors, segments, captions):
    """One video's (K, D), (K,) and captions, lists of words -> their log-probabilities and attention, by forward."""
    length = max(len(words) for words in captions)
    padded = torch.tensor([words + [PADDING] * (length - len(words)) for words in captions])
    num = len(captions)
    draw = torch.zeros(num, dtype=torch.int64)
    log_probs, attention = decoder(vectors.expand(num, -1, -1), segments.expand(num, -1), padded, draw)
    return -word_nll(log_probs, padded), attention


def trimmed(captions, b):
    """The captions of one video without PADDING, and without empty places."""
    found = [[word for word in words if word != PADDING] for words in captions.words[b].tolist()]
    return [words for words in found if words]


def every_caption(num_words, max_words):
    """All that end within max_words words, END counted, and all of max_words words that have not ended."""
    others = [word for word in range(num_words) if word not in (END, UNKNOWN)]
    ended = [[*words, END] for length in range(max_words) for words in itertools.product(others, repeat=length)]
    return ended + [list(words) for words in itertools.product(others, repeat=max_words)]


@given(
    seed=st.integers(0, 2**32),
    num_words=st.integers(2, 5),
    max_words=st.integers(1, 3),
    num_segments=st.integers(1, 3),
    room=st.integers(0, 3),
)
def test_a_beam_that_holds_all_captions_gives_all_of_them_in_order(seed, num_words, max_words, num_segments, room):
    decoder, (vectors, segments) = decoder_of(seed, num_words), videos(2, num_segments, seed)
    every = every_caption(num_words, max_words)
    found = beam_search(decoder, vectors, segments, beam=len(every) + room, max_words=max_words)
    assert found.log_prob.dtype == torch.float32
    for b in range(2):
        expected, _ = scores_of(decoder, vectors[b], segments[b], every)
        order = expected.argsort(descending=True, stable=True)
        assert trimmed(found, b) == [every[i] for i in order]
        torch.testing.assert_close(found.log_prob[b, : len(every)], expected[order].float())
    assert (found.log_prob[:, len(every) :] == -torch.inf).all()
    assert (found.words[:, len(every) :] == PADDING).all()
    assert not found.attention[:, len(every) :].any()
    assert found.words.shape == (2, len(every) + room, 1 if num_words == 2 else max_words)


def search_with_lists(decoder, vectors, segments, beam, max_words):
    """One video's captions as (log-probability, words), one continuation at a time."""
    captions = [(0.0, [])]
    for _ in range(max_words):
        candidates = []
        for place, (total, words) in enumerate(captions):
            if words and words[-1] == END:
                candidates.append((-total, place, END, words))
                continue
            draw = torch.zeros(1, dtype=torch.int64)
            log_probs, _ = decoder(vectors[None], segments[None], torch.tensor([[*words, END]]), draw)
            for word, log_prob in enumerate(log_probs[0, -1].tolist()):
                if word != UNKNOWN:
                    candidates.append((-(total + log_prob), place, word, [*words, word]))
        captions = [(-cost, words) for cost, _, _, words in sorted(candidates)[:beam]]
    return captions


@given(
    seed=st.integers(0, 2**32),
    num_words=st.integers(2, 8),
    beam=st.integers(1, 6),
    max_words=st.integers(1, 6),
    num_segments=st.integers(1, 4),
    equal=st.booleans(),
)
@settings(max_examples=40)
def test_captions_are_those_of_a_search_with_lists(seed, num_words, beam, max_words, num_segments, equal):
    decoder = decoder_of_equals(num_words) if equal else decoder_of(seed, num_words)
    vectors, segments = videos(2, num_segments, seed)
    found = beam_search(decoder, vectors, segments, beam, max_words)
    longest = 0
    for b in range(2):
        expected = search_with_lists(decoder, vectors[b], segments[b], beam, max_words)
        assert trimmed(found, b) == [words for _, words in expected]
        torch.testing.assert_close(found.log_prob[b, : len(expected)], torch.tensor([total for total, _ in expected]))
        longest = max(longest, *(len(words) for _, words in expected))
    assert found.words.shape == (2, beam, longest)


@given(seed=st.integers(0, 2**32), num_words=st.integers(3, 9))
@settings(max_examples=30)
def test_a_beam_of_one_takes_the_likeliest_word_each_time(seed, num_words):
    decoder, (vectors, segments) = decoder_of(seed, num_words), videos(1, 3, seed)
    state, word, words = decoder.start(vectors, segments), None, []
    while len(words) < 6 and END not in words:
        log_probs, _, state = decoder.step(state, word)
        log_probs[0, UNKNOWN] = -torch.inf
        word = log_probs.argmax(dim=1)
        words.append(int(word))
    assert trimmed(beam_search(decoder, vectors, segments, beam=1, max_words=6), 0) == [words]


@pytest.mark.parametrize("seed", range(5))
def test_probability_and_attention_are_the_decoders_own_of_those_words(seed):
    decoder, (vectors, segments) = decoder_of(seed, 9), videos(3, 4, seed)
    found = beam_search(decoder, vectors, segments, beam=4, max_words=7)
    assert found.attention.shape == (*found.words.shape, 4)
    for b in range(3):
        captions = trimmed(found, b)
        assert len(captions) == 4
        log_prob, attention = scores_of(decoder, vectors[b], segments[b], captions)
        torch.testing.assert_close(found.log_prob[b], log_prob.float())
        there = (found.words[b] != PADDING)[..., None]
        longest = attention.shape[1]
        torch.testing.assert_close(found.attention[b, :, :longest], attention * there[:, :longest])
        assert not found.attention[b, :, longest:].any()


@pytest.mark.parametrize("seed", range(5))
def test_what_a_video_gets_does_not_depend_on_the_others(seed):
    decoder, (vectors, segments) = decoder_of(seed, 9), videos(4, 3, seed)
    together = beam_search(decoder, vectors, segments, beam=3, max_words=8)
    for b in range(4):
        alone = beam_search(decoder, vectors[b : b + 1], segments[b : b + 1], beam=3, max_words=8)
        length = alone.words.shape[2]
        assert torch.equal(together.words[b, :, :length], alone.words[0])
        assert (together.words[b, :, length:] == PADDING).all()
        torch.testing.assert_close(together.log_prob[b], alone.log_prob[0])
        torch.testing.assert_close(together.attention[b, :, :length], alone.attention[0])


def test_what_lies_where_there_is_no_segment_has_no_influence():
    decoder, (vectors, segments) = decoder_of(3, 9), videos(4, 5, 3)
    assert not segments.all()
    plain = beam_search(decoder, vectors, segments, beam=3, max_words=8)
    vectors[~segments] = torch.nan
    beside = beam_search(decoder, vectors, segments, beam=3, max_words=8)
    assert torch.equal(beside.words, plain.words)
    assert torch.equal(beside.log_prob, plain.log_prob)
    assert torch.equal(beside.attention, plain.attention)
    assert not plain.attention[~segments[:, None, None].expand_as(plain.attention)].any()


def test_the_unknown_word_is_never_said_even_where_it_is_the_likeliest():
    decoder = decoder_that_says(UNKNOWN, much=10)
    found = beam_search(decoder, *videos(), beam=4, max_words=5)
    assert (found.words != UNKNOWN).all()
    assert found.log_prob.isfinite().all()


def test_a_caption_that_does_not_end_is_cut_after_max_words():
    found = beam_search(decoder_that_says(END, much=-100), *videos(), beam=2, max_words=4)
    assert found.words.shape == (3, 2, 4)
    assert (found.words > UNKNOWN).all()


def test_the_search_ends_with_the_longest_caption():
    decoder = decoder_that_says(END)
    found = beam_search(decoder, *videos(), beam=1)
    assert found.words.tolist() == [[[END]]] * 3
    found = beam_search(decoder, *videos(), beam=3)  # after END alone, the likeliest are a word and END
    assert found.words.shape == (3, 3, 2)
    assert found.words[:, 0].tolist() == [[END, PADDING]] * 3
    assert (found.words[:, 1:, 1] == END).all()


def test_of_equally_likely_captions_the_lower_place_and_then_the_lower_word_comes_first():
    found = beam_search(decoder_of_equals(4), *videos(2), beam=3, max_words=3)
    expected = [[END, PADDING, PADDING], [2, END, PADDING], [2, 2, END]]
    assert found.words.tolist() == [expected] * 2
    torch.testing.assert_close(found.log_prob, torch.tensor([[1.0, 2, 3]] * 2) * -torch.tensor(4.0).log())


def test_places_without_a_caption_are_empty():
    found = beam_search(decoder_of(0, 3), *videos(1), beam=5, max_words=2)
    assert sorted(trimmed(found, 0)) == [[END], [2, END], [2, 2]]
    assert found.log_prob[0, :3].isfinite().all()
    assert found.log_prob[0, 3:].tolist() == [-torch.inf] * 2
    assert found.words[0, 3:].tolist() == [[PADDING] * 2] * 2


def test_it_works_under_autocast_and_gives_float32():
    decoder, (vectors, segments) = decoder_of(1, 9).float(), videos()
    exact = beam_search(decoder, vectors.float(), segments, beam=1, max_words=4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = beam_search(decoder, vectors.float(), segments, beam=1, max_words=4)
    assert rough.log_prob.dtype == rough.attention.dtype == torch.float32
    torch.testing.assert_close(rough.log_prob, exact.log_prob, atol=0.2, rtol=0)


def test_nothing_is_kept_for_a_gradient():
    found = beam_search(decoder_of(0, 5), *videos(), beam=2, max_words=3)
    assert not found.log_prob.requires_grad
    assert not found.attention.requires_grad


@pytest.mark.parametrize(("beam", "max_words"), [(0, 30), (-1, 30), (5, 0)])
def test_a_beam_or_a_length_below_one_is_refused(beam, max_words):
    with pytest.raises(ValueError, match=f"^beam {beam}, max_words {max_words}: expected at least 1 of each$"):
        beam_search(decoder_of(0, 5), *videos(), beam=beam, max_words=max_words)
