"""A run's best model -> an MLflow model that `mlflow models serve` answers with: weights as safetensors, our source beside them.

MLmodel             which module loads it (serving.py), and which input it takes
data/model/         state.json and *.safetensors, as cluster.checkpoints.run_folder.export_best wrote them
code/               grurcn, shards, cluster, jobs: the source that trained it; nothing is pickled
requirements.txt    the packages that it was tried with, pinned: what serving needs, not what training does
"""

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from cluster.checkpoints.files import Checkpoint
from cluster.tracking.models import MODEL_FOLDER
from cluster.tracking.sender import plain
from grurcn.inference.served_input import PARAMETERS, PATH, VIDEO

ROOT = Path(__file__).parents[2]
CODE = ("grurcn", "shards", "cluster", "jobs")
PACKAGES = (
    *("mlflow", "torch", "numpy", "pandas", "av", "ffmpeg-python", "imageio-ffmpeg", "safetensors", "fsspec"),
    *("setuptools",),  # ffmpeg-python imports future, which wants it
)
REQUIREMENTS, PYTHON = "requirements.txt", "python_env.yaml"
PYTHON_ENVIRONMENT = """python: {version}
build_dependencies: [pip]
dependencies: [-r {requirements}]
"""
FLOW_PACKAGE = "opencv-contrib-python-headless"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, PATH, required=False), ColSpec(DataType.binary, VIDEO, required=False)]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "label"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Array(DataType.string), "labels"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    ),
    params=ParamSchema([ParamSpec(name, DataType.long, value) for name, value in PARAMETERS.items()]),
)


def save_pyfunc(model: Path, target: Path) -> None:
    """Moves a best model's folder into a new one that is an MLflow model. A captioning model stays as it is: jobs.predict reads
    its folder, MLflow does not serve it."""
    training = Checkpoint.at(model).state().training
    if training.task != "classification":
        plain(model, target)
        return
    place = target / MODEL_FOLDER
    place.parent.mkdir(parents=True)
    shutil.move(model, place)
    for name in CODE:
        shutil.copytree(ROOT / name, target / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    names = PACKAGES if training.recipe["clips"]["stream"] == "rgb" else (*PACKAGES, FLOW_PACKAGE)
    (target / REQUIREMENTS).write_text("".join(f"{pinned(name)}\n" for name in names))
    (target / PYTHON).write_text(
        PYTHON_ENVIRONMENT.format(version=platform.python_version(), requirements=REQUIREMENTS)
    )
    described = Model(
        signature=SIGNATURE,
        metadata={
            "classes": training.model["classes"],
            "recipe": training.recipe,
            "data_digest": training.data_digest,
        },
    )
    mlflow.pyfunc.add_to_model(
        described,
        loader_module="grurcn.inference.serving",
        data=MODEL_FOLDER,
        code="code",
        python_env=PYTHON,
        streamable=False,
    )
    described.save(str(target / "MLmodel"))


def pinned(name: str) -> str:
    """NAME==VERSION of what is installed, without the +cpu or +cu130 of a local build; the name alone of what is not."""
    try:
        return f"{name}=={version(name).partition('+')[0]}"
    except PackageNotFoundError:
        return name
