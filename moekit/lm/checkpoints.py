"""Checkpoints: a folder per step, written beside its place and renamed into it, so that a half-written one has no name.

A folder ``step_00001000`` holds the tensors, written by ``torch.distributed.checkpoint``, and ``state.json`` with
everything else. Loading a stranger's checkpoint runs no code: torch reads the tensors with ``weights_only=True``, and
the index beside them, which torch pickles, is read by an unpickler that knows the classes of an index and no others.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_STATE = "state.json"
_INDEX = ".metadata"
_PATHS = frozenset({"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_INDEX_NAMES = {  # all that the index of a checkpoint of plain tensors is made of, besides dtypes
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
        }
        | {"_MEM_FORMAT_ENCODING"}
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


def save_checkpoint(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint, all of it or nothing.

    Args:
        folder: its place, for example from ``checkpoint_folder``; an old one there is replaced.
        tensors: name to tensor.
        state: whatever JSON can hold.

    Returns:
        The folder.

    Raises:
        TypeError: if ``state`` holds something that JSON cannot.

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
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with _without_single_process_warning():
        dcp.save(dict(tensors), checkpoint_id=unfinished, no_dist=True)
    (unfinished / _STATE).write_text(text, encoding="utf-8")
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():  # moved away before it is deleted, since half of it under its name would look like a whole one
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def load_checkpoint(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a checkpoint into tensors that exist already.

    Args:
        folder: of the checkpoint.
        tensors: name to the tensor to fill in place. Every name must be in the checkpoint, with its shape.

    Returns:
        The state that was saved with it.

    Raises:
        FileNotFoundError: if there is no complete checkpoint in the folder.
        ValueError: if a tensor is missing there or has another shape, or the checkpoint's index names classes that no
            index has, which could be made to run code.
    """
    state, reader = read_state(folder), _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        size = getattr(stored.get(name), "size", None)
        if size != tensor.shape:
            have = "no such tensor" if size is None else f"shape {tuple(size)}"
            raise ValueError(
                f"checkpoint {folder}: expected {name} of shape {tuple(tensor.shape)}, found {have}. Start with the "
                f"model flags that the checkpoint was trained with; its params are in params.txt of the run folder."
            )
    with _without_single_process_warning():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    return state


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a checkpoint holds beside tensors.

    Args:
        folder: of the checkpoint.

    Returns:
        The state that was saved with it.

    Raises:
        FileNotFoundError: if there is no complete checkpoint in the folder.
    """
    path = Path(folder) / _STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}: expected a folder step_NNNNNNNN with {_STATE} in it. Checkpoints lie "
            f"in the run folder, under checkpoints/; `latest` takes the newest."
        )
    return json.loads(path.read_text(encoding="utf-8"))


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
    """Find a run's newest complete checkpoint; warn about a newer one that is not complete.

    Args:
        run: the run folder.

    Returns:
        The folder, or None if there is none.

    Example:
        >>> latest_checkpoint("no/such/run") is None
        True
    """
    for folder in sorted((Path(run) / "checkpoints").glob("step_*"), reverse=True):
        if (folder / _STATE).is_file():
            return folder
        warnings.warn(f"skipping {folder}: it has no {_STATE}, so it was not written to its end", stacklevel=2)
    return None


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collect every tensor that training changes: parameters, buffers, and the optimizer's state by parameter name.

    Args:
        model: the model.
        optimizer: Adam or AdamW over the model's parameters. State that does not exist yet is created as zeros.

    Returns:
        Name to the live tensor, so that loading into the result restores both.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> sorted(training_tensors(model, torch.optim.AdamW(model.parameters())))
        ['model.weight', 'optimizer.exp_avg.weight', 'optimizer.exp_avg_sq.weight', 'optimizer.step.weight']
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")  # where torch keeps the step
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors.update({f"optimizer.{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")})
    return tensors


class _Reader(dcp.FileSystemReader):
    """torch's reader, with its ``pickle.load`` of the index replaced."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _INDEX).open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _INDEX_NAMES.get(module, ()):
            raise ValueError(
                f"the checkpoint's {_INDEX} asks for {module}.{name}, which no index of tensors has; expected a "
                f"checkpoint that save_checkpoint wrote. It was not loaded, since it could run code."
            )
        return super().find_class(module, name)


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # Said even with no_dist=True; a single process is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
