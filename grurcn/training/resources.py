"""What a training needs, by arithmetic: GPU hours, cost, CPU cores, bandwidths, memory, sizes of checkpoints."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from grurcn.models.summary import ModelSummary
from grurcn.training.gpu_specs import GpuName, peak_flops
from grurcn.training.recipes import Recipe
from shards.reading.stages import ReadingOptions
from shards.video import Packing

# Measured by jobs.bench read on one core of an AMD EPYC of 2026: random clips of 10 frames of 340 x 256, key frames 16 apart.
DECODE_RATE = 140.0
DECODE_FRAMES = 10
SHARED_MEMORY_PER_GPU = 2**30  # NCCL's buffers between GPUs that cannot reach each other's memory; generous
FLOAT_BYTES = 4  # weights, gradients and optimizer state are float32, whatever the precision of the products
STATES_PER_WEIGHT = {"adam": 2, "sgd": 1, "adadelta": 2}  # numbers in the optimizer's state


@dataclass(frozen=True, kw_only=True)
class SizingJob:
    """A training, and the machines for it."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """Recipe of the training."""
    classes: int = 101
    """Number of classes."""
    videos: int = 9537
    """Training videos (UCF-101, split 1). An epoch is one clip of each."""
    epochs: float | None = None
    """Epochs to train. Default: the recipe's number of steps."""
    gpus: int = 8
    """GPUs, one per worker; must divide the global batch."""
    gpus_per_node: int = 8
    """GPUs per machine."""
    gpu: GpuName = "h100"
    """Type of the GPUs; decides their published dense peak in bf16 (v100 and t4: fp16)."""
    mfu: float = 0.3
    """Fraction of that peak that training reaches. An assumption: not yet measured here."""
    price: float = 0.0
    """Price of a GPU for an hour, in any currency, with its part of the machine."""
    decode_rate: float | None = None
    """Clips of this recipe that one core decodes per second. Default: 140 for 10 consecutive frames, as measured on one machine;
    for other clips in proportion to the decoded frames."""
    video_kilobytes: float = 730.0
    """Mean size of a packed video, which is read whole for a clip. Default: 10 s of 340 x 256 at the default quality."""

    def __post_init__(self) -> None:
        if min(self.classes, self.videos, self.gpus, self.gpus_per_node) < 1 or self.price < 0:
            raise ValueError(
                f"classes {self.classes}, videos {self.videos}, gpus {self.gpus}, gpus_per_node {self.gpus_per_node}, price "
                f"{self.price:g}: expected at least 1 of each, and no negative price"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu {self.mfu:g}: expected above 0 and at most 1 (a fraction of the peak)")
        if min(self.video_kilobytes, self.decode_rate or 1, self.epochs or 1) <= 0:
            raise ValueError("expected video_kilobytes, decode_rate and epochs above 0")
        if self.recipe.global_batch % self.gpus:
            raise ValueError(
                f"gpus {self.gpus}: expected a number that divides the global batch of {self.recipe.global_batch} "
                "(change it with --global-batch)"
            )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a training needs. Sizes in bytes, rates per second."""

    steps: int
    epochs: float
    clips: int
    gpu_hours: float
    wall_hours: float
    cost: float
    step_seconds: float
    clips_per_second: float  # of all GPUs together
    cores_per_gpu: float  # for decoding only
    cores: float
    storage_bytes_per_second: float  # of all workers together
    gradient_bytes_per_step: float  # sent, and received, by each GPU
    network_bits_per_second: float  # for gradients, on each machine; 0 on one machine
    clip_memory_bytes: int  # decoded clips that wait in one worker
    shared_memory_bytes: int  # /dev/shm of one machine
    checkpoint_bytes: int
    frozen_bytes: int  # frozen weights, stored once per run


def required_resources(job: SizingJob, model: ModelSummary) -> Resources:
    """What a training of this model needs, if decoding, storage and network keep up with the GPUs."""
    batch = job.recipe.global_batch
    steps = job.recipe.num_steps if job.epochs is None else max(1, round(job.epochs * job.videos / batch))
    rate = job.gpus * peak_flops(job.gpu) * job.mfu / model.training_flops  # clips per second
    seconds = steps * batch / rate
    gradients = ring_bytes(FLOAT_BYTES * model.trainable, job.gpus)
    return Resources(
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
        clip_memory_bytes=(1 + ReadingOptions().batches_ahead) * batch // job.gpus * clip_bytes(job.recipe),
        shared_memory_bytes=min(job.gpus, job.gpus_per_node) * SHARED_MEMORY_PER_GPU,
        checkpoint_bytes=FLOAT_BYTES * model.trainable * (1 + STATES_PER_WEIGHT[job.recipe.optim.optimizer]),
        frozen_bytes=FLOAT_BYTES * (model.parameters.total - model.trainable),
    )


def ring_bytes(size_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce: one round to add, one to distribute the sums.

    ranks = 4: 3 of 4 parts, twice
    """
    return 2 * size_bytes * (ranks - 1) / ranks


def decode_rate(job: SizingJob) -> float:
    """Clips of the recipe that a core decodes per second: given, or estimated from the frames after the key frame."""
    if job.decode_rate is not None:
        return job.decode_rate
    before = (Packing().gop - 1) / 2  # mean number of frames from the key frame to a random frame
    clips = job.recipe.clips
    span = clips.span if clips.stream == "rgb" else clips.frames_read
    return DECODE_RATE * (before + DECODE_FRAMES) / (before + span)


def clip_bytes(recipe: Recipe) -> int:
    """Size of a decoded clip: 1.5 bytes per pixel of a stored frame (yuv420p), 2 bytes per pixel of flow."""
    pixels = Packing().width * Packing().height * recipe.clips.frames_read
    return 2 * pixels if recipe.clips.stream == "flow" else pixels * 3 // 2
