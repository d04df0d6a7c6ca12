"""The convolutional GRU of Ballas et al. 2016, equations 5 to 12; names follow the paper.

    gates      z_t, r_t = sigmoid(W_z * x_t + U_z * h_{t-1} [+ V_z * b_t]), and r alike     (5) (6), stacked (9) (10)
    candidate  c_t = tanh(W * x_t + U * (r_t . h_{t-1}))                                    (7)           (11)
    state      h_t = (1 - z_t) . h_{t-1} + z_t . c_t                                        (8)           (12)

b_t is the state of the level below, pooled to this level's size; it affects only the gates. h_0 is zero, so the first step has
no recurrent product.

B clips, T frames, X input channels, C state channels, Y channels of the level below, H x W the map's size. Maps of all frames
are stored frame by frame, (T, B, ...), channels last, so that a step reads one piece of memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from grurcn.models.gru_kernels import fused

# (gradient of the output, output) of a tanh or a sigmoid -> gradient of its input
tanh_grad = torch.ops.aten.tanh_backward.grad_input
sigmoid_grad = torch.ops.aten.sigmoid_backward.grad_input


class ConvGRU(nn.Module):
    """A GRU whose products are zero-padded convolutions without bias: the state keeps the map's H x W."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3, below_channels: int = 0):
        """kernel_size is odd; below_channels are those of the level below, 0 if there is none."""
        super().__init__()
        self.channels = channels
        # Parameters of this module, not of layers in it: ZeRO 3 gathers weights when the module that owns them runs.
        window = (kernel_size, kernel_size)
        self.w_gates = nn.Parameter(torch.empty(2 * channels, in_channels, *window))  # W_z, W_r
        self.w = nn.Parameter(torch.empty(channels, in_channels, *window))  # W
        self.u_gates = nn.Parameter(torch.empty(2 * channels, channels, *window))  # U_z, U_r
        self.u = nn.Parameter(torch.empty(channels, channels, *window))  # U
        below = torch.empty(2 * channels, below_channels, *window)  # V_z, V_r
        self.v_gates = nn.Parameter(below) if below_channels else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot input kernels, orthogonal recurrent kernels, a matrix for each gate (the paper does not say)."""
        below = () if self.v_gates is None else self.v_gates.chunk(2)
        for kernel in (*self.w_gates.chunk(2), self.w, *below):
            nn.init.xavier_uniform_(kernel)
        for kernel in (*self.u_gates.chunk(2), self.u):
            nn.init.orthogonal_(kernel)

    def forward(
        self, x: Tensor, below: Tensor | None = None, reverse: bool = False, start: Tensor | None = None
    ) -> Tensor:
        """x (B, T, X, H, W), below (B, T, Y, H, W) -> the state after each frame (B, T, C, H, W).

        reverse runs from the last frame to the first: the state of frame t has then seen the frames t ... T - 1.
        start (B, C, H, W) is the state before the first frame, by default zero. It has no backward pass: use it under
        torch.no_grad().
        """
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        maps = [None if tensor is None else frame_by_frame(tensor).to(dtype) for tensor in (x, below)]
        # Channels last as the maps are: otherwise every step would convert them again.
        kernels = [
            None if kernel is None else kernel.to(dtype, memory_format=torch.channels_last)
            for kernel in (self.w_gates, self.w, self.u_gates, self.u, self.v_gates)
        ]
        inputs: list[Any] = [*maps, *kernels, reverse]
        if start is not None or torch.compiler.is_exporting():  # torch.export cannot follow Recurrence
            return recurrence(*inputs, start=start)[-1].transpose(0, 1)
        return Recurrence.apply(*inputs).transpose(0, 1)


def frame_by_frame(maps: Tensor) -> Tensor:
    """maps (B, T, X, H, W) -> (T, B, X, H, W), channels last; copies only if the memory has another order."""
    frames = maps.transpose(0, 1)
    if torch.compiler.is_exporting():
        return frames  # the order in memory is unknown if the batch size is
    return frames.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, frames.shape[:2])


def empty_maps(num_frames: int, like: Tensor, channels: int) -> Tensor:
    """Uninitialised (T, B, channels, H, W), channels last, for `like` (T, B, X, H, W)."""
    clips, _, height, width = like.shape[1:]
    return like.new_empty(num_frames, clips, height, width, channels).permute(0, 1, 4, 2, 3)


def recurrence(
    x: Tensor,
    below: Tensor | None,
    w_gates: Tensor,
    w: Tensor,
    u_gates: Tensor,
    u: Tensor,
    v_gates: Tensor | None,
    reverse: bool,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, B, X, H, W), below (T, B, Y, H, W), start (B, C, H, W) or None for zero
    -> z and r (T, B, 2C, H, W), candidates and states (T, B, C, H, W)."""
    gates = product(x, w_gates)  # input products, replaced by z and r
    if below is not None and v_gates is not None:
        gates += product(below, v_gates)
    candidates = product(x, w)  # input products, replaced by c
    states = empty_maps(len(x), candidates, candidates.shape[2])
    h = None if start is None else start.to(states.dtype)
    for t in step_order(len(x), reverse):
        if h is None:
            first_state(gates[t], candidates[t], states[t])
        else:
            rh = open_gates(gates[t], product(h, u_gates), h)
            next_state(candidates[t], product(rh, u), gates[t], h, states[t])
        h = states[t]
    return gates, candidates, states


class Recurrence(torch.autograd.Function):
    """All steps of a ConvGRU, with a handwritten backward pass.

    Automatic differentiation would compute the gradient of every kernel at every step and add them up. Here the steps yield the
    gradients of the inputs of the sigmoids and the tanh. One product over all frames then gives each kernel's gradient.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        below: Tensor | None,
        w_gates: Tensor,
        w: Tensor,
        u_gates: Tensor,
        u: Tensor,
        v_gates: Tensor | None,
        reverse: bool,
    ) -> Tensor:
        """x (T, B, X, H, W), below (T, B, Y, H, W) -> states (T, B, C, H, W)."""
        gates, candidates, states = recurrence(x, below, w_gates, w, u_gates, u, v_gates, reverse)
        ctx.save_for_backward(x, below, w_gates, w, u_gates, u, v_gates, gates, candidates, states)
        ctx.reverse = reverse
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_states: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, below, w_gates, w, u_gates, u, v_gates, gates, candidates, states = ctx.saved_tensors
        channels = states.shape[2]
        d_gates, d_candidates = empty_maps(len(x), states, 2 * channels), empty_maps(len(x), states, channels)
        rh = empty_maps(len(x), states, channels)  # r_t . h_{t-1}; unused at the first step
        carried = None  # gradient of h_t from later steps
        order = list(step_order(len(x), ctx.reverse))
        for t, before in zip(reversed(order), [*reversed(order[:-1]), None], strict=True):
            d_h = d_states[t] if carried is None else d_states[t] + carried
            if before is None:
                first_state_grad(d_h, gates[t], candidates[t], d_gates[t], d_candidates[t])
                break
            h = states[before]
            next_state_grad(d_h, gates[t], candidates[t], h, d_gates[t], d_candidates[t], rh[t])
            d_rh = product_grad_of_maps(d_candidates[t], rh[t], u)
            carried = open_gates_grad(d_h, d_rh, gates[t], h, d_gates[t])
            carried += product_grad_of_maps(d_gates[t], h, u_gates)

        later = slice(None, -1) if ctx.reverse else slice(1, None)  # all steps but the first, and the state before each
        earlier = slice(1, None) if ctx.reverse else slice(None, -1)
        d_x = d_below = d_v_gates = None
        if ctx.needs_input_grad[0]:
            d_x = product_grad_of_maps(d_gates, x, w_gates) + product_grad_of_maps(d_candidates, x, w)
        if below is not None:
            d_v_gates = product_grad_of_kernel(d_gates, below, v_gates)
            if ctx.needs_input_grad[1]:
                d_below = product_grad_of_maps(d_gates, below, v_gates)
        return (
            d_x,
            d_below,
            product_grad_of_kernel(d_gates, x, w_gates),
            product_grad_of_kernel(d_candidates, x, w),
            product_grad_of_kernel(d_gates[later], states[earlier], u_gates),
            product_grad_of_kernel(d_candidates[later], rh[later], u),
            d_v_gates,
            None,
        )


def step_order(num_frames: int, reverse: bool) -> range:
    return range(num_frames - 1, -1, -1) if reverse else range(num_frames)


# The products `*` of the equations and their gradients, for any number of frames: maps (..., X, H, W).


def product(maps: Tensor, kernel: Tensor) -> Tensor:
    """maps (..., X, H, W) * kernel (C, X, k, k) -> (..., C, H, W), zero-padded."""
    shape = maps.shape[:-3]
    if is_matrix(maps, kernel):
        return functional.linear(maps.flatten(-3), kernel.flatten(1))[..., None, None]
    out = functional.conv2d(maps.flatten(0, -4), kernel, padding=kernel.shape[-1] // 2)
    return out.contiguous(memory_format=torch.channels_last).unflatten(0, shape)


def product_grad_of_maps(d_out: Tensor, maps: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of a product's output -> gradient of its maps."""
    if is_matrix(maps, kernel):
        return (d_out.flatten(-3) @ kernel.flatten(1))[..., None, None]
    return convolution_grad(d_out, maps, kernel, of_kernel=False).unflatten(0, maps.shape[:-3])


def product_grad_of_kernel(d_out: Tensor, maps: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of a product's output -> gradient of its kernel, summed over all frames; zero if there are none."""
    if not len(maps):
        return torch.zeros_like(kernel)
    if is_matrix(maps, kernel):
        rows = d_out.flatten(-3).flatten(0, -2)
        return (rows.T @ maps.flatten(-3).flatten(0, -2)).view_as(kernel)
    return convolution_grad(d_out, maps, kernel, of_kernel=True)


def convolution_grad(d_out: Tensor, maps: Tensor, kernel: Tensor, of_kernel: bool) -> Tensor:
    grads = torch.ops.aten.convolution_backward(
        d_out.flatten(0, -4),
        maps.flatten(0, -4),
        kernel,
        bias_sizes=None,
        stride=[1, 1],
        padding=[kernel.shape[-1] // 2] * 2,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[not of_kernel, of_kernel, False],
    )
    return grads[of_kernel]


def is_matrix(maps: Tensor, kernel: Tensor) -> bool:
    """Whether a product is one of matrices, as that of 1 x 1 maps is: many times faster than a convolution."""
    return kernel.shape[-1] == 1 and maps.shape[-2:] == (1, 1)


# The pointwise functions between the products, for one step: maps (B, C, H, W), gates (B, 2C, H, W). Results are written where
# their maps are stored, so that nothing is copied.


@fused
def first_state(gates: Tensor, candidate: Tensor, state: Tensor) -> None:
    """Eq. 5 to 8 for h_{t-1} = 0."""
    gates.sigmoid_()
    candidate.tanh_()
    torch.mul(gates.chunk(2, dim=1)[0], candidate, out=state)


@fused
def open_gates(gates: Tensor, recurrent: Tensor, h: Tensor) -> Tensor:
    """Eq. 5 and 6, in place -> r . h."""
    gates.add_(recurrent).sigmoid_()
    return gates.chunk(2, dim=1)[1] * h


@fused
def next_state(candidate: Tensor, recurrent: Tensor, gates: Tensor, h: Tensor, state: Tensor) -> None:
    """Eq. 7, in place, and eq. 8."""
    candidate.add_(recurrent).tanh_()
    torch.lerp(h, candidate, gates.chunk(2, dim=1)[0], out=state)  # (1 - z) . h + z . c


@fused
def first_state_grad(d_h: Tensor, gates: Tensor, candidate: Tensor, d_gates: Tensor, d_candidate: Tensor) -> None:
    z, _ = gates.chunk(2, dim=1)
    d_z, d_r = d_gates.chunk(2, dim=1)
    tanh_grad(d_h * z, candidate, grad_input=d_candidate)
    sigmoid_grad(d_h * candidate, z, grad_input=d_z)
    d_r.zero_()


@fused
def next_state_grad(
    d_h: Tensor, gates: Tensor, candidate: Tensor, h: Tensor, d_gates: Tensor, d_candidate: Tensor, rh: Tensor
) -> None:
    """Backward pass of eq. 8 and of the tanh of eq. 7. Also computes r . h again, which is not kept."""
    z, r = gates.chunk(2, dim=1)
    tanh_grad(d_h * z, candidate, grad_input=d_candidate)
    sigmoid_grad((candidate - h).mul_(d_h), z, grad_input=d_gates.chunk(2, dim=1)[0])
    torch.mul(r, h, out=rh)


@fused
def open_gates_grad(d_h: Tensor, d_rh: Tensor, gates: Tensor, h: Tensor, d_gates: Tensor) -> Tensor:
    """Backward pass of r . h -> gradient of h_{t-1} without that of the gates' recurrent product."""
    z, r = gates.chunk(2, dim=1)
    sigmoid_grad(d_rh * h, r, grad_input=d_gates.chunk(2, dim=1)[1])
    return torch.addcmul(d_h, d_h, z, value=-1).addcmul_(d_rh, r)  # d_h . (1 - z) + d_rh . r
