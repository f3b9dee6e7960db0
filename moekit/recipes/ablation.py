"""The program that compares routers: each trains the same model on the same data, and one table says what came out.

Each run is one of the training program, in a folder of its own. What is done is not done again, so the program can be
stopped at any time and goes on where it was.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.text import Text

from moekit.lm.consoles import plain_console, print_lines, print_warnings
from moekit.lm.files import write_whole
from moekit.lm.json_lines import JsonLines, read_metrics
from moekit.lm.plots import picture_or_why
from moekit.lm.signals import StopRequest, exit_status, interrupted, stop_on_signals
from moekit.lookup import unknown_name
from moekit.parallel import under_torchrun
from moekit.recipes.ablation_checks import check_data, check_recipe, check_words, refuse_other_recipes, settle_folder
from moekit.recipes.ablation_failures import Failure, Held, attempt, failure_of, other_sets, told_failures, told_held
from moekit.recipes.ablation_runs import Job, is_gone, line_of, make_jobs, other_lines
from moekit.recipes.ablation_summaries import summaries, tokens_per_second
from moekit.recipes.ablation_tables import draw, markdown, printed
from moekit.recipes.commands import command_line
from moekit.recipes.configuration import kept_warnings, parse_settings
from moekit.recipes.names import RECIPES, users_fault
from moekit.recipes.routers import PREFIX, ROUTERS
from moekit.recipes.setup import make_config, overridden_flags

BASELINE = "top_k"
_FASTER = ("--val-num-samples", "65536", "--val-every-n-steps", "1000000")  # before the user's words, which win
_TABLE_COLUMNS = 180
_ERRORS = (ValueError, OSError, ModuleNotFoundError, TypeError)


@dataclass(frozen=True)
class AblationSettings:
    """Train the same model with every router, and compare them.

    Words after `--` are flags of the training program, for all runs: `-- --model moekit_tiny --batch-size 8`. Run it
    again to go on where it was stopped.
    """

    routers: str = ""
    """Names with commas, or `all`; by default all, and with --recipe the baseline top_k alone."""
    recipe: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A recipe to compare with them as it is: a published name, or path/to/file.py:name. May be given several times."""
    steps: int = 200
    """Optimizer steps of every run."""
    seeds: int = 2
    """Runs of every router, with the seeds 0, 1, ... of weights and data."""
    folder: Path = Path("logs/router_ablation")
    """Of all runs, results.jsonl, table.md and ablation.png."""
    keep_checkpoints: bool = False
    """Keep the last checkpoint of every run that is done."""


class Outcome(NamedTuple):
    """How an ablation ended.

    Attributes:
        failures: runs that raised an error.
        stopped_by: the signal that stopped it before its last run, or None.
        held: runs that other processes do.
    """

    failures: tuple[Failure, ...]
    stopped_by: str | None
    held: tuple[Held, ...] = ()


def main(
    arguments: list[str] | None = None,
    *,
    prog: str = "ablate_routers.py",
    launch: str = "python examples/ablate_routers.py",
) -> None:
    """Run the program.

    Args:
        arguments: the words of the command line; None takes ``sys.argv``.
        prog: its name in messages.
        launch: the words that start it where ``arguments`` are not those of this process, for the hint how to go on.

    Raises:
        SystemExit: with a message, if settings or data make no sense, a run failed, or another process does one; with
            130 or 143, if Ctrl-C or SIGTERM stopped it.
    """
    words = sys.argv[1:] if arguments is None else arguments
    cut = words.index("--") if "--" in words else len(words)
    settings = tyro.cli(AblationSettings, args=words[:cut], prog=prog)
    try:
        jobs, console = plan(settings, words[cut + 1 :], prog=prog), plain_console(piped=_TABLE_COLUMNS)
        print_warnings(console, *kept_warnings(_shared_words(settings, words[cut + 1 :])))
        print_lines(console, *overridden_flags(jobs[0].settings.model))
        command = command_line(words, prog=prog, launch=launch)
        outcome = ablate(settings, jobs, console, command=command, ends_process=True)
    except KeyboardInterrupt:
        raise interrupted(prog) from None
    except Exception as error:
        fault = next((fault for each in settings.recipe if (fault := users_fault(each, error))), None)
        if fault is None and not isinstance(error, _ERRORS):
            raise
        raise SystemExit(f"{prog}: {fault or error}") from error
    told = [told_failures(outcome.failures, runs=len(jobs))] if outcome.failures else []
    told += [told_held(outcome.held, runs=len(jobs))] if outcome.held else []
    text = "\n".join(f"{prog}: {each}" for each in told)
    if outcome.stopped_by is not None:
        if text:
            print(text, file=sys.stderr)
        raise SystemExit(exit_status(outcome.stopped_by))  # so that `&&` does not go on
    if text:
        raise SystemExit(text)


def plan(settings: AblationSettings, words: Sequence[str], *, prog: str | None = None) -> list[Job]:
    """List the runs, and check what can be checked before the first.

    Args:
        settings: of the ablation.
        words: of the training program.
        prog: name of the program in messages.

    Returns:
        The runs, in order.

    Raises:
        ValueError: if settings make no sense.
        FileNotFoundError: if a file is not there.

    Example:
        >>> jobs = plan(AblationSettings(routers="top_k,switch", seeds=1), ["--model", "moekit_tiny"])
        >>> [(job.label, job.settings.model.recipe) for job in jobs]
        [('top_k', 'router:top_k'), ('switch', 'router:switch')]
    """
    for name, value in (("steps", settings.steps), ("seeds", settings.seeds)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    if under_torchrun():
        raise ValueError("the ablation is one process; start it without torchrun")
    check_words(words)
    shared = parse_settings(_shared_words(settings, words), prog=prog)
    if not make_config(shared.model).moe_freq:
        raise ValueError("--moe-freq 0 makes a dense model, which has no router to compare; leave it out")
    jobs = make_jobs(labelled(settings), seeds=settings.seeds, settings=shared, folder=settings.folder)
    for job in jobs[: len(jobs) // settings.seeds]:
        check_recipe(job)
    return jobs


def labelled(settings: AblationSettings) -> dict[str, str]:
    """Name the routers and recipes that are to be compared.

    Args:
        settings: of the ablation.

    Returns:
        Label to what ``--recipe`` of the training program is.

    Raises:
        ValueError: if a name is unknown, or two have one label.

    Example:
        >>> labelled(AblationSettings(recipe=("mixtral",)))
        {'top_k': 'router:top_k', 'recipe-mixtral': 'mixtral'}
    """
    default = BASELINE if settings.recipe else "all"
    names = [name.strip() for name in (settings.routers or default).split(",")]
    names = list(ROUTERS) if names == ["all"] else names
    for name in names:
        if name not in ROUTERS:
            hint = f" It is a recipe: give --recipe {name}." if name in RECIPES else ""
            raise ValueError(f"--routers: {unknown_name(name, ROUTERS, what='router')}.{hint}")
    pairs = [(name, PREFIX + name) for name in names]
    pairs += [(f"recipe-{recipe.rpartition(':')[2]}", recipe) for recipe in settings.recipe]
    labels = [label for label, _ in pairs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} was given twice; expected each name once. Rename one of them in its file")
    return dict(pairs)


def _shared_words(settings: AblationSettings, words: Sequence[str]) -> list[str]:
    # Every run has a recipe of its own, so what a file derived from its one gives way.
    return [*_FASTER, *words, "--recipe", PREFIX + BASELINE, "--steps", str(settings.steps)]


def ablate(
    settings: AblationSettings,
    jobs: Sequence[Job],
    console: Console,
    *,
    command: str = "",
    ends_process: bool = False,
) -> Outcome:
    """Do the runs that are not done, and write and print the table of those that are. One that fails stops no other.

    The table has all runs of the folder that are done, also those of other launches. A run that another process does
    is left to it: it is in the table if it is done by then, else it is told.

    Args:
        settings: of the ablation.
        jobs: all runs.
        console: where to.
        command: that started the program, for the hint how to go on.
        ends_process: whether the process ends if a signal stops it: it heeds no SIGTERM on its way.

    Returns:
        Which runs failed, which others do still, and whether a signal stopped it.

    Raises:
        ValueError: if the folder holds runs with other settings, or of another recipe with the same label; or if the
            data make no sense.
        FileNotFoundError: if data are not there.
    """
    if not all(job.results.exists() for job in jobs):
        check_data(jobs[0].settings, console)
    settle_folder(settings.folder, jobs[0].settings)
    refuse_other_recipes(jobs)
    with stop_on_signals() as stop:
        outcome = _do_all(settings, jobs, console, stop)
        stop.ends_process = ends_process and outcome.stopped_by is not None
    outcome = outcome._replace(held=tuple(each for each in outcome.held if not each.job.results.exists()))
    if odd := other_sets(_lines(jobs, outcome.failures)):
        outcome = outcome._replace(failures=(*outcome.failures, *odd))
    show(settings, _with_others(jobs, [line for _, line in _lines(jobs, outcome.failures)], console), console)
    if outcome.stopped_by is not None:
        print_lines(console, f"stopped; go on with:\n  {command}")
    return outcome


def _do_all(settings: AblationSettings, jobs: Sequence[Job], console: Console, stop: StopRequest) -> Outcome:
    results = JsonLines(settings.folder / "results.jsonl")
    failures: list[Failure] = []
    held: list[Held] = []
    gone = results.take_out(partial(is_gone, folder=settings.folder))
    if gone:
        print_lines(console, f"{results.path}: {gone} of its lines went with the folders of their runs")
    logged = read_metrics(results.path)
    for number, job in enumerate(jobs, start=1):
        place, new = f"[{number}/{len(jobs)}]", not job.results.exists()
        with console.status(Text(f"{place} {job.label}, seed {job.seed}")):
            came = attempt(job, keep_checkpoints=settings.keep_checkpoints)
        if came is None:
            return Outcome(tuple(failures), stop.name or "SIGTERM", tuple(held))  # a run stops by nothing else
        done = isinstance(came, dict)
        if new or not done:
            print_lines(console, f"{place} {job.label}, seed {job.seed}: {_told(came)}")
        if isinstance(came, Failure):
            failures.append(came)
        elif isinstance(came, Held):
            held.append(came)
        elif came not in logged:
            results.take_out(partial(_is_of, router=came.get("router"), seed=came.get("seed")))  # as it was before
            results.log(came)
        if stop and (number < len(jobs) or not done):
            return Outcome(tuple(failures), stop.name, tuple(held))
    return Outcome(tuple(failures), None, tuple(held))


def _is_of(line: Mapping[str, Any], *, router: Any, seed: Any) -> bool:
    return (line.get("router"), line.get("seed")) == (router, seed)


def _lines(jobs: Sequence[Job], failures: Sequence[Failure]) -> list[tuple[Job, dict[str, Any]]]:
    """List the runs of which something is known, in their order, each with its line."""
    failed = {(each.label, each.seed): each.line for each in failures}
    known = [job for job in jobs if (job.label, job.seed) in failed or job.results.exists()]
    return [(job, failed.get((job.label, job.seed)) or _line_or_failure(job)) for job in known]


def _line_or_failure(job: Job) -> dict[str, Any]:
    """Say what a run came to; one that a stopped launch did not come to may have damaged results."""
    try:
        return line_of(job)
    except ValueError as error:
        return failure_of(job, error).line


def _with_others(jobs: Sequence[Job], lines: list[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """Add what other launches did in the folder: their routers come after those that were asked for."""
    if not lines:
        return []
    others, wrong = other_lines(jobs, lines)
    print_lines(console, *(f"not in the table: {each}" for each in wrong))
    order = list(dict.fromkeys([*(job.label for job in jobs), *ROUTERS, *(line["router"] for line in others)]))
    return sorted([*lines, *others], key=lambda line: order.index(line["router"]))


def show(settings: AblationSettings, lines: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table of runs that are done, and write ``table.md`` and ``ablation.png``.

    Args:
        settings: of the ablation.
        lines: of runs that are done or failed.
        console: where to.

    Raises:
        OSError: if ``table.md`` cannot be written; the table is printed all the same.
    """
    if not lines:
        return
    rows, first = summaries(lines), next(iter(labelled(settings)))
    try:
        write_whole(settings.folder / "table.md", markdown(rows, first=first))
        picture = picture_or_why(lambda: draw(settings.folder / "ablation.png", rows))
    finally:
        console.print(printed(rows, first=first))  # also where it cannot be written
    print_lines(console, f"table: {settings.folder / 'table.md'}", f"picture: {picture}")


def _told(came: dict[str, Any] | Failure | Held) -> str:
    if isinstance(came, Failure | Held):
        return came.told
    if "failed" in came:
        return str(came["failed"])
    losses = ", ".join(f"{name} {scores['loss']:.3f}" for name, scores in came["validation"].items())
    return f"{losses}; {came['seconds']:.0f} s of training, {tokens_per_second(came):,.0f} tokens/s"
