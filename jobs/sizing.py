"""What a training takes, by arithmetic: GPU hours, cost, CPU cores for decoding, bandwidths, memory, sizes of checkpoints.

    python -m jobs.sizing gru-rcn --gpus 8 --gpu h100 --price 2.5
    python -m jobs.sizing gru-rcn --videos 240000 --classes 400 --epochs 30 --global-batch 512 --gpus 64 --mfu 0.4

Nothing is trained or measured. Two figures decide, and are assumptions until you measure them: --mfu, the share of the GPU's
peak that training reaches (`python -m jobs.bench model` on your GPU prints its TFLOP/s), and --decode-rate, clips that one core
decodes in a second (`python -m jobs.bench read` on your machines, "a second and core"). Decoding, storage and network are taken
to keep up. Validation, evaluation, start-up and lost machines are not counted; early stopping may end a run sooner.

--json FILE holds: recipe, steps, epochs, clips, parameters {trunk, grus, heads, learned}, multiplications {forward, training},
each of them {trunk, grus, heads}, gpu_hours, wall_hours, cost, step_seconds, clips_per_second, cores_per_gpu, cores,
storage_bytes_per_second, gradient_bytes_per_step, network_bits_per_second, clip_memory_bytes, shared_memory_bytes,
checkpoint_bytes, frozen_bytes.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from grurcn.models.flops import Multiplications, forward_multiplications, training_multiplications
from grurcn.training.gpu_specs import GpuName, peak_flops
from grurcn.training.recipes import RECIPES, Recipe
from jobs.command import STYLE, Flat, finish, prog, readable_help, run_command
from jobs.describe import count_parameters
from shards.reading.stream import Reading
from shards.video import Packing

# Measured by jobs.bench read on one core of an AMD EPYC of 2026: random clips of 10 frames of 340 x 256, key frames 16 apart.
DECODE_RATE = 140.0
DECODE_FRAMES = 10
SHARED_MEMORY_PER_GPU = 2**30  # NCCL's buffers between GPUs that cannot reach each other's memory; generous
FLOAT_BYTES = 4  # weights, gradients and the optimizer's state are float32, whatever precision the products have
STATE_OF = {"adam": 2, "sgd": 1, "adadelta": 2}  # numbers that the optimizer keeps for a weight


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Options of a plan."""

    recipe: Annotated[Recipe, Flat]
    """What is trained."""
    classes: int = 101
    """Classes that the heads tell apart."""
    videos: int = 9537
    """Training videos (UCF-101, split 1). An epoch is one clip of each."""
    epochs: float | None = None
    """Epochs to train. Default: the recipe's number of steps."""
    gpus: int = 8
    """GPUs, one a worker; their number divides the global batch."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    gpu: GpuName = "h100"
    """Type of the GPUs: its published dense peak in bf16 (v100 and t4: fp16)."""
    mfu: float = 0.3
    """Share of that peak that training reaches. An assumption: not yet measured here."""
    price: float = 0.0
    """Of a GPU for an hour, in any currency, with its share of the machine."""
    decode_rate: float | None = None
    """Clips of this recipe that one core decodes in a second. Default: 140 for 10 frames in a row, as measured on one machine;
    others by the frames that are decoded for them."""
    video_kilobytes: float = 730.0
    """Mean size of a packed video: all of it is read for a clip. Default: 10 s of 340 x 256 at the default quality."""
    json: Path | None = None
    """Write the result as JSON to this file."""

    def __post_init__(self) -> None:
        if min(self.classes, self.videos, self.gpus, self.gpus_per_node) < 1 or self.price < 0:
            raise ValueError(
                f"classes {self.classes}, videos {self.videos}, gpus {self.gpus}, gpus_per_node {self.gpus_per_node}, price "
                f"{self.price:g}: wanted at least 1 of each, and no negative price"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu {self.mfu:g}: wanted above 0 and at most 1 (a share of the peak)")
        if min(self.video_kilobytes, self.decode_rate or 1, self.epochs or 1) <= 0:
            raise ValueError("wanted video_kilobytes, decode_rate and epochs above 0")
        if self.recipe.global_batch % self.gpus:
            raise ValueError(
                f"gpus {self.gpus}: wanted a number that divides the global batch of {self.recipe.global_batch} "
                "(another one: --global-batch)"
            )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training takes. Sizes in bytes, rates a second."""

    steps: int
    epochs: float
    clips: int
    gpu_hours: float
    wall_hours: float
    cost: float
    step_seconds: float
    clips_per_second: float  # of all GPUs together
    cores_per_gpu: float  # for decoding alone
    cores: float
    storage_bytes_per_second: float  # of all workers together
    gradient_bytes_per_step: float  # that each GPU sends, and receives
    network_bits_per_second: float  # for them, on each machine; 0 on one machine
    clip_memory_bytes: int  # decoded clips that wait, of one worker
    shared_memory_bytes: int  # /dev/shm of one machine
    checkpoint_bytes: int
    frozen_bytes: int  # weights that do not learn: once a run


def plan(job: Sizing, training: Multiplications, learned: int, frozen: int) -> Needs:
    """The arithmetic; learned and frozen are numbers of parameters."""
    batch = job.recipe.global_batch
    steps = job.recipe.num_steps if job.epochs is None else max(1, round(job.epochs * job.videos / batch))
    rate = job.gpus * peak_flops(job.gpu) * job.mfu / training.flops  # clips a second
    seconds = steps * batch / rate
    gradients = ring_bytes(FLOAT_BYTES * learned, job.gpus)
    return Needs(
        steps=steps,
        epochs=steps * batch / job.videos,
        clips=steps * batch,
        gpu_hours=job.gpus * seconds / 3600,
        wall_hours=seconds / 3600,
        cost=job.price * job.gpus * seconds / 3600,
        step_seconds=seconds / steps,
        clips_per_second=rate,
        cores_per_gpu=rate / job.gpus / decode_rate(job),
        cores=rate / decode_rate(job),
        storage_bytes_per_second=rate * 1000 * job.video_kilobytes,
        gradient_bytes_per_step=gradients,
        network_bits_per_second=8 * gradients * steps / seconds if job.gpus > job.gpus_per_node else 0.0,
        clip_memory_bytes=(1 + Reading().batches_ahead) * batch // job.gpus * clip_bytes(job.recipe),
        shared_memory_bytes=min(job.gpus, job.gpus_per_node) * SHARED_MEMORY_PER_GPU,
        checkpoint_bytes=FLOAT_BYTES * learned * (1 + STATE_OF[job.recipe.optim.optimizer]),
        frozen_bytes=FLOAT_BYTES * frozen,
    )


def ring_bytes(size_bytes: float, ranks: int) -> float:
    """What each of so many ranks sends in a ring all-reduce of so many bytes: around the ring to add, and again to tell.

    ranks = 4: 3 of 4 parts, twice
    """
    return 2 * size_bytes * (ranks - 1) / ranks


def decode_rate(job: Sizing) -> float:
    """Clips of the recipe that a core decodes in a second: what you measured, or by the frames from a key frame on."""
    if job.decode_rate is not None:
        return job.decode_rate
    before = (Packing().gop - 1) / 2  # from the key frame to a random frame, in the mean
    clips = job.recipe.clips
    span = clips.span if clips.stream == "rgb" else clips.frames_read
    return DECODE_RATE * (before + DECODE_FRAMES) / (before + span)


def clip_bytes(recipe: Recipe) -> int:
    """Of one decoded clip of stored frames (yuv420p: one and a half bytes a pixel), or fields of flow (two)."""
    pixels = Packing().width * Packing().height * recipe.clips.frames_read
    return 2 * pixels if recipe.clips.stream == "flow" else pixels * 3 // 2


def parse(args: list[str] | None = None) -> tuple[str, Sizing]:
    """The command line -> (the recipe's name, the job)."""
    recipes = {name: ((recipe.__doc__ or "").strip(), Sizing(recipe=recipe())) for name, recipe in RECIPES.items()}
    args = sys.argv[1:] if args is None else args
    with readable_help():
        job = tyro.extras.overridable_config_cli(recipes, prog=prog(), description=__doc__, args=args, config=STYLE)
    return next(word for word in args if word in RECIPES), job


def main(recipe_name: str, job: Sizing) -> int:
    recipe = job.recipe
    model = (recipe.model, recipe.clips.num_frames, recipe.clips.size, job.classes, recipe.clips.channels)
    forward, training = forward_multiplications(*model), training_multiplications(*model)
    counts = count_parameters(recipe, job.classes)
    frozen = counts["trunk"] if recipe.model.frozen and recipe.model.kind != "c3d" else 0
    learned = sum(counts.values()) - frozen
    needs = plan(job, training, learned, frozen)
    show(recipe_name, job, needs, training)
    cost = f", {needs.cost:,.2f} at {job.price:g} a GPU hour" if job.price else ""
    finish(
        f"{recipe_name}: {needs.steps:,} steps of {recipe.global_batch} take {needs.gpu_hours:,.2f} GPU hours{cost}, "
        f"{duration(needs.wall_hours)} on {job.gpus} {job.gpu}, if they reach {job.mfu:.0%} of their peak",
        {
            "recipe": recipe_name,
            "parameters": {**{name.lower(): count for name, count in counts.items()}, "learned": learned},
            "multiplications": {"forward": dataclasses.asdict(forward), "training": dataclasses.asdict(training)},
            **dataclasses.asdict(needs),
        },
        job.json,
    )
    return 0


def duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 2 else f"{60 * hours:,.1f} minutes"


def show(recipe_name: str, job: Sizing, needs: Needs, training: Multiplications) -> None:
    assumed = " (assumed)" if job.decode_rate is None else ""
    table = Table(title=f"{recipe_name} on {job.gpus} {job.gpu}", show_header=False)
    for name, value in (
        ("clips, epochs", f"{needs.clips:,}, {needs.epochs:,.1f}"),
        ("FLOPs of a clip, forward and backward", f"{training.flops:.3e}"),
        ("peak of a GPU x share", f"{peak_flops(job.gpu) / 1e12:g} TFLOP/s x {job.mfu:g}"),
        ("a step", f"{1000 * needs.step_seconds:,.0f} ms"),
        ("clips a second", f"{needs.clips_per_second:,.0f}"),
        ("clips a second that a core decodes", f"{decode_rate(job):,.0f}{assumed}"),
        ("CPU cores for decoding, a GPU", f"{needs.cores_per_gpu:,.1f}"),
        ("read from storage", f"{needs.storage_bytes_per_second / 1e6:,.0f} MB/s"),
        ("gradients that a GPU sends in a step", f"{needs.gradient_bytes_per_step / 1e6:,.0f} MB"),
        ("for them, network of each machine", f"{needs.network_bits_per_second / 1e9:,.1f} Gbit/s"),
        ("memory for decoded clips, a worker", f"{needs.clip_memory_bytes / 2**20:,.0f} MiB"),
        ("/dev/shm of a machine", f"{needs.shared_memory_bytes / 2**30:,.0f} GiB"),
        (
            "a checkpoint; frozen weights, once",
            f"{needs.checkpoint_bytes / 1e6:,.0f} MB; {needs.frozen_bytes / 1e6:,.0f} MB",
        ),
    ):
        table.add_row(name, value)
    Console(width=100).print(table)


if __name__ == "__main__":
    run_command(lambda: main(*parse()))
