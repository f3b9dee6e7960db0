"""Which recipe a run folder is of: one file's numbers are not shown as another's that defines the same name."""

import json
import os
from pathlib import Path


def located(recipe: str) -> str:
    """Let a recipe in a file mean the same from any folder.

    Args:
        recipe: what ``--recipe`` is.

    Returns:
        With an absolute path if it names a file, else as it is.

    Example:
        >>> located("mixtral"), located(f"{os.curdir}/half.py:half") == f"{os.getcwd()}/half.py:half"
        ('mixtral', True)
    """
    path, colon, name = recipe.rpartition(":")
    return f"{os.path.abspath(path)}{colon}{name}" if path.endswith(".py") else recipe


def same_recipe(stored: str, given: str) -> bool:
    """Say whether a run that was started with one recipe can go on with another.

    Older versions wrote a path as it was typed, in a folder that nobody knows now. So where there is no such file from
    here, or it was moved, the name of the file decides.

    Args:
        stored: what ``--recipe`` was, as ``config.json`` says it.
        given: what it is.

    Returns:
        Whether both are the same name, or one function in one file.

    Example:
        >>> same_recipe("old/r.py:half", "new/r.py:half"), same_recipe("r.py:half", "s.py:half")
        (True, False)
        >>> same_recipe("mixtral", "r.py:mixtral")
        False
    """
    if located(stored) == located(given):
        return True
    (before, _, name), (now, _, asked) = stored.rpartition(":"), given.rpartition(":")
    if name != asked or not (before.endswith(".py") and now.endswith(".py")):
        return False
    if os.path.isfile(before) and os.path.isfile(now):
        return os.path.samefile(before, now)
    return os.path.basename(before) == os.path.basename(now)


def stored_recipe(folder: Path) -> str | None:
    """Read what a run was started with.

    Args:
        folder: of the run.

    Returns:
        What ``--recipe`` was; None if there is no ``config.json`` or it does not say.

    Raises:
        ValueError: if ``config.json`` is damaged.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected the settings of a run. Remove {folder}") from error
    found = values.get("recipe") if isinstance(values, dict) else None
    return None if found is None else str(found)


def other_recipe(folder: Path, given: str) -> str | None:
    """Say why a run folder is not one of a recipe.

    Args:
        folder: of the run; it need not be there.
        given: what ``--recipe`` is.

    Returns:
        What is wrong and how to mend it; None if nothing is.

    Raises:
        ValueError: if its ``config.json`` is damaged.
    """
    stored = stored_recipe(folder)
    if stored is None or same_recipe(stored, given):
        return None
    return (
        f"{folder} holds a run of --recipe {stored}, and now it is --recipe {given}; expected the same, since a folder "
        f"is named by what comes after the colon. Choose another --folder, or remove {folder}"
    )
