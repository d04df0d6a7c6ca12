"""The same jobs on a real Ray cluster of this machine: packing, decoding, training on two workers, evaluation."""

import json
import operator
import signal
from collections.abc import Iterator
from functools import partial

import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient
from packing import packing_job
from servers import s3_server
from small_runs import losses, run_train

from cluster.workers.connect import NoCluster, start_ray
from cluster.workers.options import Workers
from grurcn.evaluation.decode_tasks import Decoders, check_decoders
from jobs import evaluate, make_shards
from shards.index import Index
from shards.reading.captions import Segments, evaluation_captions
from shards.reading.clips import ClipConfig
from shards.reading.stream import evaluation_batches
from shards.store import BadShards, open_store

pytestmark = pytest.mark.cluster
CLIPS = ClipConfig(num_frames=4, size=20)


@pytest.fixture(scope="module", autouse=True)
def s3() -> Iterator[str]:
    """An S3 server, a Ray cluster whose workers find it in their environment, and the place for shards in it."""
    ray.shutdown()  # another test's, whose workers know nothing of this server
    with s3_server() as url:
        start_ray()
        yield f"{url}/shards"
        ray.shutdown()


def test_ray_tasks_pack_the_same_bytes_into_a_store_as_this_process_into_a_folder(s3, videos, shards):
    assert make_shards.main(packing_job(videos, s3, workers=2)) == 0
    store = open_store(s3)
    assert {name: store.read_file(name) for name in store.names()} == {
        path.name: path.read_bytes() for path in shards.iterdir()
    }


def test_two_workers_train_from_a_store_to_the_losses_of_one_and_evaluate_each_video_once(s3, shards, storage):
    alone = losses(run_train(shards, storage, "one-worker"))
    result = run_train(s3, storage, "two-workers", on=Workers(workers=2), zero=2)
    assert losses(result) == pytest.approx(alone, rel=1e-5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ray's own is gone with the run

    runs = MlflowClient(result["tracking_uri"]).search_runs(["1"], "attributes.run_name = 'two-workers'")
    assert len(runs) == 1  # rank 1 made none

    scores = {}
    for workers, decoders in ((2, 0), (0, 2)):
        json_file = storage / f"evaluation-{workers}-{decoders}.json"
        job = evaluate.Evaluate(
            run=str(storage / "two-workers"), shards=s3, clips=3, views=5, on=Workers(workers=workers), decoders=decoders,
            json=json_file,
        )  # fmt: skip
        assert evaluate.main(job) == 0
        result = json.loads(json_file.read_text())
        assert sum(result.get("decoded_at", {}).values()) == (4 if decoders else 0)
        scores[workers, decoders] = pq.read_table(result["scores"]).to_pydict()
    assert scores[0, 2]["key"] == scores[2, 0]["key"]
    assert len(set(scores[2, 0]["key"])) == 4
    for one, two in zip(scores[0, 2]["scores"], scores[2, 0]["scores"], strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_more_workers_than_the_cluster_has_are_refused_at_once(shards, storage):
    with pytest.raises(NoCluster, match=r"8 workers need \d+ CPUs, but the Ray cluster has"):
        run_train(shards, storage, "many", on=Workers(workers=8, cpus_per_worker=64))
    with pytest.raises(
        NoCluster, match=r"2 decoders beside 8 workers: the Ray cluster has \d+ cores, of which .* take 512"
    ):
        check_decoders(2, Workers(workers=8, cpus_per_worker=64))


def test_what_a_worker_refuses_reaches_the_caller_as_it_was_raised(shards, storage, tmp_path):
    (copy := tmp_path / "copy").mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / "train-000000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[2000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(
        BadShards, match=r"train-000000\.tar: the \d+ bytes at offset 512 are not those of \S+ that were packed"
    ):
        run_train(copy, storage, "damaged", on=Workers(workers=1))

    index = Index(copy, "train")
    with pytest.raises(BadShards, match=r"train-000000\.tar: the \d+ bytes at offset 512 are not those of \S+ that"):
        list(evaluation_batches(index, CLIPS, global_batch=2, remote=Decoders(index, at_once=2)))


def test_ray_tasks_decode_the_same_bytes_as_this_process(shards, scenes):
    index, captioned = Index(shards, "train"), Index(scenes, "train")
    clips = partial(evaluation_batches, index, CLIPS, global_batch=3, num_clips=2)
    segments = partial(evaluation_captions, captioned, Segments(num_segments=3, offsets=(0, 2)), global_batch=3)
    for batches, of in ((clips, index), (segments, captioned)):
        decoders = Decoders(of, at_once=2)
        places, there = zip(*batches(remote=decoders), strict=True)
        wanted_places, here = zip(*batches(), strict=True)
        assert places == wanted_places
        for one, other in zip(there, here, strict=True):
            for name, value in vars(one).items():
                same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
                assert same(value, getattr(other, name)), name
        assert len(decoders.places) == len(of)  # without what fills up the last batch
