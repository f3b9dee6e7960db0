"""The folders of a run's checkpoints: their names, the newest whole one, and how old ones go."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from moekit.lm.checkpoint_checksums import CHECKSUMS, NO_CHECKSUMS, changed_file, read_checksums
from moekit.lm.checkpoint_index import INDEX, missing_piece, one_line
from moekit.lm.files import sync_folder

STATE = "state.json"
STEP = r"step_(\d{8,})"  # the names of ``checkpoint_folder``


def checkpoint_folder(run: str | os.PathLike[str], step: int) -> Path:
    """Name the folder of a run's checkpoint.

    Args:
        run: the run folder.
        step: optimizer steps done.

    Returns:
        ``run/checkpoints/step_NNNNNNNN``.

    Example:
        >>> checkpoint_folder("logs/a", 7).name
        'step_00000007'
    """
    return Path(run) / "checkpoints" / f"step_{step:08d}"


def latest_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """Find a run's newest whole checkpoint; warn about a newer one that is incomplete, damaged or without checksums.

    Every file of the one that is found was read and compared with its checksum.

    Args:
        run: the run folder.

    Returns:
        The folder, or None if there is none.

    Example:
        >>> latest_checkpoint("no/such/run") is None
        True
    """
    for folder in _checkpoints(run).values():
        fault = _fault(folder) or changed_file(folder, read_checksums(folder))
        if fault is None:
            return folder
        why = "" if fault == NO_CHECKSUMS else ", so it was not written to its end or is damaged"
        warnings.warn(f"skipping {folder}: {fault}{why}", stacklevel=2)
    return None


def prune_checkpoints(run: str | os.PathLike[str], *, keep: int, step: int) -> None:
    """Remove old checkpoints of a run: of those up to a step, all before the newest whole ones.

    Args:
        run: the run folder.
        keep: how many whole ones stay.
        step: optimizer steps done. Checkpoints of later steps, of a run that went back, are left alone.

    Example:
        >>> prune_checkpoints("no/such/run", keep=1, step=7)
    """
    upto = [folder for each, folder in _checkpoints(run).items() if each <= step]
    whole = [each for each in upto if _fault(each) is None]
    for folder in upto[upto.index(whole[keep - 1]) + 1 :] if len(whole) >= keep else []:
        _remove(folder)


def set_aside(run: str | os.PathLike[str], *, after: int, taken: Collection[str] = ()) -> list[Path]:
    """Rename whole checkpoints of later steps, of a branch that the run has left, to ``abandoned_step_N``.

    A later branch's becomes ``abandoned_step_N-2`` and so on, so that a name is of one checkpoint.

    Args:
        run: the run folder.
        after: steps done, where the run goes on from.
        taken: names that none may get, such as those of removed folders whose scores are kept.

    Returns:
        The new names; ``latest_checkpoint`` does not see them.

    Example:
        >>> set_aside("no/such/run", after=7)
        []
    """
    moved = []
    for step, folder in _checkpoints(run).items():
        if step > after and _fault(folder) is None and changed_file(folder, read_checksums(folder)) is None:
            there = (each.name for each in folder.parent.iterdir())
            aside = folder.with_name(name_aside(step, max(places_aside([*there, *taken], step), default=0) + 1))
            os.replace(folder, aside)
            moved.append(aside)
    return moved


def name_aside(step: int, place: int) -> str:
    """Name the folder of a checkpoint that is set aside.

    Args:
        step: of the checkpoint.
        place: among those of its step, from 1.

    Returns:
        The name.

    Example:
        >>> name_aside(24, 1), name_aside(24, 2)
        ('abandoned_step_00000024', 'abandoned_step_00000024-2')
    """
    return f"abandoned_{checkpoint_folder('', step).name}{f'-{place}' if place > 1 else ''}"


def places_aside(names: Iterable[str], step: int) -> set[int]:
    """Pick the names of ``name_aside`` out of others.

    Args:
        names: of folders.
        step: of the checkpoints.

    Returns:
        Their places among those of the step.

    Example:
        >>> places_aside(["step_00000024", "abandoned_step_00000024-2", "abandoned_step_00000020"], 24)
        {2}
    """
    found = (re.fullmatch(rf"{name_aside(step, 1)}(?:-(\d+))?", name) for name in names)
    return {int(name[1] or 1) for name in found if name}


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a checkpoint holds beside tensors.

    Args:
        folder: of the checkpoint.

    Returns:
        The state that was saved with it.

    Raises:
        FileNotFoundError: if there is no complete checkpoint in the folder.
        ValueError: if the state is no JSON object.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}: expected a folder step_NNNNNNNN with {STATE} in it. Checkpoints lie "
            f"in the run folder, under checkpoints/; where a run's folder is taken, it means the newest in it."
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {STATE} is no JSON ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {folder} is damaged: {STATE} holds a {type(state).__name__}, no object")
    return state


def remove_leftovers(parent: Path) -> None:
    """Remove what a process that was killed while it wrote or removed a checkpoint has left.

    Args:
        parent: of the checkpoints' folders.
    """
    for kind in ("unfinished", "removed"):
        for folder in parent.glob(f".*.{kind}"):
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, folder: Path) -> None:
    """Put a checkpoint in the place of another, or nothing.

    The old one is moved away before it is deleted, since half of it under its name would look like a whole one. A
    process that is killed between the two moves leaves it as ``.NAME.replaced``, where ``latest_checkpoint`` finds it.
    The new one's name is on the disk before anything older is removed, here or by ``prune_checkpoints``.

    Args:
        new: the folder to move.
        folder: where to.
    """
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    sync_folder(new)
    os.replace(new, folder)
    sync_folder(folder.parent)
    _remove(replaced)


def _checkpoints(run: str | os.PathLike[str]) -> dict[int, Path]:
    """List a run's checkpoints by step, newest first; one that was moved away for a new one counts until that is there.

    A folder of another name, such as a copy that somebody put aside, is none.
    """
    found: dict[int, Path] = {}
    for form in (rf"\.{STEP}\.replaced", STEP):
        for folder in (Path(run) / "checkpoints").glob("*"):
            name = re.fullmatch(form, folder.name)
            if name:
                found[int(name[1])] = folder
    return dict(sorted(found.items(), reverse=True))


def _fault(folder: Path) -> str | None:
    """Say what a checkpoint lacks, without reading its tensors, or None."""
    try:
        read_state(folder)
        if not (folder / CHECKSUMS).is_file():
            return NO_CHECKSUMS
        checksums = read_checksums(folder)
        small = {name: checksums[name] for name in (INDEX, STATE) if name in checksums}
        return changed_file(folder, small) or missing_piece(folder)
    except FileNotFoundError:
        return f"it has no {STATE}"
    except ValueError as error:
        return one_line(error)


def _remove(folder: Path) -> None:
    if folder.exists():
        gone = folder.with_name(f".{folder.name.strip('.')}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
