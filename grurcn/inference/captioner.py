"""A trained captioner: stored video -> its segments -> sentences, and the attention of their words.

B videos, K segments, R frames of each, D a vector's length, T words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoints.run_folder import Model
from cluster.precision import autocast
from grurcn.inference.meta import check_task, packing_of
from grurcn.models.beam_search import beam_search
from grurcn.models.captioner import Captioner
from grurcn.models.decoder import END, PADDING
from grurcn.models.encoder import build_encoder
from grurcn.models.vocabulary import Vocabulary
from grurcn.training.caption_recipes import CaptionRecipe
from shards.reading.captions import Segments
from shards.reading.clips import segment_frames
from shards.reading.decode import read_frames
from shards.video import Packing, Stored


@dataclass(frozen=True, kw_only=True)
class VideoSegments:
    """The segments of a video."""

    planes: np.ndarray  # (K, R, H * 3 // 2, W) uint8
    present: np.ndarray  # (K,) bool, which of them the video has
    seconds: np.ndarray  # (K,) float, where each begins


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A sentence and the attention of its words."""

    words: tuple[str, ...]  # T
    log_prob: float  # of the whole sentence, its end counted
    attention: np.ndarray  # (T, number of the video's segments)

    @property
    def sentence(self) -> str:
        return " ".join(self.words)


class VideoCaptioner:
    """A captioning model on a device, with its vocabulary and its beam search."""

    def __init__(
        self,
        model: Captioner,
        vocabulary: Vocabulary,
        recipe: CaptionRecipe,
        kept: Mapping[str, Any],
        device: torch.device,
        precision: str = "auto",
        beam: int | None = None,
    ):
        """model: in evaluation mode, on the device. kept: what its checkpoint keeps of the task. beam: default, the recipe's."""
        self.model, self.vocabulary, self.recipe, self.kept = model, vocabulary, recipe, kept
        self.device, self.precision = device, precision
        self.beam = beam or recipe.beam

    @classmethod
    def of(
        cls,
        model: Model,
        device: torch.device,
        precision: str = "auto",
        beam: int | None = None,
        source: str = "this model",
    ) -> "VideoCaptioner":
        """The captioner of a run's model. source: its name. Raises OtherTask for a classification model."""
        check_task(model.training, "captioning", source)
        recipe, kept = CaptionRecipe.from_dict(model.training.recipe), model.training.model
        vocabulary = Vocabulary(words=tuple(kept["vocabulary"]))
        network = build_captioner(recipe, kept["encoder"], len(vocabulary.words))
        network.load_state_dict(model.weights)
        return cls(network.to(device).eval(), vocabulary, recipe, kept, device, precision, beam)

    @property
    def segments(self) -> Segments:
        """What the encoder reads of each video."""
        return segments_of(self.kept["encoder"])

    @cached_property
    def packing(self) -> Packing:
        """How the training videos were stored; without flow, which captioning does not use."""
        return packing_of(self.kept)

    def read(self, video: Stored) -> VideoSegments:
        """The segments of a stored video. Several threads may call it. Raises BadVideo if a frame does not decode."""
        frames, present = segment_frames(video.num_frames, self.segments.num_segments, self.segments.offsets)
        planes = read_frames(video.data, frames.ravel().tolist(), self.packing)  # (K * R, H * 3 // 2, W)
        return VideoSegments(
            planes=planes.reshape(*frames.shape, *planes.shape[1:]),
            present=np.asarray(present),
            seconds=frames[:, 0] / video.fps,
        )

    def predict(self, segments: VideoSegments) -> list[Caption]:
        """The captions of a video, of which `read` gave the segments, the likeliest first."""
        [captions] = self.captions(torch.from_numpy(segments.planes)[None], torch.from_numpy(segments.present)[None])
        return captions

    @torch.inference_mode()
    def captions(self, seen: Tensor, present: Tensor) -> list[list[Caption]]:
        """seen (B, K, R, H * 3 // 2, W) uint8, or the encoder's vectors of it (B, K, D); present (B, K) bool, the segments that
        each video has -> the captions of each video, the likeliest first; there may be fewer than the beam is wide."""
        with autocast(self.precision, self.device):
            return self.search(self.model.vectors(seen.to(self.device)), present.to(self.device))

    @torch.inference_mode()
    def search(self, vectors: Tensor, present: Tensor) -> list[list[Caption]]:
        """The same for vectors (B, K, D) that Captioner.vectors gave, under the caller's autocast."""
        found = beam_search(self.model.decoder, vectors, present, self.beam, self.recipe.max_words + 1)
        attention, present_here = (
            found.attention.float().cpu().numpy(),
            present.cpu().numpy(),
        )  # (B, beam, T, K), (B, K)
        videos = zip(found.words.tolist(), found.log_prob.tolist(), attention, present_here, strict=True)
        return [
            [
                self.caption(*place)
                for place in zip(words, log_probs, weights[:, :, there], strict=True)
                if place[1] > -np.inf  # else the place in the beam is empty
            ]
            for words, log_probs, weights, there in videos
        ]

    def caption(self, numbers: list[int], log_prob: float, attention: np.ndarray) -> Caption:
        """numbers: of the words, with END and PADDING behind them; attention (T, K)."""
        words = tuple(self.vocabulary.words[number] for number in numbers if number not in (END, PADDING))
        return Caption(words=words, log_prob=log_prob, attention=attention[: len(words)])


def build_captioner(
    recipe: CaptionRecipe,
    encoder: Mapping[str, Any],
    num_words: int,
    weights: Mapping[str, Tensor] | None = None,
) -> Captioner:
    """A new model. The decoder's first weights are random from the recipe's seed, the encoder's are those given, if any."""
    built = build_encoder(encoder, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Captioner(built, built.vector_size, recipe.decoder, num_words)


def segments_of(encoder: Mapping[str, Any]) -> Segments:
    """What the encoder of a description reads of each video."""
    offsets = tuple(sorted({offset for part in encoder["parts"] for offset in part["offsets"]}))
    return Segments(num_segments=encoder["segments"], offsets=offsets)
