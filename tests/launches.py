"""Programs on the ranks of ``ranks.run_ranks``, so that none of them imports torch for itself."""

import contextlib
import io
import runpy
import warnings
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

from moekit.parallel import World
from moekit.recipes import report, runs
from moekit.recipes.configuration import parse_settings
from moekit.recipes.runs import claimed
from moekit.recipes.train import main


class Ended(NamedTuple):
    """How a command line ended on a rank: its exit message, or None, and what it printed."""

    message: str | None
    said: str


def run_commands(world: World, commands: list[list[str]]) -> list[Ended]:
    """Run command lines of the training program one after the other in the same processes; no run is drawn."""
    with patch.object(report, "plot_run", lambda path, **options: path):
        return [_run(words) for words in commands]


def run_drawn(world: World, words: list[str]) -> Ended:
    """Run a command line of the training program, with the picture at its end."""
    return _run(words)


def claim_unnamed(world: World, words: list[str]) -> list[str]:
    """Claim folders for two runs without a name, where clocks of ranks differ; return the folders' names."""
    settings = parse_settings(words)
    settings = replace(settings, run=replace(settings.run, name=None))
    now = patch.object(runs.time, "strftime", lambda form: f"now{world.rank}")
    with now, claimed(settings, world) as first, claimed(settings, world) as second:
        return [first.name, second.name]


def run_file(world: World, path: str, *words: str) -> str:
    """Call the ``main`` of a file with words; return what the rank printed."""
    said: Any = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(path)["main"](list(words))
    return said.getvalue()


def _run(words: list[str]) -> Ended:
    said: Any = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        if "--torchcompile" in words:
            warnings.simplefilter("ignore")  # the compiler's own
        try:
            main(words)
        except SystemExit as error:
            return Ended(str(error), said.getvalue())
    return Ended(None, said.getvalue())
