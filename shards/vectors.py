"""Shards of videos -> shards of the vectors that a fixed encoder computes of them, under the same names.

    open_encoding      source + encoder -> which shards are still to be encoded
    encode_shard       one shard's videos -> tar + record; runs anywhere, as often as needed
    finish_encoding    all records -> index, dataset.json (packing/records.py)

    KEY.npy            a NumPy array (K, D) float32: a vector for each of the video's own segments (clips.segment_frames)
    KEY.json           as it lies in the source

The index is the source's but for the offsets: a row's video is KEY.npy. Encoding the same videos again by the same encoder
gives the same bytes. reading/captions.py reads them.

B videos, K segments, R frames that are read of each, D a vector's length, H x W the stored frames' size.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.dataset import DatasetInfo, check_encoder, read_dataset
from shards.index import Index
from shards.packing.records import IndexRow, OpenShard, finish_dataset, unfinished, written_shard
from shards.reading.captions import CaptionedVideo, CaptionRequest, Segments, decode_video
from shards.reading.stages import ReadingOptions, decode_all, load_all
from shards.reading.vector_files import BadVectors
from shards.rows import Sample
from shards.sample_json import SampleJson
from shards.store import BadShards, absolute_url, open_store

KIND = "encoded"  # kind of source of a data set that holds vectors

Encode = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ShardOfVideos:
    """A shard that is to be encoded."""

    digest: str  # of the data set
    split: str
    number: int  # in its split
    name: str
    videos: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A whole encoding, and what is left to do of it."""

    source: str  # folder or URL of the videos
    out: str
    encoder: dict[str, Any]  # as JSON
    info: DatasetInfo  # of the source
    shards: tuple[ShardOfVideos, ...]
    left: tuple[ShardOfVideos, ...]  # those that are still to be encoded

    @property
    def videos(self) -> int:
        return sum(shard.videos for shard in self.shards)

    @property
    def videos_left(self) -> int:
        return sum(shard.videos for shard in self.left)

    @property
    def digest(self) -> str:
        return encoding_digest(self.info, self.encoder)


def encoding_digest(info: DatasetInfo, encoder: dict[str, Any]) -> str:
    """SHA-256 of what decides an encoding's bytes."""
    about = [KIND, info.digest, encoder["segments"], encoder["size"], encoder["digest"]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def open_encoding(source: str | Path, out: str | Path, encoder: dict[str, Any]) -> Encoding:
    """Prepares the place and finds out which shards are still to be encoded.

    encoder: its description as JSON, with at least "segments" (K), "size" (D) and "digest", which identifies it.

    Raises BadShards if the source holds no videos, if the place holds anything but an encoding of these videos by this
    encoder, or if it cannot be written; ValueError for an encoder without one of the three.
    """
    check_encoder(encoder)
    source, out = absolute_url(source), absolute_url(out)
    info = read_dataset(open_store(source))
    for split in (split for split, shards in info.splits.items() if shards):
        Index(source, split).check_videos()
    shards = tuple(
        ShardOfVideos(digest=info.digest, split=split, number=number, name=shard.name, videos=shard.samples)
        for split, shards in info.splits.items()
        for number, shard in enumerate(shards)
    )
    other = (
        f"{out}: holds other shards, or vectors of other videos or by another encoder than these; choose another place, or "
        "delete what is there to encode anew"
    )
    left = unfinished(open_store(out), shards, encoding_digest(info, encoder), other)
    return Encoding(source=source, out=out, encoder=encoder, info=info, shards=shards, left=tuple(left))


def encode_shard(
    source: str | Path,
    out: str | Path,
    shard: ShardOfVideos,
    segments: Segments,
    size: int,
    encode: Encode,
    *,
    batch_size: int = 4,
    reading: ReadingOptions | None = None,
) -> Iterator[int]:
    """Encodes the videos of one shard, and writes its vectors and its record; yields the number of videos of each batch.

    encode: planes (B, K, R, H * 3 // 2, W) uint8, segments (B, K) bool -> vectors (B, K, D = size) float32, on any device. The
    vectors of segments that a video does not have are ignored. The last batch of a shard may be smaller.

    Raises BadShards with shard, key and offset for videos that cannot be read, BadVectors for vectors of another shape or that
    are not finite, OSError if the disk is full. Nothing half-written stays under a final name.
    """
    index = Index(source, shard.split)
    if index.info.digest != shard.digest:
        raise BadShards(f"{index.url}: was packed again after its encoding had started; start the encoding again")
    samples = index.samples(range(int(index.starts[shard.number]), int(index.starts[shard.number + 1])))
    with (
        written_shard(open_store(out), shard.name) as target,
        closing(groups(index, samples, segments, batch_size, reading or ReadingOptions())) as found,
    ):
        for group in found:
            for video, vectors in zip(group, encoded(group, size, encode), strict=True):
                target.samples.append(add_vectors(target, video.request.sample, vectors, json_of(index, video)))
            yield len(group)


def groups(
    index: Index, samples: Sequence[Sample], segments: Segments, batch_size: int, reading: ReadingOptions
) -> Generator[list[CaptionedVideo], None, None]:
    """The decoded samples, batch_size at a time, and as many decoded ahead."""
    requests, decode = (CaptionRequest(sample=sample) for sample in samples), partial(decode_video, segments)
    with (
        closing(load_all(requests, index, reading, batch_size)) as loaded,
        closing(decode_all(loaded, index, decode, reading, batch_size)) as decoded,
    ):
        while group := list(islice(decoded, batch_size)):
            yield group


def encoded(group: Sequence[CaptionedVideo], size: int, encode: Encode) -> Iterator[np.ndarray]:
    """The vectors (K, D) float32 of each video's own segments. Raises BadVectors."""
    seen = torch.from_numpy(np.stack([video.seen for video in group]))
    own = torch.from_numpy(np.stack([video.segments for video in group]))
    vectors = encode(seen, own)
    if vectors.shape != (*own.shape, size):
        raise BadVectors(f"vectors {tuple(vectors.shape)} of {len(group)} videos; expected {(*own.shape, size)}")
    for video, of_video in zip(group, vectors.to("cpu", torch.float32), strict=True):
        of_segments = of_video[torch.from_numpy(video.segments)].numpy()
        if not np.isfinite(of_segments).all():
            raise BadVectors(f"{video.request.sample.key}: vectors that are not finite numbers")
        yield of_segments


def add_vectors(target: OpenShard, sample: Sample, vectors: np.ndarray, sample_json: bytes) -> IndexRow:
    """Appends KEY.npy and KEY.json, and returns the sample's row of the index."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(vectors, "<f4"), allow_pickle=False)
    data = file.getvalue()
    return IndexRow(
        key=sample.key,
        label=sample.label,
        group=sample.group,
        num_frames=sample.num_frames,
        num_captions=sample.num_captions,
        fps=sample.fps,
        video_offset=target.add_member(f"{sample.key}.npy", data),
        video_size=len(data),
        video_crc32=zlib.crc32(data),
        json_offset=target.add_member(f"{sample.key}.json", sample_json),
        json_size=len(sample_json),
    )


def json_of(index: Index, video: CaptionedVideo) -> bytes:
    """The sample's JSON as it lies in the source; for an external tar, which may have another or none, as packing writes it."""
    sample = video.request.sample
    if not index.info.is_external:
        return video.json
    return SampleJson(
        key=sample.key,
        captions=video.captions or None,
        label=sample.label if sample.label >= 0 else None,
        class_name=index.info.classes[sample.label] if sample.label >= 0 else None,
        group=sample.group,
        num_frames=sample.num_frames,
        fps=sample.fps,
    ).to_json()


def finish_encoding(encoding: Encoding) -> DatasetInfo:
    """Writes the index of each split and, last, dataset.json, from the records of all shards."""
    info = encoding.info
    return finish_dataset(
        open_store(encoding.out),
        {split: [shard.name for shard in encoding.shards if shard.split == split] for split in info.splits},
        lambda contents: DatasetInfo(
            classes=info.classes,
            packing=replace(info.packing, flow="none"),  # flow is not encoded
            splits=contents.splits,
            plan=encoding.digest,
            source={"kind": KIND, "of": encoding.source, "digest": info.digest, "source": info.source},
            rejected=0,
            encoder=encoding.encoder,
        ),
        can_reject=False,
    )
