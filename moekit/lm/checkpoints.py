"""Checkpoints: a folder per step, written beside its place and renamed into it, so that a half-written one has no name.

A folder ``step_00001000`` holds the tensors, written by ``torch.distributed.checkpoint``, ``state.json`` with all
else, and checksums. Loading a stranger's checkpoint runs no code: torch reads the tensors with ``weights_only=True``,
and `moekit.lm.checkpoint_index` the index beside them. `moekit.lm.checkpoint_folders` finds and removes folders.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from moekit.lm.checkpoint_checksums import (
    changed_file,
    file_checksums,
    read_checksums,
    write_checksums,
)
from moekit.lm.checkpoint_folders import (
    STATE,
    checkpoint_folder,
    latest_checkpoint,
    name_aside,
    places_aside,
    prune_checkpoints,
    put_in_place,
    read_state,
    remove_leftovers,
    set_aside,
)
from moekit.lm.checkpoint_index import INDEX, IndexReader, one_line, stored_shapes
from moekit.lm.files import write_whole

__all__ = [
    "checkpoint_folder",
    "latest_checkpoint",
    "load_checkpoint",
    "name_aside",
    "places_aside",
    "prune_checkpoints",
    "read_state",
    "save_checkpoint",
    "set_aside",
    "stored_shapes",
    "training_tensors",
]


def save_checkpoint(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint, all of it or nothing. All ranks must call it together; each writes its share.

    Args:
        folder: its place, for example from ``checkpoint_folder``; an old one there is replaced.
        tensors: name to tensor. Sharded ones are stored as one whole tensor; of those that every rank has whole under
            one name, one copy is stored.
        state: whatever JSON can hold; rank 0's counts.

    Returns:
        The folder.

    Raises:
        TypeError: if ``state`` holds something that JSON cannot.
        OSError: if a file cannot be written; earlier checkpoints are untouched, and nothing is left of this one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_checkpoint(Path(parent) / "step_00000001", {"w": torch.ones(2)}, {"step": 1})
        ...     load_checkpoint(folder, {"w": torch.zeros(2)})
        {'step': 1}
    """
    folder = Path(folder)
    text = json.dumps(dict(state), indent=1)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if _leads():
        remove_leftovers(folder.parent)
        unfinished.mkdir(parents=True)
    _meet()
    try:
        _write(unfinished, tensors, text)
        if _leads():
            put_in_place(unfinished, folder)
    except BaseException as error:
        if _leads():  # half a checkpoint would fill the disk that the next launch writes to
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, CheckpointException | OSError):  # the first is no Exception: it would pass by handlers
            full = isinstance(error, CheckpointException) or error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = " Is the disk full?" if full else ""
            raise OSError(f"cannot write the checkpoint {folder}: {one_line(error)}.{hint}") from error
        raise
    _meet()
    return folder


def _write(folder: Path, tensors: Mapping[str, Tensor], state: str) -> None:
    """Write all files of a checkpoint into a folder that is there."""
    with _without_single_process_warning():
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=not _together())
    if _leads():
        write_whole(folder / STATE, state)
    _meet()
    checksums = _gathered(file_checksums(folder, first=_rank(), step=_size()))
    if _leads():
        write_checksums(folder, {name: value for part in checksums for name, value in part.items()})


def load_checkpoint(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a checkpoint into tensors that exist already. All ranks must call it together.

    Args:
        folder: of the checkpoint.
        tensors: name to the tensor to fill in place. Every name must be in the checkpoint, with its shape, and every
            ``model.`` name of the checkpoint must be among them.

    Returns:
        The state that was saved with it.

    Raises:
        FileNotFoundError: if there is no complete checkpoint in the folder.
        ValueError: if a tensor is missing on either side or has another shape, a tensor that has two names (tied
            weights) is two that differ in the checkpoint, a file is damaged, or the checkpoint's index names classes
            that no index has, which could be made to run code.
    """
    state = read_state(folder)
    _check_files(Path(folder))
    stored = stored_shapes(folder)
    hint = (
        f"Start with the model flags that the checkpoint was trained with{_recipe_flag(state)}; they are in "
        f"config.json of its run folder."
    )
    for name, tensor in tensors.items():
        if stored.get(name) != tensor.shape:
            have = f"shape {tuple(stored[name])}" if name in stored else "no such tensor"
            raise ValueError(
                f"checkpoint {folder}: expected {name} of shape {tuple(tensor.shape)}, found {have}. {hint}"
            )
    left = [name for name in stored if name.startswith("model.") and name not in tensors]
    if left:
        raise ValueError(f"checkpoint {folder} holds {', '.join(left)}, which the model has no place for. {hint}")
    _read(Path(folder), tensors)
    return state


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collect every tensor that training changes: parameters, buffers, and the optimizer's state by parameter name.

    Args:
        model: the model.
        optimizer: Adam or AdamW over the model's parameters, or over some of them: the others have no state. State that
            does not exist yet is created as zeros.

    Returns:
        Name to the live tensor, so that loading into the result restores both.

    Raises:
        ValueError: if the optimizer is another one.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> sorted(training_tensors(model, torch.optim.AdamW(model.parameters())))
        ['model.weight', 'optimizer.exp_avg.weight', 'optimizer.exp_avg_sq.weight', 'optimizer.step.weight']
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"training_tensors: the optimizer is {type(optimizer).__name__}; expected Adam or AdamW, whose state "
            f"checkpoints know how to write down and make anew. Teach _adam_state in {__name__} what this one keeps."
        )
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in group_of:  # state of any other would be one that the optimizer cannot write down
            state = _adam_state(optimizer, parameter, group_of[parameter])
            tensors.update({f"optimizer.{key}.{name}": value for key, value in state.items()})
    return tensors


def _adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a parameter's live state, made as torch makes it where there is none yet."""
    keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
    state = optimizer.state[parameter]
    if not state:
        on_device = group.get("fused") or group.get("capturable")  # where torch keeps the step
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        state |= {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in keys}
    return {key: state[key] for key in ("step", *keys)}


def _recipe_flag(state: Mapping[str, Any]) -> str:
    settings = state.get("settings")
    recipe = settings.get("recipe") if isinstance(settings, Mapping) else None
    return f", --recipe {recipe} among them" if isinstance(recipe, str) else ""


def _check_files(folder: Path) -> None:
    """Compare all files with their checksums, each rank some of them."""
    checksums = read_checksums(folder)
    missing = [name for name in (INDEX, STATE) if name not in checksums]
    mine = sorted(checksums)[_rank() :: _size()]
    faults = [f"its checksums leave out {name}" for name in missing]
    faults += [fault for fault in _gathered(changed_file(folder, {name: checksums[name] for name in mine})) if fault]
    if faults:
        raise ValueError(f"checkpoint {folder} is damaged: {faults[0]}. Resume from an older one")


def _read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors in place, and refuse two of the checkpoint that differ where the model has one."""
    twins = _twins(tensors)
    apart = {name: torch.empty_like(tensors[name]) for name in twins}  # else whichever is read last would count
    try:
        with _without_single_process_warning():
            dcp.load({**tensors, **apart}, storage_reader=IndexReader(folder), no_dist=not _together())
    except (Exception, CheckpointException) as error:  # a damaged file may raise anything from torch's reader
        raise ValueError(f"checkpoint {folder} is damaged: {one_line(error)}. Resume from an older one") from error
    differing = [(one, name) for name, one in twins.items() if not _same_bits(tensors[one], apart[name])]
    for one, other in (names for each in _gathered(differing) for names in each):
        raise ValueError(
            f"checkpoint {folder}: the model ties {one} and {other}, but in the checkpoint they differ; expected equal "
            "ones. Choose a --model without weight_tying"
        )


def _twins(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map names to the first name of the same tensor, where one has several, as tied weights do."""
    first: dict[tuple[Any, ...], str] = {}
    twins: dict[str, str] = {}
    for name, tensor in tensors.items():
        part = _part(tensor)
        if part.numel():
            one = first.setdefault((part.data_ptr(), part.shape, part.stride(), part.dtype), name)
            twins |= {} if one == name else {name: one}
    return twins


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare bits, by which NaN is itself."""
    return torch.equal(*(_part(each).flatten().view(torch.uint8) for each in (one, other)))


def _part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _leads() -> bool:
    return _rank() == 0


def _rank() -> int:
    return dist.get_rank() if _together() else 0


def _size() -> int:
    return dist.get_world_size() if _together() else 1


def _gathered(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    values = [value] * _size()
    if _together():
        dist.all_gather_object(values, value)
    return values


def _meet() -> None:
    if _together():
        dist.all_reduce(torch.zeros(()))  # over the CPU


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # Said even with no_dist=True; a single process is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
