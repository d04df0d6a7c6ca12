"""A clip of a data set, read as a model gets it -> what preview.py draws."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grurcn.drawing.contact_sheet import Shown, flow_colours
from grurcn.inference.model_input import model_input
from grurcn.models.pixels import FLOW_SCALE, MEAN, STD
from shards.index import Index
from shards.reading.clips import Clip, ClipConfig, evaluation_clips, evaluation_views
from shards.reading.stream import collate, decode_clip, part_of, read_video
from shards.rows import Sample
from shards.sample_json import parse_captions


def show(index: Index, sample: Sample, clip: Clip, clips: ClipConfig, remarks: tuple[str, ...] = ()) -> Shown:
    """A sample's clip as the model sees it. Of flow, the frames at which its steps begin, and each step's first field."""
    fields, at = None, clip
    if clips.stream == "flow":
        fields = input_of(index, sample, clip, clips)[:, :2] / FLOW_SCALE  # (T, 2, S, S) in stored pixels
        at = replace(clip, frames=clip.frames[:: clips.stride][: clips.num_frames])
    frames = input_of(index, sample, at, replace(clips, stream="rgb"))
    colours, reach = flow_colours(fields.numpy()) if fields is not None else (None, 0.0)
    return Shown(
        sample=sample,
        class_name=index.info.classes[sample.label] if index.info.classes else "",
        captions=captions_of(index, sample),
        clip=at,
        seconds_between_frames=clips.stride / sample.fps,
        frames=as_pixels(frames),
        flow=colours,
        flow_reach=reach,
        remarks=remarks,
    )


def middle_clip(index: Index, sample: Sample, clips: ClipConfig) -> Clip:
    """The clip that validation looks at: in the middle of the video, centre view."""
    packing = index.info.packing
    box, mirror = evaluation_views(packing.height, packing.width, 1, clips)[0]
    return Clip(frames=evaluation_clips(sample.num_frames, 1, clips)[0], box=box, mirror=mirror, draw=0)


def input_of(index: Index, sample: Sample, clip: Clip, clips: ClipConfig) -> Tensor:
    """What the model would get of one clip: (T, C, S, S) float32."""
    item: dict[str, Any] = {"__key__": sample.key, "place": (0, 0), "sample": sample, "clip": clip, "weight": 1.0}
    item["part"] = part_of(sample, clips.stream)
    batch = collate([decode_clip(index, read_video(index.shard_store, item))])
    return model_input(batch.frames, batch.flow_bound, batch.box, batch.mirror, clips)[0]


def as_pixels(frames: Tensor) -> np.ndarray:
    """(T, 3, S, S) as the model gets them -> (T, S, S, 3) uint8."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((frames * std + mean) * 255).round().clamp(0, 255).byte().movedim(1, -1).numpy()


def captions_of(index: Index, sample: Sample) -> tuple[str, ...]:
    if not sample.num_captions:
        return ()
    return parse_captions(index.shard_store.read(sample.shard, sample.json_offset, sample.json_size_bytes))
