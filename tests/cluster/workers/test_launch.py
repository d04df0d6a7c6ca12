"""What the driver decides without a cluster: how many workers, what is worth another attempt, what a signal does."""

import os
import signal
import time

import pytest
import torch
from ray.exceptions import ActorDiedError, RayError
from ray.train import WorkerGroupError
from torch.distributed import DistBackendError

from cluster.workers.driver import Persistence
from cluster.workers.events import Stopped
from cluster.workers.failures import describe_error, first_cause, is_loss
from cluster.workers.launch import run_workers
from cluster.workers.nodes import fitting
from cluster.workers.options import Workers
from cluster.workers.signals import Interrupted
from shards.store import BadShards


@pytest.mark.parametrize(
    ("workers", "sizes"), [(0, [1]), ("0", [1]), (3, [3]), ("4", [4]), ("1:4", [4, 2, 1]), ("3:8", [8, 4]), ("5:7", [])]
)
def test_the_numbers_of_workers_are_those_in_the_range_that_divide_the_batch(workers, sizes):
    divides_or_is_given = lambda size: 8 % size == 0 or str(workers) == str(size)  # noqa: E731
    assert Workers(workers=workers).sizes(divides_or_is_given) == sizes


@pytest.mark.parametrize("workers", [-1, "x", "4:1", "0:4", "1:", ":2", "1:2:3", "1.5"])
def test_a_number_of_workers_that_is_none_is_refused(workers):
    with pytest.raises(ValueError, match=rf"workers {workers}: expected a number, or a range such as 1:4"):
        Workers(workers=workers)


@pytest.mark.parametrize(
    "option", [{"max_failures": -1}, {"wait_minutes": 0}, {"timeout_minutes": -1}, {"cpus_per_worker": 0}]
)
def test_limits_that_are_none_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Workers(workers=2, **option)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RayError("node died"), True),
        (DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:1"), True),
        (RuntimeError("Timed out waiting 300000ms for recv operation to complete"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (BadShards("a shard is damaged"), False),
        (OSError(28, "No space left on device"), False),
        (KeyError("x"), False),
    ],
)  # fmt: skip
def test_only_what_another_attempt_may_mend_is_tried_again(error, wanted):
    assert is_loss(error) == wanted


def test_of_several_workers_errors_the_one_that_says_why_is_raised():
    lost = RuntimeError("gloo: Connection closed by peer")
    own, bug = BadShards("train-000000.tar: cut off"), KeyError("x")
    assert first_cause(WorkerGroupError("", {0: lost, 1: own})) is own
    assert first_cause(WorkerGroupError("", {0: lost, 1: bug})) is bug
    assert first_cause(WorkerGroupError("", {0: lost})) is lost
    assert first_cause(own) is own


def test_what_ray_says_of_an_end_is_told_in_a_few_words():
    died = "The actor died because its node has died. Node Id: 12"
    assert describe_error(RayError(died)) == "node has died"
    ended = "A worker health check failed.\nWorker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits. Some"
    assert describe_error(RayError(ended)) == "Worker unexpectedly exits"
    assert describe_error(ValueError("\n  one\ntwo")) == "ValueError: one"
    assert describe_error(ActorDiedError()).startswith("ActorDiedError: The actor died")


def test_a_machine_that_comes_and_goes_is_not_waited_for(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    grown = Persistence(10)
    assert not grown.reached(True)
    now = 109.0
    assert not grown.reached(True)
    assert not grown.reached(False)
    now = 111.0
    assert not grown.reached(True)
    now = 121.0
    assert grown.reached(True)


def test_as_many_workers_fit_as_the_scarcest_resource_has_room_for():
    assert fitting({"CPU": 7.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}) == 2
    assert fitting({"CPU": 7.0}, {"CPU": 2.0}) == 3
    assert fitting({"CPU": 7.0}, {"CPU": 2.0, "GPU": 1.0}) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_asks_the_work_to_end_well_and_a_second_one_interrupts_it(number):
    def work(job, context):
        assert not context.stop_requested()
        os.kill(os.getpid(), number)
        assert context.stop_requested()
        return Stopped(step=3)

    def stubborn_work(job, context):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        return {}

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run_workers(work, {}, Workers(), lambda _: None)
    assert caught.value.number == number
    with pytest.raises(KeyboardInterrupt):
        run_workers(stubborn_work, {}, Workers(), lambda _: None)
    assert signal.getsignal(number) is before
