"""Optical flow from OpenCV, computed while a video is packed. What is stored, and how, is in shards/video.py.

OpenCV is needed for packing alone, and imported only then.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shards.video import FlowMethod

STILL = 128  # the byte of no motion
REACH = 127  # from it to the byte of a motion as long as the bound


class NoOpenCV(ValueError):
    """Optical flow was asked for, but OpenCV is not installed, or lacks its contrib modules."""


def flow_between(method: FlowMethod) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function from the luma (H, W) uint8 of two frames to the field (2, H, W) float32 between them.

    tvl1 is TV-L1 (Zach et al. 2007), which the literature uses; dis is DIS (Kroeger et al. 2016), coarser and far faster.
    Both keep OpenCV's defaults. OpenCV uses one thread in this process afterwards, as packing takes one core a task.
    Raises NoOpenCV.
    """
    try:
        import cv2

        cv2.setNumThreads(1)
        cv2.ocl.setUseOpenCL(False)
        algorithm: Any  # its stubs require a first guess of the field
        if method == "dis":
            algorithm = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
        else:
            algorithm = cv2.optflow.DualTVL1OpticalFlow.create()
    except (ImportError, AttributeError) as error:  # the second without the contrib modules
        raise NoOpenCV(
            f"--flow {method}: needs OpenCV with its contrib modules, which is not installed here ({error}); install it with: "
            "pip install 'grurcn[flow]', and without other OpenCV packages; or pack with --flow none"
        ) from None

    def between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.moveaxis(algorithm.calc(before, after, None), -1, 0)

    return between


def flow_planes(frames: Iterator[np.ndarray], method: FlowMethod, bound: float) -> Iterator[np.ndarray]:
    """Planes (H * 3 // 2, W) of a video's frames -> as many planes (3H, W) of its fields: u, v, and chroma without colour.

    Holds one frame and one field, however long the video is.
    """
    between = flow_between(method)
    before, planes = None, None
    for frame in frames:
        luma = frame[: len(frame) * 2 // 3]
        if before is not None:
            planes = as_planes(between(before, luma), bound)
            yield planes
        before = luma
    if before is not None:
        yield as_planes(np.zeros((2, *before.shape), np.float32), bound) if planes is None else planes


def as_planes(field: np.ndarray, bound: float) -> np.ndarray:
    """field (2, H, W) in pixels -> yuv420p planes (3H, W) uint8 of a picture of 2H x W."""
    _, height, width = field.shape
    planes = np.full((3 * height, width), 128, np.uint8)
    planes[: 2 * height] = to_bytes(field, bound).reshape(2 * height, width)
    return planes


def to_bytes(pixels: np.ndarray, bound: float) -> np.ndarray:
    return (STILL + np.rint(np.clip(pixels / bound, -1, 1) * REACH)).astype(np.uint8)
