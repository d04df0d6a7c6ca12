"""Compute a fixed encoder's vectors of all videos once, for captioning: shards of videos -> shards of vectors.

    python -m jobs.encode --shards data/msvd --out data/msvd-encoded --encoder.states runs/gru-rcn-bidirectional
    python -m jobs.encode --shards s3://data/msvd --out s3://data/both --encoder.states runs:/0f3a... --encoder.entity imagenet

The vectors of several encoders are joined. Each shard becomes one of the same name, with the same captions, by a Ray task of its
own, on a GPU if there are any. Run the same command again to resume an interrupted encoding. The folder also holds
encoder.safetensors, so that a model that is trained on the vectors can caption new videos.

--json FILE holds: out, segments, size, parts, digest, videos {train, val, test}, shards, bytes, seconds.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cluster.progress import duration
from grurcn.training.encode import EncodeJob, encode
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class Encode(EncodeJob):
    """Options of an encoding."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(options: Encode) -> int:
    done = encode(options)
    counts = ", ".join(f"{split} {count:,}" for split, count in done.videos.items())
    finish(
        f"encoded {sum(done.videos.values()):,} videos ({counts}) as {done.segments} segments of {done.size:,} numbers "
        f"({' + '.join(done.parts)}), {done.bytes / 1e6:.1f} MB, in {duration(done.seconds)}: {done.out}",
        dataclasses.asdict(done),
        options.json,
    )
    return 0


COMMAND = Command(Encode, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
