"""Where a trunk's first weights come from: ImageNet, a file or a URL, or the trunk of another run.

imagenet                    torchvision's, downloaded once into the cache
vgg16.pth                   a file with torchvision's parameter names; also https://...#sha256=HEX
runs/gru-rcn                the model of a run, named as grurcn/inference/model_source.py says
"""

from torch import Tensor

from cluster.checkpoints.run_folder import Model
from grurcn.inference.model_source import is_run, read_model
from grurcn.models.config import ModelConfig
from grurcn.models.trunks.base import BadWeights, trunk_spec
from grurcn.models.weights import read_weights
from shards.store.credentials import has_credentials, without_credentials

PREFIX = "trunk."  # of a trunk's parameters in a model's


def first_weights(config: ModelConfig, tracking_uri: str) -> dict[str, Tensor] | None:
    """The pretrained weights that a model begins with, None for a model without; raises what read_pretrained does."""
    if config.weights is None:
        return None
    if config.kind != "c3d":
        return read_pretrained(config.weights, config.trunk, tracking_uri)
    if config.weights == "imagenet":
        raise BadWeights(
            "imagenet: C3D has no ImageNet weights; expected a file, or none (Sports-1M's are the usual ones)"
        )
    return read_file(config.weights)


def read_pretrained(source: str, trunk: str, tracking_uri: str) -> dict[str, Tensor]:
    """The weights of a trunk by torchvision's names, on the CPU.

    Raises BadWeights if they cannot be had from `source` or are another trunk's, ValueError for a run without a whole
    checkpoint, NoTracking for an MLflow server that is away.
    """
    if source == "imagenet":
        imagenet = trunk_spec(trunk).imagenet
        if imagenet is None:
            raise BadWeights(
                f"imagenet: no ImageNet weights are registered for the trunk {trunk}; expected a file or a run"
            )
        return read_weights(imagenet)
    if is_run(source):
        return trunk_of(read_model(source, tracking_uri), source, trunk)
    return read_file(source)


def read_file(source: str) -> dict[str, Tensor]:
    """The weights of a path or URL. Raises BadWeights for a URL with credentials: the run's recipe, MLflow and logs show it."""
    if has_credentials(source):
        raise BadWeights(
            f"{without_credentials(source)}: the URL holds credentials (not shown), and every run that starts from it would "
            "store them; download the file yourself and give its path"
        )
    return read_weights(source)


def trunk_of(model: Model, source: str, trunk: str) -> dict[str, Tensor]:
    """The trunk's weights out of a model's. Raises BadWeights if it has none, or those of another trunk."""
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in model.weights.items() if name.startswith(PREFIX)}
    if not weights:
        raise BadWeights(
            f"{source}: this run's model has no trunk (found {', '.join(list(model.weights)[:3])}, ...); expected a run of a "
            f"model over {trunk}"
        )
    found = model.training.recipe["model"].get("trunk", "vgg16")  # before there was a choice, it was VGG-16
    if found != trunk:
        raise BadWeights(
            f"{source}: this run's trunk is {found}, expected {trunk}; name another run, or --model.trunk {found}"
        )
    return weights
