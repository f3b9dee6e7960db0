"""What a tokenizing run is to do, on record, so that the same command goes on and another one is refused."""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moekit.lm.files import read_object, write_whole
from moekit.lm.shards import MANIFEST
from moekit.lm.tokenize_parts import TOKENIZER, Tally
from moekit.lm.tokenizers import BpeTokenizer, Tokenizer

FORMAT = 1  # raise it when the same plan would give other bytes
PARTS = ".parts"
RECORD = "tokenize.json"
_NOTED = "what an earlier run noted"
_ANEW = "Give another --output, or remove the folder to start anew"


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a hash of all that decides a tokenizer's ids.

    Args:
        tokenizer: a byte tokenizer or a BPE.

    Returns:
        Hexadecimal digits, with the name in front.
    """
    content = f"{tokenizer.to_json()} {tokenizer.end_of_text}" if isinstance(tokenizer, BpeTokenizer) else ""
    return f"{tokenizer.name} {hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def library_versions() -> dict[str, str]:
    """Name the versions of what decides bytes: torch the order, tokenizers the ids."""
    versions = {}
    for package in ("torch", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # bytes need no tokenizers
            versions[package] = importlib.metadata.version(package)
    return versions


def read_finished(folder: Path) -> tuple[dict[str, Any], tuple[list[Any], int, int, int]]:
    """Read what a finished run noted.

    Args:
        folder: its output.

    Returns:
        Its plan; and its summary: a tally, sequences, shards, padding.

    Raises:
        ValueError: if that is damaged.
    """
    path = folder / RECORD
    record = read_object(path, expected=_NOTED, mend=f". {_ANEW}")
    match record:
        case {"plan": dict(plan), "summary": [list(tally), int(sequences), int(shards), int(padding)]}:
            if len(tally) == len(Tally._fields):
                return plan, (tally, sequences, shards, padding)
    raise ValueError(f"{path} is damaged: it lacks a plan or a summary. {_ANEW}")


def check_same(recorded: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> None:
    """Check that a command is the one that a folder was begun with.

    After a stop at a bad document, ``on_bad_document`` may turn from "raise" to "skip": nothing was left out before.

    Args:
        recorded: the plan in the folder.
        plan: of the command.
        folder: the output.

    Raises:
        ValueError: if they differ; it says in what.
    """
    differences = []
    for key in sorted({*recorded, *plan}):
        old, new = recorded.get(key), plan.get(key)
        if old != new and (key, old, new) != ("on_bad_document", "raise", "skip"):
            differences += _changed_inputs(old or {}, new) if key == "inputs" else [f"{key} was {old!r} and is {new!r}"]
    if differences:
        raise ValueError(f"{folder} was begun by another command: {'; '.join(differences)}. {_ANEW}")


def sizes_and_times(files: Iterable[Path]) -> dict[str, list[int]]:
    """Describe inputs, so that a changed one is noticed.

    Args:
        files: absolute paths.

    Returns:
        Path to its bytes and the time of its last change, in nanoseconds.

    Raises:
        OSError: if a file is not there.
    """
    found = ((file, file.stat()) for file in files)
    return {str(file): [stat.st_size, stat.st_mtime_ns] for file, stat in found}


def check_unchanged(plan: Mapping[str, Any], files: Iterable[Path], folder: Path) -> None:
    """Check that inputs are what they were before they were read.

    Args:
        plan: of the command.
        files: its inputs.
        folder: the output.

    Raises:
        ValueError: if one has changed.
        OSError: if one is not there any more.
    """
    differences = _changed_inputs(plan["inputs"], sizes_and_times(files))
    if differences:
        raise ValueError(
            f"{'; '.join(differences)} while it was read, so what was read is of no use. {_ANEW}: {folder}"
        )


def open_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Note the plan in a new folder, or check it in one that was begun.

    Args:
        folder: the output.
        plan: of the command.

    Raises:
        ValueError: if the folder was begun by another command, or the plan in it is damaged.
        FileExistsError: if it holds shards of which nothing is known.
    """
    path = folder / PARTS / "plan.json"
    if path.exists():
        check_same(read_object(path, expected=_NOTED, mend=f". {_ANEW}"), plan, folder)
    else:
        check_free(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(plan))


def check_free(folder: Path) -> None:
    """Check that a folder holds nothing that would be written.

    Args:
        folder: the output, which need not exist.

    Raises:
        FileExistsError: if it holds shards, a manifest, or a tokenizer.
    """
    names = [MANIFEST, RECORD, TOKENIZER, *sorted(path.name for path in folder.glob("*.tar"))]
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise FileExistsError(f"{folder} holds {taken[0]}, which this command did not write. {_ANEW}")


def _changed_inputs(old: Any, new: Any) -> list[str]:
    kinds = {
        "is new": sorted(new.keys() - old.keys()),
        "is missing": sorted(old.keys() - new.keys()),
        "has changed": sorted(path for path in old.keys() & new.keys() if old[path] != new[path]),
    }
    return [
        f"input {paths[0]} {what}" + (f", and {len(paths) - 1} more" if paths[1:] else "")
        for what, paths in kinds.items()
        if paths
    ]
