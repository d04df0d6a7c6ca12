"""Captioning from shards to scores in this process: the same loop, exact resume, either kind of shards, and what is refused."""

import dataclasses
import json
import os
import tarfile
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from packing import SCENES as SPLITS
from ranks import events, train_on
from ranks import losses as reported_losses
from small_runs import TINY, losses, run_train, worker_job
from videos import DATA, needs_data

from cluster.checkpoints.run_folder import OtherRun, RunFolder, load_best
from grurcn.evaluation.caption_scores import caption_scores
from grurcn.inference.captioner import VideoCaptioner
from grurcn.inference.meta import OtherTask
from grurcn.models.decoder import DecoderConfig
from grurcn.models.encoder import BadEncoder
from grurcn.models.trunks.base import BadWeights
from grurcn.models.vocabulary import BadCaptions, Vocabulary
from grurcn.training import encode as encode_module
from grurcn.training.caption_recipes import CaptionRecipe
from grurcn.training.captioning import prepare
from grurcn.training.encoders import WEIGHTS, EncoderConfig, encoder_of
from grurcn.training.loop import train_worker
from grurcn.training.optim import OptimConfig
from jobs import caption, encode, evaluate, make_shards, train
from shards.index import Index
from shards.packing.sources import Msvd
from shards.reading.captions import train_captions
from shards.reading.order import BadBatch
from shards.store import BadShards
from shards.video import Packing

SMALL = CaptionRecipe(
    encoder=EncoderConfig(segments=3),
    decoder=DecoderConfig(hidden=12, embedding=8, attention=6, dropout=0.3),
    optim=OptimConfig(learning_rate=1e-2, clip_norm=5.0),
    global_batch=8,
    num_steps=6,
    val_every=3,
    beam=2,
)


@pytest.fixture(scope="module")
def recogniser(shards: Path, storage: Path) -> str:
    """A run of recognition on the demo's motions."""
    run_train(shards, storage, "recogniser", recipe=dataclasses.replace(TINY, num_steps=2, val_every=2))
    return str(storage / "recogniser")


def encoded(scenes: Path, out: Path, segments: int = 3, **sources: Any) -> Path:
    job = encode.Encode(
        shards=str(scenes), out=str(out), encoder=EncoderConfig(segments=segments, **sources), workers=0
    )
    assert encode.main(job) == 0
    return out


@pytest.fixture(scope="module")
def vectors(scenes: Path, recogniser: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoded(scenes, tmp_path_factory.mktemp("vectors") / "both", frame=recogniser, states=recogniser)


def job(shards: Path, storage: Path, name: str, recipe: CaptionRecipe = SMALL, **options: Any) -> train.Train:
    return train.Train(
        shards=str(shards), recipe=recipe, storage=str(storage), name=name, log_every=1, json=storage / f"{name}.json", **options
    )  # fmt: skip


def run_captions(shards: Path, storage: Path, name: str, **options: Any) -> dict[str, Any]:
    assert train.main("small", job(shards, storage, name, **options)) == 0
    return json.loads((storage / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def finished(vectors: Path, storage: Path) -> dict[str, Any]:
    return run_captions(vectors, storage, "captions")


# A run


def test_a_run_ends_with_its_scores_and_a_model_that_knows_its_words_and_its_encoder(finished, vectors, storage):
    assert finished["steps"] == 6
    documented = (train.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in ("val_perplexity", "val_word_accuracy", "val_bleu4"))
    assert {
        "val_loss",
        "val_perplexity",
        "val_word_accuracy",
        "val_bleu4",
        "val_cider",
        "val_rouge_l",
    } <= finished.keys()
    assert np.isfinite([value for key, value in finished.items() if key.startswith("val_")]).all()
    model = load_best(storage / "captions")
    assert model.training.model["encoder"] == Index(vectors, "train").info.encoder
    assert model.training.model["vocabulary"] == list(Vocabulary.build(all_captions(vectors)).words)


def all_captions(shards: Path, split: str = "train") -> list[str]:
    """By plain reading of the tars."""
    found = []
    for path in sorted(shards.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found += json.load(file)["captions"]
    assert found
    return found


def test_mlflow_has_the_scores_the_vocabulary_and_a_table_of_captions(finished, monkeypatch):
    client = MlflowClient(finished["tracking_uri"])
    run = client.get_run(finished["mlflow_run_id"])
    assert run.data.params["decoder.hidden"] == "12"
    for name in ("train/loss", "train/word_accuracy", "val/loss", "val/perplexity", "val/bleu4", "val/cider"):
        assert name in run.data.metrics
    assert sorted(losses(finished)) == [1, 2, 3, 4, 5, 6]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"vocabulary.json", "validation-captions.json", "recipe.json", "dataset.json"} <= files
    [logged] = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert logged == {"path": "validation-captions.json", "type": "table"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished["tracking_uri"])  # which load_table asks, whatever its client
    table = client.load_table(run.info.experiment_id, "validation-captions.json", run_ids=[run.info.run_id])
    assert list(table.columns) == ["video", "caption", "references"]
    assert len(table) == SPLITS["val"]
    assert all(len(said.splitlines()) == 3 for said in table["references"])


def test_training_from_videos_and_from_their_vectors_gives_the_same_losses(finished, scenes, recogniser, storage):
    sources = EncoderConfig(segments=3, frame=recogniser, states=recogniser)
    recipe = dataclasses.replace(SMALL, encoder=sources)
    direct = losses(run_captions(scenes, storage, "from-videos", recipe=recipe))
    assert direct == pytest.approx(losses(finished), rel=1e-4)


def test_standardised_vectors_have_mean_0_and_deviation_1_over_the_training_videos(vectors, storage):
    recipe = dataclasses.replace(SMALL, standardise=True, num_steps=1)
    run_captions(vectors, storage, "standardised", recipe=recipe)
    trained = VideoCaptioner.of(load_best(storage / "standardised"), torch.device("cpu"))
    raw = np.concatenate([np.frombuffer(data, "<f4", offset=128).reshape(3, -1) for data in arrays(vectors)])
    seen = trained.model.vectors(torch.from_numpy(raw.copy())).numpy()
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-4)
    deviation = raw.std(axis=0)
    np.testing.assert_allclose(seen.std(axis=0)[deviation > 1e-6], 1, rtol=1e-3)
    assert (deviation > 1e-6).sum() > 5


def arrays(vectors: Path) -> list[bytes]:
    index = Index(vectors, "train")
    samples = [index[number] for number in range(len(index))]
    return [index.shard_store.read(sample.shard, sample.offset, sample.size_bytes) for sample in samples]


def test_a_run_that_stops_anywhere_goes_on_with_bit_equal_losses(finished, vectors, storage):
    def interrupted(index, segments, order, **options) -> Generator[Any, None, None]:
        with closing(train_captions(index, segments, order, **options)) as batches:
            yield from (batch for _, batch in zip(range(4), batches, strict=False))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.main("small", job(vectors, storage, "broken", save_every=2), partial(train_worker, read=interrupted))
    assert RunFolder(str(storage / "broken")).newest() is not None
    result = run_captions(vectors, storage, "broken", save_every=2)
    assert losses(result) == losses(finished)
    one, other = (load_best(storage / name).weights for name in ("captions", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("workers", "zero"), [(2, 0), (2, 3), (4, 1)])
def test_any_number_of_workers_and_zero_stage_gives_the_same_run(
    finished, vectors, recogniser, tmp_path, workers, zero
):
    index = Index(vectors, "train")
    prepared = prepare(SMALL, str(vectors), "", fresh=True)
    results = train_on(workers, tmp_path, worker_job(vectors, tmp_path, SMALL, zero=zero, prepared=prepared))
    alone = losses(finished)
    assert {step: of[0] for step, of in reported_losses(tmp_path).items()} == pytest.approx(alone, rel=1e-5)
    assert all(result == results[0] for result in results)
    assert results[0]["val_loss"] == pytest.approx(finished["val_loss"], rel=1e-4)
    tables = [event["rows"] for event in events(tmp_path) if event["kind"] == "CaptionTable"]
    assert [len(rows) for rows in tables] == [SPLITS["val"]] * 2
    assert len(index) == SPLITS["train"]


def test_accumulated_parts_change_no_loss(finished, vectors, storage):
    assert losses(run_captions(vectors, storage, "parts", accumulation=4)) == pytest.approx(losses(finished), rel=1e-5)


def test_adadelta_as_in_the_paper_trains_and_resumes(vectors, storage):
    recipe = dataclasses.replace(SMALL, optim=CaptionRecipe().optim)
    assert recipe.optim.optimizer == "adadelta"
    first = losses(run_captions(vectors, storage, "adadelta", recipe=recipe))
    assert first[6] < first[1]


def test_the_best_model_is_the_one_with_the_best_of_the_chosen_score(vectors, storage):
    recipe = dataclasses.replace(SMALL, select="cider", num_steps=12, val_every=2)
    result = run_captions(vectors, storage, "by-cider", recipe=recipe)
    client = MlflowClient(result["tracking_uri"])
    history = {each.step: each.value for each in client.get_metric_history(result["mlflow_run_id"], "val/cider")}
    assert len(history) == 6
    assert result["best_step"] == min(step for step, value in history.items() if value == max(history.values()))
    assert load_best(storage / "by-cider").step == result["best_step"]


def test_stopping_early_looks_at_the_likelihood_whatever_selects(vectors, storage):
    optim = OptimConfig(learning_rate=1e-12)
    recipe = dataclasses.replace(SMALL, select="bleu4", optim=optim, num_steps=30, val_every=1, patience=2)
    assert run_captions(vectors, storage, "early-captions", recipe=recipe)["steps"] < 30


# Vectors


def test_encoding_again_does_nothing_and_encoding_elsewhere_gives_the_same_bytes(vectors, scenes, recogniser, tmp_path):
    again = encoded(scenes, vectors, frame=recogniser, states=recogniser)
    other = encoded(scenes, tmp_path / "other", frame=recogniser, states=recogniser)
    names = sorted(path.name for path in other.iterdir() if path.is_file())
    assert {f"{split}.index.arrow" for split in SPLITS} <= set(names)
    assert WEIGHTS in names
    for name in names:
        assert (other / name).read_bytes() == (again / name).read_bytes(), name


def test_an_encoding_that_was_interrupted_goes_on(vectors, scenes, recogniser, tmp_path, monkeypatch):
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from encode_shard(*arguments, **options)

    encode_shard = encode_module.encode_shard
    monkeypatch.setattr(encode_module, "encode_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        encoded(scenes, tmp_path / "broken", frame=recogniser, states=recogniser)
    assert not (tmp_path / "broken" / "dataset.json").exists()
    done = sorted(path.name for path in (tmp_path / "broken").glob("*.tar"))
    assert len(done) == 2
    encoded(scenes, tmp_path / "broken", frame=recogniser, states=recogniser)
    assert len(calls) == 3 + 3  # five shards: two before, the third, and then those that were left
    for path in vectors.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes()


def test_an_encoder_may_be_a_run_of_mlflow(scenes, vectors, recogniser, storage, tmp_path):
    identity = RunFolder(recogniser).identity()
    assert identity is not None
    source = f"runs:/{identity.mlflow_run_id}"
    job = encode.Encode(
        shards=str(scenes), out=str(tmp_path / "vectors"), storage=str(storage), workers=0,
        encoder=EncoderConfig(segments=3, frame=source, states=source),
    )  # fmt: skip
    assert encode.main(job) == 0
    found, wanted = (Index(place, "train").info.encoder for place in (tmp_path / "vectors", vectors))
    assert found is not None
    assert wanted is not None
    assert found["digest"] == wanted["digest"]
    assert [part["source"] for part in found["parts"]] == [source, source]


# Captions


def test_a_split_is_described_and_scored(finished, vectors, storage, tmp_path):
    file = tmp_path / "scored.json"
    assert caption.main(caption.Caption(run=str(storage / "captions"), shards=str(vectors), beam=3, json=file)) == 0
    result = json.loads(file.read_text())
    documented = (caption.__doc__ or "").split("FILE holds:")[1]
    assert all(key in documented for key in result)
    assert result["videos"] == SPLITS["test"]
    rows = pq.read_table(result["captions"]).to_pylist()
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    known = {word for said in all_captions(vectors) for word in Vocabulary.build([said]).words}
    assert all(word in known for row in rows for word in row["caption"].split())
    references = {row["key"]: row["references"] for row in rows}
    assert sorted(said for of in references.values() for said in of) == sorted(all_captions(vectors, "test"))
    wanted = caption_scores(references, {row["key"]: row["caption"] for row in rows}).total
    assert result["scores"] == pytest.approx(wanted)
    metrics = MlflowClient(result["tracking_uri"]).get_run(result["mlflow_run_id"]).data.metrics
    assert metrics["test/bleu4"] == pytest.approx(wanted["bleu4"])


@pytest.mark.long
def test_videos_are_described_as_their_vectors_are(finished, vectors, scenes, storage, tmp_path):
    found = []
    for shards in (vectors, scenes):
        file = tmp_path / "result.json"
        caption.main(caption.Caption(run=str(storage / "captions"), shards=str(shards), split="val", json=file))
        rows = pq.read_table(json.loads(file.read_text())["captions"]).to_pylist()
        found.append([(row["key"], row["caption"]) for row in rows])
    assert found[0] == found[1]


@needs_data
@pytest.mark.long
def test_real_clips_go_from_their_files_to_scores(storage, tmp_path):
    """Four MSVD clips and their captions, seen by MobileNetV2 with ImageNet's weights."""
    weights = next((DATA / "weights").glob("mobilenet_v2*"))
    listed = json.loads((DATA / "captions" / "msvd" / "test_labels.json").read_text())
    clips = {path.name for path in (DATA / "captions" / "msvd").glob("*.avi")}
    there = [video for video in listed if video["id"] in clips]
    assert len(there) == 4
    for name, videos in (("train", there[:2]), ("val", there[2:3]), ("test", there[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(videos))
    source = Msvd(
        videos=DATA / "captions" / "msvd",
        train=tmp_path / "train.json", val=tmp_path / "val.json", test=tmp_path / "test.json",
    )  # fmt: skip
    packing = Packing(width=170, height=128)
    shards = tmp_path / "shards"
    make_shards.main(make_shards.MakeShards(source=source, out=str(shards), packing=packing, workers=0))
    vectors = encoded(shards, tmp_path / "vectors", segments=5, entity=str(weights), entity_size=96)
    recipe = dataclasses.replace(
        SMALL, num_steps=12, val_every=12, standardise=True, optim=OptimConfig(learning_rate=2e-2)
    )
    result = run_captions(vectors, storage, "msvd", recipe=recipe)
    first = losses(result)
    assert first[12] < first[1]
    assert (
        caption.main(caption.Caption(run=str(storage / "msvd"), shards=str(vectors), json=tmp_path / "out.json")) == 0
    )
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert 0 < scores["bleu1"] <= 1
    assert {"bleu4", "rouge_l", "cider"} <= scores.keys()


# Refused


def refused(shards: Path, storage: Path, **changes: Any) -> None:
    train.main("small", job(shards, storage, "refused", dataclasses.replace(SMALL, **changes)))


def test_videos_without_captions_are_refused(shards, scenes, storage, tmp_path):
    with pytest.raises(BadShards, match="caption"):
        refused(shards, storage)
    with pytest.raises(BadShards, match="captions and without classes"):
        run_train(scenes, storage, "no-classes", recipe=TINY)


def test_captions_in_which_every_word_is_rare_are_refused(vectors, storage):
    with pytest.raises(BadCaptions, match="1000"):
        refused(vectors, storage, min_count=1000)


def test_more_pairs_in_a_batch_than_there_are_is_refused(vectors, storage):
    with pytest.raises(BadBatch, match="36 samples are fewer than one global batch of 64"):
        refused(vectors, storage, global_batch=64)


def test_videos_without_an_encoder_to_see_them_by_are_refused(scenes, storage):
    with pytest.raises(BadEncoder, match=r"no encoder is named.*jobs\.encode"):
        refused(scenes, storage)


def test_vectors_of_another_encoder_than_the_one_named_are_refused(vectors, recogniser, storage):
    with pytest.raises(BadEncoder, match=r"computed by another encoder \(3 segments.*than the one named \(4 segments"):
        refused(vectors, storage, encoder=EncoderConfig(segments=4, frame=recogniser, states=recogniser))
    with pytest.raises(BadEncoder, match="computed by another encoder"):
        refused(vectors, storage, encoder=EncoderConfig(segments=3, frame=recogniser))
    same = EncoderConfig(segments=3, frame=recogniser, states=recogniser)
    prepared = prepare(dataclasses.replace(SMALL, encoder=same), str(vectors), "", fresh=True)
    assert prepared.encoder == Index(vectors, "train").info.encoder


def test_runs_of_another_task_or_kind_are_no_encoders(finished, scenes, shards, storage, recogniser):
    captions = str(storage / "captions")
    for option in ("frame", "states"):
        with pytest.raises(
            BadEncoder, match=rf"--encoder\.{option} .*captions: a run of captioning; expected one of classification"
        ):
            refused(scenes, storage, encoder=dataclasses.replace(EncoderConfig(), **{option: captions}))
    frames = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, kind="frames"), num_steps=1, val_every=1)
    run_train(shards, storage, "frames", recipe=frames)
    with pytest.raises(BadEncoder, match="a run of kind frames, which has no states; expected one of kind gru-rcn"):
        refused(scenes, storage, encoder=EncoderConfig(states=str(storage / "frames")))
    with pytest.raises(BadEncoder, match="no run; expected a run's folder"):
        refused(scenes, storage, encoder=EncoderConfig(states=str(storage / "nothing")))


def test_weights_of_another_trunk_are_no_entity_encoder(scenes, storage, recogniser):
    with pytest.raises(BadWeights, match="trunk is vgg16, expected mobilenet_v2"):
        refused(scenes, storage, encoder=EncoderConfig(entity=recogniser))


def test_a_lost_or_changed_file_of_the_encoders_weights_is_named(scenes, recogniser, tmp_path):
    index = Index(encoded(scenes, tmp_path / "vectors", frame=recogniser), "train")
    assert encoder_of(index)[0] == index.info.encoder
    file = tmp_path / "vectors" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\x01")
    with pytest.raises(BadEncoder, match=r"encoder\.safetensors: not the weights"):
        encoder_of(index)
    file.write_bytes(b"nothing")
    with pytest.raises(BadEncoder, match=r"encoder\.safetensors: not a safetensors file"):
        encoder_of(index)
    file.unlink()
    with pytest.raises(BadEncoder, match=r"encoder\.safetensors: no such file; copy it there, or encode again"):
        encoder_of(index)


def test_a_beam_of_none_is_refused():
    with pytest.raises(ValueError, match="beam 0: expected at least 1"):
        dataclasses.replace(SMALL, beam=0)
    with pytest.raises(ValueError, match="beam 0: expected at least 1"):
        caption.Caption(run="runs/x", shards="data/x", beam=0)


def test_selecting_by_meteor_without_java_is_refused_before_anything_starts(vectors, storage, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ValueError, match="meteor needs Java"):
        refused(vectors, storage, select="meteor")


def test_runs_of_one_task_are_not_used_for_the_other(finished, vectors, scenes, shards, storage, recogniser):
    with pytest.raises(OtherTask, match=r"captions were requested, but .*recogniser is a classification model"):
        caption.main(caption.Caption(run=recogniser, shards=str(vectors)))
    with pytest.raises(OtherTask, match=r"classes were requested, but .*captions is a captioning model"):
        evaluate.main(evaluate.Evaluate(run=str(storage / "captions"), shards=str(shards)))
    with pytest.raises(OtherRun, match="task classification there, captioning here"):
        train.main("small", job(vectors, storage, "recogniser"))
    with pytest.raises(
        BadShards, match=r"holds vectors that an encoder computed \(python -m jobs\.encode\), no videos"
    ):
        run_train(vectors, storage, "on-vectors", recipe=TINY)


def test_vectors_of_another_encoder_are_not_described(finished, scenes, recogniser, storage, tmp_path):
    other = encoded(scenes, tmp_path / "other", frame=recogniser)
    with pytest.raises(BadEncoder, match="computed by another encoder"):
        caption.main(caption.Caption(run=str(storage / "captions"), shards=str(other)))


def test_a_recipe_comes_back_from_json_as_it_was():
    recipe = dataclasses.replace(SMALL, select="cider", encoder=EncoderConfig(segments=7, entity="imagenet"))
    assert CaptionRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
