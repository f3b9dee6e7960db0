"""The console script ``moekit``: one word chooses a program, the rest is handed to it."""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from moekit import __version__
from moekit.lm.signals import interrupted
from moekit.lm.streams import print_text
from moekit.lookup import unknown_name
from moekit.recipes.doctor import diagnose
from moekit.recipes.names import RECIPES
from moekit.recipes.recipe_tables import recipe_table


def main(arguments: list[str] | None = None) -> None:
    """Run one of moekit's programs.

    Args:
        arguments: the words of the command line; None takes ``sys.argv``.

    Raises:
        SystemExit: with a message, if there is no such program, or it cannot go on, or it is interrupted.

    Example:
        >>> main(["--version"])
        moekit 0.1.0
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print_text(_usage())
    elif words[0] == "--version":
        print_text(f"moekit {__version__}")
    elif words[0] not in PROGRAMS:
        raise SystemExit(f"moekit: {unknown_name(words[0], PROGRAMS, what='program')}\n\n{_usage()}")
    else:
        try:
            PROGRAMS[words[0]].run(words[0], words[1:])
        except KeyboardInterrupt:
            raise interrupted(f"moekit {words[0]}") from None


def _usage() -> str:
    """List the programs."""
    lines = [f"  {name:<9} {program.purpose}" for name, program in PROGRAMS.items()]
    return "\n".join(["usage: moekit PROGRAM ...", "       moekit --version", "", "programs:", *lines])


class Program(NamedTuple):
    """A program of the console script.

    Attributes:
        purpose: what it does, in a line.
        run: takes its name and the words after that; it raises SystemExit with a message if it cannot go on.
    """

    purpose: str
    run: Callable[[str, list[str]], None]


def _run(module: str, packages: tuple[str, ...], name: str, words: list[str], **options: str) -> None:
    """Run the ``main`` of a module, or say which packages it imports."""
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        needed = " and ".join(filter(None, (", ".join(packages[:-1]), packages[-1])))
        raise SystemExit(
            f"moekit {name}: {error}; it needs {needed}. `moekit doctor` says what is usable here."
        ) from error
    main(words, prog=f"moekit {name}", **options)


def _recipes(name: str, words: list[str]) -> None:
    if _asks_for_help(name, words):
        return
    try:
        from moekit.lm.consoles import print_lines, wide_console
    except ModuleNotFoundError as error:
        raise SystemExit(f"moekit {name}: {error}; it prints a table with rich: pip install rich") from error
    console = wide_console()
    console.print(recipe_table(RECIPES))
    if sys.flags.optimize > 1:
        print_lines(console, "Python runs with -OO, without the docstrings that hold descriptions and references.")
        return
    for recipe, make in RECIPES.items():
        print_lines(console, f"{recipe}: {_first_line(make)}", f"  {_first_reference(make)}")


def _doctor(name: str, words: list[str]) -> None:
    if not _asks_for_help(name, words):
        print_text("\n".join(diagnose()))


PROGRAMS = {
    "train": Program(
        "Train and evaluate a language model; `moekit train --help` lists the flags.",
        partial(_run, "moekit.recipes.train", ("rich", "tyro", "torchdata"), launch="moekit train"),
    ),
    "tokenize": Program(
        "Make shards of text files; `moekit tokenize --help` lists the flags.",
        partial(_run, "moekit.lm.tokenize", ("rich", "tyro")),
    ),
    "export": Program(
        "Write a checkpoint's model as a .pt file of OpenLM's, or as .safetensors.",
        partial(_run, "moekit.recipes.export", ("tyro",)),
    ),
    "recipes": Program("List the published methods that --recipe knows.", _recipes),
    "traffic": Program(
        "Predict what each parallel strategy sends, and how long it takes, on 2 to 1,024 GPUs.",
        partial(_run, "moekit.recipes.traffic", ("rich", "tyro")),
    ),
    "bench": Program(
        "Measure MoE layers by backend, against the dense bound: `moekit bench layer`.",
        partial(_run, "moekit.recipes.bench.program", ("rich", "tyro")),
    ),
    "tune": Program(
        "Find the fastest tiles of the fused layer's kernels for your shapes, and write them to a file.",
        partial(_run, "moekit.recipes.tuning.program", ("rich", "tyro")),
    ),
    "doctor": Program("Say what is usable on this machine, what is not, and why.", _doctor),
}


def _asks_for_help(name: str, words: list[str]) -> bool:
    """Print the help of a program without flags, if it is asked for; every other word is refused."""
    if words in (["-h"], ["--help"]):
        print_text(f"usage: moekit {name}\n\n{PROGRAMS[name].purpose}")
        return True
    if words:
        raise SystemExit(f"moekit {name}: takes no further words, but {' '.join(words)!r} was given.")
    return False


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _first_reference(function: Callable[..., Any]) -> str:
    """Return the first entry of a docstring's references; lines that go on with it are indented further."""
    _, _, references = (inspect.getdoc(function) or "").partition("References:\n")
    first, *others = references.splitlines() or [""]
    indented = " " * (len(first) - len(first.lstrip()) + 1)
    return " ".join(line.strip() for line in (first, *takewhile(lambda line: line.startswith(indented), others)))
