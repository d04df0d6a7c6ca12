"""A run that is killed and goes on, again and again and on other numbers of workers, is the run that nobody disturbed."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import batches_read, losses, train_on
from small_runs import STEPS, worker_job

from cluster.checkpoints.run_folder import RunFolder


def new_folder(parent: Path) -> Path:
    folder = parent / f"{len(list(parent.iterdir()))}"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_on(1, folder, worker_job(shards, folder))
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return folder


def disturb(folder: Path, shards: Path, plan: list[tuple[int, int, int]]) -> None:
    """Begins a run, kills it, goes on with it, for each (workers, ZeRO stage, lines after which it is killed); then ends it."""
    for workers, zero, lines in plan:
        train_on(workers, folder, worker_job(shards, folder, zero=zero), kill_after=lines)
    workers, zero, _ = plan[0]
    train_on(workers, folder, worker_job(shards, folder, zero=zero))


KILLS = st.integers(1, 30)
PLANS = st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 3), KILLS), min_size=1, max_size=4)
SAME_PLANS = st.lists(KILLS, min_size=1, max_size=4)
SOME = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(SOME, max_examples=12)


def check_same_workers(kills: list[int], folder: Path, shards: Path, undisturbed: Path) -> None:
    disturb(folder, shards, [(1, 0, lines) for lines in kills])
    wanted = losses(undisturbed)
    found = losses(folder)
    assert {step: set(values) for step, values in found.items()} == {step: set(wanted[step]) for step in wanted}
    weights = [RunFolder(str(place / "run")).checkpoints()[-1].weights() for place in (folder, undisturbed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def check_any_workers(plan: list[tuple[int, int, int]], folder: Path, shards: Path, undisturbed: Path) -> None:
    disturb(folder, shards, plan)
    wanted = losses(undisturbed)
    assert losses(folder).keys() == wanted.keys()
    for step, values in losses(folder).items():
        for value in values:
            assert value == pytest.approx(wanted[step][0], rel=1e-5), step
    batches = batches_read(undisturbed)
    assert batches_read(folder).keys() >= batches.keys()
    for place, found in batches_read(folder).items():
        assert found == batches[place], place


@SOME
@given(kills=SAME_PLANS)
def test_a_run_killed_at_any_step_repeats_every_bit(kills, shards, undisturbed, tmp_path):
    check_same_workers(kills, new_folder(tmp_path), shards, undisturbed)


@SOME
@given(plan=PLANS)
def test_a_run_goes_on_with_any_number_of_workers_and_any_zero_stage(plan, shards, undisturbed, tmp_path):
    check_any_workers(plan, new_folder(tmp_path), shards, undisturbed)


@pytest.mark.nightly
@pytest.mark.timeout(1500)
@MANY
@given(kills=SAME_PLANS)
def test_many_runs_killed_at_any_step_repeat_every_bit(kills, shards, undisturbed, tmp_path):
    check_same_workers(kills, new_folder(tmp_path), shards, undisturbed)


@pytest.mark.nightly
@pytest.mark.timeout(1500)
@MANY
@given(plan=PLANS)
def test_many_runs_go_on_with_any_number_of_workers_and_any_zero_stage(plan, shards, undisturbed, tmp_path):
    check_any_workers(plan, new_folder(tmp_path), shards, undisturbed)
