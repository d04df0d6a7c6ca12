"""Writes tests/golden/before: what the commit COMMIT wrote, and what it said of it, for test_golden.py.

    python tests/golden/make_fixture.py

The commit is checked out into a temporary worktree, and its command lines run in FOLDER, one after the other. It need not be
done again, unless the fixture is to hold more: it stands for what people have on their disks.

    videos/CLASS/NN.avi    the videos that were packed
    shards/                those, packed
    vectors/               captioned videos, packed and encoded by the finished run's model
    runs/interrupted       a recognition run that was stopped in the middle: its last checkpoint, and its best one's weights
    runs/finished          the same run, left alone
    runs/teller            a captioning run over the vectors
    recorded.json          versions: of the packages that decide a packing's bytes
                           packed: SHA-256 of each file of shards/ but dataset.json
                           training, validation: losses and scores of runs/finished, by step
                           scores: of each test video by runs/finished, by key
                           captions: of each test video by runs/teller, by key
                           losses: of the first 20 steps of three recipes, as they are, on shards/ and vectors/
"""

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import av
import golden_inputs
import imageio_ffmpeg
import pyarrow.parquet as pq
from golden_cases import Command, job
from golden_observed import reading, sha256
from golden_running import World, run_command
from side_by_side import checked_out

COMMIT = "da1b8aa"
FOLDER = Path(tempfile.gettempdir()) / "golden-before"  # its path stands in what is written
TARGET = Path(__file__).parent / "before"

ALWAYS = "--storage runs --log-every 1 --precision fp32 --cpus-per-worker 1"
TINY = (
    f"--shards shards {ALWAYS} --keep 1 --global-batch 4 --num-steps 12 --val-every 4 --model.taps pool2 pool3 "
    "--model.hidden 3 4 --model.width 0.03125 --clips.num-frames 4 --clips.size 20 --optim.warmup-steps 2 "
    "--optim.learning-rate 0.02"
)
PACK = "make_shards --out {out} --width 32 --height 32 --videos-per-shard 6 --workers 0"
PACK_FOLDER = f"{PACK} folder --videos videos --val-share 0.2 --test-share 0.2"
EVALUATE = "evaluate --run runs/finished --shards shards --clips 2 --views 5 --precision fp32 --cpus-per-worker 1"
CAPTION = "caption --run runs/teller --shards vectors --precision fp32 --cpus-per-worker 1"
# Of each recipe the first 20 steps; also in test_golden.py.
FIRST_STEPS = {
    "demo": f"--shards shards {ALWAYS} --num-steps 20 --val-every 20 --global-batch 4",
    "gru-rcn-small": f"--shards shards {ALWAYS} --num-steps 20 --val-every 20 --global-batch 4",
    "caption-small": f"--shards vectors {ALWAYS} --num-steps 20 --val-every 20 --global-batch 8",
}
COMMANDS = (
    job(PACK_FOLDER.format(out="shards")),
    job(PACK.format(out="captioned") + " msvd --videos scenes --train train.json --val val.json --test test.json"),
    job(f"train demo --name interrupted {TINY}", stop_at=r"step +6 of"),
    job(f"train demo --name finished {TINY}"),
    job("encode --shards captioned --out vectors --encoder.segments 3 --encoder.states runs/finished --encoder.frame "
        "runs/finished --precision fp32 --workers 0"),
    job(f"train caption-small --name teller --shards vectors {ALWAYS} --keep 1 --global-batch 8 --num-steps 300 "
        "--val-every 300 --log-every 100 --decoder.hidden 24 --decoder.embedding 12 --optim.learning-rate 0.01"),
    job(EVALUATE),
    job(CAPTION),
    *(job(f"train {recipe} --name {recipe} {options}") for recipe, options in FIRST_STEPS.items()),
)  # fmt: skip


def main() -> None:
    world = World(FOLDER)
    shutil.rmtree(FOLDER, ignore_errors=True)
    world.place.mkdir(parents=True)
    golden_inputs.write_classes(world.place / "videos", per_class=4, frames=12, side=32, odd=False)
    golden_inputs.write_scenes(world.place, {"train": 10, "val": 3, "test": 4}, frames=12, side=32)
    with checked_out(COMMIT) as tree:
        for command in COMMANDS:
            print(" ".join(command.words), flush=True)
            check(command, tree, world)
    recorded = record(world.place)
    shutil.rmtree(TARGET, ignore_errors=True)
    for name in ("videos", "shards", "vectors", "runs/interrupted", "runs/finished", "runs/teller"):
        left_out = shutil.ignore_patterns("evaluations", "captions")
        shutil.copytree(world.place / name, TARGET / name, ignore=left_out)
    (TARGET / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"wrote {TARGET}: {size / 1e3:.0f} KB")


def check(command: Command, tree: Path, world: World) -> None:
    done = run_command(command, tree, world)
    if (done.status != 0) != bool(command.stop_at):
        raise SystemExit(f"status {done.status}: {done.errors[-3000:]}")


def record(world: Path) -> dict[str, Any]:
    """What was said of it all."""
    database = world / "runs" / "mlflow.db"
    scores = pq.read_table(world / "runs/finished/evaluations/test-2x5/scores.parquet").to_pylist()
    (captions,) = (world / "runs/teller/captions").glob("test-*/captions.parquet")
    return {
        "commit": COMMIT,
        "versions": versions(),
        "packed": digests(world / "shards"),
        "training": metrics(database, "finished", "train/loss"),
        "validation": {name: metrics(database, "finished", f"val/{name}") for name in ("loss", "top1", "top5")},
        "scores": {row["key"]: row["scores"] for row in scores},
        "captions": {row["key"]: row["caption"] for row in pq.read_table(captions).to_pylist()},
        "losses": {recipe: list(metrics(database, recipe, "train/loss").values()) for recipe in FIRST_STEPS},
    }


def versions() -> dict[str, str]:
    """Of what decides a packing's bytes."""
    packages = {name: importlib.metadata.version(name) for name in ("av", "numpy", "pyarrow", "imageio-ffmpeg")}
    libraries = {name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}
    return packages | libraries | {"ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the description, which holds the command's options too."""
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.iterdir()) if path.name != "dataset.json"}


def metrics(database: Path, run: str, key: str) -> dict[str, float]:
    """A metric of a run by its step, as MLflow's database has it."""
    with reading(database) as rows:
        found = rows(
            "select step, value from metrics join runs using (run_uuid) "
            f"where runs.name = '{run}' and key = '{key}' and is_nan = 0 order by step"
        )
    return {str(step): value for step, value in found}


if __name__ == "__main__":
    main()
