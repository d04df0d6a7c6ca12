"""The caption decoder against its equations, written out for one caption, one step, one gate and one segment at a time, in
float64; its loss by hand; and that padding, absent segments and other captions of a batch count for nothing."""

import math
from pathlib import Path

import pytest
import torch
from decoders import SIZE, TINY, WORDS, random_decoder
from ranks import CONTEXT
from torch import nn

from grurcn.models.beam_search import beam_search
from grurcn.models.decoder import END, PADDING, UNKNOWN, Decoder, DecoderConfig, caption_loss, word_nll

DRAW = torch.tensor([11, 2**62 + 7, 0])

# What lies in each parameter, in order of its rows; all of a parameter's parts have H rows but those named below.
PARTS = {
    "word_vectors": ("E",),
    "w_start": ("W_s", "W_m"),
    "b_start": ("b_s", "b_m"),
    "w_segment": ("W_a",),
    "w_state": ("U_i", "U_f", "U_o", "U_g", "W_d", "w"),
    "b_state": ("b_i", "b_f", "b_o", "b_g", "b_a", "b_w"),
    "w_score": ("u",),
    "b_score": ("c",),
    "w_word": ("W_i", "W_f", "W_o", "W_g"),
    "w_context": ("C_i", "C_f", "C_o", "C_g"),
    "w_hidden": ("W_h",),
    "w_hidden_context": ("W_p",),
    "b_hidden": ("b_h",),
    "w_out": ("V",),
    "b_out": ("b_V",),
}


def random_videos(num=3, num_segments=4, seed=0):
    """Vectors, and segments of which the first video has all, and others not."""
    vectors = torch.randn(num, num_segments, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    segments = torch.ones(num, num_segments, dtype=torch.bool)
    if num_segments > 1:
        segments[1:, -1] = False
        segments[2:, 0] = False
    if num_segments == 2:
        segments[2:, 1] = True
    return vectors, segments


def loss_of(decoder, vectors, segments, words, draw):
    log_probs, attention = decoder(vectors, segments, words, draw)
    return caption_loss(log_probs, attention, words, segments, attention_weight=0.7)


CAPTIONS = torch.tensor([[2, 3, 6, END], [5, END, PADDING, PADDING], [END, PADDING, PADDING, PADDING]])


def parts_of(decoder):
    """Each matrix and bias of the equations, a tensor of its own."""
    config = decoder.config
    rows = {"W_d": config.attention, "b_a": config.attention, "w": 1, "b_w": 1}
    parts = {}
    for name, parameter in decoder.named_parameters():
        names = PARTS[name]
        sizes = [len(parameter)] if len(names) == 1 else [rows.get(part, config.hidden) for part in names]
        for part, values in zip(names, parameter.detach().split(sizes), strict=True):
            parts[part] = values.clone().requires_grad_()
    return parts


def by_the_equations(p, vectors, segments, words, masks=None):
    """One caption: vectors (K, D), segments (K,), words (T,), masks of the state (T, H) and of the tanh (T, E), already scaled
    -> log-probabilities (T, V), attention (T, K)."""
    present = [k for k in range(len(vectors)) if segments[k]]
    m = sum(vectors[k] for k in present) / len(present)
    h = torch.tanh(p["W_s"] @ m + p["b_s"])
    memory = torch.tanh(p["W_m"] @ m + p["b_m"])
    log_probs, attention = [], []
    for t in range(len(words)):
        before = torch.zeros_like(p["E"][0]) if t == 0 else p["E"][max(int(words[t - 1]), 0)]
        e = {k: p["u"][0] @ torch.tanh(p["W_a"] @ vectors[k] + p["b_a"] + p["W_d"] @ h) + p["c"][0] for k in present}
        total = torch.stack([torch.exp(e[k]) for k in present]).sum()
        alpha = {k: torch.exp(e[k]) / total for k in present}
        beta = torch.sigmoid(p["w"][0] @ h + p["b_w"][0])
        context = beta * sum(alpha[k] * vectors[k] for k in present)
        gates = {}
        for gate in "ifog":
            gates[gate] = p[f"U_{gate}"] @ h + p[f"W_{gate}"] @ before + p[f"C_{gate}"] @ context + p[f"b_{gate}"]
        i, f, o = (torch.sigmoid(gates[gate]) for gate in "ifo")
        memory = f * memory + i * torch.tanh(gates["g"])
        h = o * torch.tanh(memory)
        seen = h if masks is None else h * masks[0][t]
        hidden = torch.tanh(p["W_h"] @ seen + before + p["W_p"] @ context + p["b_h"])
        hidden = hidden if masks is None else hidden * masks[1][t]
        logits = p["V"] @ hidden + p["b_V"]
        log_probs.append(logits - torch.log(torch.exp(logits).sum()))
        attention.append(torch.stack([alpha.get(k, torch.zeros_like(total)) for k in range(len(vectors))]))
    return torch.stack(log_probs), torch.stack(attention)


def scaled_masks(decoder, draw, num_words):
    """What each caption's states and tanhs are multiplied with in training: (T, H) and (T, E) of each."""
    ones = [torch.ones(len(draw), num_words, size).double() for size in (TINY.hidden, TINY.embedding)]
    return list(zip(*(decoder.dropped(x, draw, level) for level, x in enumerate(ones)), strict=True))


@pytest.mark.parametrize("num_words", [1, 4])
@pytest.mark.parametrize("num_segments", [1, 2, 5])
@pytest.mark.parametrize("training", [False, True])
def test_log_probabilities_attention_and_gradients_are_those_of_the_equations(num_segments, num_words, training):
    decoder = random_decoder(num_segments).train(training)
    vectors, segments = random_videos(num_segments=num_segments)
    words = CAPTIONS[:, :num_words]
    again, p = vectors.clone().requires_grad_(), parts_of(decoder)
    masks = scaled_masks(decoder, DRAW, num_words) if training else [None] * 3

    vectors.requires_grad_()
    found = decoder(vectors, segments, words, DRAW)
    expected = [by_the_equations(p, again[b], segments[b], words[b], masks[b]) for b in range(3)]
    expected = [torch.stack(rows) for rows in zip(*expected, strict=True)]
    torch.testing.assert_close(list(found), expected)

    pulls = [torch.randn_like(x) for x in expected]  # a gradient into every value, those behind END too
    torch.autograd.backward(list(found), pulls)
    torch.autograd.backward(expected, pulls)
    torch.testing.assert_close(vectors.grad, again.grad)
    assert {name for name, _ in decoder.named_parameters()} == PARTS.keys()
    for name, parameter in decoder.named_parameters():
        grads = [torch.zeros_like(p[part]) if p[part].grad is None else p[part].grad for part in PARTS[name]]
        torch.testing.assert_close(parameter.grad, torch.cat(grads), msg=lambda text, name=name: f"{name}: {text}")


def test_word_by_word_it_says_the_same_as_of_whole_captions():
    decoder, (vectors, segments) = random_decoder().eval(), random_videos()
    log_probs, attention = decoder(vectors, segments, CAPTIONS, DRAW)
    state, word = decoder.start(vectors, segments), None
    for t in range(CAPTIONS.shape[1]):
        log_probs_t, attention_t, state = decoder.step(state, word)
        torch.testing.assert_close(log_probs_t, log_probs[:, t])
        torch.testing.assert_close(attention_t, attention[:, t])
        word = CAPTIONS[:, t]


def test_probabilities_of_words_and_attention_of_segments_add_up_to_one():
    decoder, (vectors, segments) = random_decoder(), random_videos()
    log_probs, attention = decoder(vectors, segments, CAPTIONS, DRAW)
    assert log_probs.shape == (3, 4, WORDS)
    assert attention.shape == (3, 4, 4)
    torch.testing.assert_close(log_probs.exp().sum(dim=2), torch.ones(3, 4).double())
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(3, 4).double())


def test_no_step_sees_its_own_word_or_a_later_one():
    decoder, (vectors, segments) = random_decoder(), random_videos()
    words = torch.tensor([[2, 3, 4, 5, END]] * 3)
    changed = words.clone()
    changed[:, 2] = 6
    before, after = (decoder(vectors, segments, some, DRAW)[0] for some in (words, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(dim=2).any()


# What must not count


@pytest.mark.parametrize("rubbish", [1e30, math.inf, -math.inf, math.nan])
def test_what_lies_where_there_is_no_segment_has_no_influence(rubbish):
    found = []
    for value in (0.0, rubbish):
        decoder, (vectors, segments) = random_decoder(), random_videos()
        vectors[~segments] = value
        vectors.requires_grad_()
        log_probs, attention = decoder(vectors, segments, CAPTIONS, DRAW)
        caption_loss(log_probs, attention, CAPTIONS, segments, 0.7).backward()
        assert vectors.grad is not None
        assert not attention[~segments[:, None].expand_as(attention)].any()
        assert not vectors.grad[~segments].any()
        assert vectors.grad[segments].all()
        found.append([log_probs, attention, vectors.grad, *(parameter.grad for parameter in decoder.parameters())])
    for plain, beside_rubbish in zip(*found, strict=True):
        assert torch.equal(plain, beside_rubbish)


@pytest.mark.parametrize("training", [False, True])
def test_padding_has_no_influence_on_the_loss_or_a_gradient(training):
    found = []
    for padding in (0, 1, 5):
        decoder, (vectors, segments) = random_decoder().train(training), random_videos()
        words = nn.functional.pad(CAPTIONS, (0, padding), value=PADDING)
        log_probs, attention = decoder(vectors, segments, words, DRAW)
        assert log_probs.isfinite().all()
        assert attention.isfinite().all()
        loss = caption_loss(log_probs, attention, words, segments, 0.7)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in decoder.parameters())])
    for padded in found[1:]:
        torch.testing.assert_close(padded, found[0])


@pytest.mark.parametrize("training", [False, True])
def test_a_caption_scores_the_same_whatever_else_is_in_its_batch(training):
    decoder, (vectors, segments) = random_decoder().train(training), random_videos()
    log_probs, attention = decoder(vectors, segments, CAPTIONS, DRAW)
    order = [2, 0, 1]
    others = decoder(vectors[order], segments[order], CAPTIONS[order], DRAW[order])
    torch.testing.assert_close(others, (log_probs[order], attention[order]))
    for b, length in enumerate([4, 2, 1]):
        one = slice(b, b + 1)
        alone = decoder(vectors[one], segments[one], CAPTIONS[one, :length], DRAW[one])
        torch.testing.assert_close(alone, (log_probs[one, :length], attention[one, :length]))


# Dropout


def kept(decoder, level, num_words=4, size=500, draw=DRAW):
    return decoder.dropped(torch.ones(len(draw), num_words, size), draw, level) != 0


def test_the_share_is_dropped_and_the_rest_scaled_up():
    decoder = Decoder(DecoderConfig(hidden=4, embedding=5, dropout=0.3), SIZE, WORDS)
    dropped = decoder.dropped(torch.full((3, 20, 500), 2.0), DRAW, 0)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 2 / 0.7))


def test_what_a_caption_drops_depends_on_its_draw_alone():
    decoder = random_decoder()
    together = kept(decoder, 0)
    assert torch.equal(kept(decoder, 0, draw=DRAW.flip(0)), together.flip(0))
    assert torch.equal(kept(decoder, 0, num_words=2), together[:, :2])
    for b in range(3):
        assert torch.equal(kept(decoder, 0, draw=DRAW[b : b + 1])[0], together[b])


def test_steps_places_and_captions_drop_unrelated_channels():
    masks = torch.stack([kept(random_decoder(), level) for level in (0, 1)]).flatten(0, 2).double()  # (2 * 3 * 4, 500)
    both = masks @ masks.T / 500  # the share kept by both: 1/2 by itself, 1/4 by chance
    torch.testing.assert_close(both, torch.full_like(both, 0.25).fill_diagonal_(0.5), atol=0.1, rtol=0)


def test_in_training_log_probabilities_are_a_function_of_the_draw_and_of_no_generator():
    decoder, (vectors, segments) = random_decoder(), random_videos()
    first = decoder(vectors, segments, CAPTIONS, DRAW)[0]
    state = torch.random.get_rng_state()
    assert torch.equal(decoder(vectors, segments, CAPTIONS, DRAW)[0], first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.allclose(decoder(vectors, segments, CAPTIONS, DRAW + 1)[0], first)


def test_in_evaluation_and_step_by_step_nothing_is_dropped():
    decoder, (vectors, segments) = random_decoder().eval(), random_videos()
    quiet = decoder(vectors, segments, CAPTIONS, DRAW)[0]
    assert torch.equal(decoder(vectors, segments, CAPTIONS, DRAW + 1)[0], quiet)
    assert not torch.allclose(decoder.train()(vectors, segments, CAPTIONS, DRAW)[0], quiet)
    torch.testing.assert_close(decoder.step(decoder.start(vectors, segments), None)[0], quiet[:, 0])


# The loss


def test_the_loss_is_worked_by_hand():
    probs = torch.tensor([[[0.5, 0.1, 0.4], [0.25, 0.25, 0.5], [0.2, 0.6, 0.2]], [[0.8, 0.1, 0.1]] * 3])
    words = torch.tensor([[2, 0, PADDING], [0, PADDING, PADDING]])
    attention = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], [[1.0, 0.0]] * 3])
    segments = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(word_nll(probs.log(), words), -torch.tensor([0.4 * 0.25, 0.8]).log())
    nll = -(math.log(0.1) + math.log(0.8)) / 2
    regulariser = ((1 - 0.75) ** 2 + (1 - 1.25) ** 2 + (1 - 1) ** 2) / 2
    for weight in (0.0, 0.706):
        loss = caption_loss(probs.log(), attention, words, segments, weight)
        assert loss.item() == pytest.approx(nll + weight * regulariser)


def test_unknown_words_are_words():
    log_probs = torch.tensor([[[0.5, 0.1, 0.4], [0.25, 0.25, 0.5]]]).log()
    assert word_nll(log_probs, torch.tensor([[UNKNOWN, END]])).item() == pytest.approx(-math.log(0.1 * 0.25))


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_equal_parts():
    decoder, (vectors, segments) = random_decoder(), random_videos(num=4)
    words, draw = torch.cat([CAPTIONS, CAPTIONS[1:2]]), torch.arange(4)
    whole = loss_of(decoder, vectors, segments, words, draw)
    halves = [
        loss_of(decoder, vectors[half], segments[half], words[half], draw[half]) for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_it_learns_what_each_video_is_called():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(hidden=16, embedding=8, attention=8, dropout=0.1), SIZE, WORDS)
    vectors, segments = random_videos()
    vectors = vectors.float()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    for step in range(150):
        optimizer.zero_grad()
        loss_of(decoder, vectors, segments, CAPTIONS, DRAW + step).backward()
        optimizer.step()
    decoder.eval()
    assert word_nll(decoder(vectors, segments, CAPTIONS, DRAW)[0], CAPTIONS).max() < 0.2
    found = beam_search(decoder, vectors, segments, beam=1).words[:, 0]
    assert torch.equal(found, CAPTIONS)


# Sizes and first weights


def formula(hidden, words, attention, vector, vocabulary):
    """Parameters, gate by gate and matrix by matrix."""
    gate = hidden * hidden + hidden * words + hidden * vector + hidden
    start = hidden * vector + hidden
    scores = attention * vector + attention * hidden + attention + attention + 1
    openness = hidden + 1
    out = words * hidden + words * vector + words + vocabulary * words + vocabulary
    return vocabulary * words + 2 * start + 4 * gate + scores + openness + out


@pytest.mark.parametrize(("attention", "units"), [(6, 6), (None, SIZE)])
def test_it_has_as_many_parameters_as_the_equations(attention, units):
    decoder = Decoder(DecoderConfig(hidden=4, embedding=5, attention=attention), SIZE, WORDS)
    assert sum(p.numel() for p in decoder.parameters()) == formula(4, 5, units, SIZE, WORDS)


def test_the_published_sizes_can_be_built():
    vector = 1024 + 2 * (64 + 128 + 256 + 256 + 512)  # GoogLeNet and a bi-directional GRU-RCN
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(), vector, 20_000)
    assert decoder.w_state.shape == (4 * 3518 + vector + 1, 3518)
    count = sum(p.numel() for p in decoder.parameters())
    assert count == formula(3518, 468, vector, vector, 20_000) == 175_178_224


def test_first_weights_are_those_of_the_released_code():
    torch.manual_seed(0)
    config = DecoderConfig(hidden=40, embedding=30, attention=50)
    decoder = Decoder(config, 60, 70)
    p = parts_of(decoder)
    for gate in "ifog":
        torch.testing.assert_close(p[f"U_{gate}"] @ p[f"U_{gate}"].T, torch.eye(40), atol=1e-5, rtol=0)
    assert not torch.allclose(p["U_i"], p["U_f"])
    for name, values in p.items():
        if name.startswith("b_") or name == "c":
            assert not values.any(), name
        elif not name.startswith("U_"):
            spread = 0.01 / math.sqrt(2 * values.numel())
            assert values.std().item() == pytest.approx(0.01, abs=5 * spread), name
            assert values.mean().item() == pytest.approx(0, abs=5 * 0.01 / math.sqrt(values.numel())), name


# Precision, and weights spread over workers


def test_under_autocast_results_are_float32_and_near_the_exact_ones():
    decoder, (vectors, segments) = random_decoder().float(), random_videos()
    vectors = vectors.float()

    def gradients(enabled):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_probs, attention = decoder(vectors, segments, CAPTIONS, DRAW)
        caption_loss(log_probs, attention, CAPTIONS, segments, 0.7).backward()
        return log_probs, attention, torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])

    exact, rough = gradients(enabled=False), gradients(enabled=True)
    assert [x.dtype for x in rough] == [torch.float32] * 3
    torch.testing.assert_close(rough[:2], exact[:2], atol=0.1, rtol=0)
    assert not torch.equal(rough[0], exact[0])  # it was on
    assert torch.nn.functional.cosine_similarity(rough[2], exact[2], dim=0) > 0.99

    decoder.eval()
    with torch.autocast("cpu", torch.bfloat16):
        whole = decoder(vectors, segments, CAPTIONS, DRAW)
        first = decoder.step(decoder.start(vectors, segments), None)
    assert first[0].dtype == torch.float32
    torch.testing.assert_close(first[0], whole[0][:, 0], atol=0.05, rtol=0)
    assert first[2].memory.dtype == torch.float32


STEPS, WORLD = 3, 2


def trained_alone():
    """What plain torch makes of all four captions."""
    decoder, (vectors, segments, words) = random_decoder().float(), four_captions()
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(decoder, vectors, segments, words, torch.arange(4) + step).backward()
        optimizer.step()
    return decoder


def four_captions():
    vectors, segments = random_videos(num=4)
    return vectors.float(), segments, torch.cat([CAPTIONS[1:], CAPTIONS[:1], CAPTIONS[:1]])


def train_a_rank(rank, folder):
    """Two captions on each of two ranks: those of rank 0 have two words, those of rank 1 four."""
    import deepspeed
    import torch.distributed as dist
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    from cluster.engine import start_engine

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
    decoder = random_decoder().float()
    engine = start_engine(
        decoder,
        torch.optim.SGD(decoder.parameters(), lr=0.1),
        zero_stage=3,
        global_batch=4,
        accumulation=1,
        precision="fp32",
        clip_norm=None,
        device=torch.device("cpu"),
    )
    mine = slice(2 * rank, 2 * rank + 2)
    vectors, segments, words = (part[mine] for part in four_captions())
    words = words[:, : 2 + 2 * rank]
    for step in range(STEPS):
        engine.backward(loss_of(engine, vectors, segments, words, torch.arange(4)[mine] + step))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(decoder.parameters())):
        weights = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
        found = beam_search(decoder.eval(), vectors[: 1 + rank], segments[: 1 + rank], beam=2, max_words=3 + rank)
    torch.save((weights, found.words, found.log_prob), folder / f"rank-{rank}")
    dist.destroy_process_group()


@pytest.mark.cluster
def test_workers_with_longer_and_shorter_captions_train_at_zero_3_as_one_does(tmp_path: Path):
    ranks = [CONTEXT.Process(target=train_a_rank, args=(rank, tmp_path)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * WORLD

    decoder, (vectors, segments, _) = trained_alone(), four_captions()
    expected = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    decoder.eval()
    for rank in range(WORLD):
        weights, words, log_prob = torch.load(tmp_path / f"rank-{rank}")
        torch.testing.assert_close(weights, expected)
        some = slice(2 * rank, 3 * rank + 1)
        alone = beam_search(decoder, vectors[some], segments[some], beam=2, max_words=3 + rank)
        assert torch.equal(words, alone.words)
        torch.testing.assert_close(log_prob, alone.log_prob)


# Bad settings


@pytest.mark.parametrize("name", ["hidden", "embedding", "attention"])
@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_refused(name, size):
    with pytest.raises(ValueError, match=f"^{name} {size}: expected at least 1$"):
        DecoderConfig(**{name: size})


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_dropout_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=rf"^dropout {share:g}: expected at least 0 and below 1"):
        DecoderConfig(dropout=share)


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_a_negative_weight_of_the_regulariser_is_refused(weight):
    with pytest.raises(ValueError, match=rf"^attention_weight {weight:g}: expected at least 0$"):
        DecoderConfig(attention_weight=weight)
