"""What GPUs can do, by their makers' data sheets: dense matrix products a second, without sparsity."""

# TFLOP/s by a part of the name that CUDA gives: bf16 and fp16 with float32 sums. The first that fits counts.
TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250, "fp16": 2250},
    "GH200": {"bf16": 989, "fp16": 989},
    "H200": {"bf16": 989, "fp16": 989},
    "H100 NVL": {"bf16": 835, "fp16": 835},
    "H100 PCIe": {"bf16": 756, "fp16": 756},
    "H100": {"bf16": 989, "fp16": 989},
    "A100": {"bf16": 312, "fp16": 312},
    "L40S": {"bf16": 362, "fp16": 362},
    "L4": {"bf16": 121, "fp16": 121},
    "A10G": {"bf16": 70, "fp16": 70},
    "A10": {"bf16": 125, "fp16": 125},
    "V100": {"fp16": 125},
    "T4": {"fp16": 65},
}


def flops_per_second(name: str, precision: str) -> float | None:
    """Of a GPU by its name in bf16 or fp16; None where it is not known, and for fp32, where it depends on TF32."""
    for part, rates in TFLOPS.items():
        if part in name:
            return rates[precision] * 1e12 if precision in rates else None
    return None
