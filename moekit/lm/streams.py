"""Standard output as programs need it: no character that it lacks, and no reader that goes away, ends them."""

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

_IN_ASCII = dict.fromkeys(range(0x2500, 0x2580), "+") | str.maketrans("▁▂▃▄▅▆▇█±─━═│┃║", "12345678~---|||")
_ERRORS = "moekit.readable"


def take_all_characters() -> None:
    """Let standard output replace characters that its encoding lacks, if it would raise."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors=_ERRORS)


def print_text(text: str) -> None:
    """Print, as far as somebody reads it, in characters that standard output has.

    Args:
        text: of any lines.

    Example:
        >>> print_text("done: logs/a")
        done: logs/a
    """
    take_all_characters()
    try:
        print(text, flush=True)
    except OSError as error:
        print_no_more(error)


def print_no_more(error: OSError) -> None:
    """Say on standard error, if that is read, that nothing is printed any more, and let what is printed go nowhere.

    Args:
        error: of standard output, such as BrokenPipeError, or EIO of a terminal that was closed.
    """
    why = "nobody reads standard output any more"
    if not isinstance(error, BrokenPipeError):
        why = f"standard output cannot be written to ({error})"
    stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # while rich shows progress
    _lead_nowhere(sys.stdout)
    try:
        print(f"{why}; nothing is printed from here on", file=stderr, flush=True)
    except OSError:
        _lead_nowhere(stderr)


def _lead_nowhere(stream: TextIO) -> None:
    """Replace what a stream writes to: what is in buffers would fail again, and Python end with another status."""
    with open(os.devnull, "wb") as nowhere, suppress(OSError):
        os.dup2(nowhere.fileno(), stream.fileno())


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
