"""Write a trained classifier as one file that runs without this package: with PyTorch alone, or with ONNX Runtime.

    python -m jobs.export --model runs/gru-rcn --out gru-rcn.pt2
    python -m jobs.export --model runs:/0f3a... --out gru-rcn.onnx --batch 8

Either file takes clips of uint8 RGB frames (B, T, 3, S, S), cropped and resized, and normalises them itself. A flow model takes
the stored bytes of its fields (B, N, 2, S, S), u and v, cropped and resized. It returns two tensors, float32:

    probabilities   (B, K)      of the classes, the mean over the levels
    levels          (B, L, K)   by each level

Before the file appears under its name, it is loaded again, run on random clips, and compared with the model. It carries classes,
levels, the recipe's digest and a description of its input: in ONNX's metadata, and in a .pt2 as the extra file grurcn.json. ONNX
needs the extra grurcn[export].
"""

from grurcn.inference.export import ExportJob, export
from jobs.command import Command


def main(job: ExportJob) -> int:
    file = export(job)
    print(
        f"exported the model of {job.model} (step {file.step:,}) to {file.path}: {file.kind}, {file.size_bytes / 1e6:,.1f} MB; "
        f"input {file.input_shape} uint8; {len(file.classes):,} classes, levels {', '.join(file.levels)}; run on random clips "
        f"its probabilities differ from the model's by {file.largest_difference:.1e} at most"
    )
    return 0


COMMAND = Command(ExportJob, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
