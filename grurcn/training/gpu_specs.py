"""What GPUs can do, by their maker's data sheets: dense matrix products a second.

bf16, or fp16 where the GPU has no bf16; sheets that state the figure with sparsity alone are halved.
"""

from typing import Literal

GpuName = Literal["v100", "t4", "a10g", "a10", "l4", "l40s", "a100", "h100", "h200", "b200"]

# Name: (FLOP/s, how CUDA's name of the device begins behind NVIDIA or Tesla, precisions that reach it).
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
SLOWER = {"H100 PCIe": 756e12, "H100 NVL": 835e12}  # of the same name


def peak_flops(gpu: GpuName) -> float:
    """FLOP/s of a GPU by its short name."""
    return GPUS[gpu][0]


def flops_per_second(device: str, precision: str) -> float | None:
    """Of a GPU by the name that CUDA gives it, in fp32, bf16 or fp16; None where it is not known, as for fp32, which may or may
    not be TF32."""
    words = device.replace("-", " ").split()
    for rate, name, precisions in GPUS.values():
        if name in words:
            slower = [other for model, other in SLOWER.items() if model in device]
            return (slower or [rate])[0] if precision in precisions else None
    return None
