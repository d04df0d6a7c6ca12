"""jobs.inspect_shards preview: clips of a split as a model will see them."""

from dataclasses import asdict, dataclass
from pathlib import Path

from grurcn.drawing.preview import PreviewJob, draw_preview
from jobs.command import finish


@dataclass(frozen=True, kw_only=True)
class Preview(PreviewJob):
    __doc__ = PreviewJob.__doc__

    json: Path | None = None
    """Write what was drawn as JSON to this file."""


def preview(job: Preview) -> int:
    """Draws and prints; returns the exit status."""
    drawn = draw_preview(job)
    samples = [asdict(clip) for clip in drawn.samples]
    finish(
        f"drew {len(samples)} clips of {len({clip.class_name for clip in drawn.samples})} classes: {drawn.page} (in motion), "
        f"{drawn.picture}",
        {
            **asdict(drawn),
            "samples": [{"key": clip.pop("key"), "class": clip.pop("class_name"), **clip} for clip in samples],
        },
        job.json,
    )
    return 0
