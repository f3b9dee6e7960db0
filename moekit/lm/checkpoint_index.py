"""The index of a checkpoint, which says what tensor lies where in its files, read without running code.

torch pickles it. The unpickler here knows the classes of an index of plain tensors and no others.
"""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

INDEX = ".metadata"
_PATHS = frozenset({"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_CLASSES = {  # all that the index of a checkpoint of plain tensors is made of, besides dtypes
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


class IndexReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint, with its ``pickle.load`` of the index replaced."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Args:
            args: ignored, as torch's reader does.
            kwargs: ignored likewise.

        Returns:
            The index.

        Raises:
            ValueError: if it is missing or damaged, or names classes that no index has.
        """
        metadata = _unpickled(Path(self.path) / INDEX)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def stored_shapes(folder: str | os.PathLike[str]) -> dict[str, torch.Size]:
    """List the tensors of a checkpoint, without reading them.

    Args:
        folder: of the checkpoint.

    Returns:
        Name to shape.

    Raises:
        ValueError: if the index is missing or damaged, or names classes that no index has.
    """
    entries = _unpickled(Path(folder) / INDEX).state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if hasattr(entry, "size")}


def missing_piece(folder: Path) -> str | None:
    """Say which of a checkpoint's files the index names and the folder lacks, by their sizes.

    Args:
        folder: of the checkpoint.

    Returns:
        A clause about the first such file, or None.

    Raises:
        ValueError: if the index is missing or damaged, or names classes that no index has.
    """
    for piece in (_unpickled(folder / INDEX).storage_data or {}).values():
        file = folder / piece.relative_path
        if not file.is_file() or file.stat().st_size < piece.offset + piece.length:
            return f"its file {piece.relative_path} is missing or cut short"
    return None


def one_line(error: BaseException) -> str:
    """Say in one line what an error was, for a message.

    Args:
        error: of a reader.

    Returns:
        Its class and the first line of its text; those of the cause, if torch wrapped it up.

    Example:
        >>> one_line(KeyError("a"))
        "KeyError: 'a'"
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        return "UnpicklingError: a file holds something else than tensors"  # torch advises to run its code
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _ForeignClass(ValueError):
    pass


class _Unpickler(pickle._Unpickler):  # the one in Python, for an opcode of its own
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _CLASSES.get(module, ()):
            raise _ForeignClass(
                f"the checkpoint's {INDEX} asks for {module}.{name}, which no index of tensors has; expected a "
                f"checkpoint that save_checkpoint wrote. It was not loaded, since it could run code."
            )
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set attributes, as an index does on entries of its own alone; on a class they would stay for the process."""
        entry = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(entry, type) or not dataclasses.is_dataclass(entry):
            raise _ForeignClass(
                f"the checkpoint's {INDEX} sets attributes of {entry!r}, which is no entry of it; expected a "
                f"checkpoint that save_checkpoint wrote. It was not loaded, since it could change the program."
            )
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _unpickled(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except _ForeignClass as error:
        raise ValueError(f"{path.parent}: {error}") from error
    except KeyError as error:  # of an opcode
        raise ValueError(f"checkpoint {path.parent} is damaged: {INDEX} is no pickle") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"checkpoint {path.parent} is damaged: {INDEX}: {one_line(error)}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"checkpoint {path.parent} is damaged: {INDEX} holds a {type(metadata).__name__}")
    if fault := _fault_of(vars(metadata)):
        raise ValueError(f"checkpoint {path.parent} is damaged: {INDEX}: {fault}")
    return metadata


def _fault_of(index: dict[str, Any]) -> str | None:
    """Say what is wrong with an index, or None. A file that is named beside the folder would be read in its place."""
    tensors, pieces = index.get("state_dict_metadata"), index.get("storage_data") or {}
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        return "state_dict_metadata is no mapping of names"
    if not isinstance(pieces, dict):
        return f"storage_data is a {type(pieces).__name__}, no mapping"
    for piece in pieces.values():
        values: list[Any] = [getattr(piece, name, None) for name in ("relative_path", "offset", "length")]
        if list(map(type, values)) != [str, int, int]:
            return f"storage_data holds {piece!r}; expected a piece of a file"
        if Path(values[0]).is_absolute() or ".." in Path(values[0]).parts:
            return f"storage_data names the file {values[0]!r}, which is not in the checkpoint's folder"
    return None
