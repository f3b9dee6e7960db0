"""Where programs print: consoles wide enough for their tables, and lines as they are."""

import os

from rich.console import Console

from moekit.lm.streams import print_no_more, take_all_characters


def plain_console(*, quiet: bool = False, piped: int = 120) -> Console:
    """Return a console that prints names and paths as they are, in tables too: neither markup nor emoji codes are read.

    No run ends because of what it prints. If whoever reads it goes away, as ``head`` does, or a terminal that is
    closed, or if what it prints to is full, the console is quiet from there on, and standard error says so. Where the
    encoding of standard output lacks characters, blocks of bars are digits from 1 to 8, lines of tables ``-``, ``|``
    and ``+``, and other characters question marks.

    Args:
        quiet: print nothing.
        piped: columns of a file or a pipe, unless COLUMNS says how many, and more than 0; a terminal has its own.

    Example:
        >>> plain_console().print("logs/a[v2]/:car:")
        logs/a[v2]/:car:
    """
    take_all_characters()
    console = _Console(quiet=quiet, markup=False, emoji=False)
    if console.width < 1 or not (console.is_terminal or os.environ.get("COLUMNS", "").isdigit()):
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


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on, where rich would end the process: a run has more to do than to print."""
        self._be_quiet(BrokenPipeError())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:  # rich knows of pipes alone
            self._be_quiet(error)

    def _be_quiet(self, error: OSError) -> None:
        self.quiet = True
        print_no_more(error)
