"""Predict what videos show with a trained model: the likeliest classes, or a caption.

    python -m jobs.predict --model runs/gru-rcn video.avi
    python -m jobs.predict --model models:/actions/1 videos/ --workers 8 --json found.json
    python -m jobs.predict --model runs/gru-rcn video.avi --overlay seen.mp4 --heat
    python -m jobs.predict --model runs:/0f3a... --captions 3 --attention attention videos/
    curl https://example.org/video.mp4 | python -m jobs.predict --model runs/gru-rcn -

Takes video files, folders, whose video files are taken at any depth, and - for a video on the standard input. Videos are decoded
as make_shards decodes them: in helper processes, within limits, to the last frame. The others are predicted if one cannot be
read; it is named with its reason on the error output at the end, and the exit status is 1.

On a terminal each video is followed by its classes and their probabilities. Elsewhere it is a line: its path, then class and
probability in turn, separated by tabs. A captioning model gives a line for each caption: path, log-probability if --captions asks
for several, sentence.

--overlay FILE.mp4 writes the video with the prediction as it develops and each level's vote over time; --heat also shows where
the states change most. --attention FOLDER gets a picture VIDEO.png of each video: the segments that each word attends to.

--json FILE holds a list, for each video {video, class, probability, classes [{class, probability}], levels {level: {class,
probability}}}; of a captioning model {video, caption, captions [{caption, log_prob}], words, attention (a row for each word, a
number for each segment), seconds (where each segment begins)}.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.progress import Bar, duration
from grurcn.inference.predict import (
    CaptionPrediction,
    ClassPrediction,
    Prediction,
    Predictions,
    PredictJob,
    UnreadableVideo,
    predict,
)
from grurcn.inference.videos import find_videos
from jobs.command import Command
from shards.printable import printable
from shards.store import written_file

WIDEST_PATH = 60  # up to which captions are aligned on a terminal
BAR_WIDTH = 30  # characters of a probability of 1


@dataclass(frozen=True, kw_only=True)
class Predict(PredictJob):
    """Options of a prediction."""

    json: Path | None = None
    """Write the predictions as JSON to this file."""


def main(options: Predict) -> int:
    started = time.monotonic()
    videos = find_videos(options.videos)
    with Bar("predicting", "videos", len(videos), lines=options.workers > 0) as bar:

        def show(prediction: Prediction | UnreadableVideo) -> None:
            if not isinstance(prediction, UnreadableVideo):
                for line in lines_of(prediction, videos if bar.terminal else ()):
                    bar.print_line(line)
            bar.advance()

        found = predict(replace(options, videos=tuple(videos)), show)
    if options.json:
        with written_file(options.json) as file:
            rows = [prediction.to_dict() for prediction in found.predictions]
            file.write((json.dumps(rows, indent=1) + "\n").encode())
    print_summary(options, found, time.monotonic() - started)
    return 1 if found.unreadable else 0


def lines_of(prediction: Prediction, aligned_with: Sequence[Path]) -> list[str]:
    """What is printed for a video; on a terminal in columns, as wide as the paths in `aligned_with`."""
    match prediction:
        case ClassPrediction():
            return class_lines(prediction, bool(aligned_with))
        case CaptionPrediction():
            return caption_lines(prediction, aligned_with)


def class_lines(prediction: ClassPrediction, is_table: bool) -> list[str]:
    """A line with tabs: path, and class and probability in turn; or a line for each class below the path, with a bar."""
    name = on_a_line(str(prediction.video))
    found = [(on_a_line(each.name), each.probability) for each in prediction.classes]
    if not is_table:
        return ["\t".join([name, *(field for label, value in found for field in (label, f"{value:.4f}"))])]
    width = max(len(label) for label, _ in found)
    return [
        name,
        *(f"  {value:6.3f}  {label:<{width}}  {'█' * round(BAR_WIDTH * value)}".rstrip() for label, value in found),
    ]


def caption_lines(prediction: CaptionPrediction, aligned_with: Sequence[Path]) -> list[str]:
    """A line for each caption: path, log-probability if there are several, sentence."""
    name = on_a_line(str(prediction.video))
    width = min(WIDEST_PATH, max((len(str(path)) for path in aligned_with), default=0))
    lines = []
    for caption in prediction.captions:
        fields = [on_a_line(caption.sentence)]
        if len(prediction.captions) > 1:
            fields.insert(0, f"{caption.log_prob:8.3f}" if width else f"{caption.log_prob:.3f}")
        lines.append("  ".join([f"{name:<{width}}", *fields]) if width else "\t".join([name, *fields]))
    return lines


def on_a_line(text: str) -> str:
    """A text of any length without characters that a terminal would act on."""
    return "".join(map(printable, text))


def print_summary(options: Predict, found: Predictions, seconds: float) -> None:
    """The last lines. They go to the error output, so that the standard output holds predictions only."""
    predicted, named = len(found.predictions), len(found.predictions) + len(found.unreadable)
    drawn = "".join(f"; {place} written" for place in (options.overlay, options.attention) if place and predicted)
    print(
        f"predicted {predicted:,} of {named:,} videos with the model {options.model} (step {found.step:,}) "
        f"in {duration(seconds)}{drawn}",
        file=sys.stderr,
    )
    for unreadable in found.unreadable:
        print(f"error: {on_a_line(str(unreadable.video))}: {unreadable.reason}", file=sys.stderr)


COMMAND = Command(Predict, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
