"""Tiny models in DeepSpeed engines."""

import torch
import torch.distributed as dist
from torch import nn

from cluster.checkpoints.state import Training
from cluster.engine import set_learning_rate, start_engine

CPU = torch.device("cpu")

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
}

GLOBAL_BATCH = 4


def tiny_model(channels=3):
    """A frozen convolution, a batch norm in eval mode (buffers), and a head whose sizes no number of ranks
    divides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, channels, 3),
        nn.Flatten(),
        nn.Linear(4 * channels, 7),
    )
    model[0].requires_grad_(False)
    model[1].eval()
    return model


def tiny_engine(zero_stage, optimizer="AdamW", *, precision="fp32", model=None, config_path=None):
    model = model or tiny_model()
    return start_engine(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        zero_stage=zero_stage,
        global_batch=GLOBAL_BATCH,
        accumulation=1,
        precision=precision,
        clip_norm=1.0,
        device=CPU,
        config_path=config_path,
    )


def train(engine, steps):
    """The losses of the given steps; the batch and the rate are functions of the step, each rank takes its
    lanes."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        clip = torch.randn(GLOBAL_BATCH, 1, 6, 6, generator=generator)
        label = torch.randint(7, (GLOBAL_BATCH,), generator=generator)
        mine = slice(*(GLOBAL_BATCH * r // dist.get_world_size() for r in (dist.get_rank(), dist.get_rank() + 1)))
        loss = nn.functional.cross_entropy(engine(clip[mine]).float(), label[mine])
        set_learning_rate(engine, 0.1 / (step + 1))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def training_at(step: int) -> Training:
    """What a checkpoint keeps of a training that has done so many steps."""
    return Training(step=step, recipe={"task": "classification"}, model={})
