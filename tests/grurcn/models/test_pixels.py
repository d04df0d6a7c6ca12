"""Stored planes -> the model's input: checked against torch's own antialiased resizing of the cut-out planes, and against
colours that ffmpeg stored."""

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from grurcn.models.pixels import flow_to_clips, to_clips

HEIGHT, WIDTH = 36, 48
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
WHOLE = (0, 0, HEIGHT, WIDTH)


def random_planes(clips=1, frames=2, grey=False):
    """Every byte value that limited range allows, and where `grey` no colour."""
    generator = torch.Generator().manual_seed(clips * 100 + frames)
    planes = torch.randint(16, 236, (clips, frames, HEIGHT * 3 // 2, WIDTH), generator=generator, dtype=torch.uint8)
    if grey:
        planes[:, :, HEIGHT:] = 128
    return planes


def clips_of(planes, boxes, size, mirror=None):
    mirror = torch.tensor(mirror if mirror is not None else [False] * len(planes))
    return to_clips(planes, torch.tensor(boxes), mirror, size)


def bytes_of(clips):
    """Normalised clips -> RGB from 0 to 255."""
    return (clips * STD + MEAN) * 255


def luma_of(clips):
    """Clips of grey frames -> the luma that they had."""
    rgb = bytes_of(clips)
    assert (rgb - rgb[:, :, :1]).abs().max() < 1e-2
    return rgb[:, :, 0] * (235 - 16) / 255 + 16


def cut_and_resized(plane, box, size):
    """plane (T, H, W) -> (T, S, S): torch's antialiased resizing of the part cut out."""
    top, left, height, width = box
    part = plane[:, top : top + height, left : left + width].float()
    return interpolate(part[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]


# Resizing


@pytest.mark.parametrize("size", [7, 16, 36, 80])
@pytest.mark.parametrize("box", [WHOLE, (0, 0, 9, 11), (27, 37, 9, 11), (3, 5, 21, 8), (1, 0, 35, 48)])
def test_luma_is_resized_as_torch_resizes_the_part_cut_out(box, size):
    planes = random_planes(grey=True)
    found = luma_of(clips_of(planes, [box], size))
    torch.testing.assert_close(found[0], cut_and_resized(planes[0, :, :HEIGHT], box, size), rtol=0, atol=5e-3)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_box_is_resized_as_torch_resizes_it(data):
    top, left = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
    height, width = data.draw(st.integers(1, HEIGHT - top)), data.draw(st.integers(1, WIDTH - left))
    size = data.draw(st.integers(1, 60))
    planes, box = random_planes(grey=True), (top, left, height, width)
    found = luma_of(clips_of(planes, [box], size))
    torch.testing.assert_close(found[0], cut_and_resized(planes[0, :, :HEIGHT], box, size), rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [8, 60])
def test_each_clip_of_a_batch_gets_its_own_box_and_mirror(size):
    planes = random_planes(clips=4)
    boxes = [WHOLE, (3, 5, 21, 8), (14, 30, 22, 18), (0, 1, 7, 47)]
    mirror = [False, True, True, False]
    together = clips_of(planes, boxes, size, mirror)
    for i, box in enumerate(boxes):
        alone = clips_of(planes[i : i + 1], [box], size)[0]
        torch.testing.assert_close(together[i], alone.flip(-1) if mirror[i] else alone, rtol=0, atol=1e-4)


def test_a_mirrored_clip_is_the_clip_flipped():
    planes, box = random_planes(), [(2, 7, 30, 33)]
    torch.testing.assert_close(clips_of(planes, box, 20, [True]), clips_of(planes, box, 20).flip(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [9, 64])
def test_colour_is_resized_from_its_half_size_planes_and_converted_by_bt601(size):
    planes = random_planes()[0]
    top, left, height, width = box = (4, 10, 26, 30)
    chroma = planes[:, HEIGHT:].reshape(len(planes), 2, HEIGHT // 2, WIDTH // 2)
    half = (top // 2, left // 2, height // 2, width // 2)
    y = cut_and_resized(planes[:, :HEIGHT], box, size)
    u, v = (cut_and_resized(chroma[:, i], half, size) for i in (0, 1))

    y, blue, red = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224  # ITU-R BT.601, limited range
    r = y + 2 * (1 - 0.299) * red
    b = y + 2 * (1 - 0.114) * blue
    g = (y - 0.299 * r - 0.114 * b) / 0.587
    expected = torch.stack([r, g, b], dim=1).clamp(0, 1) * 255

    torch.testing.assert_close(
        bytes_of(clips_of(planes[None], [box], size))[0], expected, rtol=0, atol=0.05
    )  # the matrix has six digits


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_one_colour_stays_that_colour_in_any_box(data):
    top, left = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
    height, width = data.draw(st.integers(1, HEIGHT - top)), data.draw(st.integers(1, WIDTH - left))
    planes = torch.full((1, 1, HEIGHT * 3 // 2, WIDTH), 120, dtype=torch.uint8)
    planes[:, :, HEIGHT:] = 140
    expected = clips_of(planes, [WHOLE], 5)
    torch.testing.assert_close(clips_of(planes, [(top, left, height, width)], 5), expected, rtol=0, atol=1e-4)


# Colours


def stored(rgb):
    """rgb (H, W, 3) uint8 -> (H * 3 // 2, W) planes, as shards/ stores them: BT.601, limited range, by ffmpeg."""
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    stored = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG)
    return torch.from_numpy(stored.to_ndarray())


@pytest.mark.parametrize(
    "colour",
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (0, 0, 0), (255, 255, 255), (200, 120, 40)],
)
def test_a_stored_colour_comes_back_within_three_levels(colour):
    planes = stored(np.full((HEIGHT, WIDTH, 3), colour, np.uint8))
    found = bytes_of(clips_of(planes[None, None], [(3, 5, 20, 31)], 10))[0, 0]
    torch.testing.assert_close(found, torch.tensor(colour)[:, None, None].expand(3, 10, 10).float(), rtol=0, atol=3)


def test_a_red_left_half_stays_left_of_a_blue_right_half():
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:, : WIDTH // 2, 0] = 255
    picture[:, WIDTH // 2 :, 2] = 255
    found = bytes_of(clips_of(stored(picture)[None, None], [WHOLE], 24))[0, 0]
    expected = torch.from_numpy(picture).permute(2, 0, 1).float()
    torch.testing.assert_close(found[:, :, 0], expected[:, :24, 0], rtol=0, atol=3)
    torch.testing.assert_close(found[:, :, -1], expected[:, :24, -1], rtol=0, atol=3)


def test_grey_is_normalised_by_imagenets_mean_and_deviation():
    planes = torch.full((1, 1, HEIGHT * 3 // 2, WIDTH), 128, dtype=torch.uint8)
    planes[:, :, :HEIGHT] = 16 + 73  # a third of the way from 16 to 235
    expected = torch.tensor([(1 / 3 - 0.485) / 0.229, (1 / 3 - 0.456) / 0.224, (1 / 3 - 0.406) / 0.225])
    torch.testing.assert_close(clips_of(planes, [WHOLE], 4)[0, 0, :, 2, 2], expected, rtol=0, atol=1e-4)


def test_colours_that_no_screen_shows_are_clamped():
    planes = torch.full((1, 1, HEIGHT * 3 // 2, WIDTH), 255, dtype=torch.uint8)
    found = bytes_of(clips_of(planes, [WHOLE], 4))
    assert found.min() > -1e-2
    assert found.max() < 255 + 1e-2


def test_clips_are_float32_of_the_size_asked_for():
    clips = clips_of(random_planes(clips=3, frames=2), [WHOLE] * 3, 18)
    assert clips.shape == (3, 2, 3, 18, 18)
    assert clips.dtype == torch.float32


# Optical flow


def random_fields(clips=1, fields=8):
    generator = torch.Generator().manual_seed(clips * 100 + fields)
    return torch.randint(0, 256, (clips, fields, 2 * HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)


def slow_flow_clip(planes, bound, box, mirror, size, num_steps, stride, num_fields):
    """One clip by the definition, a step, a field and a direction at a time: (N, 2H, W) -> (T, 2F, S, S)."""
    steps = []
    for step in range(num_steps):
        channels = []
        for field in range(step * stride, step * stride + num_fields):
            for direction in (0, 1):  # to the right, down
                stored = planes[field, direction * HEIGHT : (direction + 1) * HEIGHT].float()
                pixels = (stored - 128) / 127 * bound
                if mirror:
                    part = cut_and_resized(pixels[None], box, size)[0].flip(-1) * (-1 if direction == 0 else 1)
                else:
                    part = cut_and_resized(pixels[None], box, size)[0]
                channels.append(part / 20 * 0.5 / 0.226)
        steps.append(torch.stack(channels))
    return torch.stack(steps)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_flow_clip_is_that_of_the_definition(data):
    num_steps, stride, num_fields = (data.draw(st.integers(1, most)) for most in (4, 3, 5))
    size, clips = data.draw(st.integers(4, 50)), data.draw(st.integers(1, 3))
    planes = random_fields(clips, stride * (num_steps - 1) + num_fields)
    boxes, mirrors, bounds = [], [], []
    for _ in range(clips):
        top, left = data.draw(st.integers(0, HEIGHT - 4)), data.draw(st.integers(0, WIDTH - 4))
        boxes.append((top, left, data.draw(st.integers(4, HEIGHT - top)), data.draw(st.integers(4, WIDTH - left))))
        mirrors.append(data.draw(st.booleans()))
        bounds.append(data.draw(st.sampled_from([20.0, 8.0, 32.5])))
    steps = (num_steps, stride, num_fields)
    found = flow_to_clips(planes, torch.tensor(bounds), torch.tensor(boxes), torch.tensor(mirrors), size, *steps)
    assert found.shape == (clips, num_steps, 2 * num_fields, size, size)
    assert found.dtype == torch.float32
    for clip, fields, bound, box, mirror in zip(found, planes, bounds, boxes, mirrors, strict=True):
        torch.testing.assert_close(clip, slow_flow_clip(fields, bound, box, mirror, size, *steps), rtol=0, atol=1e-4)


def test_channels_of_flow_as_worked_by_hand():
    """Two steps of two fields, one apart; field n moves 2n pixels to the right and n up. The bound of 127 makes bytes pixels."""
    planes = torch.full((2, 3, 2 * HEIGHT, WIDTH), 128, dtype=torch.uint8)
    for number in range(3):
        planes[:, number, :HEIGHT] += 2 * number
        planes[:, number, HEIGHT:] -= number
    found = flow_to_clips(
        planes, torch.full((2,), 127.0), torch.tensor([WHOLE] * 2), torch.tensor([False, True]), 8, 2, 1, 2
    )
    pixels = found[:, :, :, 3, 3] * 20 * 0.226 / 0.5
    plain, mirrored = [[0, 0, 2, -1], [2, -1, 4, -2]], [[0, 0, -2, -1], [-2, -1, -4, -2]]
    torch.testing.assert_close(pixels, torch.tensor([plain, mirrored]).float())


def test_twenty_pixels_are_as_large_as_in_temporal_segment_networks_and_stillness_is_nothing():
    planes = torch.full((1, 1, 2 * HEIGHT, WIDTH), 128, dtype=torch.uint8)
    planes[:, :, :HEIGHT] = 255
    found = flow_to_clips(
        planes, torch.tensor([20.0]), torch.tensor([(3, 5, 20, 30)]), torch.tensor([False]), 9, 1, 1, 1
    )
    torch.testing.assert_close(found[0, 0, 0], torch.full((9, 9), (1 - 0.5) / 0.226))
    assert not found[0, 0, 1].any()
