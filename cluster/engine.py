"""A model and a torch optimizer -> a DeepSpeed engine, at any ZeRO stage, on one CPU or many GPUs.

The JSON file of a stage (`cluster/deepspeed/zeroN.json`) holds ZeRO, buckets and offload. Batch size,
clipping and precision come from the run, the learning rate from the training loop: `set_learning_rate`
before each step. Facts about DeepSpeed below were read in the source of 0.19.8 and are held by
tests/cluster/test_engine.py.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from cluster.precision import resolve_precision

ZERO_STAGES = (0, 1, 2, 3)
LOSS_SCALE_START = 2.0**16
LOSS_SCALE_WINDOW = 2000  # steps without an overflow before the scale doubles; torch's GradScaler uses the same


def deepspeed_config(
    zero_stage: int,
    *,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    precision: str,
    clip_norm: float | None,
    path: Path | str | None = None,
) -> dict:
    """DeepSpeed's configuration: the stage's JSON file (or the user's own, at `path`) and the run's part.

    `precision` is resolved (not auto); `clip_norm` None or 0 means no clipping. Raises ValueError for a stage
    without a file, a file that is not JSON or is of another stage, and a file that names what the run
    decides.
    """
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"{zero_stage = } is not a ZeRO stage; choose one of {', '.join(map(str, ZERO_STAGES))}")
    path = Path(path) if path else Path(__file__).parent / "deepspeed" / f"zero{zero_stage}.json"
    config = _read_json(path)
    run = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm or 0.0,
    }
    decided = run | dict.fromkeys(
        ("bf16", "bfloat16", "fp16", "torch_autocast", "data_types"), f"precision {precision}"
    )
    decided |= {"optimizer": "the run's torch optimizer", "scheduler": "the training loop's rate"}
    for key in decided.keys() & config.keys():
        raise ValueError(
            f"{path}: {key} is {config[key]} in this file and {decided[key]} in the run; "
            "the run decides it, so take it out of the file"
        )
    found = config.get("zero_optimization", {}).get("stage", 0)
    if found != zero_stage:
        raise ValueError(f"{path}: ZeRO stage {found} in this file and {zero_stage} in the run; make them the same")
    return config | run | _precision_block(precision) | _FIXED


# What is neither the user's nor the run's: any torch optimizer may be partitioned, or offloaded without
# DeepSpeed's compiled Adam, and DeepSpeed prints no progress lines of its own.
_FIXED = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**31,
}


def _read_json(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: no DeepSpeed configuration there ({error.strerror}); name a JSON file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); see cluster/deepspeed/zero1.json for one that is") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: found a JSON {type(config).__name__}, expected an object; see cluster/deepspeed/zero1.json"
        )
    return config


def _precision_block(precision: str) -> dict:
    """Mixed precision is torch.autocast in the engine: weights, buffers and optimizer state stay float32."""
    dtype = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}[precision]
    return {"torch_autocast": {"enabled": True, "dtype": dtype}} if dtype else {}


def start_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    zero_stage: int,
    global_batch: int,
    accumulation: int,
    precision: str,
    clip_norm: float | None,
    device: torch.device,
    config_path: Path | str | None = None,
) -> DeepSpeedEngine:
    """A DeepSpeed engine on `device`, in the process group that exists or in a world of one.

    `global_batch` counts the clips of one step over all ranks and accumulated micro-batches. Parameters
    without requires_grad are left out of the optimizer (and stay in the model). All ranks call it. Raises
    ValueError where the batch does not divide, where nothing is trainable, and for what resolve_precision and
    deepspeed_config refuse.
    """
    _prepare_deepspeed(device)
    precision = resolve_precision(precision, device)
    micro_batch = _micro_batch(global_batch, accumulation, dist.get_world_size())
    config = deepspeed_config(
        zero_stage,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=dist.get_world_size(),
        precision=precision,
        clip_norm=clip_norm,
        path=config_path,
    )
    _leave_out_frozen(optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if precision == "fp16" and zero_stage > 0:
        _scale_loss_on_all_ranks(engine)
    return engine


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """Sets the rate of every parameter group from the next step on, at every ZeRO stage."""
    optimizer: Any = engine.optimizer
    # With a part of the optimizer offloaded, ZeRO 3 keeps a second optimizer for the part that is not.
    backup = getattr(optimizer, "backup_optimizer", None)
    for group in optimizer.param_groups + (backup.param_groups if backup else []):
        group["lr"] = rate


def loss_scale(engine: DeepSpeedEngine) -> dict | None:
    """The fp16 loss scale as {scale, clean_steps since it last changed}; None in fp32 and bf16."""
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None:
        return {"scale": scaler.get_scale(), "clean_steps": scaler._get_growth_tracker()}
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if not isinstance(scaler, DynamicLossScaler):
        return None
    clean_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {"scale": scaler.cur_scale, "clean_steps": clean_steps % LOSS_SCALE_WINDOW}


def set_loss_scale(engine: DeepSpeedEngine, scale: float, clean_steps: int) -> None:
    """Restores what loss_scale() returned, at the same ZeRO stage or another."""
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": clean_steps})
        return
    optimizer: Any = engine.optimizer
    scaler = optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = scale, clean_steps, -1


def _prepare_deepspeed(device: torch.device) -> None:
    """Sets what DeepSpeed reads from its environment, so that a plain process needs no launcher."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != device.type == "cpu":
        set_accelerator(CPU_Accelerator())  # a CPU run on a machine with a GPU
    if device.index is not None:  # DeepSpeed takes the device from this variable and from nowhere else
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    # On a CPU DeepSpeed compiles an all-reduce through shared memory (about a minute, a compiler and ninja
    # needed) that only its inference engine calls. An empty table of ops that can be compiled means: none,
    # use gloo.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    # A module global of DeepSpeed outlives its engine: after an fp16 engine, an fp32 one in this process
    # would scale its loss.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
    if not dist.is_initialized():
        start_world_of_one(device)


def start_world_of_one(device: torch.device) -> None:
    """Starts a process group of this process alone. It is kept in memory, so that no port can be taken."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _micro_batch(global_batch: int, accumulation: int, world_size: int) -> int:
    micro_batch, left_over = divmod(global_batch, accumulation * world_size)
    if left_over or not micro_batch:
        raise ValueError(
            f"{global_batch = } does not divide over {world_size} ranks x {accumulation} accumulated "
            f"micro-batches; use a multiple of {accumulation * world_size}"
        )
    return micro_batch


def _leave_out_frozen(optimizer: torch.optim.Optimizer) -> None:
    """ZeRO 1 and 2 fail on a parameter group that is frozen as a whole; DeepSpeed drops an empty one."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("the optimizer has no parameter with requires_grad; unfreeze a part of the model")


def _scale_loss_on_all_ranks(engine: DeepSpeedEngine) -> None:
    """Replaces the loss scaler that ZeRO 1 to 3 would use under fp16 autocast.

    There each rank asks a torch GradScaler of its own about its own partition, so one rank may skip a step
    that the others take and scale its loss differently from then on; and clipping compares the norm of the
    scaled gradients to the limit. ZeRO's own dynamic scaler, used with its fp16 block, has neither fault: the
    all ranks decide on an overflow together, and the norm is unscaled first. It works as well on float32 weights.
    ZeRO 0 reduces before its GradScaler looks and unscales before it clips, so that one stays.
    """
    optimizer: Any = engine.optimizer
    optimizer.torch_autocast_gradscaler = None
    optimizer.loss_scaler = DynamicLossScaler(
        init_scale=LOSS_SCALE_START,
        scale_window=LOSS_SCALE_WINDOW,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
    )
    optimizer.dynamic_loss_scale = True
    optimizer.check_grad_overflow = (
        True  # ZeRO 1 and 2 look only if this is set; ZeRO 3 sees it in the norm of all ranks
    )
