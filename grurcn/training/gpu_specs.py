"""Peak FLOP/s of GPUs for dense matrix products, from NVIDIA's data sheets.

In bf16, or in fp16 if the GPU has no bf16. Figures that are published with sparsity only are halved.
"""

from typing import Literal

GpuName = Literal["v100", "t4", "a10g", "a10", "l4", "l40s", "a100", "h100", "h200", "b200"]

# Name: (FLOP/s, CUDA's name of the device after NVIDIA or Tesla, precisions with that peak).
GPUS: dict[GpuName, tuple[float, str, tuple[str, ...]]] = {
    "v100": (125e12, "V100", ("fp16",)),
    "t4": (65e12, "T4", ("fp16",)),
    "a10g": (70e12, "A10G", ("bf16", "fp16")),
    "a10": (125e12, "A10", ("bf16", "fp16")),
    "l4": (121e12, "L4", ("bf16", "fp16")),
    "l40s": (362e12, "L40S", ("bf16", "fp16")),
    "a100": (312e12, "A100", ("bf16", "fp16")),
    "h100": (989e12, "H100", ("bf16", "fp16")),
    "h200": (989e12, "H200", ("bf16", "fp16")),
    "b200": (2250e12, "B200", ("bf16", "fp16")),
}
SLOWER = {"H100 PCIe": 756e12, "H100 NVL": 835e12}  # variants that share a name with a faster one


def peak_flops(gpu: GpuName) -> float:
    """Peak FLOP/s of a GPU by its short name."""
    return GPUS[gpu][0]


def flops_per_second(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU by CUDA's name of it, in bf16 or fp16.

    None if unknown, and in fp32, which may or may not be TF32.
    """
    words = device.replace("-", " ").split()
    for rate, name, precisions in GPUS.values():
        if name in words:
            slower = [other for model, other in SLOWER.items() if model in device]
            return (slower or [rate])[0] if precision in precisions else None
    return None
