"""A run's identity: the recipe and the data that it was begun with, and its MLflow run."""

import json
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset

from cluster.checkpoints.run_folder import Identity, OtherRun, RunFolder
from cluster.tracking.provenance import command, provenance_tags
from cluster.tracking.server import open_run, tracking_uri
from grurcn.training.job import TrainJob
from grurcn.training.recipes import TrainingRecipe, flat
from shards.dataset import DESCRIPTION
from shards.index import Index
from shards.store import absolute_url

ROOT = Path(__file__).parents[2]
DIGEST_LETTERS = 32  # of a data set's; MLflow stores 36
MOST_DIFFERENCES = 4  # in a message
DESCRIPTION_OF_RUN = """`{command}`

Data: `{shards}`, digest `{digest}`; *dataset.json* among the artifacts describes it. Checkpoints and the best model, which
`mlflow models serve` serves, are under *Logged models* and in `{folder}`. Pictures of the best validation are in *pictures/val*,
installed packages and uncommitted changes of the code in *environment.txt* and *changes.diff*.
"""


def open_identity(job: TrainJob, run: RunFolder, index: Index) -> Identity:
    """The identity of a run and its open MLflow run: a new one, or the one in the run's folder, which must match the job.

    Raises OtherRun if the folder holds a run with another recipe or other data.
    """
    found = run.identity()
    recipe_digest, data_digest = job.recipe.digest(), index.info.digest
    if found is not None:
        if found.recipe_digest != recipe_digest:
            raise OtherRun(
                f"{run.url}: a run of another recipe ({differences(found.recipe, job.recipe)}); choose another --name, or the "
                "options that it began with"
            )
        if found.data_digest != data_digest:
            raise OtherRun(
                f"{run.url}: a run on other data than {job.shards} (digest {found.data_digest[:12]}... there, "
                f"{data_digest[:12]}... here); choose another --name, or the shards that it began with"
            )
    uri = found.tracking_uri if found else tracking_uri(job.storage)
    run_id = open_run(
        uri,
        job.storage,
        job.experiment,
        run.name,
        found.mlflow_run_id if found else None,
        parameters={
            "recipe": job.recipe_name,
            **flat(job.recipe.to_dict()),
            "shards": absolute_url(job.shards),
            "zero": job.zero,
            "precision": job.precision,
            "accumulation": job.accumulation,
            "workers": job.on.workers,
        },
        tags={
            **provenance_tags(ROOT),
            "data_digest": data_digest,
            "recipe_digest": recipe_digest,
            "run_folder": run.url,
            "mlflow.note.content": DESCRIPTION_OF_RUN.format(
                command=command(), shards=absolute_url(job.shards), digest=data_digest, folder=run.url
            ),
        },
        datasets={"training": mlflow_dataset(index)},
    )
    if found is not None:
        return found
    identity = Identity(
        recipe_digest=recipe_digest,
        data_digest=data_digest,
        recipe=job.recipe.to_dict(),
        tracking_uri=uri,
        mlflow_run_id=run_id,
    )
    run.begin(identity)
    return identity


def mlflow_dataset(index: Index) -> Dataset:
    """A packed data set, as MLflow's pages show it."""
    info, url = index.info, absolute_url(index.url)
    counts = {name: sum(shard.samples for shard in shards) for name, shards in info.splits.items()}
    return Dataset(
        name=url.rpartition("/")[2],
        digest=info.digest[:DIGEST_LETTERS],
        source_type="local" if "://" not in url else url.partition("://")[0],
        source=json.dumps({"uri": f"{url}/{DESCRIPTION}"}),
        profile=json.dumps({"classes": len(info.classes), **counts}),
    )


def differences(found: dict[str, Any], recipe: TrainingRecipe) -> str:
    """The values in which a run's recipe differs from another one, in words."""
    if found["task"] != recipe.task:
        return f"task {found['task']} there, {recipe.task} here"
    there, here = flat(found), flat(json.loads(json.dumps(recipe.to_dict())))
    changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    more = f" and {len(changed) - MOST_DIFFERENCES} more" if len(changed) > MOST_DIFFERENCES else ""
    return "; ".join(changed[:MOST_DIFFERENCES]) + more
