"""ConvGRU against equations 5 to 8 of the paper, written out one by one: six convolutions, one step at a time, in float64."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import conv2d

from grurcn.gru import ConvGRU

NAMES = ("W_z", "W_r", "W", "U_z", "U_r", "U")


def kernels_of(gru):
    """The six kernels, each a tensor of its own."""
    packed = (*gru.w.weight.chunk(3), *gru.u_gates.weight.chunk(2), gru.u.weight)
    return {name: kernel.detach().clone().requires_grad_() for name, kernel in zip(NAMES, packed, strict=True)}


def by_the_equations(x, k):
    """x (B, T, X, H, W), six kernels -> the states (B, T, C, H, W)."""

    def times(name, maps):
        return conv2d(maps, k[name], padding=k[name].shape[-1] // 2)

    h = torch.zeros(len(x), len(k["U"]), *x.shape[-2:], dtype=x.dtype)
    states = []
    for t in range(x.shape[1]):
        z = torch.sigmoid(times("W_z", x[:, t]) + times("U_z", h))  # (5)
        r = torch.sigmoid(times("W_r", x[:, t]) + times("U_r", h))  # (6)
        candidate = torch.tanh(times("W", x[:, t]) + times("U", r * h))  # (7)
        h = (1 - z) * h + z * candidate  # (8)
        states.append(h)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("num_frames", [1, 2, 7])
@pytest.mark.parametrize(("kernel_size", "height", "width"), [(3, 5, 7), (3, 1, 2), (1, 5, 7), (1, 1, 1)])
def test_states_and_gradients_are_those_of_the_equations(num_frames, kernel_size, height, width):
    torch.manual_seed(num_frames)
    gru = ConvGRU(in_channels=3, channels=4, kernel_size=kernel_size).double()
    x = torch.randn(2, num_frames, 3, height, width, dtype=torch.float64, requires_grad=True)
    x_again, kernels = x.detach().clone().requires_grad_(), kernels_of(gru)

    states, expected = gru(x), by_the_equations(x_again, kernels)
    torch.testing.assert_close(states, expected)

    pull = torch.randn_like(expected)  # a gradient into every state, not only the last
    (states * pull).sum().backward()
    (expected * pull).sum().backward()
    torch.testing.assert_close(x.grad, x_again.grad)
    grads = {name: torch.zeros_like(kernel) if kernel.grad is None else kernel.grad for name, kernel in kernels.items()}
    torch.testing.assert_close(gru.w.weight.grad, torch.cat([grads["W_z"], grads["W_r"], grads["W"]]))
    if num_frames > 1:  # with one frame there is nothing to recur
        torch.testing.assert_close(gru.u_gates.weight.grad, torch.cat([grads["U_z"], grads["U_r"]]))
        torch.testing.assert_close(gru.u.weight.grad, grads["U"])


def test_no_state_sees_a_later_frame():
    gru, x = ConvGRU(in_channels=3, channels=4), torch.randn(2, 6, 3, 5, 7)
    changed = x.clone()
    changed[:, 4:] += 1.0

    before, after = gru(x), gru(changed)

    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_a_state_remembers_earlier_frames():
    gru, x = ConvGRU(in_channels=3, channels=4), torch.randn(2, 3, 3, 5, 7)
    changed = x.clone()
    changed[:, 0] += 1.0
    assert not torch.allclose(gru(x)[:, 2], gru(changed)[:, 2], atol=1e-3)


def hand_made(in_channels, kernel_size=1, **kernels):
    """A GRU of one state channel with the given kernels; the others are zero."""
    gru = ConvGRU(in_channels, 1, kernel_size)
    packed = (*gru.w.weight.data, *gru.u_gates.weight.data, *gru.u.weight.data)
    for name, kernel in zip(NAMES, packed, strict=True):
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
    assert [name for name, _ in gru.named_parameters()] == ["w.weight", "u_gates.weight", "u.weight"]
    assert gru(torch.zeros(1, 3, 3, 4, 4)).abs().max() == 0


@pytest.mark.parametrize(
    ("in_channels", "channels", "kernel_size", "count"),
    [
        (128, 64, 3, 331_776),
        (256, 128, 3, 1_327_104),
        (512, 256, 3, 5_308_416),
        (4096, 512, 1, 7_077_888),
    ],
)
def test_parameters_are_as_many_as_the_paper_has(in_channels, channels, kernel_size, count):
    with torch.device("meta"):
        gru = ConvGRU(in_channels, channels, kernel_size)
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
    for one, other in pairwise(kernels_of(ConvGRU(4, 4)).values()):
        assert not torch.allclose(one, other)
