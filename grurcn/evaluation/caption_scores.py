"""How good captions are, as the COCO caption scripts score them (pycocoevalcap, the extra "captions").

    bleu1 .. bleu4    n-grams in common with the references, times a penalty for brevity    0 to 1
    meteor            words matched by form, stem, synonym or paraphrase (needs Java)    0 to 1
    rouge_l           longest common subsequence                                         0 to 1
    cider             n-grams weighted by how rare they are in all references            0 to 10

Captions are cut into words by grurcn/models/vocabulary.py, which agrees with the scripts' tokenizer and needs no Java.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from grurcn.models.vocabulary import BadCaptions, tokenize

BLEU = ("bleu1", "bleu2", "bleu3", "bleu4")
METRICS = (*BLEU, "meteor", "rouge_l", "cider")

INSTALL = "pip install 'grurcn[captions]'"
INSTALL_JAVA = (
    "install Java, 8 or newer, for instance by `apt install default-jre-headless`, so that `java` is on the PATH"
)


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Each metric's score of a set of captions."""

    total: dict[str, float]  # metric -> score of the set; not for each metric the mean over its videos
    each: dict[str, dict[str, float]]  # video -> metric -> score


def caption_scores(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    metrics: Iterable[str] = METRICS,
    print_line: Callable[[str], object] = print,
) -> CaptionScores:
    """Scores one caption a video against that video's references, both by the video's key.

    Without Java, METEOR is left out and `print_line` gets a line about it. Raises BadCaptions if the two do not name the same
    videos, if there are none, or if a video has no reference with a word in it; ValueError for an unknown metric and without
    pycocoevalcap; ChildProcessError if METEOR's Java process fails.
    """
    requested = in_order(metrics)
    check_videos(references, hypotheses)
    check_installed()
    if "meteor" in requested and not has_java():
        print_line(f"METEOR is left out: it needs Java, and no `java` runs here; {INSTALL_JAVA}")
        requested.remove("meteor")
    keys = sorted(references)  # sums come out the same whatever the order
    cut_references = {key: [" ".join(tokenize(caption)) for caption in references[key]] for key in keys}
    cut_hypotheses = {key: [" ".join(tokenize(hypotheses[key]))] for key in keys}
    check_words(cut_references)

    total: dict[str, float] = {}
    each: dict[str, dict[str, float]] = {key: {} for key in keys}
    for metric, score, scores in scored(requested, cut_references, cut_hypotheses):
        total[metric] = float(score)
        for key, one in zip(keys, scores, strict=True):
            each[key][metric] = float(one)
    return CaptionScores(total=total, each=each)


def check_metrics(metrics: Iterable[str]) -> None:
    """Raises ValueError if a metric cannot be computed here: before a training of hours, not after."""
    requested = in_order(metrics)
    if requested:
        check_installed()
    if "meteor" in requested and not has_java():
        raise ValueError(f"meteor needs Java, and no `java` runs here; {INSTALL_JAVA}, or choose another metric")


def in_order(metrics: Iterable[str]) -> list[str]:
    """The metrics in the order of METRICS, each once. Raises ValueError for an unknown one."""
    names = list(metrics)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"no metric {unknown[0]!r}; expected some of {', '.join(METRICS)}")
    return [metric for metric in METRICS if metric in names]


def check_installed() -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError(f"captions are scored by pycocoevalcap, which is not installed here; {INSTALL}")


def has_java() -> bool:
    """Whether a Java starts here. (On macOS a `java` that does not is always there.)"""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True, check=False).returncode == 0


def check_videos(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]) -> None:
    """Raises BadCaptions unless both name the same videos, at least one, and each has references."""
    if not references and not hypotheses:
        raise BadCaptions("no videos to score: neither references nor captions; expected at least one video")
    if without := sorted(hypotheses.keys() - references.keys()):
        raise BadCaptions(f"{some(without)}: a caption but no references; expected both for each video")
    if without := sorted(references.keys() - hypotheses.keys()):
        raise BadCaptions(
            f"{some(without)}: references but no caption; expected both for each video, an empty caption too"
        )
    if without := sorted(key for key, captions in references.items() if not captions):
        raise BadCaptions(
            f"{some(without)}: an empty list of references; expected at least one, or leave the video out"
        )


def check_words(references: Mapping[str, list[str]]) -> None:
    """Raises BadCaptions for a video whose references, cut into words, are all empty."""
    if without := [key for key, captions in references.items() if not any(captions)]:
        raise BadCaptions(f"{some(without)}: no word in any reference; expected at least one, or leave the video out")


def some(keys: Sequence[str]) -> str:
    """The first of some videos and how many more there are."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"


def scored(
    metrics: Collection[str], references: dict[str, list[str]], hypotheses: dict[str, list[str]]
) -> Iterator[tuple[str, Any, Any]]:
    """(metric, score of the set, score of each video) of captions cut into words, joined by blanks. Some numbers are NumPy's."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if any(metric in metrics for metric in BLEU):
        four, four_each = Bleu(4).compute_score(references, hypotheses, verbose=0)  # its default prints
        yield from (row for row in zip(BLEU, four, four_each, strict=True) if row[0] in metrics)
    if "meteor" in metrics:
        yield "meteor", *meteor(references, hypotheses)
    if "rouge_l" in metrics:
        yield "rouge_l", *Rouge().compute_score(references, hypotheses)
    if "cider" in metrics:
        yield "cider", *Cider().compute_score(references, hypotheses)


def meteor(references: dict[str, list[str]], hypotheses: dict[str, list[str]]) -> tuple[float, list[float]]:
    """METEOR 1.5 of the set and of each video, by the Java program that pycocoevalcap brings.

    Raises ChildProcessError, with the program's last line, if it ends before it has answered.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            with meteor_process(errors) as (questions, answers):
                return exchange(questions, answers, references, hypotheses)
        except (OSError, ValueError) as error:  # a pipe that nobody reads, or an answer that is no number
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or [str(error)]
            raise ChildProcessError(f"METEOR's Java process failed: {lines[-1]}; leave meteor out to go on") from error


@contextmanager
def meteor_process(errors: IO[bytes]) -> Iterator[tuple[IO[str], IO[str]]]:
    """METEOR's input and output. Its process always ends with the block; pycocoevalcap's own class hangs after an error."""
    from pycocoevalcap.meteor import meteor as wrapper

    jar = Path(wrapper.__file__).with_name(wrapper.METEOR_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8")
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdin, process.stdout
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):  # what it has not read
            process.stdin.close()
        process.stdout.close()


def exchange(
    questions: IO[str], answers: IO[str], references: dict[str, list[str]], hypotheses: dict[str, list[str]]
) -> tuple[float, list[float]]:
    """Sends METEOR the videos, reads their statistics, and from these the scores: a line for each video, the last for the set."""

    def ask(*parts: str) -> None:
        questions.write(" ||| ".join(parts) + "\n")
        questions.flush()

    statistics = []
    for key, captions in references.items():
        ask("SCORE", *captions, *hypotheses[key])
        statistics.append(answers.readline().strip())
    ask("EVAL", *statistics)
    each = [float(answers.readline()) for _ in statistics]
    return float(answers.readline()), each
