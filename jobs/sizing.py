"""Compute what a training needs: GPU hours, cost, CPU cores for decoding, bandwidths, memory, sizes of checkpoints.

    python -m jobs.sizing gru-rcn --gpus 8 --gpu h100 --price 2.5
    python -m jobs.sizing gru-rcn --videos 240000 --classes 400 --epochs 30 --global-batch 512 --gpus 64 --mfu 0.4

Nothing is trained or measured. Two figures decide, and are assumptions until you measure them: --mfu, the fraction of the GPU's
peak that training reaches (`python -m jobs.bench model` on your GPU prints its TFLOP/s), and --decode-rate, clips that one core
decodes per second (`python -m jobs.bench read` on your machines). Decoding, storage and network are assumed to keep up.
Validation, evaluation, start-up and lost machines are not included; early stopping may end a run sooner.

--json FILE holds: recipe, steps, epochs, clips, parameters {trunk, grus, heads, trainable}, multiplications {forward, training},
each of them {trunk, grus, heads}, gpu_hours, wall_hours, cost, step_seconds, clips_per_second, cores_per_gpu, cores,
storage_bytes_per_second, gradient_bytes_per_step, network_bits_per_second, clip_memory_bytes, shared_memory_bytes,
checkpoint_bytes, frozen_bytes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grurcn.models.summary import ModelSummary, summarize
from grurcn.training.gpu_specs import peak_flops
from grurcn.training.recipes import RECIPES
from grurcn.training.resources import Resources, SizingJob, decode_rate, required_resources
from jobs.command import Command, Configurations, finish


@dataclass(frozen=True, kw_only=True)
class Sizing(SizingJob):
    """Options of the sizing."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(recipe_name: str, job: Sizing) -> int:
    recipe, clips = job.recipe, job.recipe.clips
    model = summarize(recipe.model, job.classes, clips.num_frames, clips.size, clips.channels)
    resources = required_resources(job, model)
    print_resources(f"{recipe_name} on {job.gpus} {job.gpu}", job, resources, model)
    cost = f", {resources.cost:,.2f} at {job.price:g} per GPU hour" if job.price else ""
    finish(
        f"{recipe_name}: {resources.steps:,} steps of {recipe.global_batch} take {resources.gpu_hours:,.2f} GPU hours{cost}, "
        f"{hours(resources.wall_hours)} on {job.gpus} {job.gpu}, at {job.mfu:.0%} of their peak",
        {
            "recipe": recipe_name,
            "parameters": {**dataclasses.asdict(model.parameters), "trainable": model.trainable},
            "multiplications": {
                "forward": dataclasses.asdict(model.forward),
                "training": dataclasses.asdict(model.training),
            },
            **dataclasses.asdict(resources),
        },
        job.json,
    )
    return 0


def hours(number: float) -> str:
    return f"{number:,.1f} hours" if number >= 2 else f"{60 * number:,.1f} minutes"


def print_resources(title: str, job: SizingJob, resources: Resources, model: ModelSummary) -> None:
    assumed = " (assumed)" if job.decode_rate is None else ""
    table = Table(title=title, show_header=False)
    for name, value in (
        ("clips, epochs", f"{resources.clips:,}, {resources.epochs:,.1f}"),
        ("FLOPs per clip, forward and backward", f"{model.training_flops:.3e}"),
        ("peak of a GPU x fraction reached", f"{peak_flops(job.gpu) / 1e12:g} TFLOP/s x {job.mfu:g}"),
        ("step", f"{1000 * resources.step_seconds:,.0f} ms"),
        ("clips per second", f"{resources.clips_per_second:,.0f}"),
        ("clips per second and core, decoded", f"{decode_rate(job):,.0f}{assumed}"),
        ("CPU cores for decoding, per GPU", f"{resources.cores_per_gpu:,.1f}"),
        ("read from storage", f"{resources.storage_bytes_per_second / 1e6:,.0f} MB/s"),
        ("gradients per step, sent by each GPU", f"{resources.gradient_bytes_per_step / 1e6:,.0f} MB"),
        ("network for them, per machine", f"{resources.network_bits_per_second / 1e9:,.1f} Gbit/s"),
        ("memory for decoded clips, per worker", f"{resources.clip_memory_bytes / 2**20:,.0f} MiB"),
        ("/dev/shm, per machine", f"{resources.shared_memory_bytes / 2**30:,.0f} GiB"),
        ("checkpoint", f"{resources.checkpoint_bytes / 1e6:,.0f} MB"),
        ("frozen weights, once per run", f"{resources.frozen_bytes / 1e6:,.0f} MB"),
    ):
        table.add_row(name, value)
    Console(width=100).print(table)


COMMAND = Command[tuple[str, Sizing]](
    Configurations(
        {name: ((recipe.__doc__ or "").strip(), Sizing(recipe=recipe())) for name, recipe in RECIPES.items()}
    ),
    lambda chosen: main(*chosen),
    __doc__,
)

if __name__ == "__main__":
    COMMAND.run()
