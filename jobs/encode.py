"""Compute a fixed encoder's vectors of all videos once, for captioning: shards of videos -> shards of vectors.

    python -m jobs.encode --shards data/msvd --out data/msvd-encoded --encoder.states runs/gru-rcn-bidirectional
    python -m jobs.encode --shards s3://data/msvd --out s3://data/both --encoder.states runs:/0f3a... --encoder.entity imagenet

Encoders that are named stand side by side: their vectors are joined. Each shard becomes one of the same name, with the captions
as they are; a Ray task each, on a GPU where there are any. An interrupted encoding goes on when the same command is run again.
Beside the shards lies encoder.safetensors, so that a model that is trained on the vectors can describe new videos too.

--json FILE holds: out, segments, size, parts, digest, videos {train, val, test}, shards, bytes, seconds.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.checkpoints.files import read_tensors, write_tensors
from cluster.precision import autocast, resolve_precision
from cluster.progress import Bar, duration
from cluster.tracking.server import tracking_uri
from cluster.workers.tasks import has_gpus, run_tasks
from grurcn.models.encoder import Encoder
from grurcn.training.captioning import segments_of
from grurcn.training.encoders import WEIGHTS, EncoderConfig, build_encoder, read_encoder, sources
from jobs.command import Command, finish
from shards.dataset import DatasetInfo
from shards.store import open_store
from shards.vectors import ShardOfVideos, encode_shard, finish_encoding, open_encoding


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Options of an encoding."""

    shards: str
    """Folder or URL (s3://, gs://, http://) that jobs.make_shards wrote, seen by every worker."""
    out: str
    """Folder or URL (s3://, gs://) of the shards of vectors, seen by every worker."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    storage: str = "runs"
    """Folder or URL of all runs: its MLflow database knows the runs named runs:/ID, where MLFLOW_TRACKING_URI names no server."""
    workers: int | None = None
    """Ray tasks at the same time; 0 encodes in this process, without Ray. Default: one for each GPU, else each CPU core."""
    gpus: bool | None = None
    """A GPU for each task. Default: if there are any."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16. The vectors are stored as float32."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: Encode) -> int:
    """Encodes what is not encoded yet, and gives back the exit status."""
    started = time.monotonic()
    encoder, weights = read_encoder(job.encoder.absolute(), tracking_uri(job.storage) if job.encoder.of_mlflow else "")
    encoding = open_encoding(job.shards, job.out, encoder)
    if encoding.left:
        write_tensors(open_store(encoding.out), WEIGHTS, weights)  # for the tasks, and for all who use the vectors
    use_gpus = job.workers != 0 and (has_gpus() if job.gpus is None else job.gpus)
    tasks = [(encoding.source, encoding.out, encoder, shard, job.precision) for shard in encoding.left]
    with Bar("encoding", "videos", encoding.videos, done=encoding.videos - encoding.videos_left) as bar:
        for count in run_tasks(encode_task, tasks, job.workers, num_gpus=int(use_gpus)):
            bar.advance(count)
    report(job, finish_encoding(encoding), encoding.out, time.monotonic() - started)
    return 0


def encode_task(
    source: str, out: str, description: dict[str, Any], shard: ShardOfVideos, precision: str
) -> Iterator[int]:
    """Encodes one shard; yields how many videos are done."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    encoder = encoder_on(out, json.dumps(description), str(device))

    def encode(planes: Tensor, _: Tensor) -> Tensor:
        with autocast(resolve_precision(precision, device), device):
            return encoder(planes.to(device))

    yield from encode_shard(source, out, shard, segments_of(description), description["size"], encode)


@lru_cache(maxsize=1)
def encoder_on(out: str, description: str, device: str) -> Encoder:
    """The encoder, built once in each process: a Ray worker does one task after the other."""
    return build_encoder(json.loads(description), read_tensors(open_store(out), WEIGHTS)).to(device)


def report(job: Encode, info: DatasetInfo, out: str, seconds: float) -> None:
    encoder = info.encoder
    assert encoder is not None
    videos = {split: sum(shard.samples for shard in shards) for split, shards in info.splits.items()}
    shards = [shard for of_split in info.splits.values() for shard in of_split]
    size_bytes = sum(shard.size_bytes for shard in shards)
    counts = ", ".join(f"{split} {count:,}" for split, count in videos.items())
    finish(
        f"encoded {sum(videos.values()):,} videos ({counts}) as {encoder['segments']} segments of {encoder['size']:,} numbers "
        f"({sources(encoder)}), {size_bytes / 1e6:.1f} MB, in {duration(seconds)}: {out}",
        {
            "out": out,
            "segments": encoder["segments"],
            "size": encoder["size"],
            "parts": [f"{part['kind']} of {part['source']}" for part in encoder["parts"]],
            "digest": encoder["digest"],
            "videos": videos,
            "shards": len(shards),
            "bytes": size_bytes,
            "seconds": seconds,
        },
        job.json,
    )


COMMAND = Command(Encode, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
