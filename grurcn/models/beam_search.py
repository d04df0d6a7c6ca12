"""Beam search: the captions that a decoder finds most likely, for several videos at once.

    after each word   every caption of a beam x every word that may come next ──> the `beam` most likely ──> the next beam

A finished caption keeps its probability and competes with those that go on. Long captions are not favoured to make up for their
lower probability (no length normalisation), as in the paper.

B videos, K segments, D a segment's vector, N places in a beam, T words, V words in the vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grurcn.models.decoder import END, PADDING, UNKNOWN, Decoder, State


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Each video's captions, the most likely first. T is the length of the longest of all."""

    words: Tensor  # (B, N, T) int64: with END where it was reached, then PADDING; nothing else where a place is empty
    log_prob: Tensor  # (B, N) float32: of the whole caption; -inf where a place is empty
    attention: Tensor  # (B, N, T, K): before each word, 0 where there is none


@torch.inference_mode()
def beam_search(decoder: Decoder, vectors: Tensor, segments: Tensor, beam: int, max_words: int = 30) -> Captions:
    """vectors (B, K, D), segments (B, K) bool -> each video's `beam` captions of at most max_words words, END counted.

    A caption that has not ended by then stays as it is. UNKNOWN is no word of any. A beam of 1 takes the likeliest word each
    time. Where fewer different captions than places exist, the last places are empty. Of captions that are equally likely, the
    one whose last word was added to the more likely beginning comes first, then that of the lower word. What a video gets does
    not depend on the others, but for the PADDING that a longer caption among them asks for.
    Raises ValueError for a beam or max_words below 1.
    """
    if beam < 1 or max_words < 1:
        raise ValueError(f"beam {beam}, max_words {max_words}: wanted at least 1 of each")
    state = repeated(decoder.start(vectors, segments), beam)  # (B*N, ...)
    words = segments.new_full((len(segments), beam, max_words), PADDING, dtype=torch.int64)
    attention = vectors.new_zeros(*words.shape, segments.shape[1])  # (B, N, T, K)
    log_prob = vectors.new_full(words.shape[:2], -torch.inf)
    log_prob[:, 0] = 0  # one caption without words; the other places are empty
    going = log_prob > -torch.inf  # (B, N): captions that have not ended
    word, length = None, 0
    while going.any() and length < max_words:
        next_log_probs, attention_t, state = decoder.step(state, word)
        totals = log_prob[..., None] + continuations(next_log_probs.unflatten(0, words.shape[:2]), going)  # (B, N, V)
        log_prob, parents, next_words = most_likely(totals, beam)  # (B, N) each
        state, words, attention = taken(state, parents), rows(words, parents), rows(attention, parents)

        goes_on = rows(going, parents) & (log_prob > -torch.inf)  # those to which a word was added
        words[:, :, length] = torch.where(goes_on, next_words, PADDING)
        attention[:, :, length] = rows(attention_t.unflatten(0, words.shape[:2]), parents) * goes_on[..., None]
        going = goes_on & (next_words != END)
        word, length = words[:, :, length].flatten(), length + 1

    empty = log_prob == -torch.inf
    words[empty], attention[empty] = PADDING, 0
    return Captions(words=words[:, :, :length], log_prob=log_prob.float(), attention=attention[:, :, :length])


def continuations(log_probs: Tensor, going: Tensor) -> Tensor:
    """log_probs (B, N, V) of the next word, going (B, N) bool -> what each word adds to its caption's log-probability (B, N, V).

    A caption that has ended has one continuation, in END's place, which adds nothing.
    """
    log_probs = log_probs.clone()
    log_probs[..., UNKNOWN] = -torch.inf
    stays = log_probs.new_full(log_probs.shape[2:], -torch.inf)  # (V,)
    stays[END] = 0
    return torch.where(going[..., None], log_probs, stays)


def most_likely(totals: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """totals (B, N, V) -> the `number` highest of each video, highest first, with their places in the beam and words (B, number).

    Of equal ones the lower place comes first, then the lower word: topk promises no order of them, argmax does.
    """
    left = totals.flatten(1).clone()  # (B, N * V)
    found = []
    for _ in range(number):
        best = left.argmax(dim=1, keepdim=True)  # (B, 1)
        found.append((left.gather(1, best), best))
        left.scatter_(1, best, -torch.inf)
    highest, index = (torch.cat(columns, dim=1) for columns in zip(*found, strict=True))
    return highest, index // totals.shape[2], index % totals.shape[2]


def repeated(state: State, number: int) -> State:
    """The state of B captions -> that of B * number, each `number` times in a row."""
    h, memory, vectors, keys, segments = (
        tensor.repeat_interleave(number, dim=0)
        for tensor in (state.h, state.memory, state.vectors, state.keys, state.segments)
    )
    return State(h, memory, vectors, keys, segments)


def taken(state: State, parents: Tensor) -> State:
    """The state of B * N captions, each replaced by that at `parents` (B, N); all of a video read the same vectors."""
    h, memory = (rows(tensor.unflatten(0, parents.shape), parents).flatten(0, 1) for tensor in (state.h, state.memory))
    return replace(state, h=h, memory=memory)


def rows(places: Tensor, parents: Tensor) -> Tensor:
    """places (B, N, ...), parents (B, N) -> of each video those at its parents (B, N, ...)."""
    return places[torch.arange(len(places), device=places.device)[:, None], parents]
