"""Beam search: the most likely captions of a decoder, for several videos at once.

    after each word   every caption of a beam x every possible next word ──> the `beam` most likely ──> the next beam

A finished caption keeps its probability and competes with unfinished ones. As in the paper, probabilities are not normalised by
length.

B videos, K segments, D a segment's vector, N places in a beam, T words, V words in the vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grurcn.models.decoder import END, PADDING, UNKNOWN, Decoder, State


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Each video's captions, the most likely first. T is the length of the longest of all."""

    words: Tensor  # (B, N, T) int64: the words, END if it was reached, then PADDING; only PADDING in empty places
    log_prob: Tensor  # (B, N) float32: of the whole caption; -inf in empty places
    attention: Tensor  # (B, N, T, K): for each word; 0 for PADDING


@torch.inference_mode()
def beam_search(decoder: Decoder, vectors: Tensor, segments: Tensor, beam: int, max_words: int = 30) -> Captions:
    """vectors (B, K, D), segments (B, K) bool -> each video's `beam` captions of at most max_words words, with END.

    A caption that is longer is cut. UNKNOWN is never chosen. A beam of 1 takes the most likely word each time. If there are
    fewer different captions than places, the last places are empty. Equally likely captions are ordered by the probability of
    all but their last word, then by the number of that word. A video's captions do not depend on the other videos, but for
    the PADDING up to the longest caption. Raises ValueError for a beam or max_words below 1.
    """
    if beam < 1 or max_words < 1:
        raise ValueError(f"beam {beam}, max_words {max_words}: expected at least 1 of each")
    state = repeat_state(decoder.start(vectors, segments), beam)  # (B*N, ...)
    words = segments.new_full((len(segments), beam, max_words), PADDING, dtype=torch.int64)
    attention = vectors.new_zeros(*words.shape, segments.shape[1])  # (B, N, T, K)
    log_prob = vectors.new_full(words.shape[:2], -torch.inf)
    log_prob[:, 0] = 0  # one caption without words; the other places are empty
    unfinished = log_prob > -torch.inf  # (B, N)
    word, length = None, 0
    while unfinished.any() and length < max_words:
        next_log_probs, attention_t, state = decoder.step(state, word)
        totals = log_prob[..., None] + continuations(
            next_log_probs.unflatten(0, words.shape[:2]), unfinished
        )  # (B, N, V)
        log_prob, parents, next_words = most_likely(totals, beam)  # (B, N) each
        state, words, attention = take_state(state, parents), take(words, parents), take(attention, parents)

        extended = take(unfinished, parents) & (log_prob > -torch.inf)  # captions that got a word
        words[:, :, length] = torch.where(extended, next_words, PADDING)
        attention[:, :, length] = take(attention_t.unflatten(0, words.shape[:2]), parents) * extended[..., None]
        unfinished = extended & (next_words != END)
        word, length = words[:, :, length].flatten(), length + 1

    empty = log_prob == -torch.inf
    words[empty], attention[empty] = PADDING, 0
    return Captions(words=words[:, :, :length], log_prob=log_prob.float(), attention=attention[:, :, :length])


def continuations(log_probs: Tensor, unfinished: Tensor) -> Tensor:
    """log_probs (B, N, V) of the next word, unfinished (B, N) bool -> what each word adds to the caption's log-probability
    (B, N, V). A finished caption has one continuation, END, which adds 0."""
    log_probs = log_probs.clone()
    log_probs[..., UNKNOWN] = -torch.inf
    finished = log_probs.new_full(log_probs.shape[2:], -torch.inf)  # (V,)
    finished[END] = 0
    return torch.where(unfinished[..., None], log_probs, finished)


def most_likely(totals: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """totals (B, N, V) -> the `number` highest of each video in descending order, their places in the beam, their words: each
    (B, number). Equal ones are ordered by place, then by word: argmax guarantees that, topk does not."""
    left = totals.flatten(1).clone()  # (B, N * V)
    found = []
    for _ in range(number):
        best = left.argmax(dim=1, keepdim=True)  # (B, 1)
        found.append((left.gather(1, best), best))
        left.scatter_(1, best, -torch.inf)
    highest, index = (torch.cat(columns, dim=1) for columns in zip(*found, strict=True))
    return highest, index // totals.shape[2], index % totals.shape[2]


def repeat_state(state: State, number: int) -> State:
    """The state of B captions -> the state of B * number, each `number` times in a row."""
    h, memory, vectors, keys, segments = (
        tensor.repeat_interleave(number, dim=0)
        for tensor in (state.h, state.memory, state.vectors, state.keys, state.segments)
    )
    return State(h, memory, vectors, keys, segments)


def take_state(state: State, parents: Tensor) -> State:
    """The state of B * N captions, each replaced by that of `parents` (B, N). A video's captions share their vectors."""
    h, memory = (take(tensor.unflatten(0, parents.shape), parents).flatten(0, 1) for tensor in (state.h, state.memory))
    return replace(state, h=h, memory=memory)


def take(places: Tensor, parents: Tensor) -> Tensor:
    """places (B, N, ...), parents (B, N) -> each video's places at its parents (B, N, ...)."""
    return places[torch.arange(len(places), device=places.device)[:, None], parents]
