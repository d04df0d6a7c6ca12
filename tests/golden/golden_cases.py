"""What is compared: command lines of the package, with the names that they have in the tree BEFORE.

They run one after the other in a folder, the world, which holds what golden_inputs.py writes and what PREPARE makes of it.
Each case begins with the world as it was then; whatever it writes there is looked at.
"""

import shlex
from dataclasses import dataclass

RECIPES = (
    *("vgg16-frames", "vgg16-frames-flow", "vgg16-rnn", "vgg16-rnn-flow", "gru-rcn", "gru-rcn-flow", "gru-rcn-stacked"),
    *("gru-rcn-bidirectional", "c3d", "gru-rcn-small", "demo", "demo-frames"),
)


@dataclass(frozen=True)
class Command:
    """One process: Python with these words."""

    words: tuple[str, ...]
    stop_at: str | None = None  # SIGTERM once a line of its output matches this pattern
    looks: str = ""  # what of its output is looked at: "errors" (the error output), "help" (options and their defaults)


@dataclass(frozen=True)
class Case:
    """Some commands, and what of what they write is compared."""

    name: str
    commands: tuple[Command, ...]
    is_quick: bool = False
    needs: tuple[str, ...] = ()  # modules without which it is passed over
    only: tuple[str, ...] = ()  # patterns: of what it writes, these names alone are compared


def job(line: str, stop_at: str | None = None, looks: str = "") -> Command:
    """python -m jobs.LINE"""
    name, *words = shlex.split(line)
    return Command(("-m", f"jobs.{name}", *words), stop_at, looks)


PACK = "--width 40 --height 40 --videos-per-shard 5 --workers 0"
STEPS = "--storage runs --experiment golden --log-every 1 --val-every 10 --precision fp32 --cpus-per-worker 1 --global-batch 8"
ON_CLASSES, ON_VECTORS = f"--shards shards {STEPS}", f"--shards vectors {STEPS}"
HERE = "--precision fp32 --cpus-per-worker 1"
MSVD = "msvd --videos scenes --train train.json --val val.json --test test.json"

# Models: a recogniser of motions, another one, a run that was stopped in the middle, and one that describes videos.
PREPARE = (
    job(f"make_shards --out shards {PACK} folder --videos videos --val-share 0.2 --test-share 0.2"),
    job(f"make_shards --out captioned {PACK} {MSVD}"),
    job(f"train demo --name recogniser --num-steps 30 {ON_CLASSES}"),
    job(f"train gru-rcn-small --name second --num-steps 10 {ON_CLASSES}"),
    job("encode --shards captioned --out vectors --encoder.segments 4 --encoder.states runs/recogniser "
        "--encoder.frame runs/recogniser --precision fp32 --workers 0"),
    job(f"train caption-small --name teller --num-steps 200 {ON_VECTORS} --val-every 200 --log-every 50"),
    job(f"train demo --name interrupted --num-steps 20 {ON_CLASSES}", stop_at=r"step +10 of"),
)  # fmt: skip

# A file that was exported runs on fixed bytes, without the package. What it says of itself is kept too.
RUN_PT2 = """
import json, sys, zipfile
import torch
clips = (torch.arange(2 * 10 * 3 * 36 * 36) * 37 % 251).to(torch.uint8).reshape(2, 10, 3, 36, 36)
found = [values.tolist() for values in torch.export.load(sys.argv[1]).module()(clips)]
with zipfile.ZipFile(sys.argv[1]) as file:
    about = {name.partition("/extra/")[2]: file.read(name).decode() for name in file.namelist() if "/extra/" in name}
json.dump({"outputs": found, "about": about}, open(sys.argv[2], "w"))
"""
RUN_ONNX = """
import json, sys
import numpy as np, onnxruntime
clips = (np.arange(2 * 10 * 3 * 36 * 36) * 37 % 251).astype(np.uint8).reshape(2, 10, 3, 36, 36)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
found = [values.tolist() for values in session.run(None, {session.get_inputs()[0].name: clips})]
json.dump({"outputs": found, "about": session.get_modelmeta().custom_metadata_map}, open(sys.argv[2], "w"))
"""

CASES = (
    # Packing
    Case(
        "pack-folder",
        (
            job(f"make_shards --out out/shards --json out/packed.json --seed 3 {PACK} --gop 6 --crf 20 "
                "folder --videos videos --val-share 0.2 --test-share 0.2 --split-seed 1"),
            job("inspect_shards info out/shards --all --json out/info.json"),
            job("inspect_shards verify out/shards --workers 0 --json out/verified.json"),
        ),
        is_quick=True,
    ),
    Case(
        "pack-captions",
        (
            job(f"make_shards --out out/shards --json out/packed.json {PACK} {MSVD}"),
            job("inspect_shards info out/shards --json out/info.json"),
        ),
        is_quick=True,
    ),
    Case(
        "pack-lists",
        (
            job(f"make_shards --out out/csv {PACK} csv --table table.csv --root videos"),
            job(f"make_shards --out out/ucf101 {PACK} ucf101 --videos ucf101/videos --lists ucf101/lists"),
            job(f"make_shards --out out/hmdb51 {PACK} hmdb51 --videos hmdb51/videos --lists hmdb51/lists"),
            job(f"make_shards --out out/kinetics {PACK} kinetics --videos kinetics/videos --table kinetics/table.csv"),
            job(f"make_shards --out out/copied {PACK} --copy folder --videos kinetics/videos"),
        ),
    ),
    Case(
        "pack-on-ray",
        (
            job("make_shards --out out/shards --width 40 --height 40 --videos-per-shard 5 --workers 2 "
                "folder --videos videos --val-share 0.2 --test-share 0.2"),
        ),
    ),
    Case(
        "index-tars",
        (
            job("inspect_shards index tars --out out/index --width 40 --height 40 --workers 0 --json out/indexed.json"),
            job("inspect_shards verify out/index --workers 0 --json out/verified.json"),
        ),
    ),
    Case(
        "preview",
        (job("inspect_shards preview shards --samples 6 --num-frames 6 --size 36 --out out/p.html --json out/p.json"),),
    ),
    # Training
    *(
        Case(
            f"train-{recipe}-zero{zero}",
            (job(f"train {recipe} --name case --num-steps 20 --zero {zero} --json out/trained.json {on}"),),
            is_quick=(recipe, zero) in (("demo", 0), ("gru-rcn-small", 2), ("caption-small", 0)),
        )
        for recipe, on in (("demo", ON_CLASSES), ("gru-rcn-small", ON_CLASSES), ("caption-small", ON_VECTORS))
        for zero in (0, 2)
    ),
    *(
        Case(
            f"train-{recipe}-zero{zero}-on-ray",
            (job(f"train {recipe} --name case --num-steps 20 --zero {zero} --workers 2 --json out/trained.json {on}"),),
        )
        for recipe, zero, on in (("demo", 0, ON_CLASSES), ("demo", 2, ON_CLASSES), ("caption-small", 0, ON_VECTORS))
    ),
    Case(
        "train-options",  # models and options that the recipes above have not
        (
            job(f"train gru-rcn-small --name stacked --num-steps 6 --zero 1 --accumulation 2 --recompute {ON_CLASSES} "
                "--model.stacked --model.bidirectional --optim.optimizer sgd --optim.schedule steps --optim.step-every 3"),
            job(f"train demo-frames --name frames --num-steps 4 --zero 3 --save-every 2 --keep 1 --seed 5 {ON_CLASSES} "
                "--model.trunk mobilenet_v2 --model.taps stride4 stride8 --model.hidden 8 8 --patience 1"),
            job(f"train demo --name begun --num-steps 4 {ON_CLASSES} --model.weights runs/recogniser --model.freeze True"),
        ),
    ),
    Case(
        "train-flow",
        (
            job(f"make_shards --out out/flow {PACK} --flow dis csv --table table.csv --root videos"),
            job(f"train demo --name flow --num-steps 4 --shards out/flow {STEPS} --global-batch 4 --clips.stream flow "
                "--clips.flow-fields 3 --clips.num-frames 5"),
            job(f"evaluate --run runs/flow --shards out/flow --clips 2 --views 5 --json out/evaluated.json {HERE}"),
        ),
        needs=("cv2",),
    ),
    Case("resume", (job(f"train demo --name interrupted --num-steps 20 --json out/trained.json {ON_CLASSES}"),)),
    Case(
        "stop-and-resume",  # at whichever step the signal comes: steps, result and last weights are those of a run left alone
        (
            job(f"train demo --name case --num-steps 20 {ON_CLASSES}", stop_at=r"step +6 of"),
            job(f"train demo --name case --num-steps 20 --json out/trained.json {ON_CLASSES}"),
        ),
        only=(
            r"^command \d > status",
            r"mlflow\.db > case > metrics > (train|val)/",
            r"^runs/case/checkpoint-00000020/\w+\.safetensors",
            r"^runs/case/finished\.json",
            r"^out/",
        ),
    ),
    Case(
        "train-captions-of-videos",  # the encoder runs beside the decoder
        (
            job(f"train caption-small --name case --num-steps 6 --shards captioned {STEPS} --encoder.states runs/recogniser "
                "--encoder.frame runs/second --select cider --max-vocabulary 10 --min-count 2"),
        ),
        needs=("pycocoevalcap",),
    ),
    # What trained models say
    Case(
        "evaluate-and-fuse",
        (
            job(f"evaluate --run runs/recogniser --shards shards --clips 3 --views 5 --json out/first.json {HERE}"),
            job(f"evaluate --run runs/second --shards shards --clips 2 --views 10 --json out/second.json {HERE}"),
            job("fuse --scores runs/recogniser/evaluations/test-3x5 runs/second/evaluations/test-2x10 --out out/fused "
                "--json out/fused.json"),
        ),
        is_quick=True,
    ),
    Case(
        "evaluate-on-ray",
        (
            job("evaluate --run runs/recogniser --shards shards --split val --clips 4 --views 1 --precision fp32 --workers 1 "
                "--decoders 1 --gpus False --json out/evaluated.json"),
        ),
    ),
    Case(
        "encode",
        (
            job("encode --shards captioned --out out/vectors --encoder.segments 3 --encoder.states runs/second --precision fp32 "
                "--workers 0 --json out/encoded.json"),
            job(f"train caption-small --name case --num-steps 10 --max-words 4 --shards out/vectors {STEPS}"),
            job(f"caption --run runs/case --shards out/vectors --beam 2 --json out/captioned.json {HERE}"),
            job("inspect_shards verify out/vectors --workers 0 --json out/verified.json"),
        ),
        needs=("pycocoevalcap",),
    ),
    Case(
        "caption",
        (
            job(f"caption --run runs/teller --shards vectors --json out/test.json {HERE}"),
            job(f"caption --run runs/teller --shards captioned --split val --beam 5 --json out/val.json {HERE}"),
        ),
        needs=("pycocoevalcap",),
    ),
    Case(
        "predict-classes",
        (
            job("predict --model runs/recogniser videos/up videos/left/05.avi --clips 4 --views 5 --top 3 --precision fp32 "
                "--json out/found.json"),
            job("predict --model runs/recogniser videos/left/05.avi --overlay out/seen.mp4 --heat --precision fp32"),
        ),
        is_quick=True,
    ),
    Case(
        "predict-captions",
        (
            job("predict --model runs/teller scenes/test00_0_1.avi scenes/test01_0_1.avi videos/down/05.avi --captions 3 "
                "--attention out/attention --precision fp32 --json out/found.json"),
        ),
    ),
    Case(
        "export",
        (
            job("export --model runs/recogniser --out out/model.pt2"),
            Command(("-c", RUN_PT2, "out/model.pt2", "out/pt2.json")),
        ),
    ),
    Case(
        "export-onnx",
        (
            job("export --model runs/recogniser --out out/model.onnx"),
            Command(("-c", RUN_ONNX, "out/model.onnx", "out/onnx.json")),
        ),
        needs=("onnx", "onnxscript", "onnxruntime"),
    ),
    Case(
        "serve",
        (
            job(f"train demo --name case --num-steps 4 --register golden {ON_CLASSES}"),
            job("predict --model models:/golden/1 --storage runs videos/up/00.avi --clips 2 --precision fp32 --json out/p.json"),
            Command(("-m", "mlflow", "models", "predict", "--model-uri", "models:/golden/1", "--env-manager", "local",
                     "--input-path", "asked.json", "--output-path", "out/served.json")),
        ),
    ),
    # Arithmetic, defaults, refusals
    Case(
        "describe",
        (
            *(job(f"describe {name} --json out/{name}.json") for name in ("gru-rcn", "gru-rcn-stacked", "c3d", "demo")),
            job("describe gru-rcn --json out/mobilenet.json --model.trunk mobilenet_v2 --model.taps stride8 stride16 "
                "--model.hidden 64 64 --classes 400"),
        ),
    ),
    Case(
        "sizing",
        (
            job("sizing gru-rcn --gpus 8 --gpu h100 --price 2.5 --json out/first.json"),
            job("sizing vgg16-frames-flow --videos 240000 --classes 400 --epochs 30 --global-batch 512 --gpus 64 --mfu 0.4 "
                "--json out/second.json"),
            job("sizing c3d --gpus 16 --json out/third.json"),
        ),
        is_quick=True,
    ),
    Case(
        "defaults",
        (
            *(job(f"describe {recipe} --help", looks="help") for recipe in RECIPES),
            job("train demo --help", looks="help"),
            *(job(f"train {recipe} --help", looks="help") for recipe in ("caption", "caption-small")),
            job("make_shards folder --help", looks="help"),
            *(job(f"{name} --help", looks="help") for name in ("evaluate", "caption", "predict", "encode")),
        ),
    ),
    Case(
        "refusals",
        (
            job(f"make_shards --out out/shards {PACK} folder --videos nowhere", looks="errors"),
            job(f"make_shards --out shards {PACK} csv --table table.csv --root videos", looks="errors"),
            job(f"train demo --name recogniser --num-steps 20 {ON_CLASSES}", looks="errors"),
            job(f"train caption-small --name case {ON_CLASSES}", looks="errors"),
            job("evaluate --run runs/teller --shards shards", looks="errors"),
            job("fuse --scores runs/recogniser --weights 1", looks="errors"),
        ),
    ),
)  # fmt: skip
