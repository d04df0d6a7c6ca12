"""The task captioning: (video, caption) pairs -> log-probabilities of the next words -> loss, and its validation."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from cluster.checkpoints.engine_state import whole_weights
from cluster.precision import autocast
from cluster.workers.collectives import all_rows
from cluster.workers.context import WorkerContext
from cluster.workers.events import CaptionTable
from grurcn.evaluation.caption_scores import METRICS, caption_scores, check_metrics
from grurcn.inference.captioner import VideoCaptioner, build_captioner, segments_of
from grurcn.models.captioner import Captioner
from grurcn.models.decoder import PADDING, caption_loss
from grurcn.models.encoder import BadEncoder
from grurcn.models.vocabulary import Vocabulary
from grurcn.training.caption_recipes import CaptionRecipe
from grurcn.training.encoders import check_same, encoder_of, read_encoder
from grurcn.training.losses import WordTally
from grurcn.training.task import Prepared, Reader, WorkerJob
from shards.index import Index
from shards.reading.captions import CaptionBatch, evaluation_captions, read_captions, train_captions
from shards.reading.order import Order
from shards.store import REQUESTS
from shards.threads import ordered_map

Batches = Generator[tuple[tuple[int, int], CaptionBatch], None, None]
SAMPLES_SHOWN = 20  # captions of a validation that go to MLflow
CAPTION_TABLE = ("video", "caption", "references")  # the columns
VIDEOS_LOOKED_AT = 256  # to know the sizes of a vector's numbers
CAPTIONS_AT_ONCE = 256  # of a validation's


@dataclass(frozen=True)
class PreparedCaptions(Prepared):
    """Scores of each validation; and of a fresh run its vocabulary and the description of its encoder."""

    metrics: tuple[str, ...]
    vocabulary: tuple[str, ...] | None = None
    encoder: dict[str, Any] | None = None

    @property
    def artifacts(self) -> dict[str, str]:
        return {} if self.vocabulary is None else {"vocabulary.json": json.dumps(self.vocabulary, ensure_ascii=False)}


class Captioning:
    """What a video's caption says, word by word."""

    def __init__(
        self, job: WorkerJob, context: WorkerContext, meta: Mapping[str, Any] | None, read: Reader = train_captions
    ):
        assert isinstance(job.recipe, CaptionRecipe)
        assert isinstance(job.prepared, PreparedCaptions)
        self.recipe, self.job, self.context, self.read = job.recipe, job, context, read
        self.device, self.metrics = context.device, job.prepared.metrics
        self.index = Index(job.shards, "train")
        self.order = Order([shard.captions for shard in self.index.shards], self.recipe.global_batch, self.recipe.seed)
        known = meta or vars(job.prepared)
        self.vocabulary = Vocabulary(words=tuple(known["vocabulary"]))
        self.encoder: dict[str, Any] = known["encoder"]
        self.confusion = None  # captions are reported as a table

    @property
    def model_meta(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that its model can be used without the data."""
        packing = vars(self.index.info.packing)
        return {"vocabulary": list(self.vocabulary.words), "encoder": self.encoder, "packing": packing}

    @property
    def flops_per_clip(self) -> None:
        """Not counted: captions are of different lengths."""
        return None

    @property
    def data_digest(self) -> str:
        return self.index.info.digest

    @property
    def select(self) -> str:
        return self.recipe.select

    def build(self, fresh: bool) -> nn.Module:
        """Encoder and decoder; the encoder's weights are read for a fresh start only, as a checkpoint has its own."""
        weights = None
        if fresh:
            if self.index.info.encoder is not None:
                _, weights = encoder_of(self.index)
            else:
                _, weights = read_encoder(self.recipe.encoder, self.job.tracking_uri)
        model = build_captioner(self.recipe, self.encoder, len(self.vocabulary.words), weights)
        if fresh and self.recipe.standardise:
            self.standardise(model.to(self.device))
        return model

    def standardise(self, model: Captioner) -> None:
        """By some training videos, the same on every rank."""
        batches = evaluation_captions(
            self.index, segments_of(self.encoder), global_batch=self.recipe.global_batch, reading=self.job.reading
        )
        most = -(-VIDEOS_LOOKED_AT // self.recipe.global_batch)
        with torch.inference_mode(), closing(batches), autocast(self.job.precision, self.device):
            seen = [self.own_vectors(model, batch.to(self.device)) for _, batch in islice(batches, most)]
        model.standardise(torch.cat(seen))

    def own_vectors(self, model: Captioner, batch: CaptionBatch) -> Tensor:
        """The vectors of the segments that a batch's videos have (N, D), padding left out."""
        is_real = batch.segments & (batch.weight > 0)[:, None]
        return model.vectors(batch.seen)[is_real].float()

    def batches(self, **lanes: Any) -> Batches:
        """This rank's part of every global batch of pairs. lanes: rank, world_size, start."""
        return self.read(self.index, segments_of(self.encoder), self.order, **lanes, reading=self.job.reading)

    def keys(self, numbers: list[int]) -> list[str]:
        """The names of the videos of the order's pairs."""
        return [sample.key for sample, _ in self.index.pairs(numbers)]

    def words(self, captions: Sequence[str]) -> Tensor:
        """The numbers of the captions' words (B, T) int64, PADDING behind their ends."""
        return padded([self.vocabulary.encode(caption, self.recipe.max_words) for caption in captions], self.device)

    def tally(self) -> WordTally:
        return WordTally(self.device)

    def loss(self, model: Callable[..., tuple[Tensor, Tensor]], batch: CaptionBatch, tally: WordTally) -> Tensor:
        """The loss of some pairs, a scalar; their scores go to the tally."""
        words = self.words([caption for [caption] in batch.captions])
        log_probs, attention = model(batch.seen, batch.segments, words, batch.draw)
        tally.add(log_probs, words)
        return caption_loss(log_probs, attention, words, batch.segments, self.recipe.decoder.attention_weight)

    def validate(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """loss, perplexity and word_accuracy over all captions of the validation videos; and the scores of the captions that the
        search finds, where they can be computed. Every rank calls it."""
        model, tally, rows = self.whole_model(engine), self.tally(), []
        precision = self.job.precision
        captioner = VideoCaptioner(model, self.vocabulary, self.recipe, self.model_meta, self.device, precision)
        with torch.inference_mode(), closing(self.validation_batches()) as batches:
            for _, batch in batches:
                with autocast(precision, self.device):
                    rows += self.validate_batch(captioner, batch.to(self.device), tally)
        return tally.read() | self.scores(all_rows(rows))

    def validate_batch(self, captioner: VideoCaptioner, batch: CaptionBatch, tally: WordTally) -> list[dict[str, Any]]:
        """Adds all captions of some videos to the tally, and returns the captions that the search finds, if they are scored."""
        real = batch.weight > 0
        if not real.any():
            return []
        model = captioner.model
        vectors, segments = model.vectors(batch.seen)[real], batch.segments[real]
        videos = [(key, said) for key, said, one in zip(batch.keys, batch.captions, real.tolist(), strict=True) if one]
        numbers = [number for number, (_, said) in enumerate(videos) for _ in said]
        words = self.words([caption for _, said in videos for caption in said])
        video = torch.tensor(numbers, device=self.device)
        for some, of in zip(words.split(CAPTIONS_AT_ONCE), video.split(CAPTIONS_AT_ONCE), strict=True):
            log_probs, _ = model.decoder(vectors[of], segments[of], some, torch.zeros_like(of))
            tally.add(log_probs, some)
        if not self.metrics:
            return []
        return [
            {"key": key, "caption": best.sentence, "references": list(said)}
            for (key, said), [best, *_] in zip(videos, captioner.search(vectors, segments), strict=True)
        ]

    def scores(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """The scores of all ranks' captions, computed by rank 0, which also reports some of them."""
        if not self.metrics:
            return {}
        scores: list[dict[str, float]] = [{}]
        if self.context.rank == 0:
            found = {row["key"]: row["caption"] for row in rows}
            references = {row["key"]: row["references"] for row in rows}
            scores = [caption_scores(references, found, self.metrics).total]
            shown = sorted(rows, key=lambda row: row["key"])[:SAMPLES_SHOWN]
            self.context.report(CaptionTable(name="validation-captions.json", rows=as_table(shown)))
        if self.context.world_size > 1:
            dist.broadcast_object_list(scores, src=0)
        return scores[0]

    def whole_model(self, engine: DeepSpeedEngine) -> Captioner:
        """The model outside of its engine: captions differ in length from rank to rank, where ZeRO 3 would want equal calls."""
        if engine.zero_optimization_stage() < 3:
            return engine.module  # pyright: ignore[reportReturnType]
        model = build_captioner(self.recipe, self.encoder, len(self.vocabulary.words))
        model.load_state_dict(whole_weights(engine))
        return model.to(self.device).eval()

    def validation_batches(self) -> Any:
        return evaluation_captions(
            Index(self.job.shards, "val"),
            segments_of(self.encoder),
            global_batch=self.recipe.global_batch,
            rank=self.context.rank,
            world_size=self.context.world_size,
            reading=self.job.reading,
        )


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of numbers as (B, T) int64, PADDING behind the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows], device=device)


def as_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line of CAPTION_TABLE each."""
    return [[row["key"], row["caption"], "\n".join(row["references"])] for row in rows]


# The driver's side


def prepare(recipe: CaptionRecipe, shards: str, tracking_uri: str, fresh: bool) -> PreparedCaptions:
    """Raises in the driver, before anything is started, what would stop a worker later.

    Raises BadShards for data without captions, BadCaptions for captions of which no vocabulary can be made, BadEncoder for an
    encoder that cannot be had or is not the one of the vectors, ValueError for a score that cannot be computed here.
    """
    check_metrics([recipe.select] if recipe.select != "loss" else [])
    index = Index(shards, "train")
    for split in (index, Index(shards, "val")):
        split.check_captions()
        split.check_files()
    Order([shard.captions for shard in index.shards], recipe.global_batch, recipe.seed)
    metrics = validation_metrics(recipe.select)
    if not fresh:
        return PreparedCaptions(metrics)
    vocabulary = Vocabulary.build(all_captions(index), recipe.max_vocabulary, recipe.min_count)
    encoder = encoder_for(recipe, index, tracking_uri)
    return PreparedCaptions(metrics, vocabulary.words, encoder)


def validation_metrics(select: str) -> tuple[str, ...]:
    """The scores of each validation's captions: none without pycocoevalcap; METEOR, which starts Java, only where it selects."""
    if find_spec("pycocoevalcap") is None:
        return ()
    return tuple(name for name in METRICS if name != "meteor" or select == "meteor")


def encoder_for(recipe: CaptionRecipe, index: Index, tracking_uri: str) -> dict[str, Any]:
    """The encoder's description: of the vectors that the shards hold, or of the runs that the recipe names, or of both, which
    must be the same."""
    if index.info.encoder is None:
        if not recipe.encoder.named:
            raise BadEncoder(
                f"{index.url}: holds videos, and no encoder is named to see them by; expected --encoder.frame, --encoder.states "
                "or --encoder.entity, or the vectors that python -m jobs.encode makes of these shards"
            )
        return read_encoder(recipe.encoder, tracking_uri)[0]
    found, _ = encoder_of(index)
    if recipe.encoder.named:
        check_same(index, read_encoder(recipe.encoder, tracking_uri)[0])
    return found


def all_captions(index: Index) -> Iterator[str]:
    """Every caption of a split."""
    samples = (index[number] for number in range(len(index)))
    for captions in ordered_map(partial(read_captions, index), samples, REQUESTS, 4 * REQUESTS):
        yield from captions
