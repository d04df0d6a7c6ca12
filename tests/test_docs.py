"""The documentation is not stale: its commands are accepted, the files that it names exist, its tutorial runs as it is typed."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from documented import (
    COMMAND_NAMES,
    PAGES,
    ROOT,
    StaleCommand,
    Terminal,
    Typed,
    all_options,
    anchors,
    blocks,
    documented_commands,
    help_of,
    help_pages,
    parse,
    prose,
    slug,
    spans,
    typed_in,
    words_of,
)
from ports import free_port

from shards.synthetic import make_motion_videos

WIDTH = 130  # of the widest line that a docstring may have
# Options of other programs that stand alone in prose: whose they are.
OF_OTHERS = {
    **dict.fromkeys(("--node-ip-address", "--node-manager-port", "--object-manager-port", "--min-worker-port"), "ray start"),
    **dict.fromkeys(("--max-worker-port", "--dashboard-agent-listen-port", "--runtime-env-agent-port"), "ray start"),
    **dict.fromkeys(("--metrics-export-port", "--head", "--address", "--runtime-env-json"), "ray start, ray job submit"),
    **dict.fromkeys(("--allowed-hosts", "--host", "--env-manager"), "mlflow server, mlflow models serve"),
}  # fmt: skip
PROGRAMS = ("ray", "mlflow", "docker", "kubectl", "pip", "sbatch", "scancel", "ruff", "git", "ssh", "curl")
# Names in prose that stand for several files.
STAND_FOR = {"cluster/deepspeed/zeroN.json": "cluster/deepspeed/zero0.json"}
FOLDERS = ("grurcn", "shards", "cluster", "jobs", "tests", "docs")


def typed(each: Typed) -> str:
    return f"{each.where}: python -m jobs.{each.command}{each.text}"


def page(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Commands


def test_every_documented_command_is_accepted():
    commands = documented_commands()
    assert len(commands) > 80  # else they are not found any more
    assert {each.command for each in commands} == set(COMMAND_NAMES)
    stale = []
    for each in commands:
        try:
            parse(each.command, words_of(each.text))
        except (StaleCommand, ModuleNotFoundError, ValueError) as error:
            stale.append(f"{typed(each)}\n{error}")
    assert not stale, "\n".join(stale)


def test_every_command_within_a_sentence_is_accepted():
    stale = []
    for path in PAGES:
        for span in spans(path.read_text()):
            for each in typed_in(span, page(path), 1):
                words = words_of(each.text)
                try:
                    assert each.command in COMMAND_NAMES, f"there is no command {each.command}"
                    if words:  # the name alone only says which command is meant
                        parse(each.command, words)
                except (StaleCommand, AssertionError) as error:
                    stale.append(f"{typed(each)}\n{error}")
    assert not stale, "\n".join(stale)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("python -m jobs.train gru-rcn-small --shards data/mine --worker 2", "--worker"),
        ("python -m jobs.train gru-rcn-tiny --shards data/mine", "gru-rcn-tiny"),
        ("grurcn train gru-rcn-small --workers 2", "--shards"),
        ("python -m jobs.make_shards --out OUT ucf102 --videos UCF-101", "ucf102"),
        ("python -m jobs.inspect_shards look data/mine", "look"),
        ("python -m jobs.bench train --workers two", "two"),
        ("python -m jobs.predict --model runs/a --heat video.avi", "--overlay"),
        ("python -m jobs.demo caption --folders demo", "--folders"),
        ("ray job submit --working-dir . -- \\\n    python -m jobs.evaluate --run a --shard b", "--shard"),
        ("ray job submit -- grurcn evaluate --run a --shard b", "--shard"),
    ],
)
def test_a_command_that_is_not_accepted_is_named_with_what_it_prints(line, says):
    (each,) = typed_in(line, "README.md", 1)
    with pytest.raises(StaleCommand, match=f"python -m jobs.{each.command} (.|\n)*status 2(.|\n)*{says}"):
        parse(each.command, words_of(each.text))


def test_parsing_a_command_gives_its_options_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = parse("make_shards", ["--out", "out", "folder", "--videos", "videos"])
    assert (job.out, job.source.videos) == ("out", Path("videos"))
    assert not list(tmp_path.iterdir())


def test_a_line_of_a_shell_is_cut_to_the_commands_words():
    (each,) = typed_in("$ curl URL | python -m jobs.predict --model 'a b' - > out  # why", "x", 1)
    assert words_of(each.text) == ["--model", "a b", "-"]
    (each,) = typed_in("python -m jobs.bench order         how well it mixes", "x", 1)
    assert words_of(each.text) == ["order"]
    (each,) = typed_in("python -m jobs.sizing RECIPE --gpus 8 [--videos N] ...", "x", 1)
    assert words_of(each.text) == ["gru-rcn", "--gpus", "8", "--videos", "1"]


def test_blocks_are_read_fenced_and_indented_with_the_mark_above_them():
    text = (
        "# A\n\n    one\n\n    two\nwords `--no`\n\n<!-- server: x -->\n```\nthree\n```\n\n<!-- y -->\nb\n\n    four\n"
    )
    found = [(block.text, block.line, block.mark) for block in blocks(text)]
    assert found == [("one\n\ntwo", 3, ""), ("three", 10, "server: x"), ("four", 16, "")]
    assert " ".join(prose(text).split()) == "# A words `--no` <!-- server: x --> <!-- y --> b"


# What is named


def test_every_option_in_the_prose_is_an_option_of_some_command():
    unknown = []
    for path in PAGES:
        for span in spans(path.read_text()):
            if span.split()[0] in PROGRAMS or span.startswith("python tests/"):
                continue
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
                if option.rstrip(".") not in all_options() and option not in OF_OTHERS:
                    unknown.append(f"{page(path)}: `{span}`: no command has {option}")
    assert not unknown, "\n".join(unknown)


def test_every_file_that_the_pages_name_is_there():
    names = re.compile(rf"(?<![\w/.:<-])(?:(?:{'|'.join(FOLDERS)})/[\w./-]*\w|test_\w+)(?:\.py)?\b(?!\.json)")
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for path in PAGES:
        if path.name == "log.md":  # history: it names files as they were
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for found in names.finditer(line):
                name = STAND_FOR.get(found[0], found[0])
                there = name.removesuffix(".py") in tests if name.startswith("test_") else exists(name)
                if not there:
                    missing.append(f"{page(path)}:{number}: {name} is not there")
    assert not missing, "\n".join(missing)


def exists(name: str) -> bool:
    return (ROOT / name).exists() or (ROOT / f"{name}.py").exists()


def test_every_link_leads_to_a_file_and_a_heading():
    broken = []
    for path in PAGES:
        text = prose(path.read_text())
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file) if file else path
            if not there.exists():
                broken.append(f"{page(path)}: {target}: no such file")
            elif anchor and anchor not in anchors(there.read_text()):
                broken.append(f"{page(path)}: {target}: no such heading")
    assert not broken, "\n".join(broken)


def test_headings_have_the_anchors_that_github_gives_them():
    assert slug("Own `data`, and *more*") == "own-data-and-more"
    assert slug("A [link](x.md) 2") == "a-link-2"


def test_every_target_of_make_that_the_pages_name_is_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named: dict[str, str] = {}
    for path in PAGES:
        text = path.read_text()
        for code in [*spans(text), *(line for block in blocks(text) for line in block.text.splitlines())]:
            if found := re.match(r"make ([a-z][\w-]*)", code):
                named[found[1]] = page(path)
    assert len(named) >= 4
    missing = {target: path for target, path in named.items() if target not in targets}
    assert not missing


# Help


def every_help() -> Iterator[tuple[str, ...]]:
    for name in COMMAND_NAMES:
        yield from ((name, *words) for words in help_pages(name))


def test_each_commands_help_begins_with_what_it_does_and_has_an_example():
    for name in COMMAND_NAMES:
        text = help_of(name, columns=WIDTH)
        assert re.match(r"[A-Z][^\n]{10,}", text.split("\n\n")[1]), f"{name}: {text[:500]}"
        assert re.search(rf"^ +(ray job submit .*)?python -m jobs\.{name}\b", text, re.MULTILINE), f"{name}: no example"


def test_no_help_is_wider_than_the_terminal_or_names_what_it_is_made_with():
    wrong = []
    for words in every_help():
        text = help_of(*words, columns=WIDTH)
        wrong += [f"{' '.join(words)}: {line}" for line in text.splitlines() if len(line.strip()) > WIDTH]
        wrong += [f"{' '.join(words)}: {word}" for word in ("tyro", "dummy", "MISSING", "Annotated") if word in text]
    assert not wrong, "\n".join(wrong)


def test_every_option_of_every_help_is_described():
    wrong = [f"{' '.join(words)}: {option}" for words in every_help() for option in undescribed(help_of(*words))]
    assert not wrong, "\n".join(wrong)


def undescribed(text: str) -> list[str]:
    """Options in a help page that have a type and a default, but no description."""
    found = []
    for entry in re.split(r"^│ (?=--)", text, flags=re.MULTILINE)[1:]:
        option, *rest = re.split(r"^(?:╰|│ ─)", entry, flags=re.MULTILINE)[0].replace("│", " ").split()
        if rest and rest[0].startswith("--"):  # its --no-... form
            rest = rest[1:]
        words = re.sub(r"\((required|default:[^)]*)\)", "", " ".join(rest[1:]))
        if not re.search("[a-z]{2}", words):
            found.append(option)
    return found


def test_an_option_without_a_description_is_found():
    text = (
        "│ --a INT   (required) │\n│ --b {auto,fp32}      │\n│   (default: auto)    │\n│ --c INT   Clips.     │\n╰──╯"
    )
    assert undescribed(text) == ["--a", "--b"]


# Typed, one after the other


def test_every_command_of_the_tutorial_is_marked_as_run_as_a_server_or_as_not_run():
    kinds = {"run": 0, "server": 0, "not run": 0}
    for block in blocks((ROOT / "docs/tutorial.md").read_text()):
        kind = block.mark.partition(": ")[0]
        if kind:
            kinds[kind] += 1
        else:
            assert not re.search(r"^(\w+=\S+ )?(python|mlflow|curl|make|ray) ", block.text, re.MULTILINE), block
    assert kinds["run"] >= 8
    assert kinds["server"] == 2


@pytest.mark.long(minutes=6)
@pytest.mark.timeout(1800)  # a busy machine may take as long as it likes
@pytest.mark.cluster
def test_the_tutorial_runs_as_it_is_typed(tmp_path):
    ports = {"5000": free_port(), "5001": free_port()}
    terminal = Terminal(tmp_path, ports)
    said = {}
    try:
        for block in blocks((ROOT / "docs/tutorial.md").read_text()):
            kind, _, about = block.mark.partition(": ")
            if kind == "server":
                terminal.serve(block.text, about)
            elif kind == "run":
                said[about] = terminal.type(block.text)
        url = f"http://127.0.0.1:{ports['5000']}/api/2.0/mlflow/registered-models/get?name=motions"
        with urllib.request.urlopen(url) as answer:
            assert json.load(answer)["registered_model"]["latest_versions"][0]["version"] == "1"
    finally:
        terminal.close()

    assert " 0 errors" in said["doctor"]
    classes = {path.name for path in (tmp_path / "data/videos").iterdir() if path.is_dir()}
    assert len(classes) == 8
    assert "none left out" in said["pack"]
    assert "no faults in" in said["look"]
    assert (tmp_path / "preview.png").stat().st_size > 10_000
    assert "trained 30 steps" in said["train"]
    evaluation = tmp_path / "runs/gru-rcn-small/evaluations/test-3x5"
    for name in ("confusion.png", "classes.png", "levels.png", "mistakes.png", "scores.parquet"):
        assert (evaluation / name).stat().st_size > 1000
    assert json.loads((evaluation / "result.json").read_text())["videos"] == 32
    rows = json.loads((tmp_path / "found.json").read_text())
    assert len(rows) == 20
    assert {row["class"] for row in rows} <= classes
    with av.open(str(tmp_path / "seen.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 24
    assert (tmp_path / "motions.onnx").stat().st_size > 100_000
    answer = json.loads(said["ask"])["predictions"][0]
    assert answer["label"] in classes
    assert len(answer["labels"]) == 3


# A reader's videos train longer than a test may, and are looked at from more sides.
SHORTER = {
    "python -m jobs.train gru-rcn-small": " --num-steps 4 --val-every 2",
    "python -m jobs.evaluate": " --clips 3 --views 2",
}


@pytest.mark.long
@pytest.mark.timeout(1800)  # a busy machine may take as long as it likes
@pytest.mark.cluster
def test_the_readmes_commands_for_own_videos_run_as_they_are_typed(tmp_path):
    make_motion_videos(tmp_path / "data/videos", per_class=5)
    terminal = Terminal(tmp_path)
    block = next(each for each in blocks((ROOT / "README.md").read_text()) if "data/videos" in each.text)
    lines = [line for line in block.text.splitlines() if not line.startswith("source ")]
    assert len(lines) == 4
    said = []
    for line in lines:
        more = next((options for start, options in SHORTER.items() if line.startswith(start)), "")
        said.append(terminal.type(line + more))
    assert "packed 40 videos of 8 classes" in said[0]
    assert "drew 16 clips of 8 classes" in said[1]
    assert "trained 4 steps" in said[2]
    assert "3 clips x 2 views" in said[3]
