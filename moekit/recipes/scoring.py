"""Scoring validation sets: on the way of a run, at its end, or alone, as OpenLM does without training data."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from moekit.lm.consoles import print_lines, print_warnings
from moekit.lm.model import LanguageModel
from moekit.parallel import World
from moekit.recipes import report
from moekit.recipes.budgets import DEFAULT_BATCH
from moekit.recipes.construction import make_model
from moekit.recipes.derived import derived_names
from moekit.recipes.differences import model_warnings
from moekit.recipes.evaluate import Evaluation, evaluate
from moekit.recipes.language_models import active_words, parameter_table
from moekit.recipes.layers import Recipe
from moekit.recipes.precisions import autocast, precision_words, resolved_precision
from moekit.recipes.runs import run_folder, shared_corpus
from moekit.recipes.settings import TrainSettings
from moekit.recipes.setup import check_model, make_config, resolved_model, with_model_keys
from moekit.recipes.sources import Corpus, read_set
from moekit.recipes.stored_settings import flat_settings, write_config
from moekit.recipes.weights import find_checkpoint, load_weights


def score(settings: TrainSettings, world: World, console: Console, *, derived: Collection[str] = ()) -> Path:
    """Score a checkpoint on validation data. All ranks call it together.

    Args:
        settings: with ``--resume`` and validation data.
        world: the ranks.
        console: where to.
        derived: names of settings that an earlier run filled in, for ``config.json``.

    Returns:
        ``results.jsonl`` beside the checkpoint, with a line for each validation set; where that cannot be written,
        ``results.json`` of the run folder.

    Raises:
        FileNotFoundError: if checkpoint or data are not there.
        OSError: if neither can be written.
        ValueError: if they do not fit the model.
    """
    assert settings.run.resume is not None
    folder = run_folder(settings)
    checkpoint = find_checkpoint(_named_checkpoint(settings, folder))
    check_model(settings.model)
    given = flat_settings(settings)
    settings = replace(settings, model=with_model_keys(settings.model))
    corpus = shared_corpus(settings, world, console)
    model, recipe, _ = make_model(settings, world)
    state = load_weights(model, checkpoint, world)
    total, active = parameter_table(model)[-1][1:]
    print_lines(
        console,
        f"{checkpoint}: {total:,} parameters, {active_words(model, active)} active; {world.device.type}, "
        f"{precision_words(settings.optimizer.precision, world.device)}",
    )
    print_warnings(console, *model_warnings(settings.model, state, training=False))
    scores = score_sets(settings, model, corpus, recipe=recipe, world=world)
    known = {"step": state.get("step"), "train_tokens": state.get("trained_tokens")}
    beside, own = checkpoint.parent / "results.jsonl", folder / "results.json"

    def write_own() -> None:
        names = derived_names(given, flat_settings(settings))
        write_config(folder, settings, derived={*derived, *names})
        scored = {"checkpoint_path": str(checkpoint), **known}
        report.write_results(own, {**scored, "parameters": total, "active_parameters": active}, scores, {})

    writers: dict[Path, Callable[[], None]]
    writers = {beside: partial(append_results, checkpoint, settings, corpus, scores, **known)}
    if not (folder / "metrics.jsonl").exists():  # else it is a run that was trained: its files stay its own
        writers[own] = write_own
    written = _write_all(writers, console) if world.rank == 0 else list(writers)
    report.print_scores(console, scores, {})
    print_lines(console, f"results: {written[0]}")
    return written[0]


def _write_all(writers: Mapping[Path, Callable[[], None]], console: Console) -> list[Path]:
    """Write files, and return those that could be written; the others are warned of, as of a folder of others'."""
    written, failed = [], None
    for path, write in writers.items():
        try:
            write()
            written.append(path)
        except OSError as error:
            failed = error
            print_warnings(console, f"warning: {path} cannot be written: {error.strerror or error}")
    if failed is not None and not written:
        raise failed
    return written


def score_sets(
    settings: TrainSettings,
    model: LanguageModel,
    corpus: Corpus,
    *,
    recipe: Recipe | None,
    world: World,
    tokens: int | None = None,
) -> dict[str, Evaluation]:
    """Score every validation set. All ranks call it together.

    Args:
        settings: of the run.
        model: to score.
        corpus: with the validation sets.
        recipe: that the MoE layers run meanwhile; None leaves them their own.
        world: the ranks.
        tokens: score the first so many tokens of each set, rounded up to whole sequences, or what
            ``--val-num-samples`` says if that is less; None scores what that says, or all.

    Returns:
        Name to scores, the same on every rank; they name their precision.
    """
    data, given, config = settings.data, settings.optimizer, model.config
    limit = min((each for each in (data.val_num_samples, tokens) if each is not None), default=None)
    per_rank = given.batch_size or (given.global_batch_size or world.size * DEFAULT_BATCH) // world.size
    scores = {}
    for each in corpus.validation:
        batches = read_set(
            each,
            data,
            config,
            batch_size=world.size * max(per_rank // given.accum_freq, 1),
            tokens=limit,
            world=world,
        )
        scored = evaluate(
            model,
            batches,
            token_bytes=each.token_bytes(),
            precision=partial(autocast, given.precision, world.device),
            recipe=recipe,
            world=world,
        )
        scores[each.name] = scored._replace(precision=resolved_precision(given.precision, world.device))
    return scores


def append_results(
    checkpoint: Path,
    settings: TrainSettings,
    corpus: Corpus,
    scores: Mapping[str, Evaluation],
    *,
    step: int | None,
    train_tokens: int | None = None,
) -> None:
    """Append a line for each validation set to ``results.jsonl`` beside a checkpoint.

    Args:
        checkpoint: that was scored.
        settings: of the run.
        corpus: with the validation sets.
        scores: name of a set to its scores.
        step: optimizer steps behind the checkpoint, if known.
        train_tokens: tokens that it was trained on, if known.
    """
    moe = make_config(settings.model).moe_freq > 0
    locations = {each.name: each.location for each in corpus.validation}
    lines: list[dict[str, Any]] = [
        {
            "checkpoint_path": str(checkpoint),
            "model": settings.model.preset,
            "recipe": settings.model.recipe if moe else None,
            "moe_top_k": resolved_model(settings.model).moe_top_k if moe else None,
            "val_data": locations[name],
            "name": name,
            "step": step,
            "train_tokens": train_tokens,
            "precision": each.precision,
            **report.plain(each),
        }
        for name, each in scores.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(checkpoint.parent / "results.jsonl", "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else f"\n{text}"  # the last line was cut short, and stays by itself
        os.write(file.fileno(), text.encode())  # one write, so that the lines are whole


def _named_checkpoint(settings: TrainSettings, folder: Path) -> str:
    """``latest`` is the newest of the run that the settings name."""
    resume = settings.run.resume or ""
    return str(folder) if resume == "latest" else resume
