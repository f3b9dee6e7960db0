"""What a run saves, and how it goes on from that: bitwise from its own checkpoints, with weights from others."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from moekit import __version__
from moekit.lm.checkpoints import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    stored_shapes,
    training_tensors,
)
from moekit.lm.consoles import print_lines, print_warnings
from moekit.lm.openlm_optimizers import read_openlm_optimizer
from moekit.parallel import fill, share
from moekit.recipes.abandoned import abandon
from moekit.recipes.differences import model_warnings
from moekit.recipes.evaluate import sum_skipped
from moekit.recipes.router_states import check_states
from moekit.recipes.runs import Run
from moekit.recipes.settings import OptimizerSettings
from moekit.recipes.settings_checks import SMALLEST_FP16
from moekit.recipes.stored_settings import flat_settings
from moekit.recipes.weights import find_checkpoint, load_weights, naming

_VERSION = "moekit"  # the key of a checkpoint's state that names the version that wrote it, as in exported files


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        seconds: of training so far.
        skipped_steps: steps left out because their loss or gradient was not finite, or they had no token to train on.
        skipped_data: sequences left out as bad data before this launch, over all ranks, by reason.
        trained_tokens: targets trained on so far, over all ranks: no holes, no padding, no step that was left out; None
            if it is not known, of steps of another program or of an older version.
        scaler: state of the gradient scaler before this launch, which one that scales no gradients hands on; empty if
            none has been used.
    """

    step: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_data: Mapping[str, int] = {}
    trained_tokens: int | None = 0
    scaler: Mapping[str, Any] = {}


class Position(NamedTuple):
    """Where a step starts: in the data, and in the random numbers.

    Attributes:
        stream: state of the batch stream.
        random: name to random state, of this rank.
        skipped: sequences that this rank left out as bad since the stream was opened, by reason.
        scaler: state of the gradient scaler; empty without one.
    """

    stream: Mapping[str, Any]
    random: Mapping[str, Tensor]
    skipped: Mapping[str, int]
    scaler: Mapping[str, Any]


def position(run: Run) -> Position:
    """Take down where a run is, so that a checkpoint can say so later.

    Args:
        run: the run.

    Returns:
        Position.
    """
    rank = run.world.rank
    states = {f"rng.{rank}": torch.get_rng_state()}
    if run.world.device.type == "cuda":
        states[f"rng_cuda.{rank}"] = torch.cuda.get_rng_state()
    return Position(run.stream.state_dict(), states, dict(run.stream.skipped), run.scaler.state_dict())


def save(run: Run, progress: Progress, at: Position | None = None) -> Path:
    """Write a checkpoint of the run, and remove old ones if the settings say so. All ranks call it together.

    Args:
        run: the run.
        progress: how far it is.
        at: where its next step starts; None is where it is now.

    Returns:
        The checkpoint's folder.

    Raises:
        FloatingPointError: if a router's state has become NaN.
    """
    check_states(run.model, step=progress.step)
    at = position(run) if at is None else at
    state = {
        _VERSION: __version__,
        **progress._asdict(),
        "skipped_data": skipped_data(run, progress, at),
        "epoch": run.budget.epochs_ended(progress.step),
        "ends_epochs": run.budget.epochs_ending(progress.step),
        "stream": at.stream,
        "scaler": at.scaler or progress.scaler,
        "batch_size": run.budget.batch_size,
        "settings": flat_settings(run.settings),
        "config": dataclasses.asdict(run.model.config),
    }
    tensors = {**training_tensors(run.model, run.optimizer), **at.random}
    folder = save_checkpoint(checkpoint_folder(run.folder, progress.step), tensors, state)
    given = run.settings.run
    keep = 1 if given.delete_previous_checkpoint else given.keep_checkpoints
    if keep is not None and run.world.rank == 0:
        prune_checkpoints(run.folder, keep=keep, step=progress.step)
    return folder


def skipped_data(run: Run, progress: Progress, at: Position) -> dict[str, int]:
    """Add up what was left out as bad data, over launches and ranks. All ranks call it together.

    Args:
        run: the run.
        progress: with what was left out before this launch.
        at: with what this rank left out since.

    Returns:
        Reason to number of sequences; reasons that did not occur are left out.
    """
    total = Counter(progress.skipped_data) + sum_skipped(at.skipped, run.world)
    return {reason: total[reason] for reason in sorted(total)}


def restore(run: Run, console: Console) -> Progress:
    """Load the checkpoint that the settings name, if any. All ranks call it together.

    Args:
        run: changed in place.
        console: where to say so.

    Returns:
        Progress.

    Raises:
        FileNotFoundError: if the settings name a checkpoint that is not there.
        ValueError: if it does not fit the run.
    """
    resume = run.settings.run.resume
    if resume is None:
        return Progress()
    found = latest_checkpoint(run.folder) if resume == "latest" and run.world.rank == 0 else None
    path = share(run.world, found) if resume == "latest" else find_checkpoint(resume)
    if path is None and any((run.folder / "checkpoints").glob("step_*")):
        raise ValueError(
            f"--resume latest: every checkpoint in {run.folder / 'checkpoints'} is incomplete, damaged or without "
            "checksums, as the warnings say, so there is nothing to go on from. Start anew under another --name, or go "
            "on with the version that wrote them"
        )
    if path is None:
        print_lines(console, f"--resume latest: {run.folder.absolute()} has no checkpoint yet, so the run starts")
        return Progress()
    if path.is_file():
        return _restore_weights(run, path, console)
    progress, warnings = _restore_all(run, path)
    print_lines(console, f"resumed {path}: step {progress.step}")
    print_warnings(console, *warnings)
    return progress


def go_back(run: Run, console: Console, progress: Progress) -> None:
    """Set aside what the run's folder holds of later steps than it goes on from; all that may fail is done before.

    Args:
        run: the run.
        console: where to say so.
        progress: of ``restore``.
    """
    resume = run.settings.run.resume
    if run.world.rank or resume is None or (resume != "latest" and find_checkpoint(resume).is_file()):
        return
    for left in abandon(run.folder, after=progress.step):
        print_lines(console, f"{left.name} was set aside: the run goes back to step {progress.step}")


def _restore_all(run: Run, folder: Path) -> tuple[Progress, list[str]]:
    tensors = training_tensors(run.model, run.optimizer)
    random, stored = position(run).random, stored_shapes(folder)
    saved = {name: state for name, state in random.items() if name in stored}
    state = load_checkpoint(folder, {**tensors, **saved})
    try:
        known = {name: state[name] for name in Progress._fields if name != "trained_tokens"}
        progress = Progress(**known, trained_tokens=state.get("trained_tokens"))
        stream, batch_size = state["stream"], state["batch_size"]
    except KeyError as error:
        raise ValueError(
            f"checkpoint {folder} lacks {error}; it is of another version of moekit (it names "
            f"{state.get(_VERSION, 'none')}, this is {__version__}). Export its weights, or start anew"
        ) from error
    _check_progress(progress, folder)
    moments = _moment_warnings(run.settings.optimizer, state, f"checkpoint {folder}")
    if batch_size != run.budget.batch_size:
        raise ValueError(
            f"checkpoint {folder} was trained with {batch_size} sequences per step over all ranks, and this launch has "
            f"{run.budget.batch_size}, under which steps, schedule and data would mean something else. --batch-size is "
            f"of one rank; give --global-batch-size {batch_size} instead"
        )
    _check_step(run, progress.step, f"checkpoint {folder} is of")
    with naming(f"checkpoint {folder}"):
        run.stream.load_state_dict(stream)
    if progress.scaler:
        run.scaler.load_state_dict(dict(progress.scaler))  # which a scaler that is off ignores
    _restore_random(run, saved, step=progress.step)
    return progress, [*model_warnings(run.settings.model, state, training=True), *moments]


def _moment_warnings(given: OptimizerSettings, state: Mapping[str, Any], what: str) -> list[str]:
    """Say what fp16, in which AdamW's state is kept with ``--precision fp16``, does to second moments; or refuse it."""
    stored = state.get("settings")
    theirs = stored if isinstance(stored, Mapping) else {}
    before, eps = theirs.get("precision"), theirs.get("eps")
    if given.precision == "fp16":
        lost = f"second moments below {SMALLEST_FP16:g} become zero in fp16, in which --precision fp16 keeps them"
        return [] if before == "fp16" else [f"warning: {what} was not trained in fp16: {lost}"]
    if before == "fp16" and isinstance(eps, float) and given.eps < eps:
        raise ValueError(
            f"{what} was trained with --precision fp16 and --eps {eps:g}: its second moments below {SMALLEST_FP16:g} "
            f"are zero, and with --eps {given.eps:g} AdamW would divide by next to nothing. Give --eps {eps:g}; or "
            "begin another run with the weights alone, by `moekit export` and --resume of what that writes"
        )
    return []


def _check_progress(progress: Progress, folder: Path) -> None:
    counts = progress.skipped_data if isinstance(progress.skipped_data, Mapping) else {"": None}
    trained = () if progress.trained_tokens is None else (progress.trained_tokens,)
    numbers = (progress.step, progress.skipped_steps, *trained, *counts.values())
    seconds = progress.seconds
    if (
        any(type(number) is not int or number < 0 for number in numbers)
        or type(seconds) not in (int, float)
        or not 0 <= seconds < math.inf
    ):
        raise ValueError(
            f"checkpoint {folder} is damaged: its state says {progress}; expected numbers of at least 0, and counts of "
            "skipped data. Resume from an older one"
        )


def _check_step(run: Run, step: int, what: str) -> None:
    if step > run.budget.steps:
        raise ValueError(
            f"{what} step {step}, but the run has {run.budget.steps} steps; expected at least as many. --steps and "
            "--train-num-samples count from the beginning of the run."
        )


def _restore_random(run: Run, saved: Mapping[str, Tensor], *, step: int) -> None:
    rank = run.world.rank
    if f"rng.{rank}" not in saved:  # the checkpoint is of fewer ranks
        torch.manual_seed(run.settings.run.seed + 1_000_003 * step + rank)
        return
    torch.set_rng_state(saved[f"rng.{rank}"])
    if f"rng_cuda.{rank}" in saved:
        torch.cuda.set_rng_state(saved[f"rng_cuda.{rank}"])


def _restore_weights(run: Run, path: Path, console: Console) -> Progress:
    """Start from weights of another program; what it knew of its data means nothing here."""
    known = load_weights(run.model, path, run.world)
    tensors = training_tensors(run.model, run.optimizer)
    shapes = {name.removeprefix("model."): t.shape for name, t in tensors.items() if name.startswith("model.")}
    moments = None
    if path.suffix != ".safetensors":
        moments = read_openlm_optimizer(path, expected=shapes, weight_tying=run.model.config.weight_tying)
    if moments:
        print_warnings(console, *_moment_warnings(run.settings.optimizer, {}, f"the optimizer's state of {path}"))
    for name, value in (moments or {}).items():
        fill(tensors[name], value)
    # OpenLM's first version stores the step at which the epoch began; AdamW's own count is right in all.
    counts = [int(value) for name, value in (moments or {}).items() if name.startswith("optimizer.step.")]
    step = max(counts, default=0)
    _check_step(run, step, f"{path} is, by its optimizer's state, of")
    start = f"with its optimizer's state, at step {step}" if moments else "the optimizer and the schedule start anew"
    print_lines(console, f"loaded the weights of {path}; {start}; the data start at their beginning")
    print_warnings(console, *model_warnings(run.settings.model, known, training=True))
    return Progress(step=step, trained_tokens=None if step else 0)
