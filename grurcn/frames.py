"""Stored frames -> the model's input, on the device: cut out, resized, mirrored, coloured and normalised in one go.

B clips, T frames, H x W the stored frames' size, S the model's input size.
"""

import torch
from torch import Tensor

# ImageNet's, as torchvision's weights want them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# BT.601, limited range: rows R, G, B; columns Y, U, V; for bytes, of which 16, 128, 128 are taken off before.
YUV_TO_RGB = torch.tensor([[1.164384, 0.0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0.0]])
YUV_OFFSET = torch.tensor([16.0, 128.0, 128.0])


def to_clips(planes: Tensor, box: Tensor, mirror: Tensor, size: int) -> Tensor:
    """planes (B, T, H * 3 // 2, W) uint8 yuv420p, box (B, 4) top, left, height, width, mirror (B,) bool
    -> normalised clips (B, T, 3, S, S) float32.

    Resizing is bilinear with antialiasing, and chroma goes from half size to S in the same step. As it is separable, it
    is two batched matrix products a plane: rows @ plane @ columns, with each clip's crop and mirror in its matrices.
    """
    height, width = planes.shape[2] * 2 // 3, planes.shape[3]
    luma, u, v = planes.flatten(2).split([height * width, height * width // 4, height * width // 4], dim=2)
    top, left, box_height, box_width = box.float().unbind(dim=1)

    resized = []
    for plane, scale in ((luma, 1), (u, 2), (v, 2)):
        rows = resize_matrix(top / scale, box_height / scale, height // scale, size)  # (B, S, H)
        columns = resize_matrix(left / scale, box_width / scale, width // scale, size)  # (B, S, W)
        columns = torch.where(mirror[:, None, None], columns.flip(1), columns)
        pixels = plane.unflatten(2, (height // scale, width // scale)).float()  # (B, T, H, W)
        resized.append(rows[:, None] @ pixels @ columns.mT[:, None])  # (B, T, S, S)
    return normalise(torch.stack(resized, dim=2))


def resize_matrix(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """start (B,), length (B,) of a stretch of a line of in_size pixels -> weights (B, out_size, in_size) that resize it.

    A triangle as wide as one output pixel, or one input pixel where that is wider: bilinear when enlarging, an
    antialiased mean when shrinking. Pixels outside the stretch do not count, as if it had been cut out first; chroma that
    an odd box cuts through the middle counts as inside, so that a stretch is never empty.
    """
    step = (length / out_size)[:, None, None]  # input pixels an output pixel
    reach = step.clamp(min=1)
    output = torch.arange(out_size, device=start.device)[None, :, None] + 0.5
    pixel = torch.arange(in_size, device=start.device)[None, None, :] + 0.5
    centre = start[:, None, None] + output * step
    weights = (1 - (pixel - centre).abs() / reach).clamp(min=0)
    first, last = start[:, None, None], (start + length)[:, None, None]
    weights = weights * ((pixel >= first) & (pixel <= last))
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(yuv: Tensor) -> Tensor:
    """yuv (B, T, 3, S, S), 0 to 255 -> RGB in ImageNet's mean and deviation, colours clamped to what a screen can show."""
    matrix, offset = YUV_TO_RGB.to(yuv.device), YUV_OFFSET.to(yuv.device)
    rgb = torch.einsum("cy,btyhw->btchw", matrix, yuv - offset[:, None, None]).clamp(0, 255)
    mean, std = torch.tensor(MEAN, device=yuv.device) * 255, torch.tensor(STD, device=yuv.device) * 255
    return (rgb - mean[:, None, None]) / std[:, None, None]
