"""Checkpoints of a branch that a run has left: out of its way, and their scores under the names that they get."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit.lm.checkpoint_folders import STEP
from moekit.lm.checkpoints import name_aside, places_aside, set_aside
from moekit.lm.files import write_whole


def abandon(run: Path, *, after: int) -> list[Path]:
    """Set checkpoints of later steps aside; their lines of ``results.jsonl`` name the folders where they then lie.

    Lines are rewritten after the folders have moved: what a process that is killed between the two has left, the next
    call mends. A line that another process appends at this very moment may be lost.

    Args:
        run: the run folder.
        after: steps done, where the run goes on from. Lines of later steps are of the branch that it leaves.

    Returns:
        The new names of the checkpoints' folders.

    Raises:
        OSError: if a folder cannot be renamed, or the lines cannot be read or written.

    Example:
        >>> abandon(Path("no/such/run"), after=7)
        []
    """
    path = run / "checkpoints" / "results.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    known = [_values(line) for line in lines]
    named = [Path(values["checkpoint_path"]).name for values in known if values]
    moved = set_aside(run, after=after, taken=named)
    read = zip(lines, known, strict=True)
    new = [_renamed(line, values, path.parent, after=after, named=named) for line, values in read]
    if new != lines:
        write_whole(path, b"\n".join(new))
    return moved


def _values(line: bytes) -> dict[str, Any] | None:
    """Read a line about a checkpoint; one that is cut short, damaged or of another program is None."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("checkpoint_path"), str) else None


def _renamed(line: bytes, values: dict[str, Any] | None, folder: Path, *, after: int, named: Sequence[str]) -> bytes:
    """Let a line name where its checkpoint lies that was one of a later step; any other is as it was."""
    if values is None:
        return line
    checkpoint = Path(values["checkpoint_path"])
    step = re.fullmatch(STEP, checkpoint.name)
    if step is None or int(step[1]) <= after or _is_elsewhere(checkpoint, folder):
        return line
    name = _name_aside(int(step[1]), folder, named=named)
    return json.dumps({**values, "checkpoint_path": str(checkpoint.with_name(name))}).encode()


def _is_elsewhere(checkpoint: Path, folder: Path) -> bool:
    """Say whether a path is of a checkpoint of another folder, of which this one is a copy, as lines are copied too."""
    there = checkpoint.is_absolute() and os.path.exists(checkpoint)
    return there and checkpoint.parent.resolve() != folder.resolve()


def _name_aside(step: int, folder: Path, *, named: Sequence[str]) -> str:
    """Say under which name a checkpoint of a step lies that was set aside: the newest one that no line names yet.

    Of a checkpoint that was removed, or is damaged and was not set aside, it is a name that no folder has.
    """
    there = places_aside((each.name for each in folder.iterdir()), step)
    used = places_aside(named, step)
    return name_aside(step, max(there - used, default=max(there | used, default=0) + 1))
