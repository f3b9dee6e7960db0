"""The program that compares routers: each trains the same model on the same data, and one table says what came out.

Each run is one of the training program, in a folder of its own. What is done is not done again, so the program can be
stopped at any time and goes on where it was.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from moekit.lm._lookup import unknown_name
from moekit.lm.files import write_whole
from moekit.lm.json_lines import JsonLines, read_metrics
from moekit.lm.signals import stop_on_signals
from moekit.parallel import under_torchrun
from moekit.recipes.ablation_runs import Job, do, line_of, make_jobs
from moekit.recipes.ablation_summaries import summaries
from moekit.recipes.ablation_tables import draw, markdown, printed
from moekit.recipes.configuration import flat_settings, parse_settings
from moekit.recipes.consoles import print_notes
from moekit.recipes.names import RECIPES, users_fault
from moekit.recipes.routers import PREFIX, ROUTERS
from moekit.recipes.settings import TrainSettings
from moekit.recipes.setup import check_model, make_config, overridden_flags

BASELINE = "top_k"
_FASTER = ("--val-num-samples", "65536", "--val-every-n-steps", "1000000")  # before the user's words, which win
_OWN = frozenset({"steps", "recipe", "seed", "name", "logs", "resume", "describe", "world_size"})
_NOT_SHARED = frozenset({"recipe", "seed", "name", "logs", "resume", "describe", "world_size", "config"})
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
        launch: the words that start it, for the hint how to go on.

    Raises:
        SystemExit: with a message, if settings or data make no sense.
    """
    words = sys.argv[1:] if arguments is None else arguments
    cut = words.index("--") if "--" in words else len(words)
    settings = tyro.cli(AblationSettings, args=words[:cut], prog=prog)
    try:
        jobs, console = plan(settings, words[cut + 1 :], prog=prog), _console()
        print_notes(console, overridden_flags(jobs[0].settings.model))
        ablate(settings, jobs, console, command=shlex.join([*launch.split(), *words]))
    except Exception as error:
        fault = next((fault for each in settings.recipe if (fault := users_fault(each, error))), None)
        if fault is None and not isinstance(error, _ERRORS):
            raise
        raise SystemExit(f"{prog}: {fault or error}") from error


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
    _check_words(words)
    shared = parse_settings([*_FASTER, *words, "--steps", str(settings.steps)], prog=prog)
    if not make_config(shared.model).moe_freq:
        raise ValueError("--moe-freq 0 makes a dense model, which has no router to compare; leave it out")
    jobs = make_jobs(labelled(settings), seeds=settings.seeds, settings=shared, folder=settings.folder)
    for job in jobs[: len(jobs) // settings.seeds]:
        _check_recipe(job)
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


def ablate(settings: AblationSettings, jobs: Sequence[Job], console: Console, *, command: str = "") -> None:
    """Do the runs that are not done, and write and print the table of those that are.

    Args:
        settings: of the ablation.
        jobs: all runs.
        console: where to.
        command: that started the program, for the hint how to go on.

    Raises:
        ValueError: if the folder holds runs with other settings.
    """
    settle_folder(settings.folder, jobs[0].settings)
    results = JsonLines(settings.folder / "results.jsonl")
    lines, stopped = read_metrics(results.path), False
    with stop_on_signals() as stop:
        for number, job in enumerate(jobs, start=1):
            if not job.results.exists():
                with console.status(f"[{number}/{len(jobs)}] {job.label}, seed {job.seed}"):
                    done = do(job, keep_checkpoints=settings.keep_checkpoints)
                if not done:
                    stopped = True
                    break
                console.print(f"\\[{number}/{len(jobs)}] {_told(line_of(job))}", highlight=False, soft_wrap=True)
            line = line_of(job)
            if line not in lines:
                results.log(line)
            if stop:
                stopped = number < len(jobs)
                break
    show(settings, [job for job in jobs if job.results.exists()], console)
    if stopped:
        console.print(f"stopped; go on with:\n  {command}", highlight=False, soft_wrap=True)


def settle_folder(folder: Path, settings: TrainSettings) -> None:
    """Write down the settings that all runs of a folder share, or compare them with what is there.

    Args:
        folder: of the ablation; made if need be.
        settings: of any run.

    Raises:
        ValueError: if the folder holds runs with other settings, or something else.
    """
    path = folder / "settings.json"
    shared = {name: value for name, value in flat_settings(settings).items() if name not in _NOT_SHARED}
    if not path.exists():
        if folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise ValueError(f"--folder {folder} holds something that is no ablation; choose another --folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(shared, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(name for name in {*before, *shared} if before.get(name) != shared.get(name))
    if names:
        told = ", ".join(f"--{name.replace('_', '-')} {before.get(name)} (now {shared.get(name)})" for name in names)
        raise ValueError(
            f"{folder} holds runs with {told}; rows of a table share their settings. Give the same again, or choose "
            f"another --folder"
        )


def show(settings: AblationSettings, jobs: Sequence[Job], console: Console) -> None:
    """Print the table of runs that are done, and write ``table.md`` and ``ablation.png``.

    Args:
        settings: of the ablation.
        jobs: runs that are done.
        console: where to.
    """
    if not jobs:
        return
    rows = summaries([line_of(job) for job in jobs])
    console.print(printed(rows))
    write_whole(settings.folder / "table.md", markdown(rows))
    try:
        picture: Any = draw(settings.folder / "ablation.png", rows)
    except ModuleNotFoundError as error:
        picture = f"none: {error}"
    console.print(f"table: {settings.folder / 'table.md'}\npicture: {picture}", highlight=False, soft_wrap=True)


def _console() -> Console:
    """Give a file or a pipe the width that the table needs."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=180)


def _told(line: dict[str, Any]) -> str:
    who = f"{line['router']}, seed {line['seed']}: "
    if "failed" in line:
        return who + line["failed"]
    losses = ", ".join(f"{name} {scores['loss']:.3f}" for name, scores in line["validation"].items())
    return f"{who}{losses}; {line['seconds']:.0f} s of training, {line['tokens'] / line['seconds']:,.0f} tokens/s"


def _check_words(words: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name in _OWN:
            raise ValueError(
                f"{word} was given after `--`, but the ablation sets it for every run; give its own flags before the "
                f"`--`: --steps, --seeds, --recipe, --folder"
            )


def _check_recipe(job: Job) -> None:
    """Find out before the first run whether a router fits the model."""
    try:
        check_model(job.settings.model)
    except ValueError as error:
        raise ValueError(f"{job.label}: {error}") from error
