"""Files of named tensors, from and for elsewhere: torch's pickles, read without running code, and safetensors."""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moekit.lm.files import whole_file

_ALIASES = "aliases"  # metadata: JSON object, name of a tensor that is not stored -> name of the stored one it shares
_REFUSED = re.compile(r"GLOBAL (\S+)|unsupported class (\S+)|unrecognized function (\S+)")


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote, on the CPU, without running code: ``torch.load`` with ``weights_only=True``.

    Tensors of a file in torch's zip format are mapped into memory, so a large file is not read before it is used.

    Args:
        path: of the file.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is a folder, cut short, no file of torch's, or needs code to load.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_torch(write_torch(Path(folder) / "a.pt", {"step": 3}))
        {'step': 3}
    """
    path = _existing_file(path, kind="a file that torch.save wrote, such as epoch_1.pt")
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storages, which concern whoever wrote the file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can raise anything: KeyError, EOFError, UnicodeDecodeError, ...
        raise ValueError(f"{path}: {_why(error)}") from error


def write_torch(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a file with ``torch.save``, whole or not at all, without a second copy in memory.

    The content is on the disk before the file has its name.

    Args:
        path: of the file; one that is there already is replaced.
        content: to save.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_torch(Path(folder) / "a.pt", {"w": torch.ones(2)}).name
        'a.pt'
    """
    with _whole(path) as unfinished, unfinished.open("wb") as file:  # a file's errors have a cause, a path's have none
        torch.save(dict(content), file)
    return Path(path)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file.

    Args:
        path: of the file.

    Returns:
        Name to tensor, on the CPU. Names that ``write_safetensors`` found to share one tensor share it again.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is a folder, cut short, no such file, or holds no tensor.
        ModuleNotFoundError: if safetensors is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_safetensors(write_safetensors(Path(folder) / "a.safetensors", {"w": torch.ones(2)}))
        {'w': tensor([1., 1.])}
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
        tensors |= {name: tensors[stored] for name, stored in aliases.items()}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected the weights of a model")
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the text beside the tensors of a ``.safetensors`` file.

    Args:
        path: of the file.

    Returns:
        Name to text; empty if there is none.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is a folder, cut short, or no such file.
        ModuleNotFoundError: if safetensors is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_safetensors(Path(folder) / "a.safetensors", {"w": torch.ones(2)}, metadata={"step": "3"})
        ...     read_metadata(path)["step"]
        '3'
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a ``.safetensors`` file, whole or not at all: its content is on the disk before the file has its name.

    The format has no shared tensors: of names with one and the same tensor (tied weights) the first is stored, and the
    metadata's ``aliases`` maps the others to it, in JSON.

    Args:
        path: of the file; one that is there already is replaced.
        tensors: name to tensor.
        metadata: text beside them.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if safetensors is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(Path(folder) / "a.safetensors", {"w": torch.ones(2)}).name
        'a.safetensors'
    """
    _safetensors()
    from safetensors.torch import save_file

    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        stored = first.setdefault(place, name) if tensor.numel() else name
        aliases |= {} if stored == name else {name: stored}
    extra = {_ALIASES: json.dumps(aliases)} if aliases else {}
    owned = {name: own_storage(tensor).contiguous() for name, tensor in tensors.items() if name not in aliases}
    with _whole(path) as unfinished:
        save_file(owned, unfinished, metadata={**(metadata or {}), "format": "pt", **extra})
    return Path(path)


def own_storage(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that is no view into a larger one, for files, which save storages whole.

    Args:
        tensor: any.

    Returns:
        The tensor itself, without a gradient, or a copy of its part.

    Example:
        >>> own_storage(torch.zeros(10)[:2]).untyped_storage().nbytes()
        8
    """
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a ``.safetensors`` file."""
    safetensors = _safetensors()
    path = _existing_file(path, kind="a .safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} is no readable .safetensors file, or was cut short: {error}. Expected one that `moekit export` or "
            f"safetensors wrote; copy it again."
        ) from error


def _existing_file(path: str | os.PathLike[str], *, kind: str) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected {kind}. A checkpoint of moekit is a folder with state.json.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected {kind}")
    return path


def _why(error: Exception) -> str:
    text = str(error)
    pickled = re.search(r"WeightsUnpickler error: (.*)", text)
    refused = _REFUSED.search(pickled.group(1)) if pickled else None
    if refused is None:
        reason = pickled.group(1) if pickled else (text.splitlines() or [""])[0].partition(". ")[0]
        return (
            f"torch cannot read it ({type(error).__name__}: {reason[:200]}). Expected a file that torch.save wrote; it "
            f"may be cut short, or damaged, or of another kind. Copy it again."
        )
    return (
        f"besides tensors and plain values it holds {next(filter(None, refused.groups()))}, and loading that could run "
        f"code, so it was not loaded. If you trust whoever wrote the file, save its tensors alone where that is "
        f"installed: `c = torch.load(PATH, map_location='cpu', weights_only=False); "
        f"torch.save({{'epoch': c['epoch'], 'step': c.get('step'), 'state_dict': c['state_dict']}}, NEW_PATH)`"
    )


def _safetensors() -> ModuleType:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".safetensors files need the package safetensors: pip install 'moekit[export]'"
        ) from error
    return safetensors


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write by a path, since the content would be held in memory twice otherwise."""
    try:
        with whole_file(path) as unfinished:
            yield unfinished
    except Exception as error:
        if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":  # as both libraries say it
            cause = error.__context__ or error
            if not isinstance(cause, Exception):  # Ctrl-C or SIGTERM, after which torch cannot end its file
                raise cause from None
            cause = cause if isinstance(cause, OSError) else error
            raise OSError(f"{path} could not be written: {str(cause).partition(chr(10))[0]}") from error
        raise
