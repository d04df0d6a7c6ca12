"""Pack videos into WebDataset shards.

    python -m jobs.make_shards --out data/mine folder --videos my-videos
    python -m jobs.make_shards --out data/ucf101 ucf101 --videos UCF-101 --lists ucfTrainTestlist --split 1
    python -m jobs.make_shards --out data/mine csv --table videos.csv
    python -m jobs.make_shards --out s3://bucket/msvd msvd --videos YouTubeClips --captions all.json --mapping mapping.txt
    python -m jobs.make_shards --out data/flow --flow tvl1 folder --videos my-videos

Videos are decoded to their last frame, resized and stored with a short key-frame interval, so that training reads random
clips cheaply; with --flow their optical flow is computed and stored beside them. A video that does not decode, or is listed
but missing, is left out and named in OUT/rejected.jsonl with the reason. An interrupted packing continues where it was when
the same command is run again. For a source of your own see shards/packing/sources/__init__.py.

--json FILE holds: out, classes, videos {train, val, test}, captions, shards, rejected, rejected_list, bytes, seconds.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.progress import duration
from grurcn.data import PackJob, pack
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class MakeShards(PackJob):
    """Options of packing."""

    strict: bool = False
    """End with status 1 if any video was left out."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def main(job: MakeShards) -> int:
    """Packs and prints; returns the exit status."""
    packed = pack(job)
    counts = ", ".join(f"{split} {count:,}" for split, count in packed.videos.items())
    kinds = f"of {packed.classes} classes" if packed.classes else f"with {packed.captions:,} captions"
    left_out = f"{packed.rejected} left out (reasons in {packed.rejected_list})" if packed.rejected else "none left out"
    finish(
        f"packed {sum(packed.videos.values()):,} videos {kinds} ({counts}) into {packed.shards} shards, "
        f"{packed.bytes / 1e6:,.1f} MB, in {duration(packed.seconds)}; {left_out}: {job.out}",
        asdict(packed),
        job.json,
    )
    return 1 if job.strict and packed.rejected else 0


COMMAND = Command(MakeShards, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
