"""The training loop: what each worker runs, from batches to checkpoints.

    batches ──> loss ──> backward ──> step ──> metrics ──> validation ──> checkpoint

What is trained is a task (task.py): its batches, its model, its loss, its validation.
"""

from deepspeed import DeepSpeedEngine

from cluster.checkpoints.run_folder import RunFolder
from cluster.engine import set_learning_rate, start_engine
from cluster.workers.collectives import Collectives
from cluster.workers.context import WorkerContext
from cluster.workers.events import Stopped, Validated
from grurcn.training.divergence import LossCheck
from grurcn.training.optim import build_optimizer, learning_rate
from grurcn.training.reporting import Reporter
from grurcn.training.result import RunResult
from grurcn.training.saving import newest_checkpoint, resume, save
from grurcn.training.state import Scores, TrainingState
from grurcn.training.stopwatch import Stopwatch
from grurcn.training.task import Reader, Task, WorkerJob


def train_worker(job: WorkerJob, context: WorkerContext, read: Reader | None = None) -> RunResult | Stopped:
    """Trains on one worker, from the newest checkpoint on. Returns the same on every rank. read: another reader of batches."""
    recipe, run, collectives = job.recipe, RunFolder(job.run), Collectives(job.timeout_minutes)
    checkpoint = newest_checkpoint(run, collectives, context)
    meta = checkpoint.state().training.model if checkpoint else None
    task = job.task.start(job, context, meta, **({"read": read} if read else {}))
    engine = build_engine(task, job, context, fresh=checkpoint is None)
    state, writer = resume(engine, run, checkpoint, job.keep, context)
    reporter, losses = Reporter(job, context, collectives, state), LossCheck(state.step, collectives)
    start = divmod(state.step, task.order.steps_per_epoch)
    batches = task.batches(rank=context.rank, world_size=context.world_size, start=start)
    tally, watch = task.tally(), Stopwatch(recipe.global_batch, context.device)
    stop = False

    while not state.is_over(recipe) and not stop:
        with watch.waiting():
            _, batch = next(batches)
        rate = learning_rate(state.step, recipe.num_steps, recipe.optim)
        set_learning_rate(engine, rate)
        for part in batch.to(context.device).split(job.accumulation):
            with watch.computing():
                loss = task.loss(engine, part, tally)
            engine.backward(loss)
            engine.step()
            losses.add(loss)
        watch.step_done()
        state.step += 1
        reporter.step_done()
        stop = collectives.any(context.stop_requested())

        is_logged = is_time(state.step, job.log_every, recipe.num_steps)
        is_validated = is_time(state.step, recipe.val_every, recipe.num_steps)
        is_saved = is_validated or stop or is_time(state.step, job.save_every, recipe.num_steps)
        if is_logged or is_saved:
            losses.check(state.step, recipe, task)
            writer.check()
        if is_logged:
            reporter.training(task, tally.read(), watch, rate, engine)
            tally, watch = task.tally(), Stopwatch(recipe.global_batch, context.device)
        if is_saved:
            with watch.pausing():
                best = validate(engine, task, state, reporter, context) if is_validated else None
                save(engine, writer, task, state, job, context, best)
    batches.close()  # its threads end with it
    writer.close()
    return state.result(recipe) if state.is_over(recipe) else Stopped(step=state.step)


def is_time(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def build_engine(task: Task, job: WorkerJob, context: WorkerContext, fresh: bool) -> DeepSpeedEngine:
    """The task's model in a DeepSpeed engine."""
    model = task.build(fresh)
    return start_engine(
        model.to(context.device),
        build_optimizer(model.parameters(), job.recipe.optim),
        zero_stage=job.zero,
        global_batch=job.recipe.global_batch,
        accumulation=job.accumulation,
        precision=job.precision,
        clip_norm=job.recipe.optim.clip_norm,
        device=context.device,
        config_path=job.deepspeed,
    )


def validate(
    engine: DeepSpeedEngine, task: Task, state: TrainingState, reporter: Reporter, context: WorkerContext
) -> Scores | None:
    """Computes and reports the scores of the validation videos. Returns them if they are the best so far."""
    engine.eval()
    scores = task.validate(engine)
    engine.train()
    is_best = state.add_validation(scores, task.select)
    reporter.validation(scores, is_best)
    if is_best and task.confusion and context.rank == 0:
        context.report(Validated(step=state.step, confusion=task.confusion))
    return scores if is_best else None
