"""Writing files whole: a reader sees the old content or the new, never half of it."""

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file beside its place and move it there, so that a process that is killed leaves no half of it.

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
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path
