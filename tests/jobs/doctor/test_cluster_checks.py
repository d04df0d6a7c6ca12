"""What makes machines fail together is found: storage, process groups, clocks, room."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_findings import bad, in_words, with_second

from jobs.doctor.cluster import names_of_nodes
from jobs.doctor.cluster_checks import check_answers, check_clocks, check_groups, check_room, check_shared_storage
from jobs.doctor.facts import ClusterFacts, GroupResult

ROOT = Path(__file__).parents[3]
NOTHING = ClusterFacts(unanswered={}, clock_offsets={}, clock_errors={}, unseen_files={}, groups={})


def test_a_storage_that_is_each_machines_own_is_an_error(here):
    cluster = replace(NOTHING, unseen_files={"two": ("one",)})
    finding = bad(check_shared_storage(cluster, "/data/runs"))
    assert "/data/runs is not shared: two does not see what one wrote" in finding.text
    assert "network folder" in finding.fix
    assert not check_shared_storage(NOTHING, "/data/runs")


def test_a_real_group_that_cannot_form_is_an_error_with_the_interface(two):
    """gloo itself, told to use an interface that this machine does not have."""
    script = "import jobs.doctor.cluster as c; print(c.join_group('gloo', '127.0.0.1:0', 0, 1, 5.0))"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "nosuch0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    match = re.fullmatch(r"GroupResult\(error=(?:'|\")(.+)(?:'|\"), bytes_per_second=0.0\)", done.stdout.strip())
    assert match, done.stdout + done.stderr
    assert "nosuch0" in match[1]
    cluster = replace(NOTHING, groups={"gloo": {"one": GroupResult(error=match[1]), "two": GroupResult()}})
    finding = bad(check_groups(two, cluster))
    assert f"gloo cannot form one over 2 machines (one: {match[1]}" in finding.text


def test_a_group_that_fails_where_a_host_name_resolves_to_the_loopback_names_the_interface(two):
    trapped = with_second(two, named_interfaces={}, host_address="127.0.0.1", interfaces={"eth7": ("10.0.0.2",)})
    joined = {"one": GroupResult(bytes_per_second=1e9), "two": GroupResult(error="connectFullMesh failed")}
    cluster = replace(NOTHING, groups={"gloo": joined})
    assert "GLOO_SOCKET_IFNAME=eth7" in bad(check_groups(trapped, cluster)).fix
    slow = replace(cluster, groups={"gloo": {name: GroupResult(bytes_per_second=1e6) for name in joined}})
    assert "warning process group: gloo adds up tensors over 2 machines at 1 MB/s" in in_words(
        bad(check_groups(two, slow))
    )


def test_machines_that_do_not_answer_are_named(two):
    cluster = replace(NOTHING, unanswered={"three": "ModuleNotFoundError: No module named 'jobs'"})
    finding = bad(check_answers(two, cluster))
    assert "three is alive for Ray and did not answer: ModuleNotFoundError" in finding.text
    assert "ray job submit --working-dir ." in finding.fix


@pytest.mark.parametrize(("ahead", "level"), [(0.1, "ok"), (-30.0, "warning"), (1000.0, "error")])
def test_clocks_that_differ_are_found(ahead, level):
    cluster = replace(NOTHING, clock_offsets={"one": 0.0, "two": ahead}, clock_errors={"one": 0.001, "two": 0.5})
    [finding] = check_clocks(cluster)
    assert finding.level == level
    assert level == "ok" or f"two is {ahead:+.1f} s off" in finding.text


@pytest.mark.parametrize(
    ("workers", "room", "impossible", "level"),
    [(2, 2, None, "ok"), (2, 1, None, "warning"), (2, 0, "2 workers need 2 CPUs, the Ray cluster has 1", "error")],
)
def test_workers_for_which_the_cluster_has_no_room_are_found(workers, room, impossible, level):
    [finding] = check_room(workers, room, "1 CPU", impossible)
    assert finding.level == level
    assert not check_room(0, room, "1 CPU", impossible)


def test_nodes_of_one_host_have_names_of_their_own():
    node = {"NodeManagerHostname": "h", "NodeManagerAddress": "10.0.0.1"}
    other = {"NodeManagerHostname": "i", "NodeManagerAddress": "10.0.0.2"}
    names = names_of_nodes([{**node, "NodeID": "abcdef01"}, {**node, "NodeID": "012345ff"}, {**other, "NodeID": "9"}])
    assert names == ["h (10.0.0.1, node abcdef)", "h (10.0.0.1, node 012345)", "i (10.0.0.2)"]
