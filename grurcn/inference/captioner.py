"""A captioning model and videos as it wants them: stored video -> its segments -> sentences, and where their words looked.

K segments, R frames of each that its encoder wants, T words.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from cluster.checkpoints.run_folder import Model
from cluster.precision import autocast
from grurcn.drawing.attention import Attended, attention_sheet
from grurcn.drawing.contact_sheet import Heading
from grurcn.models.beam_search import beam_search
from grurcn.models.decoder import END, PADDING
from grurcn.training.captioning import captioner_of, segments_of
from shards.reading.clips import segment_frames
from shards.reading.decode import read_frames
from shards.video import Packing, Stored


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model sees of a video."""

    planes: np.ndarray  # (K, R, H * 3 // 2, W) uint8
    segments: np.ndarray  # (K,) bool, which of them the video has
    seconds: np.ndarray  # (K,) float, where each begins


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A sentence, and where its words looked."""

    words: tuple[str, ...]  # T
    log_prob: float  # of the whole, its end counted
    attention: np.ndarray  # (T, number of the video's segments)

    @property
    def sentence(self) -> str:
        return " ".join(self.words)


class Describer:
    """A captioning model on a device."""

    def __init__(
        self, model: Model, source: str, device: torch.device, precision: str = "auto", beam: int | None = None
    ):
        """source: how the model was named. beam: default, the recipe's. Raises OtherTask for a model of recognition."""
        self.trained = captioner_of(model, device, source)
        self.segments = segments_of(model.meta["encoder"])
        self.packing = packing_of(model)
        self.beam = beam or self.trained.recipe.beam
        self.device, self.precision = device, precision

    def read(self, stored: Stored) -> Seen:
        """A video's segments as a model would read them from a shard. Raises BadVideo."""
        frames, there = segment_frames(stored.num_frames, self.segments.num_segments, self.segments.offsets)
        planes = read_frames(stored.data, frames.ravel().tolist(), self.packing)  # (K * R, H * 3 // 2, W)
        return Seen(
            planes=planes.reshape(*frames.shape, *planes.shape[1:]),
            segments=np.asarray(there),
            seconds=frames[:, 0] / stored.fps,
        )

    @torch.inference_mode()
    def describe(self, seen: Seen) -> list[Caption]:
        """The captions that the search keeps for a video, the likeliest first; there may be fewer than the beam has places."""
        with autocast(self.precision, self.device):
            vectors = self.trained.model.vectors(torch.from_numpy(seen.planes)[None].to(self.device))
            segments = torch.from_numpy(seen.segments)[None].to(self.device)
            decoder, most = self.trained.model.decoder, self.trained.recipe.max_words + 1
            found = beam_search(decoder, vectors, segments, self.beam, most)
        attention = found.attention[0, :, :, segments[0]].float().cpu().numpy()  # (beam, T, K)
        captions = []
        for numbers, log_prob, of in zip(found.words[0].tolist(), found.log_prob[0].tolist(), attention, strict=True):
            known = self.trained.vocabulary.words
            words = tuple(known[number] for number in numbers if number not in (END, PADDING))
            captions.append(Caption(words=words, log_prob=log_prob, attention=of[: len(words)]))
        return [caption for caption in captions if caption.log_prob > -np.inf]


def packing_of(model: Model) -> Packing:
    """How the model's training videos were stored; flow, which captions are not learned from, is not computed."""
    return dataclasses.replace(Packing(**model.meta["packing"]), flow="none")


def row_of(seen: Seen, captions: list[Caption]) -> dict[str, Any]:
    """A video's captions as JSON holds them."""
    best = captions[0]
    return {
        "caption": best.sentence,
        "captions": [{"caption": caption.sentence, "log_prob": caption.log_prob} for caption in captions],
        "words": list(best.words),
        "attention": best.attention.tolist(),
        "seconds": seen.seconds[seen.segments].tolist(),
    }


def picture_of(video: Path, seen: Seen, caption: Caption) -> bytes:
    """The PNG of a caption's attention."""
    there = seen.segments
    attended = Attended(
        words=caption.words,
        attention=caption.attention,
        frames=np.stack([rgb(planes) for planes in seen.planes[there, 0]]),
        seconds=seen.seconds[there],
    )
    heading = Heading(
        title=caption.sentence or "(no word)",
        lines=(
            str(video),
            f"log-probability {caption.log_prob:.3f}",
            "below the first frame of each segment: the share of attention that it has before the word; the less, the darker",
        ),
    )
    return attention_sheet(heading, attended)


def rgb(planes: np.ndarray) -> np.ndarray:
    """Planes (H * 3 // 2, W) -> (H, W, 3) uint8."""
    return av.VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")
