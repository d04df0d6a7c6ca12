"""Which fixed encoders a captioning run sees its videos by, and where their weights come from: recognition runs, or weights.

A description (what dataset.json and checkpoints keep) says all that is needed to build an encoder, and tells one from another:

    {"segments": 28, "size": 2432, "parts": [{kind, source, model, offsets, size, box_share}, ...], "weights": SHA-256, "digest"}

Its digest covers everything but the sources: the same weights are the same encoder, wherever they were read.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cluster.checkpoints.files import read_tensors
from cluster.checkpoints.run_folder import Model
from grurcn.inference.model_source import is_run, read_model
from grurcn.models.config import ModelConfig
from grurcn.models.encoder import BadEncoder, Encoder, PartConfig, sources, weights_digest
from grurcn.models.trunks.base import trunk_spec
from grurcn.training.encoder_config import EncoderConfig
from grurcn.training.pretrained import read_pretrained
from grurcn.training.recipes import Recipe
from shards.index import Index
from shards.store import NoFile

WEIGHTS = "encoder.safetensors"  # beside the shards of vectors that it has computed


def read_encoder(config: EncoderConfig, tracking_uri: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An encoder's description and weights, from the runs and files that the config names.

    Raises BadEncoder for a run that is of another task or kind than its place wants, BadWeights for weights of another trunk,
    ValueError for a run without a checkpoint.
    """
    parts: list[tuple[PartConfig, str, Mapping[str, Tensor]]] = []
    if config.frame:
        parts.append(frame_part(config.frame, tracking_uri))
    if config.states:
        parts.append(states_part(config.states, tracking_uri))
    if config.entity:
        parts.append(entity_part(config.entity, config.entity_trunk, config.entity_size, tracking_uri))
    if not parts:
        raise BadEncoder(
            "no encoder is named; expected --encoder.frame, --encoder.states or --encoder.entity, or shards of vectors that "
            "jobs.encode has written"
        )
    encoder = Encoder([part for part, _, _ in parts])
    for number, (part, source, weights) in enumerate(parts):
        load_part(encoder.parts[number], part, weights, source)
    weights = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    about = [{**dataclasses.asdict(part), "source": source} for part, source, _ in parts]
    return described(config.segments, about, encoder.vector_size, weights_digest(weights)), weights


def described(segments: int, parts: Sequence[Mapping[str, Any]], size: int, weights: str) -> dict[str, Any]:
    """The description, with its digest. JSON and back does not change it."""
    description = json.loads(json.dumps({"segments": segments, "size": size, "parts": parts, "weights": weights}))
    bare = [{key: value for key, value in part.items() if key != "source"} for part in description["parts"]]
    digest = hashlib.sha256(json.dumps({**description, "parts": bare}, sort_keys=True).encode()).hexdigest()
    return {**description, "digest": digest}


def encoder_of(index: Index) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights of the encoder whose vectors a data set holds.

    Raises BadEncoder if its file of weights is missing or has changed.
    """
    assert index.info.encoder is not None
    try:
        weights = read_tensors(index.store, WEIGHTS)
    except NoFile:
        raise BadEncoder(
            f"{index.url}/{WEIGHTS}: no such file; copy it there, or encode again (python -m jobs.encode)"
        ) from None
    except ValueError as error:
        raise BadEncoder(
            f"{index.url}/{WEIGHTS}: {error}; copy it there, or encode again (python -m jobs.encode)"
        ) from None
    if weights_digest(weights) != index.info.encoder["weights"]:
        raise BadEncoder(f"{index.url}/{WEIGHTS}: not the weights that the vectors were computed with; encode again")
    return index.info.encoder, weights


def check_same(index: Index, named: Mapping[str, Any]) -> None:
    """Raises BadEncoder if a data set's vectors were computed by another encoder than the one that is named."""
    found = index.info.encoder
    assert found is not None
    if found["digest"] != named["digest"]:
        raise BadEncoder(
            f"{index.url}: its vectors were computed by another encoder ({summary(found)}) than the one named "
            f"({summary(named)}); encode again (python -m jobs.encode), or name none, and take what the vectors are"
        )


def summary(description: Mapping[str, Any]) -> str:
    """In a few words."""
    return f"{description['segments']} segments, {sources(description)}, {description['digest'][:12]}..."


# The parts


def frame_part(source: str, tracking_uri: str) -> tuple[PartConfig, str, Mapping[str, Tensor]]:
    """The trunk of a run of any kind that has one, as it sees a single frame."""
    model, recipe = recognition_run(source, tracking_uri, "--encoder.frame")
    if recipe.model.kind == "c3d":
        raise BadEncoder(
            f"--encoder.frame {source}: a run of C3D, which has no trunk; expected a run of frames or gru-rcn"
        )
    vector = trunk_spec(recipe.model.trunk).last_tap
    taps = (vector,) if vector in recipe.model.taps else recipe.model.taps
    part = PartConfig(
        kind="frame",
        model=trunk_alone(recipe.model, taps),
        offsets=(0,),
        size=recipe.clips.size,
        box_share=recipe.clips.test_scale,
    )
    return part, source, model.weights


def states_part(source: str, tracking_uri: str) -> tuple[PartConfig, str, Mapping[str, Tensor]]:
    """A whole GRU-RCN, as it sees a clip."""
    model, recipe = recognition_run(source, tracking_uri, "--encoder.states")
    if recipe.model.kind != "gru-rcn":
        raise BadEncoder(
            f"--encoder.states {source}: a run of kind {recipe.model.kind}, which has no states; expected one of kind gru-rcn"
        )
    clips = recipe.clips
    part = PartConfig(
        kind="states",
        model=dataclasses.replace(recipe.model, weights=None, freeze=True),
        offsets=tuple(range(0, clips.num_frames * clips.stride, clips.stride)),
        size=clips.size,
        box_share=clips.test_scale,
    )
    return part, source, model.weights


def entity_part(source: str, trunk: str, size: int, tracking_uri: str) -> tuple[PartConfig, str, Mapping[str, Tensor]]:
    """A trunk alone, as it was trained on pictures."""
    weights = read_pretrained(source, trunk, tracking_uri)
    taps = (trunk_spec(trunk).last_tap,)
    model = trunk_alone(ModelConfig(trunk=trunk, kind="frames", taps=taps), taps)
    part = PartConfig(kind="frame", model=model, offsets=(0,), size=size, box_share=0.875)
    return part, source, {f"trunk.{name}": tensor for name, tensor in weights.items()}


def trunk_alone(model: ModelConfig, taps: tuple[str, ...]) -> ModelConfig:
    """A model's trunk up to some taps, without GRUs."""
    return dataclasses.replace(
        model, kind="frames", taps=taps, bidirectional=False, stacked=False, weights=None, freeze=True
    )


def recognition_run(source: str, tracking_uri: str, option: str) -> tuple[Model, Recipe]:
    """The best model of a recognition run that sees RGB frames, and its recipe."""
    if not is_run(source):
        raise BadEncoder(
            f"{option} {source}: no run; expected a run's folder or URL (STORAGE/NAME), one of its checkpoints, or runs:/ID"
        )
    model = read_model(source, tracking_uri)
    content = model.training.recipe
    if "model" not in content:
        raise BadEncoder(
            f"{option} {source}: a run of captioning; expected one of classification (such as gru-rcn-bidirectional)"
        )
    recipe = Recipe.from_dict(content)
    if recipe.clips.stream != "rgb":
        raise BadEncoder(f"{option} {source}: a run on optical flow; captions are learned from RGB frames")
    return model, recipe


def load_part(network: Any, part: PartConfig, weights: Mapping[str, Tensor], source: str) -> None:
    """Those of a run's weights that a part has. Raises BadEncoder if some are missing or of another shape."""
    expected = network.state_dict()
    known = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")} | dict(weights)
    for name, tensor in expected.items():
        found = known.get(name)
        if found is None or found.shape != tensor.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}, expected {tuple(tensor.shape)}"
            raise BadEncoder(
                f"{source}: {name} is {shape}: these are not the weights of {part.model.trunk}, width {part.model.width:g}"
            )
    network.load_state_dict({name: known[name] for name in expected})
