"""Where programs print: consoles wide enough for their tables, and lines as they are."""

import os

from rich.console import Console


def plain_console(*, quiet: bool = False, piped: int = 120) -> Console:
    """Return a console that prints names and paths as they are, in tables too: neither markup nor emoji codes are read.

    Args:
        quiet: print nothing.
        piped: columns of a file or a pipe, unless COLUMNS says how many; a terminal has its own.

    Example:
        >>> plain_console().print("logs/a[v2]/:car:")
        logs/a[v2]/:car:
    """
    console = Console(quiet=quiet, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = piped
    return console


def wide_console() -> Console:
    """Return a plain console of at least 120 columns, for a row of numbers that is cut says nothing.

    Example:
        >>> wide_console().width >= 120
        True
    """
    console = plain_console()
    console.width = max(console.width, 120)
    return console


def print_lines(console: Console, *lines: str, style: str | None = None) -> None:
    """Print lines, each as it is: neither wrapped, coloured nor read as markup.

    Args:
        console: to print to.
        lines: of text.
        style: of rich; None is plain.

    Example:
        >>> print_lines(Console(width=8), "as [it] is, whole :car:")
        as [it] is, whole :car:
    """
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_warnings(console: Console, *lines: str) -> None:
    """Print lines that nobody should miss: bold, each as it is.

    Args:
        console: to print to.
        lines: of text.

    Example:
        >>> print_warnings(Console(width=8), "warning: as [it] is")
        warning: as [it] is
    """
    print_lines(console, *lines, style="bold")
