"""Writing tables of tiles: into a file that is there, beside its other entries."""

import os
from collections.abc import Iterable
from pathlib import Path

from moekit.experts.tile_files import parse_tiles, read_tiles, table_text
from moekit.experts.tile_tables import Table, TileEntry, merged
from moekit.lm.files import write_whole
from moekit.lm.folder_locks import FolderLock


def write_tiles(path: str | os.PathLike[str], entries: Iterable[TileEntry]) -> Table:
    """Add entries to a file, which is written whole, or not at all.

    Processes and threads that write one file take turns, see ``FolderLock``: what each has added stays. Meanwhile there
    is a hidden folder beside it.

    Args:
        path: of the file; its folder must exist, the file need not. Entries for the same layers are replaced.
        entries: of ``tune``.

    Returns:
        What the file holds now.

    Raises:
        OSError: if the file cannot be written, or another has been writing it for some seconds.
        ValueError: if the file that is there is no table of tiles, or an entry makes none; the file is left as it is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tiles(Path(folder) / "tiles.json", [])
        ()
    """
    path = Path(path)
    if not path.parent.is_dir():  # which the lock would make
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first.")
    with FolderLock(path.with_name(f".{path.name}.lock"), flag="file of tiles", is_left=False):
        text = table_text(merged(read_tiles(path) if path.exists() else (), entries))
        table = parse_tiles(text, name=str(path))  # so that no file is written that could not be read
        write_whole(path, text)
    return table
