"""The main program: train an MoE language model, evaluate it, and say what came out."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moekit.lm.checkpoints import checkpoint_folder
from moekit.lm.displays import Display, StepReport, show_training
from moekit.lm.signals import stop_on_signals
from moekit.lm.trackers import JsonLines, read_metrics
from moekit.recipes import report
from moekit.recipes.evaluate import Evaluation, evaluate
from moekit.recipes.language_models import language_model, parameter_table
from moekit.recipes.runs import Run, restore, save, set_up, write_params
from moekit.recipes.settings import TrainSettings, parse_settings
from moekit.recipes.setup import autocast, make_config, make_recipe, uses_bfloat16
from moekit.recipes.steps import StepLoss, batch_loss, layer_load, layer_stats, learning_rate, update_selection_biases

PROMPTS = ("Fellow citizens, the state of", "def __init__(self")
_SHORT_VALIDATION = 16_384  # tokens per domain of the validations on the way


def main(
    arguments: list[str] | None = None, *, prog: str = "train_moe.py", launch: str = "python examples/train_moe.py"
) -> None:
    """Run the program.

    Args:
        arguments: the words of the command line; None takes ``sys.argv``.
        prog: its name in messages.
        launch: the words that start it, for the hint how to resume.

    Raises:
        SystemExit: with a message, if settings or data make no sense.
    """
    settings = parse_settings(arguments, prog=prog)
    console = Console()
    try:
        if settings.run.describe:
            describe(settings, console)
        else:
            words = sys.argv[1:] if arguments is None else arguments
            train(settings, console, command=shlex.join([*launch.split(), *words]))
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError, FloatingPointError) as error:
        raise SystemExit(f"{prog}: {error}") from error


def describe(settings: TrainSettings, console: Console) -> None:
    """Print the model of some settings, without making its weights.

    Args:
        settings: of the run.
        console: where to.
    """
    config = make_config(settings.model)
    with torch.device("meta"):
        model = language_model(config, make_recipe(settings.model))
    console.print(model, highlight=False, markup=False, soft_wrap=True)
    console.print(report.describe(model, upstream_bias=settings.model.recipe == "openlm" and config.moe_freq > 0))


def train(settings: TrainSettings, console: Console, *, command: str = "") -> Path:
    """Train, evaluate and report.

    Args:
        settings: of the run.
        console: where to.
        command: that started the run, for the hint how to resume it.

    Returns:
        The run folder, with ``params.txt``, ``metrics.jsonl``, ``checkpoints/``, ``results.json`` and ``run.png``.

    Raises:
        FileExistsError: if the run folder holds a run and the settings do not resume it.
        FloatingPointError: if the loss is not finite.
        ValueError: if the settings make no sense.
        FileNotFoundError: if data or a checkpoint are not there.
    """
    run = set_up(settings, console)
    done, seconds = restore(run, console)
    write_params(run)
    precision = "bf16 autocast" if uses_bfloat16(settings.optimizer.precision, run.device) else "fp32"
    total, active = parameter_table(run.model)[-1][1:]
    console.print(
        f"{run.folder}: {total:,} parameters, {active:,} active; {run.device.type}, {precision}",
        highlight=False,
        soft_wrap=True,
    )
    tracker = JsonLines(run.folder / "metrics.jsonl", from_step=done + 1)
    with stop_on_signals() as stop, show_training(console, settings.optimizer.steps, done=done) as display:
        clock = _Clock(seconds)
        while done < settings.optimizer.steps and not stop:
            step = train_step(run, done)
            done += 1
            with clock.paused(steps=1):
                log_step(run, tracker, display, clock, *step, step=done)
    folder = save(run, done, seconds=clock.seconds)
    if done < settings.optimizer.steps:
        console.print(f"stopped by {stop.name} after step {done}; checkpoint {folder}\ngo on with:", highlight=False)
        console.print(f"  {command}{_resume_flags(run)}", highlight=False, soft_wrap=True)
        return run.folder
    finish(run, console, seconds=clock.seconds)
    return run.folder


def train_step(run: Run, step: int) -> tuple[StepLoss, Tensor, float]:
    """Take one optimizer step.

    Args:
        run: changed in place.
        step: optimizer steps done before.

    Returns:
        The loss, the gradient norm before clipping, the learning rate.
    """
    optimizer = run.settings.optimizer
    rate = learning_rate(
        step, steps=optimizer.steps, peak=optimizer.lr, warmup=optimizer.warmup_steps, end=optimizer.lr_cooldown_end
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batch = next(run.stream).to(run.device, non_blocking=True)
    with autocast(optimizer.precision, run.device):
        loss = batch_loss(run.model, batch)
    run.optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    limit = optimizer.grad_clip_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
    run.optimizer.step()
    update_selection_biases(run.model, loss.layers)
    return loss, norm, rate


def log_step(
    run: Run,
    tracker: JsonLines,
    display: Display,
    clock: "_Clock",
    loss: StepLoss,
    norm: Tensor,
    rate: float,
    *,
    step: int,
) -> None:
    """Report a step if it is one of those to report, with a short validation if it is one of those to validate.

    Args:
        run: the run.
        tracker: of the metrics file.
        display: to update.
        clock: of the run.
        loss: of the step.
        norm: gradient norm.
        rate: learning rate.
        step: optimizer steps done.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    every, last = run.settings.run, step == run.settings.optimizer.steps
    validates = step % every.val_every_n_steps == 0 or last
    if step % every.log_every_n_steps and not validates:
        return
    value = loss.cross_entropy.item()
    if not torch.isfinite(loss.total):
        raise FloatingPointError(
            f"the loss is {value} (in all {loss.total.item()}) at step {step}; lower --lr, or lengthen --warmup"
        )
    loads = [layer_load(index, stats) for index, stats in layer_stats(run.model, loss.layers).items()]
    balancing = {f"loss/{name}": term.item() for name, term in loss.balancing.items()}
    speed = clock.lap() * run.tokens_per_step
    metrics: dict[str, Any] = {"step": step, "tokens": step * run.tokens_per_step, "loss": value, **balancing}
    metrics |= {"lr": rate, "grad_norm": norm.item(), "tokens_per_second": round(speed, 1)}
    metrics |= {"layers": [load._asdict() for load in loads]}
    if validates:
        metrics["validation"] = {name: scores.loss for name, scores in validate(run, tokens=_SHORT_VALIDATION)}
    tracker.log(metrics)
    balance = balancing.get("loss/load_balance", float("nan"))
    display.update(StepReport(step, run.settings.optimizer.steps, value, balance, rate, speed, loads))


def validate(run: Run, *, tokens: int | None = None) -> list[tuple[str, Evaluation]]:
    """Score the validation data of every domain that has any.

    Args:
        run: the run.
        tokens: score the first so many tokens of each domain, rounded up to whole batches; None scores all.

    Returns:
        Pairs of domain and scores.
    """
    limit = None if tokens is None else -(-tokens // run.tokens_per_step)
    scores = []
    for name, batches in run.validation.items():
        precision = autocast(run.settings.optimizer.precision, run.device)
        scores.append((name, evaluate(run.model, batches[:limit], token_bytes=run.token_bytes, precision=precision)))
    return scores


def finish(run: Run, console: Console, *, seconds: float) -> None:
    """Score the whole of the validation data; print tables and samples; write results and picture.

    Args:
        run: after its last step.
        console: where to.
        seconds: of training.
    """
    scores = dict(validate(run))
    with_data = {domain.name: domain for domain in run.corpus.domains if domain.name in scores}
    simple = {
        name: report.baselines(domain, vocab_size=run.model.config.vocab_size) for name, domain in with_data.items()
    }
    total, active = parameter_table(run.model)[-1][1:]
    tokens = run.settings.optimizer.steps * run.tokens_per_step
    console.print()
    console.print(report.score_table(scores, simple))
    if any(each.loads for each in scores.values()):
        console.print(report.load_table(scores))
    console.print(
        f"{total:,} parameters, {active:,} active per token; {tokens:,} tokens in {seconds:.0f} s of training, "
        f"{tokens / seconds:,.0f} tokens/s",
        highlight=False,
    )
    if run.corpus.tokenizer is not None:
        report.print_samples(console, run.model, run.corpus.tokenizer, PROMPTS)
    results = {
        name: {**each._asdict(), "perplexity": each.perplexity, **simple[name]._asdict()}
        for name, each in scores.items()
    }
    summary = {"parameters": total, "active_parameters": active, "tokens": tokens, "seconds": round(seconds, 1)}
    _write_results(run.folder / "results.json", {**summary, "validation": results})
    picture = report.draw(run.folder / "run.png", read_metrics(run.folder / "metrics.jsonl"), scores, simple)
    console.rule()
    console.print(f"picture: {picture}\ncheckpoint: {checkpoint_folder(run.folder, run.settings.optimizer.steps)}")


def _write_results(path: Path, results: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dict(results), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _resume_flags(run: Run) -> str:
    given = run.settings.run
    named = "" if given.name else f" --name {shlex.quote(run.folder.name)}"
    return named + ("" if given.resume == "latest" else " --resume latest")  # of two --resume, the last counts


class _Clock:
    """Seconds that went into training steps; reports and validations are not counted."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._resumed = time.monotonic()
        self._lap_steps, self._lap_start = 0, seconds

    @contextmanager
    def paused(self, *, steps: int) -> Iterator[None]:
        """Count the steps since the last pause, and stop the clock."""
        self.seconds += time.monotonic() - self._resumed
        self._lap_steps += steps
        yield
        self._resumed = time.monotonic()

    def lap(self) -> float:
        """Return steps per second since the last lap."""
        speed = self._lap_steps / max(self.seconds - self._lap_start, 1e-9)
        self._lap_steps, self._lap_start = 0, self.seconds
        return speed
