"""Where programs print: consoles wide enough for their tables, and lines as they are."""

from collections.abc import Callable, Iterable
from functools import partial

from rich.console import Console


def wide_console() -> Console:
    """Return a console of at least 120 columns, for a row of numbers that is cut says nothing.

    Example:
        >>> wide_console().width >= 120
        True
    """
    console = Console()
    console.width = max(console.width, 120)
    return console


def whole_lines(console: Console) -> Callable[[str], None]:
    """Return a function that prints a line as it is: neither wrapped, coloured nor read as markup.

    Args:
        console: to print to.

    Example:
        >>> whole_lines(Console(width=8))("as [it] is, whole")
        as [it] is, whole
    """
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def print_notes(console: Console, lines: Iterable[str], *, style: str | None = None) -> None:
    """Print lines, each as it is.

    Args:
        console: to print to.
        lines: of text.
        style: of rich; None is plain.

    Example:
        >>> print_notes(Console(width=8), ["as [it] is, whole"])
        as [it] is, whole
    """
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def print_warnings(console: Console, lines: Iterable[str]) -> None:
    """Print lines that nobody should miss: bold, each as it is.

    Args:
        console: to print to.
        lines: of text.

    Example:
        >>> print_warnings(Console(width=8), ["warning: as [it] is"])
        warning: as [it] is
    """
    print_notes(console, lines, style="bold")
