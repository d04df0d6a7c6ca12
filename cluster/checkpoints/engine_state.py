"""A DeepSpeed engine's state <-> the files of a checkpoint (files.py), whatever the world size and the ZeRO stage.

DeepSpeed's own checkpoints are one pickle a rank and refuse another number of ranks. Here a tensor that is cut over the ranks
is gathered, one parameter at a time (rank 0 keeps the whole on its CPU), and cut again when it is read. Buffers are rank 0's.

Training waits while take_snapshot copies; write_snapshot then works from that copy, in a thread of rank 0.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine, zero
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from torch import Tensor, nn

from cluster.checkpoints.files import MODEL, OPTIMIZER, STATE, Checkpoint, Snapshot
from cluster.checkpoints.state import CheckpointState, Optimizer
from cluster.engine import loss_scale, set_loss_scale


def take_snapshot(engine: DeepSpeedEngine, with_frozen: bool) -> Snapshot | None:
    """A copy of the state, on rank 0; None on the others. All ranks call it, with equal arguments.

    The place to call it is after engine.step(): gradients of half a step are not kept.
    """
    trainable = set(_names(engine).values())
    is_kept = lambda name: with_frozen or name in trainable  # noqa: E731
    weights = _keep_on_rank_0(_weights(engine, is_kept))
    moments = _keep_on_rank_0(_moments(engine))
    if dist.get_rank() != 0:
        return None
    frozen = {name for name, parameter in _module(engine).named_parameters() if not parameter.requires_grad}
    return Snapshot(
        weights={name: tensor for name, tensor in weights.items() if name not in frozen},
        frozen={name: tensor for name, tensor in weights.items() if name in frozen} if with_frozen else None,
        moments=moments,
        optimizer=Optimizer(
            name=type(_torch_optimizer(engine)).__name__,
            trainable=sorted(trainable),
            step_counts=_step_counts(engine),
            loss_scale=loss_scale(engine),
        ),
    )


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The model's state_dict, whole on every rank, on its own device. All ranks call it."""
    return {name: tensor.detach().clone() for name, tensor in _weights(engine, lambda _: True)}


def load_state(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> CheckpointState:
    """Loads weights, optimizer state and loss scale into `engine`, and returns the whole state. All ranks call it.

    Raises ValueError, with the engine unchanged, if a file is missing or damaged, or was written for another model, optimizer
    or format.
    """
    state = checkpoint.state()
    with ExitStack() as open_files:
        files = {
            file: open_files.enter_context(
                safe_open(open_files.enter_context(checkpoint.fetched(file, sha256)), framework="pt")
            )
            for file, sha256 in state.sha256.items()
        }
        _check_optimizer(checkpoint, engine, state.optimizer)
        weights = Tensors([files[file] for file in state.weights])
        _check_weights(f"{checkpoint.url}/{MODEL}", engine, weights)
        _set_weights(engine, weights)
        _set_moments(engine, files[OPTIMIZER], state.optimizer.step_counts)
    if state.optimizer.loss_scale and loss_scale(engine):
        set_loss_scale(engine, **state.optimizer.loss_scale)
    return state


class Tensors:
    """Several safetensors files, read as one."""

    def __init__(self, files: list[Any]):
        self.file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no dictionary

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.file_of.items()}

    def get_tensor(self, name: str) -> Tensor:
        return self.file_of[name].get_tensor(name)


# At ZeRO 0 a parameter is whole and its optimizer state is the torch optimizer's. From ZeRO 1 on the
# optimizer sees one flat tensor for many parameters, of which this rank has a piece. At ZeRO 3 the parameter
# is a piece too. Frozen parameters are in no flat tensor.


def _module(engine: DeepSpeedEngine) -> Any:
    """The model that was given to start_engine."""
    return engine.module


def _names(engine: DeepSpeedEngine) -> dict[nn.Parameter, str]:
    """The trainable parameters and their names."""
    return {parameter: name for name, parameter in _module(engine).named_parameters() if parameter.requires_grad}


def _flat_tensors(engine: DeepSpeedEngine) -> list[tuple[list[nn.Parameter], Tensor]]:
    """(parameters, the tensor that the torch optimizer updates for them) for each such tensor."""
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [([parameter], parameter) for parameter in _names(engine)]
    if stage == 3:
        return list(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True))
    return list(zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True))


def _torch_optimizer(engine: DeepSpeedEngine) -> Any:
    """The torch optimizer that was given to start_engine; engine.optimizer may be ZeRO's, around it."""
    return engine.basic_optimizer


def _torch_state(engine: DeepSpeedEngine) -> dict[Tensor, dict]:
    """The torch optimizer's own state, by the tensor it updates."""
    return _torch_optimizer(engine).state


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a checkpoint (those registered with persistent=False do not)."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


# Writing


def _keep_on_rank_0(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Every rank takes part in gathering each tensor; only rank 0 keeps a copy."""
    kept = {}
    for name, tensor in tensors:
        if dist.get_rank() == 0:
            kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return kept


def _weights(engine: DeepSpeedEngine, is_kept: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _module(engine).named_parameters():
        if is_kept(name):
            with zero.GatheredParameters([parameter], enabled=_is_cut(parameter)):
                yield name, parameter
    yield from _buffers(_module(engine)).items()


def _moments(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """NAME/KEY and the whole tensor, for every tensor of optimizer state; nothing before the first step."""
    names = _names(engine)
    for parameters, flat in _flat_tensors(engine):
        kept = _torch_state(engine).get(flat, {})
        keys = [
            key for key, value in kept.items() if torch.is_tensor(value) and value.shape == flat.shape and key != "step"
        ]
        for parameter in parameters:
            for key in keys:
                whole: Any = kept[key] if flat is parameter else safe_get_full_optimizer_state(parameter, key)
                yield f"{names[parameter]}/{key}", whole


def _step_counts(engine: DeepSpeedEngine) -> dict[str, float]:
    """How often the optimizer has updated each parameter, where it counts (Adam does, SGD does not)."""
    names = _names(engine)
    counts = {}
    for parameters, flat in _flat_tensors(engine):
        step = _torch_state(engine).get(flat, {}).get("step")
        if step is not None:
            counts |= {names[parameter]: float(step) for parameter in parameters}
    return counts


# Reading


@torch.no_grad()
def _set_weights(engine: DeepSpeedEngine, weights: Tensors) -> None:
    for name, parameter in _module(engine).named_parameters():
        with zero.GatheredParameters([parameter], modifier_rank=0, enabled=_is_cut(parameter)):  # cut again on leaving
            parameter.copy_(weights.get_tensor(name))
    for name, buffer in _buffers(_module(engine)).items():
        buffer.copy_(weights.get_tensor(name))
    if engine.zero_optimization_stage() > 0:
        optimizer: Any = engine.optimizer
        optimizer.refresh_fp32_params()  # the optimizer's flat copy follows the model's weights


@torch.no_grad()
def _set_moments(engine: DeepSpeedEngine, file: Any, step_counts: dict[str, float]) -> None:
    """Build the torch optimizer's state anew: before the first step it has none to copy into."""
    names, state = _names(engine), _torch_state(engine)
    saved = _keys_by_name(file)
    state.clear()
    for parameters, flat in _flat_tensors(engine):
        keys = {key for parameter in parameters for key in saved.get(names[parameter], ())}
        if keys:
            state[flat] = {key: torch.zeros_like(flat) for key in sorted(keys)}
        # Parameters in one flat tensor share a count; at ZeRO 0 one that went unused may have a lower one.
        steps = [step_counts[names[parameter]] for parameter in parameters if names[parameter] in step_counts]
        if steps:
            device = _step_device(engine, flat)
            state[flat]["step"] = torch.tensor(max(steps), dtype=torch.float32, device=device)
    if engine.zero_optimization_stage() in (1, 2) and state:
        optimizer: Any = engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()  # what safe_set_full_optimizer_state looks through
    for parameters, flat in _flat_tensors(engine):
        for parameter in parameters:
            for key in saved.get(names[parameter], ()):
                _set_moment(parameter, flat, state, key, file.get_tensor(f"{names[parameter]}/{key}"))


def _set_moment(parameter: nn.Parameter, flat: Tensor, state: dict, key: str, whole: Tensor) -> None:
    if flat is parameter:
        state[flat][key].copy_(whole)
    elif _is_cut(parameter):
        # safe_set_full_optimizer_state would run past the end if the ranks do not divide the elements.
        safe_set_local_optimizer_state(parameter, _piece(parameter, whole), key)
    else:
        safe_set_full_optimizer_state(parameter, whole, key)


def _step_device(engine: DeepSpeedEngine, flat: Tensor) -> torch.device:
    """torch's optimizers count steps on the CPU, except in one fused or captured kernel."""
    defaults = _torch_optimizer(engine).defaults
    return flat.device if defaults.get("fused") or defaults.get("capturable") else torch.device("cpu")


def _keys_by_name(file: Any) -> dict[str, list[str]]:
    """{parameter's name: the keys of its optimizer state}."""
    keys: dict[str, list[str]] = {}
    for entry in list(file.keys()):
        name, key = entry.rsplit("/", 1)
        keys.setdefault(name, []).append(key)
    return keys


def _is_cut(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor")


def _piece(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's piece of a parameter that ZeRO 3 cut; the last pieces are filled up with zeros.

    7 elements on 3 ranks, 3 each: [0 1 2] [3 4 5] [6 . .]
    """
    size = parameter.ds_tensor.numel()
    start = size * parameter._z3_optimizer._get_param_partition_rank(parameter)
    piece = whole.flatten()[start : start + size]
    return nn.functional.pad(piece, (0, size - len(piece)))


# Checking


def _check_optimizer(checkpoint: Checkpoint, engine: DeepSpeedEngine, optimizer: Optimizer) -> None:
    expected = type(_torch_optimizer(engine)).__name__
    if optimizer.name != expected:
        raise ValueError(
            f"{checkpoint.url}/{OPTIMIZER}: written by {optimizer.name}, but this run uses {expected}; "
            "use the same optimizer or start a new run from the weights alone"
        )
    saved, trainable = set(optimizer.trainable), set(_names(engine).values())
    if saved != trainable:
        differences = _some("only there", saved - trainable) + _some("only here", trainable - saved)
        raise ValueError(
            f"{checkpoint.url}/{STATE}: trained other parameters than this run: {differences}"
            "freeze the same ones or start a new run from the weights alone"
        )


def _check_weights(path: str, engine: DeepSpeedEngine, weights: Tensors) -> None:
    found = weights.shapes()
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in _module(engine).named_parameters()}
    expected |= {name: tuple(buffer.shape) for name, buffer in _buffers(_module(engine)).items()}
    if found == expected:
        return
    both = found.keys() & expected.keys()
    shapes = {f"{name} {found[name]} instead of {expected[name]}" for name in both if found[name] != expected[name]}
    differences = _some("missing", expected.keys() - found.keys())
    differences += _some("unexpected", found.keys() - expected.keys()) + _some("shape", shapes)
    raise ValueError(f"{path}: does not fit the model: {differences}build the model it was written for")


def _some(what: str, names: set[str], most: int = 3) -> str:
    """`missing a, b, c and 4 more; `, or nothing for nothing."""
    shown = ", ".join(sorted(names)[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {shown}{more}; " if names else ""
