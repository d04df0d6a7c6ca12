"""What workers tell the driver, and the driver them: an actor between them.

In a file of its own that imports little, as the actor's process starts with it: with PyTorch it would take 5 seconds of a core
and 400 MB, at each restart.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

News = dict[str, Any]


class Mailbox:
    """Keeps what workers tell until the driver takes it. Workers do not wait for it, nor fail without it."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.stop = False

    def put(self, news: News) -> None:
        self.news.append(news)

    def take(self) -> list[News]:
        taken, self.news = self.news, []
        return taken

    def ask(self) -> None:
        """The driver wants the workers to save and stop."""
        self.stop = True

    def asked(self) -> bool:
        return self.stop


def new_mailbox() -> Any:
    """On the driver's own machine, so that losing another one does not silence the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
