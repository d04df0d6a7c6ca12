"""Stored frames, or fields of optical flow -> the model's input, on the device: cut out, resized, mirrored, coloured and
normalised in one go.

B clips, T frames, N fields, H x W the stored frames' size, S the model's input size.
"""

import torch
from torch import Tensor

# ImageNet's, as torchvision's weights want them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# BT.601, limited range: rows R, G, B; columns Y, U, V; for bytes, of which 16, 128, 128 are taken off before.
YUV_TO_RGB = torch.tensor([[1.164384, 0.0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0.0]])
YUV_OFFSET = torch.tensor([16.0, 128.0, 128.0])

# A stored byte of flow is 128 + 127 * pixels / bound. The model sees 20 pixels as 0.5 / 0.226, as Temporal Segment Networks
# do (Wang et al. 2016): from pictures of -20 to 20 pixels, half of the range over the mean of ImageNet's deviations.
FLOW_STILL, FLOW_REACH = 128, 127
FLOW_SCALE = 0.5 / 0.226 / 20


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


def flow_to_clips(
    planes: Tensor, bound: Tensor, box: Tensor, mirror: Tensor, size: int, num_steps: int, stride: int, num_fields: int
) -> Tensor:
    """planes (B, N, 2H, W) uint8, u above v, bound (B,) pixels that the largest byte means, box (B, 4) top, left, height,
    width, mirror (B,) bool -> clips (B, num_steps, 2 * num_fields, S, S) float32.

    The channels of a step are u and v of its fields in their order: u_t, v_t, u_t+1, v_t+1, ... Steps share fields, and each
    is resized once:

        num_steps = 3, stride = 2, num_fields = 4, N = 8        step 0   0 1 2 3
                                                                step 1       2 3 4 5
                                                                step 2           4 5 6 7

    Motions keep their length in stored pixels whatever the box is resized to, as in the two-stream networks. What goes right
    goes left in a mirror: u changes its sign.
    """
    assert planes.shape[1] == stride * (num_steps - 1) + num_fields
    height, width = planes.shape[2] // 2, planes.shape[3]
    top, left, box_height, box_width = box.float().unbind(dim=1)
    rows = resize_matrix(top, box_height, height, size)  # (B, S, H)
    columns = resize_matrix(left, box_width, width, size)  # (B, S, W)
    columns = torch.where(mirror[:, None, None], columns.flip(1), columns)

    scale = (bound * FLOW_SCALE / FLOW_REACH)[:, None].repeat(1, 2)  # (B, 2), of u and v
    scale[:, 0] = torch.where(mirror, -scale[:, 0], scale[:, 0])
    pixels = (planes.float() - FLOW_STILL).unflatten(2, (2, height))  # (B, N, 2, H, W)
    resized = rows[:, None, None] @ pixels @ columns.mT[:, None, None]  # (B, N, 2, S, S)
    fields = resized * scale[:, None, :, None, None]
    first = stride * torch.arange(num_steps, device=planes.device)
    shown = first[:, None] + torch.arange(num_fields, device=planes.device)  # (T, F)
    return fields[:, shown].flatten(2, 3)


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
