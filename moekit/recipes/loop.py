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
    training = _Training(run, recorder, Clock(progress.seconds), command)
    at, trouble, trained = position(run), None, 0
    while progress.step < run.budget.steps:
        asked = time.perf_counter()
        batch, trouble = _attempt(run.stream.__next__)
        data_time = time.perf_counter() - asked
        tokens, stopping = agree(run, batch, stop=bool(stop) or batch is None)
        if batch is None or stopping:
            break  # the batch is not used, and the position is before it
        due = _due(run, progress.step + 1)
        result = train_step(run, batch, step=progress.step, tokens=tokens, statistics=due.report)
        trained += result.targets if result.taken else 0
        with training.clock.paused(steps=1, tokens=result.targets):
            progress = _counted(training, progress, result, at)
            at = position(run)
            _, trouble = _attempt(partial(_report, training, due, result, progress, at, data_time=data_time))
            if (due.report or run.settings.run.log_data) and any_true(run.world, trouble is not None):
                break
            if due.save:
                save(run, progress, at)
    return Ended(progress, at, trained, stop.name or "another rank's signal or error", trouble)


class _Training(NamedTuple):
    """What stays from step to step; ``command`` resumes the run."""

    run: Run
    recorder: Recorder
    clock: Clock
    command: str


class _Due(NamedTuple):
    """What is to be done after a step."""

    validate: bool
    report: bool
    save: bool


def _due(run: Run, step: int) -> _Due:
    given, budget = run.settings.run, run.budget
    ended, is_last = budget.epochs_ending(step), step == budget.steps
    validate = step % given.val_every_n_steps == 0 or bool(ended) or is_last
    by_steps = given.save_every_n_steps is not None and step % given.save_every_n_steps == 0
    by_epochs = any(epoch % given.save_frequency == 0 for epoch in ended)
    return _Due(
        validate,
        report=step % given.log_every_n_steps == 0 or validate,
        save=(by_steps or by_epochs) and not is_last,  # the caller saves at the end
    )


def _report(
    training: _Training, due: _Due, result: StepResult, progress: Progress, at: Position, *, data_time: float
) -> None:
    run, recorder, clock, _ = training
    if not due.report:
        recorder.data(progress.step)
        return
    # First what all ranks do together, then what may fail on one.
    scores, trouble = _attempt(partial(validate, run, tokens=_SHORT_VALIDATION)) if due.validate else ({}, None)
    total = progress._replace(skipped_data=skipped_data(run, progress, at))
    recorder.data(progress.step)
    recorder.step(result, total, speed=clock.lap(), data_time=data_time, validation=scores)
    if trouble is not None:
        raise trouble


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Do something that may fail on this rank alone, so that all ranks can hear of it before any stops."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def _counted(training: _Training, progress: Progress, result: StepResult, at: Position) -> Progress:
    """Count a step; one that changed nothing is counted apart, or ends the run with a checkpoint from before it."""
    run, recorder, clock, command = training
    counted = progress._replace(step=progress.step + 1, seconds=clock.seconds)
    if result.taken:
        before = progress.trained_tokens
        return counted._replace(trained_tokens=None if before is None else before + result.targets)
    what = f"the loss or its gradient is not finite at step {counted.step}"
    if not result.targets:
        recorder.say(f"step {counted.step} has no token to train on, all of its data are bad or padding: left out")
    elif not result.finite:
        if run.settings.optimizer.on_nonfinite == "stop":
            folder = save(run, progress, at)
            raise FloatingPointError(
                f"{what}. Nothing was updated with it; {folder} has the state before. Lower --lr, lengthen --warmup, "
                f"or leave such steps out:\n  {command} --on-nonfinite skip"
            )
        recorder.say(f"{what}: left out (--on-nonfinite skip)")
    return counted._replace(skipped_steps=progress.skipped_steps + 1)


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
