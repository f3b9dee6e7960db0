"""One run of an ablation: its settings, its end, and what a table needs of it."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from moekit.lm.batches import ValidationBatch
from moekit.lm.displays import LayerLoad
from moekit.lm.files import write_whole
from moekit.lm.json_lines import check_metrics
from moekit.lm.trackers import read_metrics
from moekit.parallel import start_processes
from moekit.recipes import report
from moekit.recipes.ablation_recipes import located, other_recipe, stored_recipe
from moekit.recipes.ablation_summaries import summaries
from moekit.recipes.audits import audit
from moekit.recipes.budgets import DEFAULT_BATCH
from moekit.recipes.finishing import Trained, summary_of
from moekit.recipes.language_models import first_moe_layer
from moekit.recipes.loop import validate
from moekit.recipes.runs import Run, claimed
from moekit.recipes.saving import Progress
from moekit.recipes.settings import TrainSettings
from moekit.recipes.sources import ValidationSet, read_set
from moekit.recipes.steps import split_ids
from moekit.recipes.train import train

_RESULTS = "results.json"
_UNIGRAM_TOKENS = 1_000_000  # how often few tokens occur says more of themselves than of their set


class Job(NamedTuple):
    """One router with one seed.

    Attributes:
        label: of its rows and folders.
        seed: of weights and data.
        settings: of the training program.
    """

    label: str
    seed: int
    settings: TrainSettings

    @property
    def folder(self) -> Path:
        """Of the run."""
        assert self.settings.run.name is not None
        return self.settings.run.logs / self.settings.run.name

    @property
    def results(self) -> Path:
        """The file that a run has once it is done."""
        return self.folder / _RESULTS


def make_jobs(recipes: Mapping[str, str], *, seeds: int, settings: TrainSettings, folder: Path) -> list[Job]:
    """List the runs: all recipes with the first seed, then all with the next, so that a part of them is a whole table.

    Args:
        recipes: label to what ``--recipe`` is; the runs have absolute paths of files.
        seeds: how many; they are 0, 1, ...
        settings: that all runs share.
        folder: of the ablation.

    Returns:
        The runs, in order.

    Example:
        >>> jobs = make_jobs({"a": "mixtral"}, seeds=2, settings=TrainSettings(), folder=Path("logs"))
        >>> [job.folder.name for job in jobs]
        ['a-seed0', 'a-seed1']
    """
    return [
        Job(label, seed, _of_a_run(settings, recipe, seed=seed, name=_name(label, seed), logs=folder))
        for seed in range(seeds)
        for label, recipe in recipes.items()
    ]


def is_gone(line: Mapping[str, Any], folder: Path) -> bool:
    """Say whether the run that a line is about is there no more, so that the line is of nothing.

    Args:
        line: of ``results.jsonl``; one that is about no run is never gone.
        folder: of the ablation.

    Returns:
        Whether it is.

    Example:
        >>> is_gone({"router": "top_k", "seed": 0}, Path("no/such/folder"))
        True
    """
    if "router" not in line or "seed" not in line:
        return False
    return not (folder / _name(line["router"], line["seed"]) / _RESULTS).exists()


def _name(label: str, seed: int) -> str:
    return f"{label}-seed{seed}"


def _of_a_run(settings: TrainSettings, recipe: str, **run: Any) -> TrainSettings:
    of_run = replace(settings.run, resume="latest", **run)
    return replace(settings, model=replace(settings.model, recipe=located(recipe)), run=of_run)


def do(job: Job, *, keep_checkpoints: bool) -> bool:
    """Train and score, from where an earlier launch was stopped. A run whose loss is not finite is done, too.

    Args:
        job: the run.
        keep_checkpoints: leave the checkpoint of a run that is done.

    Returns:
        Whether it is done; else somebody asked to stop, and a checkpoint was written.

    Raises:
        ValueError: if its settings make no sense.
        OSError: if data or a checkpoint cannot be read.
        BlockingIOError: if another process does it.
    """
    with start_processes() as world, claimed(job.settings, world) as folder:
        # again, since another process may have worked in it before this one had it
        if (other := other_recipe(job.folder, job.settings.model.recipe)) is not None:
            raise ValueError(other)
        if job.results.exists():
            return True
        try:
            train(job.settings, Console(quiet=True), world=world, finishing=record, folder=folder)
        except FloatingPointError as error:
            write_whole(job.results, json.dumps({"failed": str(error).partition(". ")[0]}) + "\n")
        done = job.results.exists()
        if done and not keep_checkpoints:
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        return done


def line_of(job: Job) -> dict[str, Any]:
    """Say what a run came to, as a line of ``results.jsonl``.

    Args:
        job: a run that is done.

    Returns:
        Label, recipe as it was trained, seed, and what ``results.json`` holds.

    Raises:
        ValueError: if that is damaged, or lacks what a table needs of it.
    """
    recipe = stored_recipe(job.folder) or job.settings.model.recipe
    named = {"router": job.label, "recipe": recipe, "seed": job.seed}
    try:
        line = {**named, **json.loads(job.results.read_text(encoding="utf-8"))}
        summaries([line])  # which reads all that a table needs
        check_metrics(line)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{job.results} is damaged, expected what a run came to ({why}); delete it, and the run is done again"
        ) from error
    return line


def other_lines(jobs: Sequence[Job], lines: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Say what the runs came to that other launches did in the folder of an ablation.

    Args:
        jobs: the own runs.
        lines: what is known of those; a table can have other runs of the same recipes and validation sets alone.

    Returns:
        Lines in the manner of ``line_of``, by label and seed; and what is wrong with runs that are left out.
    """
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    recipes = {job.label: job.settings.model.recipe for job in jobs}
    for label, seed, folder in _other_runs(jobs):
        try:
            recipe = recipes.setdefault(label, stored_recipe(folder) or label)
            if (other := other_recipe(folder, recipe)) is not None:
                raise ValueError(other)
            line = line_of(Job(label, seed, _of_a_run(jobs[0].settings, recipe, seed=seed, name=folder.name)))
            usual = next((each["validation"] for each in (*lines, *found) if "failed" not in each), None)
            if usual is not None and "failed" not in line and set(usual) != set(line["validation"]):
                raise ValueError(
                    f"{folder / _RESULTS} has scores of {', '.join(sorted(line['validation']))}; expected "
                    f"{', '.join(sorted(usual))}, as others have. Delete it, and do the run again"
                )
        except ValueError as error:
            wrong.append(str(error))
        else:
            found.append(line)
    return found, wrong


def _other_runs(jobs: Sequence[Job]) -> list[tuple[str, int, Path]]:
    """List label, seed and folder of the runs that are done beside these."""
    own = {job.folder.name for job in jobs}
    folders = {path.parent for path in jobs[0].settings.run.logs.glob(f"*-seed*/{_RESULTS}")}
    parts = [(*folder.name.rpartition("-seed")[::2], folder) for folder in folders if folder.name not in own]
    return sorted((label, int(seed), folder) for label, seed, folder in parts if seed.isdecimal())


def record(run: Run, console: Console, *, progress: Progress, trained: Trained) -> None:
    """Score a run after its last step, and write what a table needs: the ``finishing`` of ``train``.

    Args:
        run: after its last step.
        console: not used.
        progress: of the run.
        trained: not used.
    """
    layer = first_moe_layer(run.model)
    assert layer is not None  # an ablation is one of routers
    recipes = {"training": layer.recipe, "evaluation": run.evaluation_recipe}
    leaks = {when: audit(each, layer.num_experts).leaks for when, each in recipes.items() if each is not None}
    scores = validate(run)
    summary = {
        "steps": run.budget.steps,
        **summary_of(run, progress),
        "experts_per_token": mean_experts_per_token([layer for each in scores.values() for layer in each.layers]),
        "drop_rate": training_drop_rate(read_metrics(run.folder / "metrics.jsonl")),
        "leaks": leaks,
    }
    simple = {each.name: report.Baselines(_unigram(run, each), None) for each in run.corpus.validation}
    report.write_results(run.folder / _RESULTS, summary, scores, simple)


def mean_experts_per_token(layers: Sequence[LayerLoad]) -> float:
    """Average how many networks compute a token: simple experts are none, and not counted.

    Args:
        layers: of all validation sets; each counts by its tokens.

    Returns:
        Assignments to feed-forward networks per token; for a soft router, slots per token.

    Example:
        >>> one = LayerLoad(0, [0.5, 0.5], 0.0, 0.0, 0.7, 0, assignments=6, tokens=3)
        >>> mean_experts_per_token([one, one._replace(assignments=1, tokens=1)])
        1.75
        >>> mean_experts_per_token([one._replace(simple_experts=1)])
        1.0
    """
    return sum(map(_of_networks, layers)) / sum(each.tokens for each in layers)


def _of_networks(each: LayerLoad) -> int:
    """Count the assignments to feed-forward networks, of which ``load`` has shares."""
    networks = each.load[: len(each.load) - each.simple_experts]
    return round(sum(networks) * each.assignments)


def unigram_loss(scored: Iterable[ValidationBatch], known: Iterable[ValidationBatch] | None, vocab_size: int) -> float:
    """Score a prediction without context: how often each token is to be predicted, in what is known of a set.

    Args:
        scored: the tokens that a model is scored on.
        known: those, and more of their set; None if there are no more.
        vocab_size: V.

    Returns:
        Nats per token of ``scored``. If that is all that is known, it is the entropy of its tokens, and no model that
        always predicts the same distribution scores less. Infinite if a token of ``scored`` is not in ``known``.
    """
    shares = _shares(scored, vocab_size)
    return -float(torch.special.xlogy(shares, shares if known is None else _shares(known, vocab_size)).sum())


def _shares(batches: Iterable[ValidationBatch], vocab_size: int) -> Tensor:
    """Count how often each token is to be predicted: (V,) float64, which add up to 1."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        targets = split_ids(batch.batch.ids)[1]
        counts += torch.bincount(targets[targets >= 0].cpu(), minlength=vocab_size)
    return counts / counts.sum()


def _unigram(run: Run, each: ValidationSet) -> float:
    """Score what a run scores of a validation set by how often tokens occur in the set, of which that is the front."""
    scored = run.settings.data.val_num_samples
    whole = scored is None or scored >= _UNIGRAM_TOKENS
    known = None if whole else _batches(run, each, _UNIGRAM_TOKENS)
    return unigram_loss(_batches(run, each, scored), known, run.model.config.vocab_size)


def training_drop_rate(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Average what capacity limits dropped in training, over layers and reported steps.

    Args:
        metrics: lines of ``metrics.jsonl``; those without layers count nothing.

    Returns:
        The share of assignments.

    Example:
        >>> training_drop_rate([{"layers": [{"drop_rate": 0.5}, {"drop_rate": 0.0}]}, {"step": 2}])
        0.25
    """
    rates = [layer["drop_rate"] for line in metrics for layer in line.get("layers", ())]
    return sum(rates) / len(rates) if rates else 0.0


def _batches(run: Run, each: ValidationSet, tokens: int | None) -> Iterator[ValidationBatch]:
    """Read the first so many tokens of a validation set, in whole sequences; None reads all."""
    batch_size = run.settings.optimizer.batch_size or DEFAULT_BATCH
    return read_set(each, run.settings.data, run.model.config, batch_size=batch_size, tokens=tokens)
