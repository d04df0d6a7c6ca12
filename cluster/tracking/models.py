"""A run's checkpoints and best model in MLflow: logged models, each with its step and its scores; and the model registry.

    checkpoint-00000120    a checkpoint's files, to resume from; the newest few. Weights that are not trained are shared:
                           the run's artifact checkpoints/frozen.safetensors
    best-00000080          the best model so far, whole; the run's tag `best_model` is its id, `best_model_sha256` its weights'

Of the same name there is one a run, whatever is sent again.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from cluster.tracking.server import check_reachable

BEST_MODEL, BEST_SHA256 = "best_model", "best_model_sha256"  # tags of the run
MODEL_FOLDER = "data/model"  # of a best model's artifacts: state.json and weights
CHECKPOINT, BEST = "checkpoint", "best"  # kinds


class LoggedModels:
    """The logged models of one run."""

    def __init__(self, client: MlflowClient, uri: str, run_id: str):
        self.client, self.uri, self.run_id = client, uri, run_id

    def log(
        self, kind: str, name: str, folder: Path, step: int, scores: Mapping[str, float], milliseconds: int
    ) -> LoggedModel:
        """Logs a folder as the model of a step. scores, milliseconds: as in the run's metrics, which has them once then."""
        run = self.client.get_run(self.run_id)
        found = [model for model in self.all(kind) if model.name == name]
        model = (
            found[0]
            if found
            else self.client.create_logged_model(
                run.info.experiment_id,
                name=name,
                source_run_id=self.run_id,
                tags={"step": str(step), "run": run.info.run_name or ""},
                params={key: run.data.params[key] for key in ("recipe", "seed") if key in run.data.params},
                model_type=kind,
            )
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if not found:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        for key, value in scores.items():
            self.client.log_metric(self.run_id, key, value, milliseconds, step, model_id=model.model_id)
        return model

    def set_best(self, model: LoggedModel, sha256: str) -> None:
        """Names a model the best of the run. sha256: of its weights."""
        tags = [RunTag(BEST_MODEL, model.model_id), RunTag(BEST_SHA256, sha256)]
        self.client.log_batch(self.run_id, tags=tags, synchronous=True)

    def best_sha256(self) -> str | None:
        """What the run's best model was named with."""
        return self.client.get_run(self.run_id).data.tags.get(BEST_SHA256)

    def all(self, kind: str) -> list[LoggedModel]:
        """Those of a kind, oldest step first."""
        run = self.client.get_run(self.run_id)
        found = self.client.search_logged_models(
            [run.info.experiment_id], filter_string=f"source_run_id = '{self.run_id}' AND model_type = '{kind}'"
        )
        return sorted(found, key=lambda model: int(model.tags.get("step", 0)))

    def delete(self, models: Iterable[LoggedModel]) -> None:
        """Deletes models, but never one that is registered."""
        for model in models:
            if not self.versions_of(model):
                get_artifact_repository(model.artifact_location, tracking_uri=self.uri).delete_artifacts("")
                self.client.delete_logged_model(model.model_id)

    def versions_of(self, model: LoggedModel) -> list[ModelVersion]:
        found = self.client.search_model_versions(f"run_id = '{self.run_id}'")
        return [version for version in found if version.source == self.source_of(model)]

    def register(self, name: str) -> None:
        """Makes the best model the newest version of a registered one, unless it is a version of it already."""
        [best] = self.all(BEST)[-1:] or [None]
        if best is None or any(version.name == name for version in self.versions_of(best)):
            return
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        made = self.client.create_model_version(name, self.source_of(best), self.run_id, model_id=best.model_id)
        known = json.loads(best.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        versions = [*known, {"name": name, "version": made.version}]  # by which its pages link to the registered model
        self.client.set_logged_model_tags(best.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})

    def source_of(self, model: LoggedModel) -> str:
        """What a version of it is made of. A database's registry would look for models:/ID in this process's default database."""
        return f"models:/{model.model_id}" if self.uri.startswith("http") else model.artifact_location


def download_model(uri: str, source: str, folder: Path, whole: bool = False) -> Path:
    """Downloads a model into a folder -> where its state.json lies. source: models:/ID of a logged one, models:/NAME/VERSION,
    models:/NAME/latest or models:/NAME@ALIAS of a registered one. whole: all of it, not only what load_best reads -> its folder.

    Raises NoTracking if the server does not answer, ValueError if there is no such model or it is not one of ours.
    """
    check_reachable(uri)
    client = MlflowClient(uri)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        place = location_of(client, source)
        repository = get_artifact_repository(place, tracking_uri=uri)
        if not repository.list_artifacts(MODEL_FOLDER):
            raise ValueError(
                f"{source}: no {MODEL_FOLDER} in it ({place}); expected a best model that jobs.train has logged"
            )
        return Path(repository.download_artifacts("" if whole else MODEL_FOLDER, str(folder)))
    except MlflowException as error:
        raise ValueError(
            f"{source}: not found in MLflow at {uri} ({error.message}); name one that its pages show"
        ) from None


def download_best(uri: str, run_id: str, folder: Path) -> Path:
    """Downloads a run's best model into `folder`, and returns where it lies, for
    cluster.checkpoints.run_folder.load_best.

    Raises NoTracking if the server does not answer, ValueError if there is no such run, or it has no best model yet.
    """
    check_reachable(uri)
    try:
        tags = MlflowClient(uri).get_run(run_id).data.tags
    except MlflowException as error:
        raise ValueError(
            f"MLflow at {uri} has no run {run_id} ({error.message}); set MLFLOW_TRACKING_URI to the server that has it"
        ) from None
    if BEST_MODEL not in tags:
        raise ValueError(
            f"MLflow run {run_id} at {uri} has no best model: nothing was validated in it yet; wait, or name another run"
        )
    return download_model(uri, f"models:/{tags[BEST_MODEL]}", folder)


def location_of(client: MlflowClient, source: str) -> str:
    """Where the artifacts of a logged or registered model lie. Raises ValueError for a name that can be no model's."""
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[^/@]+))?", source)
    if match is None:
        raise ValueError(
            f"{source}: expected models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS or models:/ID"
        )
    name, version, alias = match["name"], match["version"], match["alias"]
    if version is None and alias is None:
        return str(client.get_logged_model(str(name)).artifact_location)
    if alias is not None:
        found = client.get_model_version_by_alias(name, alias).source
    elif version == "latest":
        versions = client.search_model_versions(f"name = '{name}'")
        if not versions:
            raise ValueError(f"{source}: no version of it is registered; name another model")
        found = max(versions, key=lambda each: int(each.version)).source
    else:
        found = client.get_model_version(str(name), str(version)).source
    logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", found or "")
    return client.get_logged_model(logged[1]).artifact_location if logged else str(found)
