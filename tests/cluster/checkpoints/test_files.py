"""A run that is stopped and resumed goes on as if it had not been: at every ZeRO stage, and at another world
size."""

import json

import pytest
import torch
import torch.distributed as dist
from engines import OPTIMIZERS, tiny_engine, tiny_model, train, training_at
from safetensors.torch import load_file
from torch import nn
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import start_processes

from cluster.checkpoints.engine_state import load_state, take_snapshot
from cluster.checkpoints.files import Checkpoint, write_frozen, write_snapshot
from cluster.engine import loss_scale

STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


def write_state(engine, folder, step=0):
    """All ranks call it; when it returns, rank 0 has written the checkpoint, and its frozen weights beside it."""
    checkpoint = Checkpoint.at(folder)
    snapshot = take_snapshot(engine, with_frozen=True)
    if snapshot is not None:
        write_snapshot(snapshot, checkpoint, write_frozen(snapshot, checkpoint.store), training_at(step))
    dist.barrier()
    return checkpoint


@STAGES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_has_bit_equal_losses(zero_stage, optimizer, tmp_path):
    uninterrupted = train(tiny_engine(zero_stage, optimizer), range(8))

    first = tiny_engine(zero_stage, optimizer)
    losses = train(first, range(3))
    write_state(first, tmp_path, step=3)
    second = tiny_engine(zero_stage, optimizer, model=tiny_model().apply(scramble))
    state = load_state(second, Checkpoint.at(tmp_path))
    losses += train(second, range(state.training.step, 8))

    assert losses == uninterrupted
    assert len(set(losses)) == 8


def scramble(module):
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        tensor.data.fill_(3)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1), (2, 0), (1, 2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_resumes_at_another_zero_stage(before, after, optimizer, tmp_path):
    uninterrupted = train(tiny_engine(before, optimizer), range(8))
    first = tiny_engine(before, optimizer)
    train(first, range(3))
    write_state(first, tmp_path)
    second = tiny_engine(after, optimizer)
    load_state(second, Checkpoint.at(tmp_path))
    assert train(second, range(3, 8)) == pytest.approx(uninterrupted[3:], rel=1e-5)


@STAGES
def test_an_engine_that_has_trained_goes_back_to_the_checkpoint(zero_stage, tmp_path):
    engine = tiny_engine(zero_stage)
    train(engine, range(3))
    write_state(engine, tmp_path)
    losses = train(engine, range(3, 6))
    load_state(engine, Checkpoint.at(tmp_path))
    assert train(engine, range(3, 6)) == losses


@STAGES
def test_a_checkpoint_before_the_first_step_holds_no_optimizer_state(zero_stage, tmp_path):
    write_state(tiny_engine(zero_stage), tmp_path)
    assert load_file(tmp_path / "optimizer.safetensors") == {}
    engine = tiny_engine(zero_stage)
    train(engine, range(2))
    load_state(engine, Checkpoint.at(tmp_path))
    assert train(engine, range(3)) == train(tiny_engine(zero_stage), range(3))


@STAGES
def test_the_files_hold_whole_tensors_by_name(zero_stage, tmp_path):
    engine = tiny_engine(zero_stage)
    train(engine, range(2))
    write_state(engine, tmp_path, step=2)

    model = tiny_model()
    model.load_state_dict(Checkpoint.at(tmp_path).weights(), strict=True)
    assert Checkpoint.at(tmp_path).state().training == training_at(2)
    trainable = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: tensor.shape for name, tensor in load_file(tmp_path / "optimizer.safetensors").items()}
    assert moments == {f"{name}/{key}": shape for name, shape in trainable.items() for key in ("exp_avg", "exp_avg_sq")}
    assert Checkpoint.at(tmp_path).state().optimizer.step_counts == dict.fromkeys(trainable, 2.0)


@STAGES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_loses_nothing_of_the_float32_weights(zero_stage, precision, tmp_path):
    initial = tiny_model().state_dict()
    write_state(tiny_engine(zero_stage, precision=precision), tmp_path)
    torch.testing.assert_close(Checkpoint.at(tmp_path).weights(), dict(initial), rtol=0, atol=0)


@STAGES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_low_precision_run_has_equal_losses_and_loss_scale(zero_stage, precision, tmp_path):
    uninterrupted = tiny_engine(zero_stage, precision=precision)
    losses = train(uninterrupted, range(6))
    first = tiny_engine(zero_stage, precision=precision)
    train(first, range(3))
    write_state(first, tmp_path)
    second = tiny_engine(zero_stage, precision=precision)
    load_state(second, Checkpoint.at(tmp_path))
    assert train(second, range(3, 6)) == losses[3:]
    assert loss_scale(second) == loss_scale(uninterrupted)


# World size 2


def rank(index, world_size, folder, task, *args):
    dist.init_process_group(
        "gloo", store=FileStore(str(folder / "store"), world_size), rank=index, world_size=world_size
    )
    torch.set_num_threads(1)
    task(folder, *args)
    dist.destroy_process_group()


def on_two_ranks(folder, task, *args):
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    start_processes(rank, args=(2, folder, task, *args), nprocs=2, start_method="spawn")
    return json.loads((folder / "losses.json").read_text())


# ZeRO 3 keeps small parameters whole on every rank unless told otherwise.
CUT_ALL_PARAMETERS = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'


def all_stages(folder, cases):
    """For each (stage, optimizer): an uninterrupted run, one that is resumed, and one resumed from a world of
    one."""
    losses = {}
    for zero_stage, optimizer in cases:
        path = folder / "zero3.json" if (zero_stage, optimizer) == (3, "AdamW") else None
        name = f"{zero_stage} {optimizer}"
        uninterrupted = train(tiny_engine(zero_stage, optimizer, config_path=path), range(6))
        first = tiny_engine(zero_stage, optimizer, config_path=path)
        train(first, range(3))
        write_state(first, folder / f"two {name}")
        second = tiny_engine(zero_stage, optimizer, config_path=path)
        load_state(second, Checkpoint.at(folder / f"two {name}"))
        resumed = train(second, range(3, 6))
        grown = tiny_engine(zero_stage, optimizer, config_path=path)
        load_state(grown, Checkpoint.at(folder / f"one {name}"))
        losses[name] = [uninterrupted, resumed, train(grown, range(3, 6))]
    low_precision = tiny_engine(3, precision="bf16", config_path=folder / "zero3.json")
    write_state(low_precision, folder / "low precision")
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def test_a_run_resumes_bit_equal_on_two_ranks_and_goes_from_one_to_two_and_back(tmp_path):
    cases = [(stage, optimizer) for stage in (0, 1, 2, 3) for optimizer in OPTIMIZERS]
    on_one = {}
    for stage, optimizer in cases:
        engine = tiny_engine(stage, optimizer)
        on_one[f"{stage} {optimizer}"] = train(engine, range(3))
        write_state(engine, tmp_path / f"one {stage} {optimizer}")
        on_one[f"{stage} {optimizer}"] += train(engine, range(3, 6))

    (tmp_path / "zero3.json").write_text(CUT_ALL_PARAMETERS)
    on_two = on_two_ranks(tmp_path, all_stages, cases)
    torch.testing.assert_close(
        Checkpoint.at(tmp_path / "low precision").weights(), dict(tiny_model().state_dict()), rtol=0, atol=0
    )

    for stage, optimizer in cases:
        name = f"{stage} {optimizer}"
        uninterrupted, resumed, grown = on_two[name]
        assert resumed == uninterrupted[3:], name
        assert uninterrupted == pytest.approx(on_one[name], rel=1e-5), name
        assert grown == pytest.approx(on_one[name][3:], rel=1e-5), name
        shrunk = tiny_engine(stage, optimizer)
        load_state(shrunk, Checkpoint.at(tmp_path / f"two {name}"))
        assert train(shrunk, range(3, 6)) == pytest.approx(on_one[name][3:], rel=1e-5), name


# Bad input


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    engine = tiny_engine(1)
    train(engine, range(1))
    write_state(engine, folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"state\.json: no such file, so this is no complete checkpoint"):
        Checkpoint.at(tmp_path).state()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_state_file_that_is_not_ours_is_refused(copy, text):
    (copy / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json: not a checkpoint's state"):
        Checkpoint.at(copy).state()


def test_another_format_is_refused(copy):
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match=r"state\.json: format 99 found, 3 expected"):
        Checkpoint.at(copy).state()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_missing_or_changed_file_is_refused_by_name(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: SHA-256 .* found, .* expected: the file has changed"):
        load_state(tiny_engine(1), Checkpoint.at(copy))
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file"):
        load_state(tiny_engine(1), Checkpoint.at(copy))


@STAGES
def test_another_model_is_refused_and_the_engine_left_as_it_was(checkpoint, zero_stage):
    engine = tiny_engine(zero_stage, model=tiny_model(channels=2))
    with pytest.raises(
        ValueError,
        match=r"does not fit the model: shape 3\.bias \(3,\) instead of \(2,\), 3\.weight .*5\.weight",
    ):
        load_state(engine, Checkpoint.at(checkpoint))
    assert train(engine, range(2)) == train(tiny_engine(zero_stage, model=tiny_model(channels=2)), range(2))


def test_a_model_with_other_frozen_parameters_is_refused(checkpoint):
    model = tiny_model()
    model[0].requires_grad_(True)
    model[3].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"only there 3\.bias, 3\.weight; only here 0\.bias, 0\.weight; freeze the same"
    ):
        load_state(tiny_engine(1, model=model), Checkpoint.at(checkpoint))


def test_missing_and_unexpected_weights_are_named(checkpoint):
    model = tiny_model()
    model[1] = nn.GroupNorm(1, 5, affine=False)
    model.register_buffer("centre", torch.zeros(5))
    with pytest.raises(ValueError, match=r"other parameters .* only there 1\.bias, 1\.weight; freeze"):
        load_state(tiny_engine(1, model=model), Checkpoint.at(checkpoint))
    model = tiny_model()
    model.register_buffer("centre", torch.zeros(5))
    with pytest.raises(ValueError, match=r"does not fit the model: missing centre; build the model"):
        load_state(tiny_engine(1, model=model), Checkpoint.at(checkpoint))
    model = tiny_model()
    model[1].register_buffer("running_mean", torch.zeros(5), persistent=False)
    with pytest.raises(ValueError, match=r"does not fit the model: unexpected 1\.running_mean; build the model"):
        load_state(tiny_engine(1, model=model), Checkpoint.at(checkpoint))


def test_another_optimizer_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: written by AdamW, but this run uses SGD"):
        load_state(tiny_engine(1, "SGD"), Checkpoint.at(checkpoint))
