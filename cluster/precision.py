"""Mixed precision: what auto means on a device, and autocast for a model that runs without an engine."""

import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` made concrete for a device: fp32 on a CPU, bf16 on a GPU that has it, fp16 on an older GPU.

    A CPU without bfloat16 instructions runs convolutions in bf16 10 to 60 times slower than in fp32, so a CPU
    means fp32.
    Raises ValueError for a name that is not in PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{precision = } is not known; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The engine's mixed precision, for a model that runs without an engine."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[resolve_precision(precision, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
