"""Whatever dies, hangs or goes away, a training goes on and ends with the losses of one that nobody disturbed."""

import json
import os
import re
import signal
import time
from collections.abc import Callable

import pytest
from hosts import Cluster, Host
from trainings import Training, events, json_of, losses, tracked

pytestmark = [
    pytest.mark.multihost(minutes=4, of="cluster/workers grurcn/training/loop.py"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("packed"),
]

# With small steps, what other numbers of workers round differently grows slowly, and each step's loss can be compared.
RATE = ["--optim.learning-rate", "1e-4"]
STEPS_ALIKE = 60
NUM_STEPS, MANY_STEPS = 100, 240  # half a minute and more than one


def steps(count: int, save_every: int = 10) -> list[str]:
    return ["--num-steps", str(count), "--val-every", str(count), "--save-every", str(save_every), *RATE]


@pytest.fixture
def train(cluster: Cluster) -> Callable[[str, str, list[str]], Training]:
    """Begins a training and waits for its step 15."""

    def begin(name: str, workers: str, options: list[str]) -> Training:
        training = Training(cluster, name, "--workers", workers, *options)
        training.submit()
        training.wait_for_step(15)
        return training

    return begin


@pytest.fixture
def check(cluster: Cluster, alone: Callable[..., dict[int, float]]) -> Callable[[Training, int], None]:
    """A training has ended well, as one run, with all steps told once and the losses of one process."""

    def compare(training: Training, count: int) -> None:
        training.end()
        assert json.loads(json_of(training.name).read_text())["steps"] == count
        found = losses(cluster, training.name)
        assert sorted(found) == list(range(1, count + 1))
        wanted = alone(*steps(count), "--log-every", "1")
        assert found == pytest.approx(wanted, rel=1e-3)
        first = range(1, STEPS_ALIKE + 1)
        assert [found[step] for step in first] == pytest.approx([wanted[step] for step in first], rel=1e-5)
        assert tracked(cluster, training.name).info.status == "FINISHED"

    return compare


def host_with_worker(cluster: Cluster) -> Host:
    """A machine with a worker, not the head."""
    return next(host for host in (cluster.one, cluster.two) if host.workers())


def where(cluster: Cluster) -> set[str]:
    return {host.name for host in cluster.nodes if host.workers()}


def test_a_killed_worker_and_killed_machines_are_done_without_and_one_that_comes_back_is_used(
    cluster, train, check, record_property
):
    training = train("lost-and-found", "1:2", steps(MANY_STEPS))
    host = host_with_worker(cluster)
    [process] = host.workers()
    os.kill(process, signal.SIGKILL)
    training.wait_till_again(time.monotonic(), 1, record_property, "a worker is killed")
    assert re.search(rf"lost worker \d on {host.name} \({host.address}\), process {process}: ", training.log)

    training.wait_for_step(training.step + 10)  # with a checkpoint among them
    first = host_with_worker(cluster)
    [process] = first.workers()
    first.kill()
    training.wait_till_again(time.monotonic(), 2, record_property, "a machine is killed")
    assert re.search(rf"lost worker \d on {first.name} \({first.address}\), process {process}: ", training.log)
    second = cluster.two if first is cluster.one else cluster.one
    assert where(cluster) == {"head", second.name}

    training.wait_for_step(training.step + 10)
    second.kill()
    training.wait_till_again(time.monotonic(), 3, record_property, "one more machine is killed")
    assert where(cluster) == {"head"}

    first.start()
    started = time.monotonic()
    training.wait_for("machines for 2 workers have come: saving, then going on with them")
    training.wait_for("going on after step", 4)
    record_property("a machine comes back", f"{time.monotonic() - started:.0f} s until it is used")
    assert where(cluster) == {"head", first.name}
    check(training, MANY_STEPS)
    told = events(cluster, training.name)
    assert [bool(re.search("lost worker", event)) for event in told] == [True, False, True, False, True, False, False]
    assert [bool(re.search("training again", event)) for event in told] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    assert "machines for 2 workers have come" in told[-1]


def test_a_link_that_fails_for_seconds_is_waited_for_and_one_that_stays_down_is_done_without(
    cluster, train, check, record_property
):
    training = train("link", "1:2", steps(NUM_STEPS))
    host = host_with_worker(cluster)
    [process] = host.workers()
    host.link_down()
    time.sleep(5)
    host.link_up()
    step, since = training.step, time.monotonic()
    training.wait_for_step(step + 1)
    record_property("a link is down for 5 s", f"{time.monotonic() - since:.0f} s until the next step")
    training.wait_for_step(step + 10)
    assert "lost" not in training.log

    host.link_down()
    training.wait_till_again(time.monotonic(), 1, record_property, "a link stays down")
    assert re.search(
        rf"lost worker \d on {host.name} \({host.address}\), process {process}: node has died", training.log
    )
    check(training, NUM_STEPS)


def test_a_job_that_is_killed_or_stopped_or_lost_with_the_head_goes_on_when_it_is_submitted_again(
    cluster, train, check, record_property
):
    training = train("again", "2", steps(NUM_STEPS))
    for pid in cluster.drivers():
        os.kill(pid, signal.SIGKILL)
    assert cluster.wait(training.job) == "FAILED"

    since = time.monotonic()
    training.submit({"RAY_JOB_STOP_WAIT_TIME_S": "60"})  # 3 s by default: too short for saving
    training.wait_for_step(16)
    record_property("the job is submitted again", f"{time.monotonic() - since:.0f} s until the next step")
    assert "going on after step 10 from" in training.log
    training.wait_for_step(25)
    since = time.monotonic()
    cluster.stop(training.job)
    record_property("the job is stopped", f"{time.monotonic() - since:.0f} s until its end")
    assert cluster.status(training.job) == "STOPPED"
    assert training.log.endswith("interrupted; run the same command again to go on\n")
    stopped_at = training.step

    training.submit()
    training.wait_for_step(45)
    assert f"going on after step {stopped_at} from" in training.log

    since = time.monotonic()
    cluster.head.kill()
    cluster.heal()
    training.submit()
    training.wait_for_step(46)
    record_property(
        "the head is killed", f"{time.monotonic() - since:.0f} s until the next step, cluster and job started anew"
    )
    assert "going on after step 40 from" in training.log
    check(training, NUM_STEPS)


def test_a_machine_that_is_to_go_is_left_in_time_and_a_run_that_needs_two_machines_waits_for_the_second(
    cluster, train, check, record_property
):
    training = train("drained", "2", steps(NUM_STEPS, save_every=1000))
    host = host_with_worker(cluster)
    cluster.drain(host)
    since = time.monotonic()
    training.wait_for(f"{host.address} is about to be taken away: saving, then going on without it")
    training.wait_for("going on after step")
    [saved] = re.findall(r"going on after step (\d+)", training.log)
    told_before = training.log.partition("going on after step")[0]
    assert f"step {saved:>6} of" in told_before.splitlines()[-1]  # no step is lost
    training.wait_until(lambda: f"step {int(saved) + 1:>6} of" in training.log, "one step more")
    record_property("a machine is to go", f"{time.monotonic() - since:.0f} s until the next step")
    assert host.name not in where(cluster)

    host.kill()
    training.wait_for_step(training.step + 10)
    assert "lost" not in training.log
    other = host_with_worker(cluster)
    other.kill()
    since = time.monotonic()
    training.wait_for("waiting for machines: 2 workers of 1 CPU are needed, the Ray cluster has room for 1")
    other.start()
    training.wait_till_again(since, 1, record_property, "a machine that is needed is killed, and comes back")
    check(training, NUM_STEPS)


def test_servers_that_freeze_or_cannot_be_reached_are_waited_for(cluster, train, check, record_property):
    training = train("store", "1:2", steps(NUM_STEPS))
    cluster.store.freeze()
    time.sleep(30)
    assert training.step < NUM_STEPS
    cluster.store.thaw()
    step, since = training.step, time.monotonic()
    training.wait_for_step(step + 5)
    record_property("the servers are frozen for 30 s", f"{time.monotonic() - since:.0f} s until the fifth step")
    cluster.store.link_down()
    time.sleep(10)
    cluster.store.link_up()
    check(training, NUM_STEPS)
    assert "lost" not in training.log


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            ["--workers", "3"],
            "a global batch of 4 cannot be shared evenly by 3 workers; workers that divide it: 1, 2, 4",
        ),
        (
            ["--workers", "4", "--wait-minutes", "0.1"],
            "4 workers need 4 CPUs, but the Ray cluster has 3; ask for fewer workers or add machines",
        ),
    ],
)
def test_machines_that_are_too_few_are_one_clear_error(options, error, cluster):
    training = Training(cluster, "too-few", *options, *steps(NUM_STEPS))
    training.submit()
    assert cluster.wait(training.job) == "FAILED"
    assert training.log.splitlines()[-1] == f"error: {error}"
    assert "Traceback" not in training.log
