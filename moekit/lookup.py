"""Look a name up in a table, with an error that helps whoever mistyped it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

V = TypeVar("V")


def unknown_name(name: str, known: Iterable[str], *, what: str) -> str:
    """Say that a name is not known, which known names are near, and what all of them are.

    Args:
        name: what was given.
        known: the names that exist.
        what: what kind of thing the name stands for, for the message.

    Returns:
        The text of an error message.

    Example:
        >>> unknown_name("rms", ["rms_norm", "layer_norm"], what="norm")
        "unknown norm 'rms'; did you mean 'rms_norm'? Known: layer_norm, rms_norm"
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}"


def look_up(table: Mapping[str, V], name: str, *, what: str) -> V:
    """Return ``table[name]``.

    Args:
        table: the known names and what they stand for.
        name: the name to find.
        what: what kind of thing the name stands for, for the message.

    Returns:
        The value under ``name``.

    Raises:
        ValueError: if the table has no such name; the message lists near matches and all names.

    Example:
        >>> look_up({"a": 1}, "a", what="letter")
        1
    """
    if name not in table:
        raise ValueError(unknown_name(name, table, what=what))
    return table[name]
