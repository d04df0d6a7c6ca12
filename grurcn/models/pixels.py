"""Stored frames, or fields of optical flow -> the model's input. Cropping, resizing, mirroring, colour conversion and
normalisation run together on the device.

B clips, T frames, N fields, H x W the stored frames' size, S the model's input size.
"""

import torch
from torch import Tensor

# Of ImageNet, as torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# BT.601, limited range: rows R, G, B; columns Y, U, V, for bytes after subtracting the offset.
YUV_TO_RGB = torch.tensor([[1.164384, 0.0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0.0]])
YUV_OFFSET = torch.tensor([16.0, 128.0, 128.0])

# A stored byte of flow is 128 + 127 * pixels / bound. The model's input for 20 pixels is 0.5 / 0.226, as in Temporal Segment
# Networks (Wang et al. 2016): half of the range of -20 to 20 pixels, over the mean of ImageNet's deviations.
FLOW_STILL, FLOW_REACH = 128, 127
FLOW_SCALE = 0.5 / 0.226 / 20


def to_clips(planes: Tensor, box: Tensor, mirror: Tensor, size: int) -> Tensor:
    """planes (B, T, H * 3 // 2, W) uint8 yuv420p, box (B, 4) top, left, height, width, mirror (B,) bool
    -> normalised clips (B, T, 3, S, S) float32.

    Resizing is bilinear with antialiasing, and takes chroma from half size to S in the same step. It is separable, so it is two
    batched matrix products per plane: rows @ plane @ columns. The matrices contain each clip's crop and mirror.
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
    """planes (B, N, 2H, W) uint8, u above v, bound (B,) pixels of the largest byte, box (B, 4) top, left, height, width,
    mirror (B,) bool -> clips (B, num_steps, 2 * num_fields, S, S) float32.

    The channels of a step are u and v of its fields in order: u_t, v_t, u_t+1, v_t+1, ... Steps share fields, and each field is
    resized once:

        num_steps = 3, stride = 2, num_fields = 4, N = 8        step 0   0 1 2 3
                                                                step 1       2 3 4 5
                                                                step 2           4 5 6 7

    Motions are in stored pixels, whatever size the box is resized to, as in the two-stream networks. Mirroring changes the sign
    of u.
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
    """start (B,), length (B,) of an interval of a line of in_size pixels -> weights (B, out_size, in_size) that resize it.

    The weights are triangles as wide as an output pixel, or as an input pixel if that is wider: bilinear when enlarging, an
    antialiased mean when shrinking. Pixels outside the interval have no weight, as if it had been cropped first. A chroma pixel
    on the border of an odd box counts as inside, so that an interval is never empty.
    """
    step = (length / out_size)[:, None, None]  # input pixels per output pixel
    reach = step.clamp(min=1)
    output = torch.arange(out_size, device=start.device)[None, :, None] + 0.5
    pixel = torch.arange(in_size, device=start.device)[None, None, :] + 0.5
    centre = start[:, None, None] + output * step
    weights = (1 - (pixel - centre).abs() / reach).clamp(min=0)
    first, last = start[:, None, None], (start + length)[:, None, None]
    weights = weights * ((pixel >= first) & (pixel <= last))
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(yuv: Tensor) -> Tensor:
    """yuv (B, T, 3, S, S), 0 to 255 -> RGB, clamped to 0 to 255, normalised by ImageNet's mean and deviation."""
    matrix, offset = YUV_TO_RGB.to(yuv.device), YUV_OFFSET.to(yuv.device)
    rgb = torch.einsum("cy,btyhw->btchw", matrix, yuv - offset[:, None, None]).clamp(0, 255)
    mean, std = torch.tensor(MEAN, device=yuv.device) * 255, torch.tensor(STD, device=yuv.device) * 255
    return (rgb - mean[:, None, None]) / std[:, None, None]
