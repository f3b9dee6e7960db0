"""The console script ``moekit``: one word chooses a program, the rest is handed to it."""

import importlib
import inspect
import signal
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from moekit import __version__
from moekit.lookup import unknown_name
from moekit.recipes import doctor as _doctor
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
        print(usage())
    elif words[0] == "--version":
        print(f"moekit {__version__}")
    elif words[0] not in PROGRAMS:
        raise SystemExit(f"moekit: {unknown_name(words[0], PROGRAMS, what='program')}\n\n{usage()}")
    else:
        try:
            PROGRAMS[words[0]](words[1:])
        except KeyboardInterrupt:
            print(f"moekit {words[0]}: interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None


def usage() -> str:
    """List the programs, with what each does.

    Returns:
        A text of several lines.

    Example:
        >>> print(usage().splitlines()[0])
        usage: moekit PROGRAM ...
    """
    lines = [f"  {name:<9} {(inspect.getdoc(program) or '').splitlines()[0]}" for name, program in PROGRAMS.items()]
    return "\n".join(["usage: moekit PROGRAM ...", "       moekit --version", "", "programs:", *lines])


def train(arguments: list[str]) -> None:
    """Train and evaluate a language model; `moekit train --help` lists the flags.

    Args:
        arguments: the words after `train`.

    Raises:
        SystemExit: with a message, if settings or data make no sense, or a package is missing.
    """
    main = _program("moekit.recipes.train", "moekit train", "rich", "tyro", "torchdata")
    main(arguments, prog="moekit train", launch="moekit train")


def recipes(arguments: list[str]) -> None:
    """List the published methods that --recipe knows.

    Args:
        arguments: the words after `recipes`; there are none but --help.

    Raises:
        SystemExit: if there are others, or rich is missing.
    """
    if _asks_for_help("recipes", arguments):
        return
    try:
        from moekit.lm.consoles import print_lines, wide_console
    except ModuleNotFoundError as error:
        raise SystemExit(f"moekit recipes: {error}; it prints a table with rich: pip install rich") from error
    console = wide_console()
    console.print(recipe_table(RECIPES))
    for name, make in RECIPES.items():
        print_lines(console, f"{name}: {_first_line(make)}", f"  {_first_reference(make)}")


def doctor(arguments: list[str]) -> None:
    """Say what is usable on this machine, what is not, and why.

    Args:
        arguments: the words after `doctor`; there are none but --help.

    Raises:
        SystemExit: if there are others.
    """
    if _asks_for_help("doctor", arguments):
        return
    print("\n".join(_doctor.diagnose()))


def tokenize(arguments: list[str]) -> None:
    """Make shards of text files; `moekit tokenize --help` lists the flags.

    Args:
        arguments: the words after `tokenize`.

    Raises:
        SystemExit: with a message, if it cannot go on, or a package is missing.
    """
    _program("moekit.lm.tokenize", "moekit tokenize", "rich", "tyro")(arguments, prog="moekit tokenize")


def export(arguments: list[str]) -> None:
    """Write a checkpoint's model as a .pt file of OpenLM's, or as .safetensors.

    Args:
        arguments: the words after `export`.

    Raises:
        SystemExit: with a message, if it cannot go on, or a package is missing.
    """
    _program("moekit.recipes.export", "moekit export", "tyro")(arguments, prog="moekit export")


def traffic(arguments: list[str]) -> None:
    """Predict what each parallel strategy sends, and how long it takes, on 2 to 1,024 GPUs.

    Args:
        arguments: the words after `traffic`.

    Raises:
        SystemExit: with a message, if the shape cannot be, or a package is missing.
    """
    _program("moekit.recipes.traffic", "moekit traffic", "rich", "tyro")(arguments, prog="moekit traffic")


def bench(arguments: list[str]) -> None:
    """Measure MoE layers by backend, against the dense bound: `moekit bench layer`.

    Args:
        arguments: the words after `bench`.

    Raises:
        SystemExit: with a message, if there is nothing of that name to measure, or a package is missing.
    """
    _program("moekit.recipes.bench.program", "moekit bench", "rich", "tyro")(arguments, prog="moekit bench")


def tune(arguments: list[str]) -> None:
    """Find the fastest tiles of the fused layer's kernels for your shapes, and write them to a file.

    Args:
        arguments: the words after `tune`.

    Raises:
        SystemExit: with a message, if there is no CUDA device, it cannot go on, or a package is missing.
    """
    _program("moekit.recipes.tuning.program", "moekit tune", "rich", "tyro")(arguments, prog="moekit tune")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "tokenize": tokenize,
    "export": export,
    "recipes": recipes,
    "traffic": traffic,
    "bench": bench,
    "tune": tune,
    "doctor": doctor,
}


def _program(module: str, name: str, *packages: str) -> Callable[..., None]:
    """Import a program's ``main``, or say which packages its module imports."""
    try:
        main: Callable[..., None] = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        needed = " and ".join(filter(None, (", ".join(packages[:-1]), packages[-1])))
        raise SystemExit(f"{name}: {error}; it needs {needed}. `moekit doctor` says what is usable here.") from error
    return main


def _asks_for_help(program: str, arguments: list[str]) -> bool:
    """Print the help of a program without flags, if it is asked for; every other word is refused."""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: moekit {program}\n\n{_first_line(PROGRAMS[program])}")
        return True
    if arguments:
        raise SystemExit(f"moekit {program}: takes no further words, but {' '.join(arguments)!r} was given.")
    return False


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _first_reference(function: Callable[..., Any]) -> str:
    """Return the first entry of a docstring's references; lines that go on with it are indented further."""
    _, _, references = (inspect.getdoc(function) or "").partition("References:\n")
    first, *others = references.splitlines() or [""]
    indented = " " * (len(first) - len(first.lstrip()) + 1)
    return " ".join(line.strip() for line in (first, *takewhile(lambda line: line.startswith(indented), others)))
