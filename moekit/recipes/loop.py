"""The training loop: steps, reports, validations and checkpoints, on all ranks together."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from moekit.lm.signals import StopRequest
from moekit.parallel import any_true
from moekit.recipes.evaluate import Evaluation
from moekit.recipes.recording import Clock, Recorder
from moekit.recipes.runs import Run
from moekit.recipes.saving import Position, Progress, position, save, skipped_data
from moekit.recipes.scoring import score_sets
from moekit.recipes.updates import StepResult, agree, train_step

T = TypeVar("T")
_SHORT_VALIDATION = 16_384  # tokens per set of the validations on the way


class Ended(NamedTuple):
    """How a training loop ended.

    Attributes:
        progress: how far it came.
        at: where the next step starts.
        tokens: that this launch trained on, over all ranks: no holes, no padding, no step that was left out.
        by: who stopped it, in words.
        trouble: what went wrong on this rank outside a step, with data, validation or trackers; or None.
    """

    progress: Progress
    at: Position
    tokens: int
    by: str
    trouble: Exception | None


def loop(run: Run, recorder: Recorder, progress: Progress, stop: StopRequest, *, command: str) -> Ended:
    """Train until the last step, or until a rank is asked to stop or has to. The last checkpoint is left to the caller.

    Args:
        run: changed in place.
        recorder: to report to.
        progress: where to start.
        stop: whether somebody asked to stop.
        command: that resumes the run, for messages.

    Returns:
        How it ended, on all ranks after the same step.

    Raises:
        FloatingPointError: see ``train``.
    """
    steps, every = run.budget.steps, run.settings.run
    clock, at, trouble, trained = Clock(progress.seconds), position(run), None, 0
    while progress.step < steps:
        asked = time.perf_counter()
        batch, trouble = _attempt(run.stream.__next__)
        data_time = time.perf_counter() - asked
        tokens, stopping = agree(run, batch, stop=bool(stop) or batch is None)
        if batch is None or stopping:
            break  # the batch is not used, and the position is before it
        step = progress.step + 1
        ended = run.budget.epochs_ended(step) > run.budget.epochs_ended(progress.step)
        validates = step % every.val_every_n_steps == 0 or ended or step == steps
        reports = step % every.log_every_n_steps == 0 or validates
        result = train_step(run, batch, step=progress.step, tokens=tokens, statistics=reports)
        trained += result.targets if result.taken else 0
        with clock.paused(steps=1, tokens=result.targets):
            progress = _counted(run, progress, result, clock.seconds, at, command, recorder)
            at = position(run)
            report = partial(_report, run, recorder, result, progress, at, clock, data_time=data_time)
            _, trouble = _attempt(partial(report, reports=reports, validates=validates))
            if (reports or every.log_data) and any_true(run.world, trouble is not None):
                break
            if step < steps and _saves(run, step, ended=ended):
                save(run, progress, at)
    return Ended(progress, at, trained, stop.name or "another rank's signal or error", trouble)


def _report(
    run: Run,
    recorder: Recorder,
    result: StepResult,
    progress: Progress,
    at: Position,
    clock: Clock,
    *,
    data_time: float,
    reports: bool,
    validates: bool,
) -> None:
    if reports:  # first what all ranks do together, then what may fail on one
        scores = validate(run, tokens=_SHORT_VALIDATION) if validates else {}
        losses = {name: each.loss for name, each in scores.items()}
        total = progress._replace(skipped_data=skipped_data(run, progress, at))
        recorder.step(result, total, speed=clock.lap(), data_time=data_time, validation=losses)
    recorder.data(progress.step)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Do something that may fail on this rank alone, so that all ranks can hear of it before any stops."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _counted(
    run: Run, progress: Progress, result: StepResult, seconds: float, at: Position, command: str, recorder: Recorder
) -> Progress:
    """Count a step; one that was not finite is counted apart, or ends the run with a checkpoint from before it."""
    step = progress.step + 1
    if result.taken:
        before = progress.trained_tokens
        trained = None if before is None else before + result.targets
        return progress._replace(step=step, seconds=seconds, trained_tokens=trained)
    what = f"the loss or its gradient is not finite at step {step}"
    if not result.finite:
        if run.settings.optimizer.on_nonfinite == "stop":
            folder = save(run, progress, at)
            raise FloatingPointError(
                f"{what}. Nothing was updated with it; {folder} has the state before. Lower --lr, lengthen --warmup, "
                f"or leave such steps out:\n  {command} --on-nonfinite skip"
            )
        recorder.say(f"{what}: left out (--on-nonfinite skip)")
    return progress._replace(step=step, seconds=seconds, skipped_steps=progress.skipped_steps + 1)


def _saves(run: Run, step: int, *, ended: bool) -> bool:
    given = run.settings.run
    by_steps = given.save_every_n_steps is not None and step % given.save_every_n_steps == 0
    return by_steps or (ended and run.budget.epochs_ended(step) % given.save_frequency == 0)


def validate(run: Run, *, tokens: int | None = None) -> dict[str, Evaluation]:
    """Score every validation set of a run; see ``score_sets``.

    Args:
        run: the run.
        tokens: at most so many of each set.

    Returns:
        Name to scores.
    """
    recipe = run.evaluation_recipe
    return score_sets(run.settings, run.model, run.corpus, recipe=recipe, world=run.world, tokens=tokens)
