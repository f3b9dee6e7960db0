"""Writing files whole: a reader sees the old content or the new, never half of it, also after a power failure."""

import errno
import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file beside its place and move it there, so that a process that is killed leaves no half of it.

    The content is on the disk before the file has its name, so a power failure leaves no half of it either.

    Args:
        path: of the file; its folder must exist. A file that is there already is replaced.
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
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk, so that a power failure takes none of them back.

    A file system that cannot say so is not waited for.

    Args:
        folder: whose files or folders were made, moved or removed.

    Raises:
        OSError: if the folder is not there, or the disk fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sync_folder(folder)
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
