"""The main program: train an MoE language model, evaluate it, and say what came out."""

import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from moekit.lm.checkpoints import checkpoint_folder
from moekit.lm.consoles import plain_console, print_lines, print_warnings, wide_console
from moekit.lm.model import LanguageModel
from moekit.lm.signals import exit_status, interrupted, stop_on_signals
from moekit.parallel import World, any_true, share, start_processes, under_torchrun
from moekit.recipes import report
from moekit.recipes.audits import audit
from moekit.recipes.choices import experts_per_token
from moekit.recipes.commands import command_line
from moekit.recipes.configuration import code_of_file, kept_warnings, parse, remedies
from moekit.recipes.construction import kernel_notes, run_layer, run_layout
from moekit.recipes.derived import derived_names
from moekit.recipes.finishing import Trained, finish, set_results_aside
from moekit.recipes.holdings import holding_table, plan_holdings
from moekit.recipes.language_models import active_words, first_moe_layer, language_model, parameter_table
from moekit.recipes.loop import Ended, loop
from moekit.recipes.names import users_fault
from moekit.recipes.precisions import deterministic, precision_words
from moekit.recipes.recording import recording
from moekit.recipes.runs import Run, claimed, resolved, set_up, unread
from moekit.recipes.saving import Progress, go_back, restore, save
from moekit.recipes.scoring import score
from moekit.recipes.settings import TrainSettings
from moekit.recipes.settings_legacy import without_effect
from moekit.recipes.setup import check_model, make_config, make_recipe, overridden_flags
from moekit.recipes.stored_settings import flat_settings, write_config
from moekit.routing.token_rounding import rounding_of

_ERRORS = (ValueError, OSError, ModuleNotFoundError, FloatingPointError, TypeError)


class Launch(NamedTuple):
    """What became of a launch.

    Attributes:
        folder: of the run.
        stopped_by: who stopped it before the last step, in words; None if nobody did.
    """

    folder: Path
    stopped_by: str | None


def main(
    arguments: list[str] | None = None, *, prog: str = "train_moe.py", launch: str = "python examples/train_moe.py"
) -> None:
    """Run the program.

    Args:
        arguments: the words of the command line; None takes ``sys.argv``.
        prog: its name in messages.
        launch: the words that start it where ``arguments`` are not those of this process, for the hint how to resume.

    Raises:
        SystemExit: with a message, if settings or data make no sense; with a status, if a signal stopped the run.
    """
    words = sys.argv[1:] if arguments is None else arguments
    settings, stopped_by = None, None
    try:
        settings, derived = parse(words, prog=prog)
        run_layer(settings.run)  # a file of tiles is looked at before anything begins
        if settings.run.describe:
            console = wide_console()
            _tell_of_file(words, console)
            print_lines(console, *overridden_flags(settings.model))
            describe(settings, console)
            return
        with start_processes() as world:
            console = plain_console(quiet=world.rank > 0)
            _tell_of_file(words, console)
            print_lines(console, *notes(settings, world))
            if settings.evaluates_only:
                with deterministic(settings.run.deterministic):
                    score(settings, world, console, derived=derived)
            else:
                command = command_line(words, prog=prog, launch=launch)
                launched = _launched(settings, console, world, command=command, derived=derived, ends_process=True)
                stopped_by = launched.stopped_by
    except KeyboardInterrupt:
        raise interrupted(prog) from None
    except Exception as error:
        fault = None if settings is None else users_fault(settings.model.recipe, error)
        if fault is None and not isinstance(error, _ERRORS):
            raise
        message = str(fault or error)
        raise SystemExit("\n".join([f"{prog}: {message}", *remedies(message, words)])) from error
    if stopped_by is not None:
        raise SystemExit(exit_status(stopped_by))  # 0 would let `train && export` go on with half a run


def describe(settings: TrainSettings, console: Console) -> None:
    """Print the model of some settings, without making its weights.

    Args:
        settings: of the run.
        console: where to.
    """
    check_model(settings.model)
    config = make_config(settings.model)
    with torch.device("meta"):
        model = language_model(config, make_recipe(settings.model))
    print_lines(console, str(model))
    console.print(report.describe(model, upstream_bias=settings.model.recipe == "openlm" and config.moe_freq > 0))
    if settings.run.world_size is not None:
        console.print(_holdings(model, settings, settings.run.world_size, settings.parallel.ranks_per_node or 8))


def _holdings(model: LanguageModel, settings: TrainSettings, world_size: int, ranks_per_node: int) -> Any:
    rows = plan_holdings(model, settings, world_size, ranks_per_node=ranks_per_node)
    return holding_table(rows, run_layout(settings, world_size, ranks_per_node=ranks_per_node))


def notes(settings: TrainSettings, world: World) -> list[str]:
    """Say, once, which flags have no effect in this launch, and why.

    Args:
        settings: of the run.
        world: the ranks.

    Returns:
        Lines of text.

    Example:
        >>> from moekit.recipes.settings import ParallelSettings
        >>> from moekit.parallel import one_process
        >>> notes(TrainSettings(parallel=ParallelSettings(fsdp=True)), one_process())
        ['--fsdp has nothing to share with: this is one process. Start several with torchrun']
    """
    parallel, lines = settings.parallel, [*without_effect(settings.legacy), *overridden_flags(settings.model)]
    lines += kernel_notes(settings, world.device)
    if world.size == 1:
        names = ("fsdp", "fsdp_amp", "fsdp_pure_bf16", "moe_weight_parallelism", "moe_expert_model_parallelism")
        lines += [
            f"--{name.replace('_', '-')} has nothing to share with: this is one process. Start several with torchrun"
            for name in names
            if getattr(parallel, name)
        ]
    return lines


def _tell_of_file(words: Sequence[str], console: Console) -> None:
    """Say what the user may not know of the file that ``--config`` names."""
    print_lines(console, *code_of_file(words))
    print_warnings(console, *kept_warnings(words))


def train(
    settings: TrainSettings,
    console: Console,
    *,
    world: World | None = None,
    command: str = "",
    finishing: Callable[..., None] | None = None,
    folder: Path | None = None,
) -> Path:
    """Train, evaluate and report. All ranks call it together.

    Args:
        settings: of the run.
        console: where to.
        world: the ranks; None is one process.
        command: that started the run, for the hint how to resume it.
        finishing: what to do after the last step, in place of ``finish`` and with its arguments.
        folder: of the run, if the caller has ``claimed`` it; None claims it until the run is scored.

    Returns:
        The run folder, with ``config.json``, ``params.txt``, ``metrics.jsonl``, ``checkpoints/``, ``results.json`` and
        ``run.png``; without the last two, if a signal stopped the run. Those of an earlier end, past which the run goes
        on, are set aside before its first step, as ``results_1.json`` and ``run_1.png``.

    Raises:
        FileExistsError: if the run folder holds a run and the settings do not resume it.
        FloatingPointError: if a loss or gradient is not finite, and the settings do not leave such steps out; if a
            router's state becomes NaN.
        ValueError: if the settings make no sense.
        FileNotFoundError: if data or a checkpoint are not there.
        SystemExit: if a signal stopped the run under torchrun.
    """
    if world is None:
        with start_processes() as world:
            return train(settings, console, world=world, command=command, finishing=finishing, folder=folder)
    return _launched(settings, console, world, command=command, finishing=finishing, folder=folder).folder


def _launched(
    settings: TrainSettings,
    console: Console,
    world: World,
    *,
    command: str,
    finishing: Callable[..., None] | None = None,
    folder: Path | None = None,
    derived: Collection[str] = (),
    ends_process: bool = False,
) -> Launch:
    """Do what ``train`` says; ``derived`` names the settings that an earlier run filled in.

    ``ends_process``: the process ends if a signal stops the run, and heeds no SIGTERM on its way.
    """
    own = claimed(settings, world) if folder is None else nullcontext(folder)
    with deterministic(settings.run.deterministic), own as folder:
        run = set_up(settings, world, console, folder=folder)
        try:
            started = _started(run, console)
            if world.rank == 0:
                filled = resolved(run)
                names = derived_names(flat_settings(settings), flat_settings(filled))
                write_config(run.folder, filled, derived={*derived, *names})
            _announce(run, console)
            ended = _train_and_save(run, console, started, command=command, ends_process=ends_process)
        finally:
            run.stream.close()
        if ended.progress.step < run.budget.steps:
            _print_stop(run, console, ended, command=command)
            if under_torchrun():
                # 0 would say that the work is done, and agents on other machines would not go on with it
                raise SystemExit(1)
            return Launch(run.folder, ended.by)
        trained = Trained(ended.tokens, ended.progress.seconds - started.seconds, whole=started.step == 0)
        try:
            (finishing or finish)(run, console, progress=ended.progress, trained=trained)
        except KeyboardInterrupt:
            if not ends_process:
                raise
            _print_stop(run, console, ended._replace(by="SIGINT"), command=command)
            return Launch(run.folder, "SIGINT")
        return Launch(run.folder, None)


def _started(run: Run, console: Console) -> Progress:
    """Go on from the checkpoint that the settings name, if any; what no step reads is counted once in a run."""
    left_out, started = unread(run), restore(run, console)
    return started if started.step else started._replace(skipped_data=left_out)


def _train_and_save(run: Run, console: Console, started: Progress, *, command: str, ends_process: bool) -> Ended:
    """Train to the end or to a stop, and save what no checkpoint holds yet."""
    world = run.world
    with recording(run, console, started) as recorder, stop_on_signals() as stop:
        go_back(run, console, started)
        if started.step < run.budget.steps:
            set_results_aside(run, console)
        ended = loop(run, recorder, started, stop, command=f"{command}{_resume_flags(run)}")
        progress = ended.progress
        # all ranks save or none: each knows of its own trouble alone, and may see an older state of the folder
        troubled = any_true(world, ended.trouble is not None)
        absent = share(world, not checkpoint_folder(run.folder, progress.step).exists())
        if progress.step > started.step or (absent and not troubled):
            save(run, progress, ended.at)
        if ended.trouble is not None:
            raise ended.trouble
        stop.ends_process = ends_process and progress.step < run.budget.steps
        return ended


def _print_stop(run: Run, console: Console, ended: Ended, *, command: str) -> None:
    folder = checkpoint_folder(run.folder, ended.progress.step)
    left = f"checkpoint {folder}" if folder.exists() else "nothing was saved"
    print_lines(console, f"stopped by {ended.by} after step {ended.progress.step}; {left}")
    print_lines(console, "go on with:", f"  {command}{_resume_flags(run)}")


def _announce(run: Run, console: Console) -> None:
    """Say what is about to be trained."""
    budget, device = run.budget, run.world.device
    if run.world.size > 1:
        if run.settings.parallel.moe_expert_model_parallelism and not run.grid.layout.exchanges:
            print_lines(
                console,
                f"--moe-expert-model-parallelism: {run.grid.layout.num_experts} experts cannot be spread over "
                f"{run.world.size} ranks, which have no divisor in common; every rank computes all of them",
            )
        per_node = run.settings.parallel.ranks_per_node or run.world.ranks_per_node
        console.print(_holdings(run.model, run.settings, run.world.size, per_node))
    ranks = "" if run.world.size == 1 else f", {run.world.size} ranks"
    total, active = parameter_table(run.model)[-1][1:]
    print_lines(
        console,
        f"{run.folder}: {total:,} parameters, {active_words(run.model, active)} active; "
        f"{device.type}{ranks}, {precision_words(run.settings.optimizer.precision, device)}; {budget.steps:,} steps of "
        f"{budget.tokens_per_step:,} tokens",
    )
    notes = [*_causality_notes(run.settings), *_rounding_notes(run)] if run.world.rank == 0 else ()
    print_warnings(console, *notes)
    warmup = run.settings.optimizer.warmup
    if warmup is not None and warmup >= budget.steps:
        print_lines(
            console, f"--warmup {warmup} is not shorter than the run: the rate does not reach --lr before its end"
        )


def _causality_notes(settings: TrainSettings) -> list[str]:
    """Warn of a language model that would be trained on what it cannot see when it generates."""
    config = make_config(settings.model)
    if not config.moe_freq or config.moe_num_experts is None:
        return []
    found = audit(make_recipe(settings.model), config.moe_num_experts)
    if not found.leaks:
        return []
    return [
        f"warning: with --recipe {settings.model.recipe} a token's output depends on later tokens, so that the "
        "training loss (and validation, unless the method evaluates otherwise) is no loss of a model that generates",
        f"  {found.later_token}",
    ]


def _rounding_notes(run: Run) -> list[str]:
    """Warn of loads that are rounded to whole tiles and of which most are nearer to none."""
    layer = first_moe_layer(run.model)
    rounding = None if layer is None else rounding_of(layer.recipe.route)
    if layer is None or rounding is None:
        return []
    _, tile = rounding
    tokens = run.budget.tokens_per_step // (run.world.size * run.settings.optimizer.accum_freq)
    load = experts_per_token(layer.recipe, layer.num_experts) * tokens / layer.num_experts
    if 2 * load >= tile:
        return []
    return [
        f"warning: an expert has {load:.0f} rows of a micro-batch of {tokens:,} tokens in the mean, and --recipe "
        f"{run.settings.model.recipe} rounds loads to multiples of {tile}: most become 0, and their tokens reach no "
        "expert. Give larger micro-batches, fewer experts, or a recipe with a smaller tile"
    ]


def _resume_flags(run: Run) -> str:
    given = run.settings.run
    named = "" if given.name else f" --name {shlex.quote(run.folder.name)}"
    return named + ("" if given.resume == "latest" else " --resume latest")  # of two --resume, the last counts
