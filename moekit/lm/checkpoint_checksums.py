"""Checksums of a checkpoint's files: torch reads a tensor whose bits have changed on disk without a word."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from moekit.lm.files import write_whole

CHECKSUMS = "checksums.json"
NO_CHECKSUMS = f"it has no {CHECKSUMS}: it is of a version of moekit before checksums, or the file was lost"


def file_checksums(folder: Path, *, first: int = 0, step: int = 1) -> dict[str, str]:
    """Compute the CRC-32 of the files of a folder, all but the checksums, or of every so manyth of them.

    Args:
        folder: of a checkpoint.
        first: number of the first file, in the order of their names.
        step: from one file to the next.

    Returns:
        Name to eight hexadecimal digits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "a", "123456789").name, file_checksums(Path(folder))
        ('a', {'a': 'cbf43926'})

    References:
        Cyclic redundancy check of ISO/IEC 8802-3, as in zlib; its check value for 123456789 is cbf43926.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    return {name: _checksum(folder / name) for name in names[first::step]}


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> Path:
    """Write ``checksums.json``.

    Args:
        folder: of the checkpoint.
        checksums: name to checksum, for every file of it.

    Returns:
        Its path.
    """
    return write_whole(folder / CHECKSUMS, json.dumps(dict(sorted(checksums.items())), indent=1) + "\n")


def read_checksums(folder: Path) -> dict[str, str]:
    """Read ``checksums.json``.

    Args:
        folder: of the checkpoint.

    Returns:
        Name to checksum.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(
            f"checkpoint {folder} cannot be checked: {NO_CHECKSUMS}. Load it with that version, or name another one"
        )
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {folder} is damaged: {CHECKSUMS} is no JSON ({error}). Resume from an older one"
        ) from error
    if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
        raise ValueError(f"checkpoint {folder} is damaged: {CHECKSUMS} holds no checksums. Resume from an older one")
    return checksums


def changed_file(folder: Path, checksums: Mapping[str, str]) -> str | None:
    """Say which file of a checkpoint is not as it was written.

    Args:
        folder: of the checkpoint.
        checksums: name to checksum, of the files to look at.

    Returns:
        A clause about the first such file, or None.

    Example:
        >>> changed_file(Path("no/such/checkpoint"), {"state.json": "cbf43926"})
        'its file state.json is missing'
    """
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            return f"its file {name} is missing"
        found = _checksum(folder / name)
        if found != expected:
            return f"its file {name} has the checksum {found}, but was written with {expected}"
    return None


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
