"""An actor between workers and their driver: it keeps the workers' events, and the driver's request to stop.

It imports little, as the actor's process starts with this file: PyTorch would take 5 seconds and 400 MB at each restart.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.workers.events import Event


class EventQueue:
    """Keeps events until the driver takes them. Workers do not wait for it, and do not fail without it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stop = False

    def put(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        """The events since the last call."""
        taken, self.events = self.events, []
        return taken

    def request_stop(self) -> None:
        """The driver wants the workers to save and stop."""
        self.stop = True

    def stop_requested(self) -> bool:
        return self.stop


def start_event_queue() -> Any:
    """An EventQueue actor on the driver's own machine, so that it survives the loss of any other machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventQueue).options(scheduling_strategy=here).remote()
