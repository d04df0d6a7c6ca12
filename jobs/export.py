"""Write a trained model of recognition as one file that runs without this package: with PyTorch alone, or with ONNX Runtime.

    python -m jobs.export --model runs/gru-rcn --out gru-rcn.pt2
    python -m jobs.export --model runs:/0f3a... --out gru-rcn.onnx --batch 8

Either file takes clips of uint8 RGB frames (B, T, 3, S, S), cut out and resized, and normalises them itself; a model of optical
flow takes the stored bytes of its fields (B, N, 2, S, S), u and v, cut out and resized. It gives two tensors, float32:

    probabilities   (B, K)      of the classes, the mean over the levels
    levels          (B, L, K)   by each level

Before the file appears under its name, it is loaded again, run on random clips, and compared with the model. It carries classes,
levels, the recipe's digest and what its input is: in ONNX's metadata, and in a .pt2 as the extra file grurcn.json. ONNX wants the
extra grurcn[export].
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.checkpoints.run_folder import Model
from cluster.tracking.server import tracking_uri
from grurcn.inference.classifier import OtherTask, Recogniser
from grurcn.models.pixels import FLOW_REACH, FLOW_SCALE, FLOW_STILL, MEAN, STD
from grurcn.training.pretrained import read_run
from grurcn.training.recipes import Recipe
from jobs.command import Command

INPUT, OUTPUTS = "clips", ("probabilities", "levels")
ABOUT = "grurcn.json"  # in a .pt2
OPSET = 18  # of ONNX: the one that torch's exporter writes without a conversion
TOLERANCE = 1e-4  # by which a probability may differ
MOST_ONNX_BYTES = 2**31 - 2**20  # a protobuf ends at 2 GiB
BATCHES_TRIED = (1, 3)  # of a dynamic batch


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of an export."""

    model: str
    """Folder or URL of a run (STORAGE/NAME), whose best model is taken, one of its checkpoints, runs:/ID of MLflow, or
    models:/NAME/VERSION of its registry."""
    out: Path
    """File to write: .pt2 for torch.export.load, .onnx for ONNX Runtime. It must not be there yet."""
    batch: Literal["dynamic"] | int = "dynamic"
    """Clips that the file takes at once: any number, or this one alone."""
    storage: str = "runs"
    """Folder or URL of all runs: its MLflow database knows runs:/ID and models:/, where MLFLOW_TRACKING_URI names no server."""

    def __post_init__(self) -> None:
        if self.out.suffix not in WRITERS:
            raise ValueError(f"out {self.out}: ends with {self.out.suffix or 'nothing'}; wanted .pt2 or .onnx")
        if self.batch != "dynamic" and self.batch < 1:
            raise ValueError(f"batch {self.batch}: wanted dynamic, or at least 1")


def main(job: Export) -> int:
    """Loads the model, writes and checks the file, prints what came out."""
    out = job.out.expanduser()
    with whole_file(out) as partial:
        write = WRITERS[out.suffix]()
        needs_mlflow = job.model.startswith(("runs:", "models:"))
        model = read_run(job.model, tracking_uri(job.storage) if needs_mlflow else "")
        recogniser = recogniser_of(model, job.model)
        network = Exported(recogniser)
        about = about_model(recogniser, model, job)
        run = write(network, job.batch, about, partial)
        largest = largest_difference(recogniser, network, run, job.batch)
        size = partial.stat().st_size
    kind = "a program of torch.export" if out.suffix == ".pt2" else f"ONNX, opset {OPSET}"
    print(
        f"exported the model of {job.model} (step {model.step:,}) to {out}: {kind}, {size / 1e6:,.1f} MB; input "
        f"{about['input']['shape']} uint8; {len(recogniser.classes):,} classes, levels {', '.join(recogniser.levels)}; run on "
        f"random clips its probabilities differ from the model's by {largest:.1e} at most"
    )
    return 0


def recogniser_of(model: Model, source: str) -> Recogniser:
    """On the CPU, in float32: the file's numbers are those. Raises OtherTask, naming the source, for a run of captioning."""
    try:
        return Recogniser.of(model, torch.device("cpu"), "fp32")
    except OtherTask as error:
        raise OtherTask(f"{source}: {error}") from None


@contextlib.contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A file beside `out` to write to, that gets its name when the block has ended well, and is removed otherwise.

    Raises FileExistsError if `out` is there already, other OSErrors if nothing can be written there.
    """
    if out.exists():
        raise FileExistsError(f"{out}: is there already; remove it, or name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.touch()
    try:
        yield partial
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


# What is exported


class Exported(nn.Module):
    """A recogniser's model with its normalisation before it and its mean vote behind it, of plain operations."""

    offset: Tensor
    factor: Tensor
    shown: Tensor  # (T, fields a step), of flow

    def __init__(self, recogniser: Recogniser):
        super().__init__()
        self.network = recogniser.model.requires_grad_(False)
        clips = recogniser.recipe.clips
        self.is_flow = clips.stream == "flow"
        self.frames = clips.frames_read
        self.shape = (self.frames, 2 if self.is_flow else 3, clips.size, clips.size)
        if self.is_flow:
            scale = recogniser.packing.flow_bound * FLOW_SCALE / FLOW_REACH
            self.register_buffer("offset", torch.tensor(float(FLOW_STILL)))
            self.register_buffer("factor", torch.tensor(scale))
            first = clips.stride * torch.arange(clips.num_frames)
            self.register_buffer("shown", first[:, None] + torch.arange(clips.flow_fields))
        else:
            self.register_buffer("offset", torch.tensor(MEAN)[:, None, None] * 255)
            self.register_buffer("factor", 1 / (torch.tensor(STD)[:, None, None] * 255))
        self.eval()

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """clips (B, T, 3, S, S) uint8, or fields of flow (B, N, 2, S, S) uint8 -> probabilities (B, K), of levels (B, L, K)."""
        levels = self.network(self.normalised(clips), clips.flatten(1)[:, 0].long()).exp()
        return levels.mean(dim=1), levels

    def normalised(self, clips: Tensor) -> Tensor:
        """What grurcn.models.pixels does once clips are resized; the steps of flow share fields."""
        pixels = (clips.float() - self.offset) * self.factor
        return pixels[:, self.shown].flatten(2, 3) if self.is_flow else pixels  # (B, T, I, S, S)


def about_model(recogniser: Recogniser, model: Model, job: Export) -> dict[str, Any]:
    """What the file says of itself."""
    clips = recogniser.recipe.clips
    size = clips.size
    if clips.stream == "flow":
        bound = recogniser.packing.flow_bound
        content = (
            f"optical flow of {clips.frames_read} neighbouring frames: of each field u, then v, as bytes "
            f"{FLOW_STILL} + {FLOW_REACH} * pixels / {bound:g}, motions in pixels of the stored frames"
        )
    else:
        content = f"{clips.num_frames} RGB frames of 0 to 255, every {clips.stride} of the video"
    batch = "B" if job.batch == "dynamic" else job.batch
    channels = 2 if clips.stream == "flow" else 3
    return {
        "format": 1,
        "source": job.model,
        "step": model.step,
        "recipe_digest": Recipe.from_dict(model.meta["recipe"]).digest(),
        "kind": recogniser.recipe.model.kind,
        "classes": list(recogniser.classes),
        "levels": list(recogniser.levels),
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": f"({batch}, {clips.frames_read}, {channels}, {size}, {size})",
            "content": content,
            "crop": f"the centre square of {clips.test_scale:g} of the shorter side of the stored frames, resized to {size} x "
            f"{size}, bilinear with antialiasing",
            "stored_frames": stored_frames(model),
        },
        "outputs": {
            "probabilities": "(B, K) float32, the mean over the levels",
            "levels": "(B, L, K) float32, by each level",
        },
    }


def stored_frames(model: Model) -> str | None:
    """WIDTH x HEIGHT to which videos are stretched before they are cut; None for a run of an older version."""
    packing = model.meta.get("packing")
    return f"{packing['width']} x {packing['height']}" if packing else None


# The formats

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
Batch = Literal["dynamic"] | int
Write = Callable[[Exported, Batch, Mapping[str, Any], Path], Run]


def program_of(network: Exported, batch: Batch) -> torch.export.ExportedProgram:
    """The network as a program for any batch or one alone, on any device."""
    example = random_clips(network, 2 if batch == "dynamic" else batch, seed=0)
    shapes = {"clips": {0: torch.export.Dim("batch", min=1)}} if batch == "dynamic" else None
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    graph = program.graph_module.graph
    for node in list(graph.nodes):  # they would hold the program to the CPU
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def pt2_writer() -> Write:
    return write_pt2


def write_pt2(network: Exported, batch: Batch, about: Mapping[str, Any], partial: Path) -> Run:
    """Writes a .pt2 and loads it again."""
    content = json.dumps(about, ensure_ascii=False, indent=1)
    with partial.open("wb") as file:
        torch.export.save(program_of(network, batch), file, extra_files={ABOUT: content})
    with partial.open("rb") as file:
        loaded = torch.export.load(io.BytesIO(file.read())).module()
    return lambda clips: loaded(clips)


def onnx_writer() -> Write:
    """Raises ValueError, which says how to get them, where ONNX's packages are missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter wants it
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ONNX wants the package {error.name}, which is not here; pip install 'grurcn[export]', or write a .pt2, which "
            "wants nothing"
        ) from None

    def write(network: Exported, batch: Batch, about: Mapping[str, Any], partial: Path) -> Run:
        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        if size > MOST_ONNX_BYTES:
            raise ValueError(
                f"{size / 2**30:.1f} GiB of weights: one file of ONNX holds less than 2 GiB; write a .pt2 instead"
            )
        with quiet():
            program = torch.onnx.export(
                program_of(network, batch),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
        for name, value in about.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            proto.metadata_props.add(key=name, value=text)
        onnx.checker.check_model(proto)
        partial.write_bytes(proto.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(partial), options, providers=["CPUExecutionProvider"])

        def run(clips: Tensor) -> tuple[Tensor, Tensor]:
            probabilities, levels = session.run(list(OUTPUTS), {INPUT: clips.numpy()})
            return torch.from_numpy(probabilities), torch.from_numpy(levels)

        return run

    return write


WRITERS: dict[str, Callable[[], Write]] = {".pt2": pt2_writer, ".onnx": onnx_writer}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters have to say of their own passes."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# The check


def random_clips(network: Exported, batch: int, seed: int) -> Tensor:
    """(batch, ...) uint8 bytes as the network takes them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *network.shape), dtype=torch.uint8, generator=generator)


def largest_difference(recogniser: Recogniser, network: Exported, run: Run, batch: Batch) -> float:
    """Of what a file gives to what the model gives, over all probabilities of random clips.

    Raises ValueError if that is more than rounding explains: the file must not be used.
    """
    largest = 0.0
    for seed, size in enumerate(BATCHES_TRIED if batch == "dynamic" else (batch,), start=1):
        clips = random_clips(network, size, seed)
        with torch.inference_mode():
            draw = torch.zeros(size, dtype=torch.int64)
            wanted = recogniser.model(network.normalised(clips), draw).exp()  # the model as it is trained, not its copy
            probabilities, levels = run(clips)
        for found, right in ((levels, wanted), (probabilities, wanted.mean(dim=1))):
            if found.shape != right.shape:
                raise ValueError(f"the exported model gives {tuple(found.shape)} numbers, wanted {tuple(right.shape)}")
            difference = float((found - right).abs().max())
            if not difference <= TOLERANCE:  # nor NaN
                raise ValueError(
                    f"the exported model's probabilities differ from the model's by {difference:.1e}, wanted at most "
                    f"{TOLERANCE:g}; nothing was written: try the other format"
                )
            largest = max(largest, difference)
    return largest


COMMAND = Command(Export, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
