"""A captioning run whose weights are random and large, so that its words depend on what it sees."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoints.files import Snapshot
from cluster.checkpoints.run_folder import RunFolder
from cluster.checkpoints.state import Optimizer, Training
from cluster.checkpoints.writer import CheckpointWriter
from grurcn.inference.captioner import build_captioner
from grurcn.models.config import ModelConfig
from grurcn.models.decoder import DecoderConfig
from grurcn.models.encoder import PartConfig, build_encoder, weights_digest
from grurcn.training.caption_recipes import CaptionRecipe
from grurcn.training.encoders import described
from shards.synthetic import SIZE
from shards.video import Packing

SEGMENTS, OFFSETS = 5, (0, 1, 4)

RECIPE = CaptionRecipe(
    decoder=DecoderConfig(hidden=6, embedding=5, attention=4), max_words=6, beam=4, optim=CaptionRecipe().optim
)

WORDS = ("<end>", "<unk>", "a", "square", "disc", "moves", "left", "up")

PACKING = Packing(width=SIZE, height=SIZE)

SGD = Optimizer(name="SGD", step_counts={})


def write_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], recipe: dict[str, Any], model: dict[str, Any]
) -> Path:
    """A run with one checkpoint, the best, at step 8."""
    writer = CheckpointWriter(RunFolder(str(folder)), keep=1)
    snapshot = Snapshot(weights=weights, frozen=None, moments={}, optimizer=SGD)
    writer.write(snapshot, Training(step=8, recipe=recipe, model=model), {"loss": 1.0})
    return folder


def write_run(folder: Path, packing: Packing = PACKING, recipe: CaptionRecipe = RECIPE) -> Path:
    """A captioning run over a tiny GRU-RCN and a tiny trunk. Its weights are large: what it says depends on what it sees."""
    states = ModelConfig(taps=("pool1", "pool2"), hidden=(3, 5), width=0.0625, freeze=True)
    frames = dataclasses.replace(states, kind="frames")
    parts = [
        PartConfig(kind="states", model=states, offsets=OFFSETS, size=16, box_share=0.875),
        PartConfig(kind="frame", model=frames, offsets=(0,), size=16, box_share=0.875),
    ]
    about: list[dict[str, Any]] = [{**dataclasses.asdict(part), "source": "tests"} for part in parts]
    torch.manual_seed(0)
    size = sum(part.vector_size for part in parts)
    encoder = described(SEGMENTS, about, size, "0" * 64)
    weights = build_encoder(encoder).state_dict()
    encoder = described(SEGMENTS, about, size, weights_digest(weights))
    model = build_captioner(recipe, encoder, len(WORDS), weights)
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=1.5)
    kept = {"vocabulary": list(WORDS), "encoder": encoder, "packing": vars(packing)}
    return write_checkpoint(folder, model.state_dict(), recipe.to_dict(), kept)
