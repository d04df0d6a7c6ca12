"""Computes a fixed encoder's vectors of all videos once, for captioning: shards of videos -> shards of vectors."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.checkpoints.files import read_tensors, write_tensors
from cluster.precision import autocast, resolve_precision
from cluster.progress import Bar
from cluster.tracking.server import tracking_uri
from cluster.workers.tasks import has_gpus, run_tasks
from grurcn.inference.captioner import segments_of
from grurcn.models.encoder import Encoder, build_encoder
from grurcn.training.encoders import WEIGHTS, EncoderConfig, read_encoder
from shards.store import open_store
from shards.vectors import ShardOfVideos, encode_shard, finish_encoding, open_encoding


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Which encoder to run on which data."""

    shards: str
    """Folder or URL (s3://, gs://, http://) that jobs.make_shards wrote; every worker must see it."""
    out: str
    """Folder or URL (s3://, gs://) of the shards of vectors; every worker must see it."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    storage: str = "runs"
    """Folder or URL of all runs. Its MLflow database resolves runs:/ID, unless MLFLOW_TRACKING_URI names a server."""
    workers: int | None = None
    """Ray tasks at the same time; 0 encodes in this process, without Ray. Default: one per GPU, or else per CPU core."""
    gpus: bool | None = None
    """Use a GPU for each task. Default: if there are any."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16. The vectors are stored as float32."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The data set of vectors."""

    out: str
    segments: int
    size: int  # of a vector
    parts: list[str]
    digest: str  # of the encoder
    videos: dict[str, int]  # by split
    shards: int
    bytes: int
    seconds: float


def encode(job: EncodeJob) -> Encoded:
    """Encodes what is not encoded yet. Raises BadEncoder, BadShards or ValueError for what cannot be encoded."""
    started = time.monotonic()
    encoder, weights = read_encoder(job.encoder.absolute(), tracking_uri(job.storage) if job.encoder.of_mlflow else "")
    encoding = open_encoding(job.shards, job.out, encoder)
    if encoding.left:
        write_tensors(open_store(encoding.out), WEIGHTS, weights)  # for the tasks, and for all users of the vectors
    use_gpus = job.workers != 0 and (has_gpus() if job.gpus is None else job.gpus)
    tasks = [(encoding.source, encoding.out, encoder, shard, job.precision) for shard in encoding.left]
    with Bar("encoding", "videos", encoding.videos, done=encoding.videos - encoding.videos_left) as bar:
        for count in run_tasks(encode_task, tasks, job.workers, num_gpus=int(use_gpus)):
            bar.advance(count)
    splits = finish_encoding(encoding).splits
    shards = [shard for split_shards in splits.values() for shard in split_shards]
    return Encoded(
        out=encoding.out,
        segments=encoder["segments"],
        size=encoder["size"],
        parts=[f"{part['kind']} of {part['source']}" for part in encoder["parts"]],
        digest=encoder["digest"],
        videos={split: sum(shard.samples for shard in split_shards) for split, split_shards in splits.items()},
        shards=len(shards),
        bytes=sum(shard.size_bytes for shard in shards),
        seconds=time.monotonic() - started,
    )


def encode_task(
    source: str, out: str, description: dict[str, Any], shard: ShardOfVideos, precision: str
) -> Iterator[int]:
    """Encodes one shard; yields the number of videos that are done."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    encoder = encoder_on(out, json.dumps(description), str(device))

    def encode_planes(planes: Tensor, _: Tensor) -> Tensor:
        with autocast(resolve_precision(precision, device), device):
            return encoder(planes.to(device))

    yield from encode_shard(source, out, shard, segments_of(description), description["size"], encode_planes)


@lru_cache(maxsize=1)
def encoder_on(out: str, description: str, device: str) -> Encoder:
    """The encoder, built once per process, as a Ray worker runs several tasks."""
    return build_encoder(json.loads(description), read_tensors(open_store(out), WEIGHTS)).to(device)
