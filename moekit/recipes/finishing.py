"""The end of a run: the whole of the validation data, tables, samples of text, results and the picture."""

import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from moekit.lm.checkpoints import checkpoint_folder
from moekit.lm.consoles import print_lines
from moekit.lm.plots import picture_or_why
from moekit.lm.trackers import read_metrics
from moekit.recipes import report
from moekit.recipes.evaluate import Evaluation, evaluating
from moekit.recipes.forms import method_of
from moekit.recipes.language_models import active_words, first_moe_layer, parameter_table
from moekit.recipes.loop import validate
from moekit.recipes.recording import device_name, utilization
from moekit.recipes.runs import Run
from moekit.recipes.saving import Progress
from moekit.recipes.scoring import append_results

_RESULTS, _PICTURE = "results.json", "run.png"
PROMPTS = ("Fellow citizens, the state of", "def __init__(self")


class Trained(NamedTuple):
    """What this launch trained.

    Attributes:
        tokens: targets over all ranks; holes of bad data, padding and steps that were left out are none.
        seconds: of its steps.
        whole: whether it took the run from its first step.
    """

    tokens: int
    seconds: float
    whole: bool


def finish(run: Run, console: Console, *, progress: Progress, trained: Trained) -> None:
    """Score the whole of the validation data; print tables and samples; write results and picture.

    Args:
        run: after its last step.
        console: where to.
        progress: of the run.
        trained: what this launch did of it.
    """
    scores = validate(run)
    checkpoint = checkpoint_folder(run.folder, run.budget.steps)
    summary = summary_of(run, progress)
    simple = _simple_scores(run, console, scores) if run.world.rank == 0 else {}
    picture = None
    if run.world.rank == 0:  # before anything is printed, which may fail
        steps, tokens = run.budget.steps, progress.trained_tokens
        append_results(checkpoint, run.settings, run.corpus, scores, step=steps, train_tokens=tokens)
        report.write_results(run.folder / _RESULTS, summary, scores, simple)
        picture = _picture(run, scores, simple)
    console.print()
    report.print_scores(console, scores, simple)
    speed = f"{_counted_words(summary['tokens'], progress.seconds, trained)}{_mfu_words(run, trained)}"
    active = active_words(run.model, summary["active_parameters"])
    sizes = f"{summary['parameters']:,} parameters, {active} active per token"
    print_lines(console, f"{sizes}; {speed}")
    if run.corpus.tokenizer is not None:
        with evaluating(run.model, run.evaluation_recipe):
            report.print_samples(console, run.model, run.corpus.tokenizer, PROMPTS)
    console.rule()
    print_lines(console, f"picture: {picture}", f"checkpoint: {checkpoint}")


def set_results_aside(run: Run, console: Console) -> None:
    """Rename what an earlier end of the run left, for a run that trains on is not what that says.

    ``results.json`` becomes ``results_1.json`` and ``run.png`` becomes ``run_1.png``, or the first later number that is
    free, so that nothing is written over. Rank 0 does so.

    Args:
        run: before the first step of a launch.
        console: where to say so.
    """
    if run.world.rank:
        return
    ends = [path for path in (run.folder / _RESULTS, run.folder / _PICTURE) if path.exists()]
    numbered = ([path.with_stem(f"{path.stem}_{number}") for path in ends] for number in count(1))
    free = next(names for names in numbered if not any(name.exists() for name in names))
    for path, name in zip(ends, free, strict=True):
        os.replace(path, name)
        print_lines(console, f"{path.name} was set aside as {name.name}: the run goes on past that end")


def summary_of(run: Run, progress: Progress) -> dict[str, Any]:
    """Say what a run took, and by which forms of router, plan and losses it came to its scores.

    Args:
        run: after its last step.
        progress: of the run.

    Returns:
        ``step`` that it is of; ``parameters`` and ``active_parameters`` per token, at most so many where ``has_bound``;
        ``tokens`` by its steps and ``trained_tokens``, without holes and padding; ``seconds`` of training; and
        ``method``, as ``method_of`` has it, unless the model is dense.
    """
    total, active = parameter_table(run.model)[-1][1:]
    summary = {
        "step": progress.step,
        "parameters": total,
        "active_parameters": active,
        "tokens": run.budget.steps * run.budget.tokens_per_step,
        "trained_tokens": progress.trained_tokens,
        "seconds": round(progress.seconds, 3),
    }
    layer = first_moe_layer(run.model)
    if layer is None:
        return summary
    scope = run.settings.model.moe_loss_scope
    return {**summary, "method": method_of(layer.recipe, evaluation=run.evaluation_recipe, loss_scope=scope)}


def _counted_words(tokens: int, seconds: float, trained: Trained) -> str:
    """Say how many tokens a run has by its steps, how many there were, and how fast this launch was."""
    speed = f", {trained.tokens / trained.seconds:,.0f} tokens/s" if trained.seconds > 0 else ""
    if not trained.whole:
        own = f"this launch trained on {trained.tokens:,} in {trained.seconds:.0f} s{speed}"
        return f"{tokens:,} tokens by its steps, {seconds:.0f} s of training; {own}"
    there = "" if trained.tokens == tokens else f" by its steps, {trained.tokens:,} of them trained on,"
    return f"{tokens:,} tokens{there} in {seconds:.0f} s of training{speed}"


def _mfu_words(run: Run, trained: Trained) -> str:
    """Say how much of what the devices could do this launch used, if it trained at all."""
    if trained.seconds <= 0:
        return ""
    mfu = utilization(run, trained.tokens / trained.seconds)
    return f", MFU {mfu:.1%}" if mfu is not None else f", MFU unknown (no peak known: {device_name(run.world.device)})"


def _picture(run: Run, scores: Mapping[str, Evaluation], simple: Mapping[str, report.Baselines]) -> Path | str:
    metrics = read_metrics(run.folder / "metrics.jsonl")
    return picture_or_why(lambda: report.draw(run.folder / _PICTURE, metrics, scores, simple))


def _simple_scores(run: Run, console: Console, scores: Mapping[str, Evaluation]) -> dict[str, report.Baselines]:
    """Score with count models; a run ends without them where their data cannot be read once more."""
    try:
        return report.simple_scores(run.corpus, scores, run.model.config, run.settings.data)
    except (ValueError, OSError) as error:
        print_lines(console, f"no bigrams and unigrams beside the scores: {error}")
        return {}
