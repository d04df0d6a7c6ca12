"""The caption decoder: an LSTM that attends to a video's segments before each word (Yao et al. 2015, as its authors released it).

    start      h_0 = tanh(W_s m + b), memory_0 = tanh(W_m m + b), m the mean of the segments' vectors a_k
    attention  alpha_t = softmax_k(u . tanh(W_a a_k + W_d h_{t-1} + b) + c)
    context    context_t = sigmoid(w . h_{t-1} + b) * sum_k alpha_tk a_k
    gates      U h_{t-1} + W E[y_{t-1}] + W_c context_t + b: i, f, o by a sigmoid, g by a tanh
    state      memory_t = f . memory_{t-1} + i . g, h_t = o . tanh(memory_t)
    word       log_softmax(V drop(tanh(W_h drop(h_t) + E[y_{t-1}] + W_p context_t + b)) + b)

y_t is the caption's word at step t; at the first step, E[y_{t-1}] is zero. Each sum has one bias (the released code has two in
the last). The released code also drops half of the input of i, f and o, which is omitted here.

B captions, K segments, D a segment's vector, A the attention's units, T words, E a word's vector, H LSTM units, V words in the
vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from grurcn.models.dropout import dropout

# Numbers of words in any vocabulary.
END = 0  # ends a caption
UNKNOWN = 1  # replaces words that are not in the vocabulary
PADDING = -1  # after END, in a batch of captions


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Options of the caption decoder."""

    hidden: int = 3518
    """LSTM units."""
    embedding: int = 468
    """Length of a word vector."""
    attention: int | None = None
    """Units that score a segment. Default: the length of a segment's vector."""
    dropout: float = 0.5
    """Fraction of each state, and of each output layer's input, that training drops."""
    attention_weight: float = 0.706
    """Weight in the loss of the squared distance from 1 of each segment's attention, summed over words; 0 turns it off."""

    def __post_init__(self) -> None:
        sizes = {"hidden": self.hidden, "embedding": self.embedding, "attention": self.attention}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} {size}: expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout {self.dropout:g}: expected at least 0 and below 1 (the fraction that is dropped)"
            )
        if not self.attention_weight >= 0:
            raise ValueError(f"attention_weight {self.attention_weight:g}: expected at least 0")


@dataclass(frozen=True)
class State:
    """The state of captions after some of their words, and their videos' vectors."""

    h: Tensor  # (B, H)
    memory: Tensor  # (B, H), at least float32
    vectors: Tensor  # (B, K, D), zeros where there is no segment
    keys: Tensor  # (B, K, A), W_a a_k
    segments: Tensor  # (B, K) bool


class Decoder(nn.Module):
    """Segment vectors -> log-probabilities of each next word: of given captions at once (forward), or word by word (step)."""

    def __init__(self, config: DecoderConfig, vector_size: int, num_words: int):
        """vector_size is D, num_words V."""
        super().__init__()
        self.config = config
        hidden, words = config.hidden, config.embedding
        attention = vector_size if config.attention is None else config.attention
        self.from_state = (4 * hidden, attention, 1)  # products of the state: for the gates, the attention, the context
        # Parameters of this module, not of layers in it: ZeRO 3 then gathers them once per forward pass. Gathering them at each
        # step would block, as workers have different numbers of steps.
        self.word_vectors = nn.Parameter(torch.empty(num_words, words))  # E
        self.w_start = nn.Parameter(torch.empty(2 * hidden, vector_size))  # W_s, W_m
        self.b_start = nn.Parameter(torch.empty(2 * hidden))
        self.w_segment = nn.Parameter(torch.empty(attention, vector_size))  # W_a
        self.w_state = nn.Parameter(torch.empty(sum(self.from_state), hidden))  # U of i, f, o and g, W_d, w
        self.b_state = nn.Parameter(torch.empty(sum(self.from_state)))
        self.w_score = nn.Parameter(torch.empty(1, attention))  # u
        self.b_score = nn.Parameter(torch.empty(1))  # c
        self.w_word = nn.Parameter(torch.empty(4 * hidden, words))  # W
        self.w_context = nn.Parameter(torch.empty(4 * hidden, vector_size))  # W_c
        self.w_hidden = nn.Parameter(torch.empty(words, hidden))  # W_h
        self.w_hidden_context = nn.Parameter(torch.empty(words, vector_size))  # W_p
        self.b_hidden = nn.Parameter(torch.empty(words))
        self.w_out = nn.Parameter(torch.empty(num_words, words))  # V
        self.b_out = nn.Parameter(torch.empty(num_words))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal recurrent matrices, one per gate; other matrices small and normal; zero biases. As in the released code."""
        for name, parameter in self.named_parameters():
            if name.startswith("b_"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.01)
        for gate in self.w_state[: self.from_state[0]].chunk(4):
            nn.init.orthogonal_(gate)

    def forward(self, vectors: Tensor, segments: Tensor, words: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """vectors (B, K, D); segments (B, K) bool, those that a video has, at least one; words (B, T) int64, the captions with
        END, then PADDING; draw (B,) int64, each caption's random bits for dropout
        -> log-probabilities of each word, given the words before it (B, T, V); attention (B, T, K), 0 for missing segments.

        Both are float32 under autocast. After END they are finite and mean nothing.
        """
        before = self.vectors_before(words)  # (B, T, E)
        word_gates = functional.linear(before, self.w_word)  # (B, T, 4H)
        state = self.start(vectors, segments)
        states, contexts, attention = [], [], []
        for word_gates_t in word_gates.unbind(dim=1):
            state, context_t, attention_t = self.advance(state, word_gates_t)
            states.append(state.h)
            contexts.append(context_t)
            attention.append(attention_t)
        log_probs = self.read_out(torch.stack(states, dim=1), before, torch.stack(contexts, dim=1), draw)
        return log_probs, torch.stack(attention, dim=1)

    def start(self, vectors: Tensor, segments: Tensor) -> State:
        """vectors (B, K, D), segments (B, K) bool -> the state before the first word."""
        present = segments[..., None]
        vectors = vectors.masked_fill(~present, 0)  # NaN too
        mean = vectors.sum(dim=1) / present.sum(dim=1)  # (B, D)
        first = functional.linear(mean, self.w_start, self.b_start).tanh()  # (B, 2H)
        h, memory = at_least_float32(first).chunk(2, dim=-1)
        if torch.is_autocast_enabled(vectors.device.type):
            vectors = vectors.to(torch.get_autocast_dtype(vectors.device.type))  # once, not at every step
        return State(h, memory, vectors, functional.linear(vectors, self.w_segment), segments)

    def step(self, state: State, word: Tensor | None) -> tuple[Tensor, Tensor, State]:
        """The state, and the previous word (B,) int64, None at the first step
        -> log-probabilities of the next word (B, V), attention (B, K), the new state. Without dropout."""
        if word is None:
            before = self.word_vectors.new_zeros(len(state.h), self.config.embedding)
        else:
            before = self.vectors_of(word)  # (B, E)
        state, context, attention = self.advance(state, functional.linear(before, self.w_word))
        return self.read_out(state.h, before, context), attention, state

    # Shared by forward and step

    def vectors_of(self, words: Tensor) -> Tensor:
        """words (...) int64 -> their vectors (..., E). PADDING gets END's, which is not used."""
        return functional.embedding(words.clamp(min=0), self.word_vectors)

    def vectors_before(self, words: Tensor) -> Tensor:
        """words (B, T) -> the vector of the word before each, zeros before the first (B, T, E)."""
        return functional.pad(self.vectors_of(words[:, :-1]), (0, 0, 1, 0))

    def advance(self, state: State, word_gates: Tensor) -> tuple[State, Tensor, Tensor]:
        """The state h_{t-1} and W E[y_{t-1}] (B, 4H) -> the state h_t, context_t (B, D), alpha_t (B, K)."""
        from_state = functional.linear(state.h, self.w_state, self.b_state)  # all products of h_{t-1} at once
        gates, query, openness = from_state.split(self.from_state, dim=1)  # (B, 4H), (B, A), (B, 1)
        fits = torch.tanh(state.keys + query[:, None])  # (B, K, A)
        scores = at_least_float32(functional.linear(fits, self.w_score, self.b_score)[..., 0])  # (B, K)
        attention = scores.masked_fill(~state.segments, -torch.inf).softmax(dim=1)
        context = torch.sigmoid(openness) * (attention[:, None] @ state.vectors)[:, 0]  # (B, D)
        gates = gates + word_gates + functional.linear(context, self.w_context)
        i, f, o, g = gates.chunk(4, dim=1)
        memory = torch.sigmoid(f) * state.memory + torch.sigmoid(i) * torch.tanh(g)
        return replace(state, h=torch.sigmoid(o) * torch.tanh(memory), memory=memory), context, attention

    def read_out(self, h: Tensor, before: Tensor, context: Tensor, draw: Tensor | None = None) -> Tensor:
        """h_t (B, [T,] H), E[y_{t-1}] (B, [T,] E) and context_t (B, [T,] D) -> log-probabilities (B, [T,] V).

        With dropout in training, if draw is given."""
        h = self.dropped(h, draw, level=0)
        from_context = functional.linear(context, self.w_hidden_context)
        hidden = torch.tanh(functional.linear(h, self.w_hidden, self.b_hidden) + before + from_context)
        logits = functional.linear(self.dropped(hidden, draw, level=1), self.w_out, self.b_out)
        return at_least_float32(logits).log_softmax(dim=-1)

    def dropped(self, x: Tensor, draw: Tensor | None, level: int) -> Tensor:
        """x (B, T, C) with dropout: other channels at each step, which do not depend on T."""
        if draw is None or not self.training:
            return x
        return dropout(x.flatten(1), self.config.dropout, draw, level).view_as(x)


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32; other types are unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def caption_loss(
    log_probs: Tensor, attention: Tensor, words: Tensor, segments: Tensor, attention_weight: float
) -> Tensor:
    """log_probs (B, T, V) and attention (B, T, K) of the decoder, words (B, T), segments (B, K) bool -> a scalar: the mean over
    captions of the negative log-likelihood, and of attention_weight * sum_k (1 - sum_t alpha_tk)^2.

    Steps after END and missing segments are ignored. All captions have the same weight, whatever their length, so that the loss
    of a batch is the mean over its equal parts. (The released code's regulariser, a sum over the batch and a mean over
    segments, grows with the batch.)
    """
    seen = (attention * (words != PADDING)[..., None]).sum(dim=1)  # (B, K)
    unseen = ((1 - seen).square() * segments).sum(dim=1)  # (B,)
    return (word_nll(log_probs, words) + attention_weight * unseen).mean()


def word_nll(log_probs: Tensor, words: Tensor) -> Tensor:
    """log_probs (B, T, V), words (B, T) -> negative log-likelihood of each caption with its END, in nats (B,)."""
    chosen = log_probs.gather(2, words.clamp(min=0)[..., None])[..., 0]  # (B, T)
    return -chosen.masked_fill(words == PADDING, 0).sum(dim=1)
