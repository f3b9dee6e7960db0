"""Writing files whole: a reader sees the old content or the new, never half of it, also after a power failure.

And what is said of files that are in a folder's place, or that somebody else damaged.
"""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MOST_NAME_BYTES = 255  # of the usual file systems


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file beside its place and move it there, so that a process that is killed leaves no half of it.

    The content is on the disk before the file has its name, so a power failure leaves no half of it either.

    Args:
        path: of the file; its folder must exist. A file that is there already is replaced; a link stays, and the file
            that it leads to is replaced.
        content: text, written as UTF-8, or bytes.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written; what was there before is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "a.txt", "hello").read_text()
        'hello'
    """
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Do what ``write_whole`` does, for whoever writes by a path: the one that this yields."""
    place = Path(os.path.realpath(path))
    if not replaceable(place):
        raise OSError(errno.EINVAL, "Not an ordinary file, which is replaced as a whole", os.fspath(path))
    ending = f".{secrets.token_hex(4)}"  # of this call: threads write one file, too
    stem = os.fsencode(place.name)[: _MOST_NAME_BYTES - 1 - len(ending)].decode(errors="ignore")
    unfinished = place.with_name(f".{stem}{ending}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # of a new file of this process; a library may give it to its owner alone
        yield unfinished
        unfinished.chmod(mode)
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, place)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a write has none, as on a full disk
            error.filename = os.fspath(path)
        unfinished.unlink(missing_ok=True)
        raise


def replaceable(path: str | os.PathLike[str]) -> bool:
    """Say whether a file can take this place: not where there is a device, a pipe or a socket, which would be lost.

    Args:
        path: of the file; a folder is told by the system.

    Example:
        >>> replaceable("report.json"), replaceable(os.devnull)
        (True, False)
    """
    try:
        mode = os.stat(path).st_mode  # one look, for another process may make the file meanwhile
    except OSError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def check_folder(folder: Path, *, given: str) -> None:
    """Refuse a folder in whose place, or above which, there is a file.

    Args:
        folder: that need not be there.
        given: how the user gave it, for the message.

    Raises:
        NotADirectoryError: if there is one.

    Example:
        >>> check_folder(Path("logs/a"), given="--logs logs")
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"{given}: {place} is a file; expected a folder, or a new name")


def read_object(path: Path, *, expected: str, mend: str) -> dict[str, Any]:
    """Read a JSON object that a program of ours wrote.

    Args:
        path: of the file.
        expected: what it should hold, for the message.
        mend: the end of the message, with what parts it from the rest.

    Returns:
        The object.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is damaged, or holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_object(write_whole(Path(folder) / "a.json", '{"a": 1}'), expected="a plan", mend=".")
        {'a': 1}
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}), expected {expected}{mend}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {str(found)[:60]!r}, expected {expected}{mend}")
    return found


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk, so that a power failure takes none of them back.

    A file system that cannot say so is not waited for, nor is Windows, which opens no folders.

    Args:
        folder: whose files or folders were made, moved or removed.

    Raises:
        OSError: if the folder is not there, or the disk fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sync_folder(folder)
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
