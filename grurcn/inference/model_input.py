"""A clip batch's frames, as they were stored -> what the model sees, for either stream."""

from torch import Tensor

from grurcn.models.pixels import flow_to_clips, to_clips
from shards.reading.clips import ClipConfig


def model_input(frames: Tensor, flow_bound: Tensor, box: Tensor, mirror: Tensor, clips: ClipConfig) -> Tensor:
    """frames (B, clips.frames_read, ...) uint8, flow_bound (B,), box (B, 4), mirror (B,), as in ClipBatch
    -> (B, T, clips.channels, S, S) float32.
    """
    if clips.stream == "flow":
        return flow_to_clips(
            frames, flow_bound, box, mirror, clips.size, clips.num_frames, clips.stride, clips.flow_fields
        )
    return to_clips(frames, box, mirror, clips.size)
