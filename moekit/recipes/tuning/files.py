"""Writing tables of tiles: into a file that is there, beside its other entries."""

import os
from collections.abc import Iterable
from pathlib import Path

from moekit.experts.tile_files import parse_tiles, read_tiles, table_text
from moekit.experts.tile_tables import Table, TileEntry, merged
from moekit.lm.files import write_whole


def write_tiles(path: str | os.PathLike[str], entries: Iterable[TileEntry]) -> Table:
    """Add entries to a file, which is written whole, or not at all.

    Args:
        path: of the file; its folder must exist, the file need not. Entries for the same layers are replaced.
        entries: of ``tune``.

    Returns:
        What the file holds now.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if the file that is there is no table of tiles, or an entry makes none; the file is left as it is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tiles(Path(folder) / "tiles.json", [])
        ()
    """
    path = Path(path)
    text = table_text(merged(read_tiles(path) if path.exists() else (), entries))
    table = parse_tiles(text, name=str(path))  # so that no file is written that could not be read
    write_whole(path, text)
    return table
