"""Tables of tiles as files: JSON with a tile a line, and the table that comes with the package."""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moekit.experts.tile_tables import Table, TileEntry, choose, remembered
from moekit.experts.tiles import LayerSize, LayerTiles, Tile, check_tiles, misfit, ruled_tiles
from moekit.operators import constant_in_graphs

FORMAT = "moekit tiles 3"
_NUMBERS = ("capability", "dtype_size", "dim", "hidden", "experts", "rows_per_expert")  # of an entry, whole ones
_OLDER = ("moekit tiles 1", "moekit tiles 2")
_MEND = "Correct it, or remove it and let moekit tune --write make it again."


@constant_in_graphs
def shipped() -> Table:
    """Return the table that comes with the package, which is read once.

    Returns:
        Its entries.

    Example:
        >>> all(entry.capability >= 8 for entry in shipped())
        True
    """
    return _shipped()


@functools.cache
def _shipped() -> Table:
    return read_tiles(Path(__file__).with_name("tiles.json"))


def layer_tiles(size: LayerSize) -> LayerTiles:
    """Choose the tiles of a layer: by the shipped table if it has an entry near enough, else by rule.

    Args:
        size: of the layer.

    Returns:
        LayerTiles.

    Example:
        >>> import torch
        >>> from moekit.experts.tiles import LayerSize
        >>> layer_tiles(LayerSize(torch.float32, 64, 8, 16, 32, gated=True)).down
        Tile(m=64, n=128, k=32, warps=8, stages=3, band=16, overlap=False, specialized=False)
    """
    return remembered(_layer_tiles, size)


def _layer_tiles(size: LayerSize) -> LayerTiles:
    return choose(shipped(), ruled_tiles, size)


def table_text(table: Iterable[TileEntry]) -> str:
    """Write a table as JSON, a tile a line.

    Args:
        table: of entries.

    Returns:
        A text that ends in a newline, for ``parse_tiles``.

    Example:
        >>> print(table_text([]), end="")
        {"format": "moekit tiles 3", "entries": [
        ]}
    """
    lines = []
    for entry in table:
        head = json.dumps({name: value for name, value in entry._asdict().items() if name != "tiles"})
        tiles = entry.tiles._asdict().items()
        body = ",\n".join(f'   "{product}": {json.dumps(tile._asdict())}' for product, tile in tiles)
        lines.append(f'{head[:-1]},\n  "tiles": {{\n{body}}}}}')
    return f'{{"format": "{FORMAT}", "entries": [\n' + ",\n".join(lines) + ("\n" if lines else "") + "]}\n"


def read_tiles(path: str | os.PathLike[str]) -> Table:
    """Read a table from a file.

    Args:
        path: of a file that ``moekit tune --write`` wrote.

    Returns:
        Its entries.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no table of tiles; the message says where, and what was expected there.

    Example:
        >>> len(read_tiles(Path(__file__).with_name("tiles.json"))) == len(shipped())
        True
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text: {error}. {_MEND}") from error
    return parse_tiles(text, name=str(path))


def parse_tiles(text: str, *, name: str) -> Table:
    """Read a table from a text.

    Args:
        text: JSON, as ``table_text`` writes it.
        name: of the file, for messages.

    Returns:
        Its entries.

    Raises:
        ValueError: if it is no table of tiles.

    Example:
        >>> parse_tiles(table_text([]), name="tiles.json")
        ()
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # beside syntax errors: integers of more than 4300 digits
        raise ValueError(f"{name}: no JSON: {error}. {_MEND}") from error
    fields = _fields(content, ("format", "entries"), name)
    if fields["format"] in _OLDER:
        raise ValueError(
            f'{name}, format: "{fields["format"]}"; expected "{FORMAT}". It is of an older version, whose entries do '
            f"not say a precision. Remove it and let moekit tune --write make it again."
        )
    _expect(fields["format"] == FORMAT, f"{name}, format", fields["format"], f'"{FORMAT}"')
    _expect(isinstance(fields["entries"], list), f"{name}, entries", fields["entries"], "a list")
    return tuple(_entry(each, f"{name}, entry {i}") for i, each in enumerate(fields["entries"], 1))


def _entry(content: Any, where: str) -> TileEntry:
    fields = _fields(content, TileEntry._fields, where)
    for field in _NUMBERS:
        _expect_whole(fields[field], f"{where}, {field}")
    _expect(isinstance(fields["gated"], bool), f"{where}, gated", fields["gated"], "true or false")
    _expect(fields["precision"] in ("ieee", "tf32"), f"{where}, precision", fields["precision"], '"ieee" or "tf32"')
    _expect(isinstance(fields["origin"], str), f"{where}, origin", fields["origin"], "a text")
    products = _fields(fields["tiles"], LayerTiles._fields, f"{where}, tiles")
    tiles = LayerTiles(*(_tile(products[each], f"{where}, tiles.{each}") for each in LayerTiles._fields))
    try:
        check_tiles(tiles)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return TileEntry(**{**fields, "tiles": tiles})


def _tile(content: Any, where: str) -> Tile:
    tile = Tile(**_fields(content, Tile._fields, where))
    found = misfit(tile)
    if found is not None:
        field, expected = found
        _expect(False, f"{where}.{field}", content[field], expected)
    return tile


def _fields(content: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    _expect(isinstance(content, dict), where, content, f"an object of the fields {', '.join(names)}")
    unknown, missing = sorted(set(content) - set(names)), [name for name in names if name not in content]
    if unknown or missing:
        found = [*(f"unknown field {name!r}" for name in unknown), *(f"no field {name!r}" for name in missing)]
        raise ValueError(f"{where}: {', '.join(found)}; expected the fields {', '.join(names)}. {_MEND}")
    return {name: content[name] for name in names}


def _expect_whole(value: Any, where: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _expect(whole, where, value, "a whole number, at least 1")


def _expect(holds: bool, where: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {json.dumps(value)}; expected {expected}. {_MEND}")
