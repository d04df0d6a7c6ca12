"""Optical flow: how far each pixel moves from one frame to the next, computed while packing and stored as a video.

Every frame has a field (2, H, W) float32: u, to the right, and v, down, in pixels of the stored frames.

    frames   0 ──> 1 ──> 2 ──> 3
    fields     0     1     2   2     field i leads from frame i to frame i + 1; the last repeats the one before

A stored field is a picture of 2H x W bytes, the H rows of u above those of v. A byte is 128 + 127 * pixels / bound: 128 is
no motion, exactly, and turning a motion round is turning its byte round 128. Motions beyond the bound are cut to it; the
two-stream networks' pictures of flow end at 20 pixels too (Wang et al. 2016).

OpenCV computes it; it is wanted for packing only, and imported only then.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

FlowMethod = Literal["none", "tvl1", "dis"]
FLOW_METHODS = ("none", "tvl1", "dis")
STILL = 128  # the byte of no motion
REACH = 127  # from it to the bytes of motions as long as the bound


class NoOpenCV(ValueError):
    """Optical flow is wanted, but OpenCV is not installed, or without its contrib modules."""


def flow_between(method: FlowMethod) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function from the luma (H, W) uint8 of two frames to the field (2, H, W) float32 between them.

    tvl1 is TV-L1 (Zach et al. 2007), which the literature uses; dis is DIS (Kroeger et al. 2016), coarser and far faster;
    both as OpenCV sets them. From here on OpenCV uses one thread in this process, as packing takes one core a task.
    Raises NoOpenCV.
    """
    try:
        import cv2

        cv2.setNumThreads(1)
        cv2.ocl.setUseOpenCL(False)
        algorithm: Any  # its stubs insist on a first guess of the field
        if method == "dis":
            algorithm = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
        else:
            algorithm = cv2.optflow.DualTVL1OpticalFlow.create()
    except (ImportError, AttributeError) as error:  # the second without the contrib modules
        raise NoOpenCV(
            f"--flow {method}: OpenCV with its contrib modules is wanted, but not installed here ({error}); install it with: "
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


def to_pixels(stored: np.ndarray, bound: float) -> np.ndarray:
    """Stored bytes uint8 -> motions float32 in pixels of the stored frames."""
    return (stored.astype(np.float32) - STILL) * (bound / REACH)
