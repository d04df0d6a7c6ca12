"""A trained classifier as one file that runs without this package: a PyTorch program (.pt2) or ONNX."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.checkpoints.run_folder import Model
from grurcn.inference.classifier import Classifier
from grurcn.inference.model_source import find_model
from grurcn.models.pixels import FLOW_REACH, FLOW_SCALE, FLOW_STILL, MEAN, STD
from grurcn.training.recipes import Recipe
from shards.store import written_file

INPUT, OUTPUTS = "clips", ("probabilities", "levels")
ABOUT = "grurcn.json"  # the description in a .pt2
OPSET = 18  # of ONNX: the one that torch's exporter writes without a conversion
TOLERANCE = 1e-4  # by which a probability may differ
MOST_ONNX_BYTES = 2**31 - 2**20  # a protobuf ends at 2 GiB
BATCHES_TRIED = (1, 3)  # of a dynamic batch

Batch = Literal["dynamic"] | int


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Which model to export, and how."""

    model: str
    """Folder or URL of a run (STORAGE/NAME), whose best model is taken, one of its checkpoints, runs:/ID of MLflow, or
    models:/NAME/VERSION of its registry."""
    out: Path
    """File to write: .pt2 for torch.export.load, .onnx for ONNX Runtime. It must not exist yet."""
    batch: Batch = "dynamic"
    """Clips that the file takes at once: any number, or this one alone."""
    storage: str = "runs"
    """Folder or URL of all runs: its MLflow database knows runs:/ID and models:/, where MLFLOW_TRACKING_URI names no server."""

    def __post_init__(self) -> None:
        if self.out.suffix not in WRITERS:
            raise ValueError(f"out {self.out}: ends with {self.out.suffix or 'nothing'}; expected .pt2 or .onnx")
        if self.batch != "dynamic" and self.batch < 1:
            raise ValueError(f"batch {self.batch}: expected dynamic, or at least 1")


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file that was written, and what it holds."""

    path: Path
    size_bytes: int
    kind: str
    step: int  # of the model
    input_shape: str
    classes: tuple[str, ...]
    levels: tuple[str, ...]
    largest_difference: float  # of its probabilities from the model's, on random clips


def export(job: ExportJob) -> ExportedFile:
    """Writes a model to a file, which is loaded again and compared with the model before it appears under its name.

    Raises FileExistsError if the file exists, other OSErrors if it cannot be written, OtherTask for a captioning model, and
    ValueError if ONNX's packages are missing or the file's numbers are not the model's.
    """
    out = job.out.expanduser()
    if out.exists():
        raise FileExistsError(f"{out}: exists already; remove it, or name another --out")
    with written_file(out) as file:
        partial = Path(file.name)
        write = WRITERS[out.suffix]()
        model = find_model(job.model, job.storage)
        classifier = Classifier.of(model, torch.device("cpu"), "fp32", job.model)
        network = ExportedModel(classifier)
        about = about_model(classifier, model, job)
        run = write(network, job.batch, about, partial)
        difference = largest_difference(classifier, network, run, job.batch)
    return ExportedFile(
        path=out,
        size_bytes=out.stat().st_size,
        kind="a program of torch.export" if out.suffix == ".pt2" else f"ONNX, opset {OPSET}",
        step=model.step,
        input_shape=about["input"]["shape"],
        classes=classifier.classes,
        levels=classifier.levels,
        largest_difference=difference,
    )


class ExportedModel(nn.Module):
    """A classifier's network between the normalisation of its input and the mean over its levels."""

    offset: Tensor
    factor: Tensor
    fields: Tensor  # (T, fields of a step), of a flow model

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.network = classifier.model
        clips = classifier.recipe.clips
        self.is_flow = clips.stream == "flow"
        self.frames = clips.frames_read
        self.shape = (self.frames, 2 if self.is_flow else 3, clips.size, clips.size)
        if self.is_flow:
            scale = classifier.packing.flow_bound * FLOW_SCALE / FLOW_REACH
            self.register_buffer("offset", torch.tensor(float(FLOW_STILL)))
            self.register_buffer("factor", torch.tensor(scale))
            first = clips.stride * torch.arange(clips.num_frames)
            self.register_buffer("fields", first[:, None] + torch.arange(clips.flow_fields))
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
        return pixels[:, self.fields].flatten(2, 3) if self.is_flow else pixels  # (B, T, I, S, S)


def about_model(classifier: Classifier, model: Model, job: ExportJob) -> dict[str, Any]:
    """The description that the file carries."""
    clips = classifier.recipe.clips
    size = clips.size
    if clips.stream == "flow":
        bound = classifier.packing.flow_bound
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
        "recipe_digest": Recipe.from_dict(model.training.recipe).digest(),
        "kind": classifier.recipe.model.kind,
        "classes": list(classifier.classes),
        "levels": list(classifier.levels),
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
    """WIDTH x HEIGHT to which videos are resized before they are cropped; None for a run of an older version."""
    packing = model.training.model.get("packing")
    return f"{packing['width']} x {packing['height']}" if packing else None


# The formats. Each is written to a partial file and loaded from it again, for the check.

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
Write = Callable[[ExportedModel, Batch, Mapping[str, Any], Path], Run]


def program_of(network: ExportedModel, batch: Batch) -> torch.export.ExportedProgram:
    """The network as a program for any batch size or a fixed one, on any device."""
    example = random_clips(network, 2 if batch == "dynamic" else batch, seed=0)
    shapes = {"clips": {0: torch.export.Dim("batch", min=1)}} if batch == "dynamic" else None
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    graph = program.graph_module.graph
    for node in list(graph.nodes):  # they would tie the program to the CPU
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def pt2_writer() -> Write:
    return write_pt2


def write_pt2(network: ExportedModel, batch: Batch, about: Mapping[str, Any], partial: Path) -> Run:
    """Writes a .pt2 and loads it again."""
    content = json.dumps(about, ensure_ascii=False, indent=1)
    with partial.open("wb") as file:
        torch.export.save(program_of(network, batch), file, extra_files={ABOUT: content})
    with partial.open("rb") as file:
        loaded = torch.export.load(io.BytesIO(file.read())).module()
    return lambda clips: loaded(clips)


def onnx_writer() -> Write:
    """Raises ValueError, with how to install them, if ONNX's packages are missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter wants it
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ONNX needs the package {error.name}, which is not installed; pip install 'grurcn[export]', or write a .pt2, "
            "which needs no further package"
        ) from None

    def write(network: ExportedModel, batch: Batch, about: Mapping[str, Any], partial: Path) -> Run:
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
    """Hides the messages of the exporters' passes."""
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


def random_clips(network: ExportedModel, batch: int, seed: int) -> Tensor:
    """(batch, ...) uint8, as the network takes them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *network.shape), dtype=torch.uint8, generator=generator)


def largest_difference(classifier: Classifier, network: ExportedModel, run: Run, batch: Batch) -> float:
    """The largest difference between the probabilities of the file and of the model, on random clips.

    Raises ValueError if it is more than rounding errors explain.
    """
    largest = 0.0
    for seed, size in enumerate(BATCHES_TRIED if batch == "dynamic" else (batch,), start=1):
        clips = random_clips(network, size, seed)
        with torch.inference_mode():
            draw = torch.zeros(size, dtype=torch.int64)
            expected = classifier.model(network.normalised(clips), draw).exp()  # as in training, not as in the program
            probabilities, levels = run(clips)
        for found, right in ((levels, expected), (probabilities, expected.mean(dim=1))):
            if found.shape != right.shape:
                raise ValueError(
                    f"the exported model gives {tuple(found.shape)} numbers, expected {tuple(right.shape)}"
                )
            difference = float((found - right).abs().max())
            if not difference <= TOLERANCE:  # nor NaN
                raise ValueError(
                    f"the exported model's probabilities differ from the model's by {difference:.1e}, expected at most "
                    f"{TOLERANCE:g}; nothing was written: try the other format"
                )
            largest = max(largest, difference)
    return largest
