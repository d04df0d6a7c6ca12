"""The convolutional GRU of Ballas et al. 2016, equations 5 to 8; names follow the paper.

B clips, T frames, X input channels, C state channels, H x W the map's size.
"""

from functools import partial

import torch
from torch import Tensor, nn


class ConvGRU(nn.Module):
    """A GRU whose products are zero-padded convolutions without bias: the state keeps the map's H x W."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=kernel_size, padding="same", bias=False)
        self.channels = channels
        self.w = conv(in_channels, 3 * channels)  # W_z, W_r, W
        self.u_gates = conv(channels, 2 * channels)  # U_z, U_r
        self.u = conv(channels, channels)  # U
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot input kernels, orthogonal recurrent kernels, one matrix a gate (the paper does not say)."""
        for weight in self.w.weight.chunk(3):
            nn.init.xavier_uniform_(weight)
        for weight in (*self.u_gates.weight.chunk(2), self.u.weight):
            nn.init.orthogonal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, X, H, W) -> the state after each frame (B, T, C, H, W). The state before the first is zero."""
        wx = self.w(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, T, 3C, H, W), all frames in one call
        states: list[Tensor] = []
        for wx_t in wx.unbind(dim=1):
            wx_z, wx_r, wx_c = wx_t.chunk(3, dim=1)  # (B, C, H, W) each
            if not states:  # h_0 = 0: nothing to convolve
                states.append(torch.sigmoid(wx_z) * torch.tanh(wx_c))
                continue
            h = states[-1]
            uh_z, uh_r = self.u_gates(h).chunk(2, dim=1)
            z = torch.sigmoid(wx_z + uh_z)  # eq. 5
            r = torch.sigmoid(wx_r + uh_r)  # eq. 6
            candidate = torch.tanh(wx_c + self.u(r * h))  # eq. 7
            states.append((1 - z) * h + z * candidate)  # eq. 8
        return torch.stack(states, dim=1)
