"""Fuse evaluations of the same videos: the weighted mean of their scores, in the paper 1 for RGB and 2 for flow (section 5.1).

    python -m jobs.fuse --scores runs/rgb/evaluations/test-25x10 runs/flow/evaluations/test-25x10
    python -m jobs.fuse --scores A B C --weights 1 2 1 --out runs/fusions/abc

With --out, the folder holds scores.parquet and result.json like that of an evaluation, and can be fused again.

--json FILE holds: inputs [{scores, weight, top1, top5}], top1, top5, videos, per_class {class: {videos, top1}}, scores (the fused
file, null without --out).
"""

from dataclasses import dataclass
from pathlib import Path

from grurcn.evaluation.fusion import FuseJob, fuse
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class Fuse(FuseJob):
    """Options of a fusion."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(options: Fuse) -> int:
    fusion = fuse(options)
    inputs = "; ".join(
        f"{path} x {one.weight:g}: top-1 {one.top1:.4f}, top-5 {one.top5:.4f}"
        for path, one in zip(options.scores, fusion.inputs, strict=True)
    )
    where = "" if options.out is None else f"; scores and per-class accuracy in {options.out}"
    finish(
        f"fused {len(fusion.inputs)} evaluations of {len(fusion.scores.videos):,} videos: top-1 {fusion.top1:.4f}, top-5 "
        f"{fusion.top5:.4f} ({inputs}){where}",
        fusion.to_dict(),
        options.json,
    )
    return 0


COMMAND = Command(Fuse, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
