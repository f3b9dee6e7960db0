"""Where programs print: consoles wide enough for their tables, and lines as they are."""

import codecs
import contextlib
import io
import os
import sys

from rich.console import Console

_IN_ASCII = dict.fromkeys(range(0x2500, 0x2580), "+") | str.maketrans("▁▂▃▄▅▆▇█±─━═│┃║", "12345678~---|||")
_ERRORS = "moekit.readable"


def plain_console(*, quiet: bool = False, piped: int = 120) -> Console:
    """Return a console that prints names and paths as they are, in tables too: neither markup nor emoji codes are read.

    No run ends because of what it prints. If whoever reads it goes away, as ``head`` does, the console is quiet from
    there on, and standard error says so. Where the encoding of standard output lacks characters, blocks of bars are
    digits from 1 to 8, lines of tables ``-``, ``|`` and ``+``, and other characters question marks.

    Args:
        quiet: print nothing.
        piped: columns of a file or a pipe, unless COLUMNS says how many; a terminal has its own.

    Example:
        >>> plain_console().print("logs/a[v2]/:car:")
        logs/a[v2]/:car:
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors=_ERRORS)
    console = _Console(quiet=quiet, markup=False, emoji=False)
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


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on, where rich would end the process: a run has more to do than to print."""
        self.quiet = True
        print("nobody reads standard output any more; nothing is printed from here on", file=sys.stderr)
        with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):  # what is in buffers would fail again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _readable(error: UnicodeError) -> tuple[bytes, int]:
    """Replace what an encoding lacks by what all have, for ``codecs.register_error``; bytes of file names stay."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_IN_ASCII)
    return b"".join(_bytes(character) for character in lacking), error.end


def _bytes(character: str) -> bytes:
    byte = ord(character) - 0xDC00  # of a name that is in no encoding (PEP 383)
    return bytes([byte]) if 0x80 <= byte < 0x100 else character.encode("ascii", "replace")


codecs.register_error(_ERRORS, _readable)
