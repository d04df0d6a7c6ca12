"""jobs.inspect_shards index: makes tars that others wrote readable here."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.progress import duration
from grurcn.data import IndexJob, IndexResult, index_external
from jobs.command import finish
from shards.reading.clips import ClipConfig
from shards.video import Packing


@dataclass(frozen=True, kw_only=True)
class MakeIndex(IndexJob):
    __doc__ = IndexJob.__doc__

    strict: bool = False
    """End with status 1 if any sample was left out."""
    json: Path | None = None
    """Write the result as JSON to this file."""


def make_index(job: MakeIndex) -> int:
    """Indexes and prints; returns the exit status."""
    indexed = index_external(job)
    held = {"classes": indexed.classes, "captions": indexed.captions}
    kinds = " and ".join(f"{count:,} {name}" for name, count in held.items() if count)
    counts = ", ".join(f"{split} {count:,}" for split, count in indexed.videos.items())
    left_out = (
        f"{indexed.rejected:,} left out (reasons in {indexed.rejected_list})" if indexed.rejected else "none left out"
    )
    no_val = (
        "" if indexed.videos["val"] else "no tar is in val, which jobs.train needs: use --val-shards N or --split-of; "
    )
    finish(
        f"indexed {sum(indexed.videos.values()):,} videos with {kinds} ({counts}) in {indexed.shards:,} tars, "
        f"{indexed.bytes / 1e6:,.1f} MB, in {duration(indexed.seconds)}; {left_out}; {no_val}{cost_of_reading(indexed)}: "
        f"{indexed.out}",
        asdict(indexed),
        job.json,
    )
    return 1 if job.strict and indexed.rejected else 0


def cost_of_reading(indexed: IndexResult) -> str:
    """How many frames are decoded for a clip: of these videos from the first frame on, of packed ones from a key frame on.

    On average that is half of the frames before the last clip, or half of those between key frames, and the clip's own.
    """
    clip, frames = ClipConfig.num_frames, indexed.frames_per_video
    here, packed = max(0.0, frames - clip) / 2 + min(frames, clip), (Packing.gop - 1) / 2 + clip
    return (
        f"a random clip of {clip} frames decodes {here:.0f} frames of these videos, about {packed:.0f} if "
        "jobs.make_shards packs them"
    )
