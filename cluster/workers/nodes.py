"""The machines of a Ray cluster: how many workers they have room for, and which are about to go."""

import time
from collections.abc import Mapping, Sequence

import ray
from ray._private.state import state

from cluster.workers.connect import NoCluster

Resources = dict[str, float]


def needs(cpus: int, gpu: bool) -> Resources:
    """What one worker takes."""
    return {"CPU": float(cpus), **({"GPU": 1.0} if gpu else {})}


class Nodes:
    """Counts workers of one kind that would fit on the machines that are alive and stay."""

    def __init__(self, needs: Resources):
        self.needs = needs

    def needs_text(self) -> str:
        """What one worker takes, such as "1 CPU and 1 GPU"."""
        return " and ".join(f"{count:g} {kind}" for kind, count in self.needs.items())

    def check_possible(self, least: int) -> None:
        """Raises NoCluster if even an idle cluster would have no room: Ray would wait for a machine that may never come."""
        found = ray.cluster_resources()
        for kind, each in self.needs.items():
            if found.get(kind, 0) < least * each:
                raise NoCluster(
                    f"{least} workers need {least * each:g} {kind}s, but the Ray cluster has {found.get(kind, 0):g}; "
                    "ask for fewer workers or add machines"
                )

    def room(self, ours: int = 0) -> int:
        """Workers that fit now, on top of or in place of `ours` that run already."""
        leaving = state.get_draining_nodes()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
        fit = sum(fitting(node["Resources"], self.needs) for node in nodes)
        return min(fit, ours + fitting(ray.available_resources(), self.needs))

    def largest(self, sizes: Sequence[int], ours: int = 0) -> int | None:
        """The largest of the sizes, which come largest first, that there is room for; None if there is for none."""
        room = self.room(ours)
        return next((size for size in sizes if size <= room), None)

    def leaving(self, used: set[str]) -> str | None:
        """The addresses of those of our nodes that are about to be taken away: drained, or preempted with notice."""
        found = set(state.get_draining_nodes()) & used
        addresses = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in found)
        return ", ".join(addresses) or None

    def settle(self, seconds: float) -> None:
        """After a loss: until what its workers held is free again, or is known to be gone, or for so long."""
        until, before = time.monotonic() + seconds, -1
        while time.monotonic() < until:
            time.sleep(0.5)
            now = self.room()
            if now == before == sum(fitting(node["Resources"], self.needs) for node in ray.nodes() if node["Alive"]):
                return
            before = now


def fitting(resources: Mapping[str, float], needs: Resources) -> int:
    return min(int(resources.get(kind, 0) // each) for kind, each in needs.items())
