"""The end of a run: the whole of the validation data, tables, samples of text, results and the picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from moekit.lm.checkpoints import checkpoint_folder
from moekit.lm.trackers import read_metrics
from moekit.recipes import report
from moekit.recipes.evaluate import Evaluation, evaluating
from moekit.recipes.forms import method_of
from moekit.recipes.language_models import moe_layers, parameter_table
from moekit.recipes.loop import validate
from moekit.recipes.recording import device_name, utilization
from moekit.recipes.runs import Run
from moekit.recipes.saving import Progress
from moekit.recipes.scoring import append_results

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
    tokens = run.budget.steps * run.budget.tokens_per_step
    total, active = parameter_table(run.model)[-1][1:]
    simple = _simple_scores(run, console, scores) if run.world.rank == 0 else {}
    console.print()
    report.print_scores(console, scores, simple)
    speed = f"{_counted_words(tokens, progress.seconds, trained)}{_mfu_words(run, trained)}"
    console.print(f"{total:,} parameters, {active:,} active per token; {speed}", highlight=False)
    picture = None
    if run.world.rank == 0:
        append_results(checkpoint, run.settings, run.corpus, scores, step=run.budget.steps, train_tokens=tokens)
        summary = {
            "parameters": total,
            "active_parameters": active,
            "tokens": tokens,
            "trained_tokens": progress.trained_tokens,
            "seconds": round(progress.seconds, 1),
            **method_of_run(run),
        }
        report.write_results(run.folder / "results.json", summary, scores, simple)
        picture = _picture(run, scores, simple)
    if run.corpus.tokenizer is not None:
        with evaluating(run.model, run.evaluation_recipe):
            report.print_samples(console, run.model, run.corpus.tokenizer, PROMPTS)
    console.rule()
    console.print(f"picture: {picture}\ncheckpoint: {checkpoint}", highlight=False, soft_wrap=True)


def method_of_run(run: Run) -> dict[str, Any]:
    """Say by which forms of router, plan and losses a run came to its numbers.

    Args:
        run: the run.

    Returns:
        ``method``, as ``method_of`` has it; nothing for a dense model.
    """
    layer = next((layer for _, layer in moe_layers(run.model)), None)
    if layer is None:
        return {}
    scope = run.settings.model.moe_loss_scope
    return {"method": method_of(layer.recipe, evaluation=run.evaluation_recipe, loss_scope=scope)}


def _counted_words(tokens: int, seconds: float, trained: Trained) -> str:
    """Say how many tokens a run has by its steps, how many there were, and how fast this launch was."""
    speed = f", {trained.tokens / trained.seconds:,.0f} tokens/s" if trained.seconds > 0 else ""
    if not trained.whole:
        own = f"this launch trained on {trained.tokens:,} in {trained.seconds:.0f} s{speed}"
        return f"{tokens:,} tokens by its steps, {seconds:.0f} s of training; {own}"
    there = "" if trained.tokens == tokens else f" by its steps, {trained.tokens:,} of them trained on,"
    return f"{tokens:,} tokens{there} in {seconds:.0f} s of training{speed}"


def _mfu_words(run: Run, trained: Trained) -> str:
    """Say how much of what the devices could do this launch used."""
    mfu = utilization(run, trained.tokens / trained.seconds) if trained.seconds > 0 else None
    return f", MFU {mfu:.1%}" if mfu is not None else f", MFU unknown (no peak known: {device_name(run.world.device)})"


def _picture(run: Run, scores: Mapping[str, Evaluation], simple: Mapping[str, report.Baselines]) -> Path | str:
    """Draw the run; matplotlib is an extra, and a run is none the worse without it."""
    try:
        return report.draw(run.folder / "run.png", read_metrics(run.folder / "metrics.jsonl"), scores, simple)
    except ModuleNotFoundError as error:
        return f"none: {error}"


def _simple_scores(run: Run, console: Console, scores: Mapping[str, Evaluation]) -> dict[str, report.Baselines]:
    """Score with count models; a run ends without them where their data have holes, or cannot be read once more."""
    try:
        return report.simple_scores(run.corpus, scores, run.model.config, run.settings.data)
    except (ValueError, OSError) as error:
        console.print(f"no bigrams and unigrams beside the scores: {error}", highlight=False, soft_wrap=True)
        return {}
