"""A run's folder: checkpoints in any store, written while training goes on; damaged ones; full disks, servers that are away."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from engines import tiny_engine, tiny_model, train, training_at
from moto.server import ThreadedMotoServer
from ports import free_port
from s3fs import S3FileSystem
from servers import s3_server

from cluster.checkpoints.engine_state import load_state
from cluster.checkpoints.files import Checkpoint
from cluster.checkpoints.run_folder import Identity, RunFolder, export_best, load_best
from cluster.checkpoints.writer import CheckpointWriter
from shards.store import BadShards, FolderStore, NoFile, retry

IDENTITY = Identity(
    recipe_digest="a", data_digest="b", recipe={"task": "classification"}, tracking_uri="c", mlflow_run_id="d"
)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> str:
    """Of a run that has not begun: a folder, and a URL."""
    if request.param == "folder":
        return str(tmp_path / "runs" / "mine")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}/mine"


def save(writer: CheckpointWriter, engine, step: int, best: dict | None = None) -> None:
    writer.save(engine, training_at(step), best)


def train_and_save(place: str, keep: int = 2, best_at: int = 2, steps: int = 5):
    """A checkpoint a step, the best of them at `best_at`. Gives back the engine and the run."""
    engine, run = tiny_engine(0), RunFolder(place)
    writer = CheckpointWriter(run, keep)
    for step in range(1, steps + 1):
        train(engine, [step - 1])
        save(writer, engine, step, {"loss": 1.0} if step == best_at else None)
    writer.close()
    return engine, run


def tiny_model_of(engine) -> torch.nn.Module:
    return engine.module


def names(run: RunFolder) -> list[str]:
    return [checkpoint.name for checkpoint in run.checkpoints()]


def damage(store, name: str) -> None:
    content = bytearray(store.read_file(name))
    content[-1] ^= 1
    with store.written(name) as file:
        file.write(content)


def test_a_run_is_kept_in_a_folder_and_in_an_object_store_alike(place):
    engine, run = train_and_save(place)
    assert names(run) == ["checkpoint-00000004", "checkpoint-00000005"]
    assert sorted(run.store.names()) == [
        "checkpoint-00000002/model.safetensors",  # the best
        *(
            f"checkpoint-0000000{step}/{name}"
            for step in (4, 5)
            for name in ("model.safetensors", "optimizer.safetensors", "state.json")
        ),
        "frozen.safetensors",
    ]
    other = tiny_engine(0, model=tiny_model())
    newest = run.newest_whole(warn=pytest.fail)
    assert newest is not None
    state = load_state(other, newest)
    assert state.best is not None
    assert (state.training, state.best.step) == (training_at(5), 2)
    assert train(other, range(5, 8)) == train(engine, range(5, 8))
    assert run.identity() is None
    run.begin(IDENTITY)
    assert RunFolder(place).identity() == IDENTITY
    assert run.result() is None
    run.finish({"steps": 5})
    assert run.result() == {"steps": 5}


def test_the_best_model_stays_when_its_step_is_old(place, tmp_path):
    engine = tiny_engine(0)
    train(engine, range(2))
    wanted = {name: tensor.clone() for name, tensor in tiny_model_of(engine).state_dict().items()}
    _, run = train_and_save(place)
    found = load_best(run.url)
    assert (found.step, found.best, found.checkpoint.name) == (2, True, "checkpoint-00000005")
    torch.testing.assert_close(found.weights, wanted, rtol=0, atol=0)
    torch.testing.assert_close(load_best(f"{run.url}/checkpoint-00000004").weights, wanted, rtol=0, atol=0)
    export_best(found.checkpoint, tmp_path / "alone")
    alone = load_best(tmp_path / "alone")
    assert alone.step == 2
    torch.testing.assert_close(alone.weights, wanted, rtol=0, atol=0)


def test_weights_that_are_not_trained_are_written_once(place, monkeypatch):
    written = []
    store_type = type(RunFolder(place).store)
    real = store_type.written
    monkeypatch.setattr(store_type, "written", lambda self, name: written.append(name) or real(self, name))
    _, run = train_and_save(place)
    assert written.count("frozen.safetensors") == 1
    state = run.checkpoints()[-1].state()
    assert state.weights == ["model.safetensors", "../frozen.safetensors"]
    engine = tiny_engine(0)
    writer = CheckpointWriter(run, 2, load_state(engine, run.checkpoints()[-1]))
    train(engine, [5])
    save(writer, engine, 6)  # by another process, which goes on
    writer.close()
    assert written.count("frozen.safetensors") == 1
    run.checkpoints()[-1].check()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The state that is written is that of the step, whatever the weights are by then."""
    may_write, steps_meanwhile = threading.Event(), 3
    real = FolderStore.written

    def slow(self, name):
        assert may_write.wait(60)
        return real(self, name)

    monkeypatch.setattr(FolderStore, "written", slow)
    engine, run = tiny_engine(0), RunFolder(str(tmp_path))
    writer = CheckpointWriter(run, 2)
    train(engine, [0])
    save(writer, engine, 1)
    losses = train(engine, range(1, 1 + steps_meanwhile))
    writer.check()
    assert not run.checkpoints()
    may_write.set()
    writer.close()
    again = tiny_engine(0)
    load_state(again, run.checkpoints()[-1])
    assert train(again, range(1, 1 + steps_meanwhile)) == losses


def test_weights_that_are_not_finite_are_not_saved_and_the_checkpoint_before_is_the_newest(place):
    engine, run = train_and_save(place, steps=2)
    with torch.no_grad():
        next(weight for weight in tiny_model_of(engine).parameters() if weight.requires_grad).fill_(float("nan"))
    writer = CheckpointWriter(run, 1, run.checkpoints()[-1].state())
    save(writer, engine, 3)
    with pytest.raises(
        ValueError, match=r"checkpoint-00000003: not saved, as the weights are not finite after this step"
    ):
        writer.close()
    assert names(run) == ["checkpoint-00000001", "checkpoint-00000002"]
    run.checkpoints()[-1].check()


# Damage


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["changed", "cut off", "missing"])
def test_a_damaged_newest_checkpoint_is_warned_of_and_the_one_before_it_is_taken(place, file, how):
    _, run = train_and_save(place)
    name = f"checkpoint-00000005/{file}"
    if how == "missing":
        run.store.delete([name])
    elif how == "cut off":
        content = run.store.read_file(name)
        with run.store.written(name) as target:
            target.write(content[: len(content) // 2])
    elif file == "state.json":
        with run.store.written(name) as target:
            target.write(b"[]")
    else:
        damage(run.store, name)
    said: list[str] = []
    found = run.newest_whole(said.append)
    assert found is not None
    assert found.name == "checkpoint-00000004"
    if (file, how) != ("state.json", "missing"):  # without it, it is no checkpoint
        assert len(said) == 1
        assert said[0].startswith(f"warning: a damaged checkpoint is passed over: {run.url}/checkpoint-00000005/{file}")


def test_after_a_damaged_checkpoint_the_same_steps_are_saved_anew(place):
    _, run = train_and_save(place)
    damage(run.store, "checkpoint-00000005/model.safetensors")
    found = run.newest_whole(lambda _: None)
    assert found is not None
    engine = tiny_engine(0)
    writer = CheckpointWriter(run, 2, load_state(engine, found))
    train(engine, [4])
    save(writer, engine, 5)
    writer.close()
    assert names(run) == ["checkpoint-00000004", "checkpoint-00000005"]
    run.checkpoints()[-1].check()


def test_a_run_of_which_every_checkpoint_is_damaged_is_not_begun_anew(place):
    _, run = train_and_save(place)
    damage(run.store, "frozen.safetensors")
    with pytest.raises(
        ValueError, match=r"every checkpoint is damaged \(the newest: .*frozen\.safetensors: SHA-256 .*--name"
    ):
        run.newest_whole(lambda _: None)


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path):
    _, run = train_and_save(str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-00000006").mkdir()
    (tmp_path / "run" / "checkpoint-00000006" / ".model.safetensors.1234.partial").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-00000007").mkdir()
    (tmp_path / "run" / "checkpoint-00000007" / "model.safetensors").write_bytes(b"whole, but alone")
    run.prepare()
    assert not [name for name in run.store.names() if "partial" in name]
    newest = run.newest_whole(pytest.fail)
    assert newest is not None
    assert newest.name == "checkpoint-00000005"
    engine = tiny_engine(0)
    writer = CheckpointWriter(run, 2, load_state(engine, newest))
    train(engine, [5])
    save(writer, engine, 6)
    writer.close()
    assert not [name for name in run.store.names() if name.startswith("checkpoint-00000007")]


# Stores that fail


def test_a_full_disk_is_one_error_the_checkpoint_before_stays_and_room_is_all_that_is_needed(tmp_path):
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        engine, run = tiny_engine(0), RunFolder(str(disk / "run"))
        writer = CheckpointWriter(run, 10)
        with pytest.raises(OSError, match="no space left on the device; make room and run the same again"):
            save_until_full(writer, engine)
        whole = names(run)
        assert whole
        assert not [name for name in run.store.names() if "partial" in name]
        newest = run.newest_whole(pytest.fail)
        assert newest is not None
        assert newest.name == whole[-1]
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        again = tiny_engine(0)
        state = load_state(again, newest)
        writer = CheckpointWriter(run, 10, state)
        train(again, [state.training.step])
        save(writer, again, state.training.step + 1)
        writer.close()
        assert names(run) == [*whole, f"checkpoint-{len(whole) + 1:08}"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def save_until_full(writer: CheckpointWriter, engine) -> None:
    for step in range(1, 30):
        train(engine, [step - 1])
        save(writer, engine, step)


def test_a_store_that_is_away_for_a_while_is_waited_for(s3, monkeypatch, tmp_path):
    """While the server is away nothing is lost, and training waits only when the next checkpoint is due."""
    port = free_port()
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 120.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")  # where nobody answers yet
    S3FileSystem.clear_instance_cache()
    engine, run = tiny_engine(0), RunFolder(f"{s3}/{tmp_path.name}")
    writer = CheckpointWriter(run, 2)
    train(engine, [0])
    save(writer, engine, 1)
    train(engine, [1])
    time.sleep(3)
    writer.check()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        save(writer, engine, 2)
        writer.close()
        assert names(run) == ["checkpoint-00000001", "checkpoint-00000002"]
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def test_a_store_that_stays_away_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 5.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    S3FileSystem.clear_instance_cache()
    writer = CheckpointWriter(RunFolder("s3://videos/away"), 2)
    save(writer, tiny_engine(0), 0)
    with pytest.raises(BadShards, match=r"s3://videos/away/.*failed \d+ times in 5 s"):
        writer.close()
    S3FileSystem.clear_instance_cache()


# Reading what is not there


def test_a_place_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no checkpoint in it; expected a run's folder"):
        load_best(tmp_path / "nowhere")
    assert RunFolder(str(tmp_path / "nowhere")).newest() is None
    with pytest.raises(NoFile), Checkpoint.at(tmp_path / "nowhere").store.fetched("x"):
        pass


def test_a_run_file_that_is_no_json_is_refused_by_name(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: not JSON .* changed by hand"):
        RunFolder(str(tmp_path)).identity()
    (tmp_path / "run.json").write_text(json.dumps({**IDENTITY.__dict__}))
    assert RunFolder(str(tmp_path)).identity() == IDENTITY
