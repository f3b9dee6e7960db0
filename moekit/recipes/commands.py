"""The line that starts a program again, as it was really started."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from moekit.parallel import under_torchrun


def command_line(words: Sequence[str], *, prog: str, launch: str) -> str:
    """Rebuild the line that started this program, for a hint how to go on.

    Under torchrun that line is not known here, where torchrun's own words are not seen: it is named instead.

    Args:
        words: that the program was given.
        prog: its name in messages; words after the first are what came before ``words``, as in "moekit train".
        launch: what starts the program where this process was not started with these words, as from Python.

    Returns:
        A line for a shell.

    Example:
        >>> command_line(["--name", "a b"], prog="moekit train", launch="moekit train")
        "moekit train --name 'a b'"
    """
    if under_torchrun():
        return "(the same torchrun line)"
    given = [*prog.split()[1:], *words]
    cut = len(sys.orig_argv) - len(given)
    if not sys.argv[1:] == sys.orig_argv[cut:] == given:
        return f"{launch} {shlex.join(words)}".rstrip()
    return shlex.join([*_start(sys.argv[0], sys.orig_argv[:cut]), *given])


def _start(script: str, start: list[str]) -> list[str]:
    """A console script is named as a shell finds it, without the interpreter in its first line."""
    if start[-1:] != [script] or script.endswith(".py"):
        return start
    name = os.path.basename(script)
    found = shutil.which(name)
    return [name if found is not None and os.path.samefile(found, script) else script]
