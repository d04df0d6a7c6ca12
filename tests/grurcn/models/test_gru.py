"""ConvGRU against equations 5 to 12 of the paper, written out one by one: six or eight convolutions, one step at a time, in
float64."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import conv2d

from grurcn.models.gru import ConvGRU

NAMES = ("W_z", "W_r", "W", "U_z", "U_r", "U", "V_z", "V_r")


def kernels_of(gru):
    """The six or eight kernels, each a tensor of its own."""
    below = () if gru.v_gates is None else gru.v_gates.chunk(2)
    kernels = (*gru.w_gates.chunk(2), gru.w, *gru.u_gates.chunk(2), gru.u, *below)
    return {
        name: kernel.detach().clone().requires_grad_()
        for name, kernel in zip(NAMES[: len(kernels)], kernels, strict=True)
    }


def grad_of(kernel):
    assert kernel.grad is not None
    return kernel.grad.clone()


def by_the_equations(x, k, below=None, reverse=False):
    """x (B, T, X, H, W), below (B, T, Y, H, W), six or eight kernels -> the states (B, T, C, H, W)."""

    def times(name, maps):
        return conv2d(maps, k[name], padding=k[name].shape[-1] // 2)

    h = torch.zeros(len(x), len(k["U"]), *x.shape[-2:], dtype=x.dtype)
    states = {}
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        b_z = 0 if below is None else times("V_z", below[:, t])
        b_r = 0 if below is None else times("V_r", below[:, t])
        z = torch.sigmoid(times("W_z", x[:, t]) + b_z + times("U_z", h))  # (5), (9)
        r = torch.sigmoid(times("W_r", x[:, t]) + b_r + times("U_r", h))  # (6), (10)
        candidate = torch.tanh(times("W", x[:, t]) + times("U", r * h))  # (7), (11)
        h = (1 - z) * h + z * candidate  # (8), (12)
        states[t] = h
    return torch.stack([states[t] for t in range(x.shape[1])], dim=1)


@pytest.mark.parametrize("num_frames", [1, 2, 7])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 4), (1, 2), (1, 1)])
@pytest.mark.parametrize("below_channels", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_and_gradients_are_those_of_the_equations(
    num_frames, kernel_size, height, width, below_channels, reverse
):
    torch.manual_seed(num_frames)
    gru = ConvGRU(3, 4, kernel_size, below_channels).double()
    inputs = [torch.randn(2, num_frames, 3, height, width, dtype=torch.float64, requires_grad=True)]
    if below_channels:
        inputs.append(
            torch.randn(2, num_frames, below_channels, height, width, dtype=torch.float64, requires_grad=True)
        )
    again, kernels = [maps.detach().clone().requires_grad_() for maps in inputs], kernels_of(gru)

    states = gru(*inputs, reverse=reverse)
    expected = by_the_equations(again[0], kernels, *again[1:], reverse=reverse)
    torch.testing.assert_close(states, expected)

    pull = torch.randn_like(expected)  # a gradient into every state, not only the last
    (states * pull).sum().backward()
    (expected * pull).sum().backward()
    for maps, copy in zip(inputs, again, strict=True):
        torch.testing.assert_close(maps.grad, copy.grad)
    grads = {name: torch.zeros_like(kernel) if kernel.grad is None else kernel.grad for name, kernel in kernels.items()}
    torch.testing.assert_close(gru.w_gates.grad, torch.cat([grads["W_z"], grads["W_r"]]))
    torch.testing.assert_close(gru.w.grad, grads["W"])
    torch.testing.assert_close(gru.u_gates.grad, torch.cat([grads["U_z"], grads["U_r"]]))
    torch.testing.assert_close(gru.u.grad, grads["U"])
    if below_channels:
        torch.testing.assert_close(grad_of(gru.v_gates), torch.cat([grads["V_z"], grads["V_r"]]))


def test_a_gradient_into_the_last_state_alone_is_that_of_the_equations():
    gru = ConvGRU(3, 4).double()
    x, kernels = torch.randn(2, 5, 3, 4, 5, dtype=torch.float64), kernels_of(gru)
    gru(x)[:, -1].square().mean().backward()
    by_the_equations(x, kernels)[:, -1].square().mean().backward()
    torch.testing.assert_close(gru.u.grad, kernels["U"].grad)
    torch.testing.assert_close(gru.w.grad, kernels["W"].grad)


def test_gradients_add_up_over_clips_however_maps_lie_in_memory():
    gru, x = ConvGRU(3, 4).double(), torch.randn(3, 4, 3, 5, 6, dtype=torch.float64)
    frame_by_frame = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(gru(frame_by_frame), gru(x))
    gru(x).sum().backward()
    together = grad_of(gru.u)
    gru.zero_grad()
    for clip in x.split(1):
        gru(clip).sum().backward()
    torch.testing.assert_close(gru.u.grad, together)


def test_what_is_kept_for_the_gradient_is_not_spoilt_by_it():
    gru, x = ConvGRU(3, 4), torch.randn(2, 4, 3, 5, 6)
    loss = gru(x).sum()
    loss.backward(retain_graph=True)
    first = grad_of(gru.u)
    gru.zero_grad()
    loss.backward()
    assert torch.equal(grad_of(gru.u), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_states_have_its_type_and_are_near_the_exact_ones(dtype):
    torch.manual_seed(0)
    gru, x = ConvGRU(8, 8), torch.randn(2, 4, 8, 5, 6)
    with torch.autocast("cpu", dtype):
        states = gru(x)
    assert states.dtype == dtype
    torch.testing.assert_close(states.float(), gru(x), atol=0.03, rtol=0)
    states.float().square().sum().backward()
    rough = grad_of(gru.u)
    gru.zero_grad()
    gru(x).square().sum().backward()
    assert torch.nn.functional.cosine_similarity(rough.flatten(), grad_of(gru.u).flatten(), dim=0) > 0.995


def test_without_gradients_nothing_is_kept():
    gru, x = ConvGRU(3, 4), torch.randn(2, 4, 3, 5, 6)
    with torch.inference_mode():
        quiet = gru(x)
    assert torch.equal(quiet, gru(x))


def test_the_state_of_the_level_below_moves_the_gates_and_not_the_candidate():
    # One cell, one step, r out of play: h = sigmoid(V_z b) . tanh(W x). A bottom-up input in the candidate would add to the tanh.
    gru = hand_made(1, below_channels=1, W=0.5, V_z=2.0, V_r=7.0)
    state = gru(frames(1.0), frames(0.3)).flatten()
    torch.testing.assert_close(state, torch.sigmoid(torch.tensor([0.6])) * torch.tanh(torch.tensor([0.5])))


def test_in_reverse_the_first_frames_state_has_seen_all_frames_and_the_last_ones_only_its_own():
    gru, x = ConvGRU(3, 4), torch.randn(2, 4, 3, 5, 7)
    backwards = gru(x, reverse=True)
    torch.testing.assert_close(backwards, gru(x.flip(1)).flip(1))
    torch.testing.assert_close(backwards[:, 3], gru(x[:, 3:])[:, 0])


def test_no_state_sees_a_later_frame():
    gru, x = ConvGRU(in_channels=3, channels=4), torch.randn(2, 6, 3, 5, 7)
    changed = x.clone()
    changed[:, 4:] += 1.0

    before, after = gru(x), gru(changed)

    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("below_channels", [0, 2])
def test_a_clip_goes_on_from_a_state(below_channels):
    gru, x = ConvGRU(3, 4, below_channels=below_channels), torch.randn(2, 5, 3, 5, 7)
    below = torch.randn(2, 5, 2, 5, 7) if below_channels else None
    with torch.no_grad():
        whole = gru(x, below)
        rest = gru(x[:, 2:], None if below is None else below[:, 2:], start=whole[:, 1])
    torch.testing.assert_close(rest, whole[:, 2:])


def test_a_state_remembers_earlier_frames():
    gru, x = ConvGRU(in_channels=3, channels=4), torch.randn(2, 3, 3, 5, 7)
    changed = x.clone()
    changed[:, 0] += 1.0
    assert not torch.allclose(gru(x)[:, 2], gru(changed)[:, 2], atol=1e-3)


def hand_made(in_channels, kernel_size=1, below_channels=0, **kernels):
    """A GRU of one state channel with the given kernels; the others are zero."""
    gru = ConvGRU(in_channels, 1, kernel_size, below_channels)
    below = () if gru.v_gates is None else gru.v_gates.data
    packed = (*gru.w_gates.data, *gru.w.data, *gru.u_gates.data, *gru.u.data, *below)
    for name, kernel in zip(NAMES[: len(packed)], packed, strict=True):
        kernel.copy_(torch.tensor(kernels.get(name, 0.0)).expand_as(kernel))
    return gru


def frames(*values):
    """One clip of 1 x 1 maps of one channel."""
    return torch.tensor(values)[None, :, None, None, None]


def test_z_of_one_takes_the_candidate_and_z_of_zero_keeps_the_state():
    # z is sigmoid(100 x): 1 for x = 1, 0 for x = -1; the candidate is tanh(x / 2).
    gru = hand_made(1, W_z=100.0, W=0.5)
    expected = torch.tensor([0.0, 0.5, 0.5, 1.0]).tanh()
    torch.testing.assert_close(gru(frames(-1.0, 1.0, -1.0, 2.0)).flatten(), expected)


def test_two_steps_worked_by_hand():
    # z = r = 1/2: h_1 = tanh(1) / 2 = 0.380797; h_2 = h_1 / 2 + tanh(-1 + 3 * h_1 / 2) / 2 = 0.190399 - 0.202161
    gru = hand_made(1, W=1.0, U=3.0)
    torch.testing.assert_close(gru(frames(1.0, -1.0)).flatten(), torch.tensor([0.380797, -0.011762]), rtol=0, atol=2e-6)


def test_r_is_applied_before_the_recurrent_convolution():
    # A row of two cells; U hands each cell the state of its right neighbour; z is 1 throughout, r is 0 left and 1 right.
    # Left, r . h before the convolution is the right cell's whole state; r after it would be nothing at all.
    right_neighbour = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    centre = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    off = [[0.0] * 3] * 3
    hundred = [[100 * value for value in row] for row in centre]
    gru = hand_made(3, 3, W_z=[off, off, hundred], W_r=[off, hundred, off], W=[centre, off, off], U=[right_neighbour])
    x = torch.zeros(1, 2, 3, 1, 2)  # channels: candidate, r, z
    x[0, 0, 0] = 0.8
    x[0, 1, 1] = torch.tensor([-1.0, 1.0])
    x[0, :, 2] = 1.0

    first, second = gru(x)[0, :, 0, 0]

    torch.testing.assert_close(first, torch.tensor([0.8, 0.8]).tanh())
    torch.testing.assert_close(second, torch.tensor([torch.tensor(0.8).tanh().tanh().item(), 0.0]))


def test_there_are_no_biases():
    gru = ConvGRU(in_channels=3, channels=4)
    assert [name for name, _ in gru.named_parameters()] == ["w_gates", "w", "u_gates", "u"]
    assert gru(torch.zeros(1, 3, 3, 4, 4)).abs().max() == 0


@pytest.mark.parametrize(
    ("in_channels", "channels", "below_channels", "kernel_size", "count"),
    [
        (128, 64, 0, 3, 331_776),
        (256, 128, 0, 3, 1_327_104),
        (512, 256, 0, 3, 5_308_416),
        (4096, 512, 0, 1, 7_077_888),
        # Stacking adds 2 * 9 * O_{l-1} * O_l a level.
        (256, 128, 64, 3, 1_327_104 + 147_456),
        (512, 256, 128, 3, 5_308_416 + 589_824),
        (512, 256, 256, 3, 5_308_416 + 1_179_648),
        (4096, 512, 256, 1, 7_077_888 + 262_144),
    ],
)
def test_parameters_are_as_many_as_the_paper_has(in_channels, channels, below_channels, kernel_size, count):
    with torch.device("meta"):
        gru = ConvGRU(in_channels, channels, kernel_size, below_channels)
    assert sum(parameter.numel() for parameter in gru.parameters()) == count


@pytest.mark.parametrize("in_channels", [3, 8])
def test_recurrent_kernels_start_orthogonal_and_input_kernels_do_not(in_channels):
    torch.manual_seed(0)
    kernels = {name: kernel.detach().flatten(1) for name, kernel in kernels_of(ConvGRU(in_channels, 8)).items()}
    for name, kernel in kernels.items():
        orthogonal = torch.allclose(kernel @ kernel.T, torch.eye(8), atol=1e-5)
        assert orthogonal == name.startswith("U"), name
    for name in ("W_z", "W_r", "W"):  # Glorot's bound, of one gate's fans
        bound = (6 / (9 * in_channels + 9 * 8)) ** 0.5
        assert 0.9 * bound < kernels[name].abs().max() <= bound, name


def test_every_gate_starts_with_kernels_of_its_own():
    for one, other in pairwise(kernels_of(ConvGRU(4, 4, 3, 4)).values()):
        assert not torch.allclose(one, other)
