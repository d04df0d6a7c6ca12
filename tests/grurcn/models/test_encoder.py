"""Fixed encoders of segments: the vectors are those of the networks run by hand, clip by clip, and nothing learns."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from grurcn.models.config import ModelConfig
from grurcn.models.encoder import CLIPS_AT_ONCE, Encoder, PartConfig, centre_box
from grurcn.models.pixels import to_clips
from shards.reading.clips import ClipConfig, evaluation_views

HEIGHT, WIDTH = 24, 40
MODEL = ModelConfig(taps=("pool1", "pool2"), hidden=(3, 5), width=0.0625, freeze=True)


def part(kind: str, offsets: tuple[int, ...], size: int = 16, **model) -> PartConfig:
    config = dataclasses.replace(MODEL, kind="gru-rcn" if kind == "states" else "frames", **model)
    return PartConfig(kind=kind, model=config, offsets=offsets, size=size, box_share=0.875)  # type: ignore[arg-type]


def planes(videos: int, segments: int, frames: int) -> torch.Tensor:
    return torch.randint(0, 256, (videos, segments, frames, HEIGHT * 3 // 2, WIDTH), dtype=torch.uint8)


def built(*parts: PartConfig) -> Encoder:
    torch.manual_seed(0)
    return Encoder(parts)


def first_trunk(encoder: Encoder) -> Any:
    part: Any = encoder.parts[0]
    return part.trunk


def clip_of(config: PartConfig, frames: torch.Tensor) -> torch.Tensor:
    """(T, H * 3 // 2, W) -> (1, T, 3, S, S), in the middle."""
    side = round(min(HEIGHT, WIDTH) * config.box_share)
    box = torch.tensor([[(HEIGHT - side) // 2, (WIDTH - side) // 2, side, side]])
    return to_clips(frames[None], box, torch.tensor([False]), config.size)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_segments_states_are_those_after_its_frames_averaged_over_space_and_joined_over_levels(bidirectional):
    config = part("states", (0, 2, 4), bidirectional=bidirectional)
    encoder, seen = built(config), planes(2, 3, 3)
    vectors = encoder(seen)
    assert vectors.shape == (2, 3, config.vector_size) == (2, 3, 8 * (1 + bidirectional))
    network: Any = encoder.parts[0]
    draw = torch.zeros(1, dtype=torch.int64)
    for video in range(2):
        for segment in range(3):
            maps = network.maps(clip_of(config, seen[video, segment]), draw)
            wanted = []
            for level, x in enumerate(maps):
                states = [network.grus[level](x, None, False)[0, -1]]
                if bidirectional:
                    states.append(network.reverse_grus[level](x, None, True)[0, 0])
                wanted += [state.mean(dim=(1, 2)) for state in states]
            torch.testing.assert_close(vectors[video, segment], torch.cat(wanted), rtol=1e-4, atol=1e-6)


def test_a_frames_vector_is_the_trunks_maps_averaged_over_space():
    config = part("frame", (0,))
    encoder, seen = built(config), planes(2, 2, 1)
    vectors = encoder(seen)
    for video in range(2):
        for segment in range(2):
            maps = first_trunk(encoder)(clip_of(config, seen[video, segment])[0])
            wanted = torch.cat([x[0].mean(dim=(1, 2)) for x in maps.values()])
            torch.testing.assert_close(vectors[video, segment], wanted, rtol=1e-4, atol=1e-6)


def test_fc7_is_fc7_itself():
    config = part("frame", (0,), size=32, taps=("fc7",), hidden=(4,))
    encoder, seen = built(config), planes(1, 1, 1)
    fc7 = first_trunk(encoder)(clip_of(config, seen[0, 0])[0])["fc7"][0, :, 0, 0]
    assert len(fc7) == config.vector_size
    torch.testing.assert_close(encoder(seen)[0, 0], fc7, rtol=1e-4, atol=1e-6)


def test_encoders_side_by_side_each_see_their_own_frames_at_their_own_size():
    first, second = part("frame", (0,), size=8), part("states", (0, 3, 6))
    both = built(first, second)
    assert both.offsets == (0, 3, 6)
    seen = planes(2, 2, 3)
    alone = []
    for number, config in enumerate((first, second)):
        encoder = Encoder([config])
        encoder.parts[0].load_state_dict(both.parts[number].state_dict())
        alone.append(encoder(seen[:, :, : len(config.offsets)]))
    torch.testing.assert_close(both(seen), torch.cat(alone, dim=2))
    assert both.vector_size == first.vector_size + second.vector_size


def test_many_segments_give_what_each_gives_alone():
    config = part("states", (0, 1))
    encoder, seen = built(config), planes(1, CLIPS_AT_ONCE + 3, 2)
    each = torch.cat([encoder(seen[:, at : at + 1]) for at in range(seen.shape[1])], dim=1)
    torch.testing.assert_close(encoder(seen), each, rtol=1e-4, atol=1e-6)


def test_nothing_in_an_encoder_learns_or_drops_even_in_training():
    encoder = built(part("states", (0, 1)), part("frame", (0,)))
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(planes(1, 1, 2)).requires_grad


@pytest.mark.parametrize(
    ("height", "width", "share"), [(24, 40, 0.875), (256, 340, 0.875), (40, 40, 0.9), (33, 22, 1.0)]
)
def test_the_box_is_that_of_an_evaluations_centre_view(height, width, share):
    [(box, mirror)] = evaluation_views(height, width, 1, ClipConfig(test_scale=share))
    assert centre_box(height, width, share) == box
    assert not mirror


def test_a_part_comes_back_from_json_as_it_was():
    config = part("states", (0, 2, 4), bidirectional=True)
    assert PartConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
