"""Writes a run's checkpoints while training goes on, and deletes those that are no longer needed."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from deepspeed import DeepSpeedEngine
from torch import distributed

from cluster.checkpoints.engine_state import take_snapshot
from cluster.checkpoints.files import (
    FROZEN,
    MODEL,
    STATE,
    Checkpoint,
    Snapshot,
    checkpoint_name,
    write_frozen,
    write_snapshot,
)
from cluster.checkpoints.run_folder import RunFolder, step_of
from cluster.checkpoints.state import CheckpointState, Training


class CheckpointWriter:
    """Writes a run's checkpoints in a thread of rank 0, one at a time, while training goes on. Every rank has one."""

    def __init__(self, run: RunFolder, keep: int, state: CheckpointState | None = None):
        """keep: how many of the newest checkpoints stay. state: of the checkpoint that the run resumes from."""
        self.run, self.keep = run, keep
        self.frozen_sha256 = state.sha256.get(f"../{FROZEN}") if state else None
        self.best = state.best if state else None
        self.with_frozen = self.frozen_sha256 is None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self.writing: Future[None] | None = None

    def save(
        self,
        engine: DeepSpeedEngine,
        training: Training,
        scores: Mapping[str, float] | None,
        then: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        """Copies the state, and begins to write it once the checkpoint before is written. Every rank calls it.

        scores: of this step's validation, if these weights are the best so far. then: called in the thread, once the checkpoint
        is there. Raises what writing the one before has raised: OSError for a full disk, ValueError for a store that stays away.
        """
        self.wait()
        snapshot = take_snapshot(engine, self.with_frozen)
        self.with_frozen = False
        if snapshot is not None:
            self.writing = self.thread.submit(self.write, snapshot, training, scores, then)

    def write(
        self,
        snapshot: Snapshot,
        training: Training,
        scores: Mapping[str, float] | None,
        then: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        """What the thread does."""
        checkpoint = Checkpoint(self.run.store, checkpoint_name(training.step))
        check_finite(snapshot, checkpoint)
        if snapshot.frozen is not None:
            self.frozen_sha256 = write_frozen(snapshot, self.run.store)
        best = self.best if scores is None else scores
        self.best = write_snapshot(snapshot, checkpoint, self.frozen_sha256, training, best).best
        self.delete_old(training.step)
        then(checkpoint)

    def delete_old(self, step: int) -> None:
        """Deletes what neither the newest checkpoints up to this step nor the best model need."""
        store = self.run.store
        kept = {each.name for each in self.run.checkpoints() if step_of(each.name) <= step}
        kept = set(sorted(kept, key=step_of)[-self.keep :])
        best = f"{checkpoint_name(self.best.step)}/{MODEL}" if self.best else ""
        old = [name for name in store.names() if step_of(name) >= 0 and name.split("/")[0] not in kept and name != best]
        store.delete([name for name in old if name.endswith(STATE)])  # first, so that no half of one looks whole
        store.delete([name for name in old if not name.endswith(STATE)])

    def check(self) -> None:
        """Raises what writing has raised, if it has; does not wait."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is written. Raises what writing has raised."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Waits, on every rank, until all is written."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
        distributed.barrier()


def check_finite(snapshot: Snapshot, checkpoint: Checkpoint) -> None:
    """Raises ValueError for weights from which nobody could go on: the loss of their step may still have been a number."""
    bad = [name for name, tensor in snapshot.weights.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"{checkpoint.url}: not saved, as the weights are not finite after this step ({bad[0]} and {len(bad) - 1} more); the "
            "checkpoints before it are kept; lower --optim.learning-rate, or clip sooner (--optim.clip-norm)"
        )
