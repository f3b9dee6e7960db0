"""A run: its folder and its parts."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from moekit.lm.batches import Reading, Stream, open_stream
from moekit.lm.checkpoint_folders import remove_leftovers
from moekit.lm.consoles import print_lines
from moekit.lm.files import check_folder
from moekit.lm.folder_locks import FolderLock
from moekit.lm.model import LanguageModel
from moekit.lm.shard_readers import unread_data
from moekit.parallel import Grid, World, share, wait
from moekit.recipes.budgets import Budget, final_rate, make_budget, warmup_steps
from moekit.recipes.construction import make_model
from moekit.recipes.layers import Recipe
from moekit.recipes.optimizers import make_optimizer
from moekit.recipes.precisions import gradient_scaler, resolved_precision
from moekit.recipes.settings import TrainSettings
from moekit.recipes.setup import check_model, make_config, resolved_model, with_model_keys
from moekit.recipes.sources import Corpus, batching_of, check_lasts, make_corpus
from moekit.recipes.steps import Forward, run_forward
from moekit.recipes.wording import no_place


class Run(NamedTuple):
    """Everything that a training loop works on.

    Attributes:
        settings: of the run.
        world: the ranks that train together.
        budget: how long the run is.
        folder: LOGS/NAME.
        corpus: the data.
        model: being trained.
        forward: runs it in a step, compiled if the settings say so.
        evaluation_recipe: what its MoE layers run when it is scored; None for a dense model.
        grid: how the ranks are arranged.
        optimizer: over all its parameters.
        scaler: of gradients; does nothing unless the precision is amp.
        stream: of training batches.
    """

    settings: TrainSettings
    world: World
    budget: Budget
    folder: Path
    corpus: Corpus
    model: LanguageModel
    forward: Callable[..., Forward]
    evaluation_recipe: Recipe | None
    grid: Grid
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    stream: Stream


@contextmanager
def claimed(settings: TrainSettings, world: World) -> Iterator[Path]:
    """Name a run's folder, and keep other launches out of it; what a launch that was killed left in it is removed.

    Rank 0 locks it, see ``FolderLock``, and all ranks hear of a refusal. A run without a name takes another folder
    where one is taken.

    Args:
        settings: of the run.
        world: the ranks; all of them enter together.

    Yields:
        LOGS/NAME.

    Raises:
        BlockingIOError: if another process has the folder of that name.
        OSError: if the folder cannot be made.
        FileExistsError: if it holds a run and the settings do not resume it.
    """
    named = settings.run.name is not None
    for folder in _folders(settings):
        lock = FolderLock(share(world, folder), flag="--name", waits=named)
        try:
            trouble = share(world, _claim(lock, settings) if world.rank == 0 else None)
            if trouble is None:
                yield lock.folder
                return
        finally:
            lock.let_go()
        if named or not isinstance(trouble, BlockingIOError | FileExistsError):
            raise trouble


def _claim(lock: FolderLock, settings: TrainSettings) -> OSError | None:
    """Take the lock and clear the folder, or say what is in the way."""
    try:
        lock.take()
        if not os.access(lock.folder, os.W_OK | os.X_OK):
            return OSError(no_place(lock.folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
        _refuse_another_run(settings, lock.folder)  # of a launch that has ended meanwhile
        remove_leftovers(lock.folder / "checkpoints")
    except OSError as error:
        return error if error.errno is None else OSError(no_place(lock.folder, error))  # None: in our words
    return None


def set_up(settings: TrainSettings, world: World, console: Console, *, folder: Path | None = None) -> Run:
    """Make model, optimizer and data stream.

    Args:
        settings: of the run.
        world: the ranks; all of them call this together.
        console: where to say what takes time.
        folder: of the run, which ``claimed`` keeps for it; None only names one.

    Returns:
        Run, before its first step; its settings are those of the model that is made, in which keys of the model's file
        win over flags.

    Raises:
        FileExistsError: if the run folder holds a run and the settings do not resume it.
        ValueError: if the settings make no sense together, or the data do not last.
    """
    folder = share(world, run_folder(settings)) if folder is None else folder
    check_model(settings.model)
    settings = replace(settings, model=with_model_keys(settings.model))
    config = make_config(settings.model)
    budget = make_budget(settings, seq_len=config.seq_len, world_size=world.size)
    corpus = shared_corpus(settings, world, console)
    check_lasts(corpus, budget)
    built = make_model(settings, world)
    return Run(
        settings=settings,
        world=world,
        budget=budget,
        folder=folder,
        corpus=corpus,
        model=built.model,
        forward=torch.compile(run_forward) if settings.run.torchcompile else run_forward,
        evaluation_recipe=built.evaluation_recipe,
        grid=built.grid,
        optimizer=make_optimizer(built.model, settings.optimizer),
        scaler=gradient_scaler(settings.optimizer.precision, world.device),
        stream=_open_stream(settings, world, corpus, batch_size=budget.batch_size),
    )


def _open_stream(settings: TrainSettings, world: World, corpus: Corpus, *, batch_size: int) -> Stream:
    config, data = make_config(settings.model), settings.data
    reading = Reading(
        [source.shards for source in corpus.sources],
        batching_of(data, config, world, batch_size=batch_size),
        seed=settings.run.seed,
        weights=corpus.weights,
        lanes=data.data_lanes,
        max_passes=corpus.max_passes,
    )
    return open_stream(reading, workers=_workers(settings, world.device))


def unread(run: Run) -> dict[str, int]:
    """Look into training shards that are empty by their manifest, for no step reads them.

    Rank 0 does, and all ranks, which call it together, hear of it.

    Args:
        run: the run.

    Returns:
        What is left out with them: reason to number of sequences.

    Raises:
        ShardError: if they hold any, and ``--on-bad-data`` is not skip.
        OSError: if one behind a URL cannot be read.
    """
    found, trouble = dict[str, int](), None
    if run.world.rank == 0:
        shards = [shard for source in run.corpus.sources for shard in source.shards]
        batching = batching_of(run.settings.data, run.model.config, run.world, batch_size=run.budget.batch_size)
        try:
            found = unread_data(shards, batching)
        except (ValueError, OSError, ImportError) as error:
            trouble = error
    found, trouble = share(run.world, (found, trouble))
    if trouble is not None:
        raise trouble
    return found


def resolved(run: Run) -> TrainSettings:
    """Fill in what the settings of a run left to defaults, so that they mean the same elsewhere and later.

    Args:
        run: the run.

    Returns:
        The settings that ``config.json`` holds: with the number of steps (unless tokens and epochs say it), the global
        batch, the warm-up, the last rate, the precision, the workers, and what the recipe takes for experts per token,
        capacity factor and loss weight.
    """
    given, device = run.settings, run.world.device
    optimizer = replace(
        given.optimizer,
        steps=run.budget.steps if given.data.train_num_samples is None else None,
        batch_size=None,
        global_batch_size=run.budget.batch_size,
        warmup=warmup_steps(given.optimizer, run.budget.steps),
        lr_cooldown_end=final_rate(given.optimizer) if given.optimizer.lr_scheduler == "cosine" else None,
        precision=resolved_precision(given.optimizer.precision, device),  # type: ignore[arg-type]
    )
    data = replace(given.data, workers=_workers(given, device))
    return replace(given, model=resolved_model(given.model), optimizer=optimizer, data=data)


def _workers(settings: TrainSettings, device: torch.device) -> int:
    given = settings.data.workers
    return (1 if device.type == "cuda" else 0) if given is None else given


def shared_corpus(settings: TrainSettings, world: World, console: Console) -> Corpus:
    """Find or prepare the data; rank 0 first, so that the others find what it prepared.

    Args:
        settings: of the run.
        world: the ranks.
        console: where to say what takes time.

    Returns:
        Corpus.
    """
    config = make_config(settings.model)
    corpus = None
    for turn in (True, False):
        if (world.rank == 0) is turn:
            corpus = make_corpus(settings, config, say=partial(print_lines, console))
        wait(world)
    assert corpus is not None
    return corpus


def run_folder(settings: TrainSettings) -> Path:
    """Name the folder of a run; one without a name has an empty or new one.

    Args:
        settings: of the run.

    Returns:
        LOGS/NAME.

    Raises:
        FileExistsError: if it holds a run and the settings do not resume that one; a file of weights does not.
        NotADirectoryError: if there is a file in its place.
    """
    return next(_folders(settings))


def _folders(settings: TrainSettings) -> Iterator[Path]:
    """Name the folders that a run may have: that of its name, or else those of this second which hold nothing."""
    run, recipe = settings.run, settings.model.recipe.rpartition(":")[2]
    preset = Path(settings.model.preset).stem
    first = run.logs / (run.name or f"{preset}-{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_folder(first, given=f"--logs {run.logs}")
    if run.name is not None:
        _refuse_another_run(settings, first)
        yield first
        return
    for folder in chain([first], (first.with_name(f"{first.name}-{number}") for number in count(2))):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            yield folder


def _refuse_another_run(settings: TrainSettings, folder: Path) -> None:
    resume = settings.run.resume
    own = resume == "latest" or (resume is not None and _is_own(Path(resume), folder))
    if not own and not settings.evaluates_only and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds a run already; go on with it by --resume latest, or choose another --name or --logs"
        )


def _is_own(path: Path, folder: Path) -> bool:
    """Say whether a checkpoint is of the run in a folder; a file of weights, which says no step, starts another run."""
    inside = path.absolute().resolve().is_relative_to(folder.absolute().resolve())
    trained = (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("step_*"))
    return inside and not (trained and os.path.isfile(path))
