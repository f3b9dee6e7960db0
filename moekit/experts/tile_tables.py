"""Tables of tiles that were measured, and the choice of the nearest entry."""

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from moekit.experts.tiles import NARROW_BYTES, LayerSize, LayerTiles, precision_of, ruled_tiles

FARTHEST = 2.0
"""The most doublings, of D, F and rows per expert together, between a layer and the entry that is used for it."""


class TileEntry(NamedTuple):
    """The tiles of one size of layer, and where they were measured.

    Attributes:
        capability: the major compute capability of the device.
        dtype_size: bytes of a number: 2 for bfloat16 and float16, 4 for float32.
        dim: D.
        hidden: F.
        experts: E; for the reader, no choice looks at it.
        rows_per_expert: N / E, rounded down, at least 1.
        gated: whether there are two up-projections.
        precision: of products of float32, "ieee" or "tf32"; "ieee" for 16-bit numbers.
        origin: the device and the versions, for the reader.
        tiles: of the layer.
    """

    capability: int
    dtype_size: int
    dim: int
    hidden: int
    experts: int
    rows_per_expert: int
    gated: bool
    precision: str
    origin: str
    tiles: LayerTiles

    @property
    def key(self) -> tuple[int | str, ...]:
        """What it is the entry of: all but the origin and the tiles. A table has one entry of a key, in their order."""
        sizes = self.dim, self.hidden, self.experts, self.rows_per_expert
        return self.capability, self.dtype_size, *sizes, self.gated, self.precision


Table = tuple[TileEntry, ...]


def entry_of(size: LayerSize, tiles: LayerTiles, *, origin: str) -> TileEntry:
    """Make the entry of a size of layer.

    Args:
        size: of the layer.
        tiles: of the layer.
        origin: the device and the versions, for the reader.

    Returns:
        TileEntry.

    Example:
        >>> import torch
        >>> size = LayerSize(torch.bfloat16, 131072, 64, 2048, 1024, gated=True, capability=9)
        >>> entry_of(size, ruled_tiles(size), origin="by rule").rows_per_expert
        2048
    """
    rows = max(size.assignments // max(size.experts, 1), 1)
    widths = (size.dim, size.hidden, size.experts, rows)
    return TileEntry(size.capability, size.dtype.itemsize, *widths, size.gated, precision_of(size), origin, tiles)


def merged(table: Iterable[TileEntry], entries: Iterable[TileEntry]) -> Table:
    """Add entries to a table; one for the same layer on the same capability is replaced.

    Args:
        table: the old entries.
        entries: the new ones.

    Returns:
        All, in order of capability, dtype, size and precision.

    Example:
        >>> import torch
        >>> size = LayerSize(torch.bfloat16, 131072, 64, 2048, 1024, gated=True, capability=9)
        >>> old, new = (entry_of(size, ruled_tiles(size), origin=each) for each in ("old", "new"))
        >>> [entry.origin for entry in merged([old], [new])]
        ['new']
    """
    by_key = {entry.key: entry for entry in (*table, *entries)}
    return tuple(by_key[key] for key in sorted(by_key))


def from_table(
    table: Sequence[TileEntry], otherwise: Callable[[LayerSize], LayerTiles] = ruled_tiles
) -> Callable[[LayerSize], LayerTiles]:
    """Return a choice of tiles by a table: the nearest entry of a layer's capability, dtype size, gating, precision.

    Entries are as far from a layer as D and F have to be doubled or halved, |log2(D / D')| + |log2(F / F')|, and as
    there are powers of two between the rows per expert. Of those at most ``FARTHEST`` away the nearest is taken, of
    equally near ones the first. Rows count by their power of two so that a compiled graph holds for a whole octave.
    Nothing is read from the device.

    Args:
        table: of ``read_tiles``, or entries of ``moekit tune``.
        otherwise: chooses where no entry is near enough, and on devices without a compute capability.

    Returns:
        A function LayerSize -> LayerTiles, for ``fused_layer(tiles=...)``.

    Raises:
        ValueError: if the table holds anything but entries, as the path of a file does.

    Example:
        >>> import torch
        >>> size = LayerSize(torch.bfloat16, 131072, 64, 2048, 1024, gated=True, capability=9)
        >>> low = LayerTiles(*(tile._replace(m=64, k=64) for tile in ruled_tiles(size)))
        >>> tiles = from_table([entry_of(size, low, origin="an example")])
        >>> tiles(size._replace(dim=1536)).up.m, tiles(size._replace(dim=256)).up.m
        (64, 128)
    """
    for entry in table:
        if not isinstance(entry, TileEntry):
            raise ValueError(
                f"from_table: the table holds {reprlib.repr(entry)}; expected entries, TileEntry. Read a file of "
                f"`moekit tune --write` with read_tiles."
            )
    return partial(remembered, partial(choose, tuple(table), otherwise))


def remembered(pick: Callable[[LayerSize], LayerTiles], size: LayerSize) -> LayerTiles:
    """Choose the tiles of one size of layer, looking for each size once, but in a graph that is traced.

    Args:
        pick: chooses; hashable, and the same object in each call that is to remember.
        size: of the layer.

    Returns:
        LayerTiles.

    Example:
        >>> import torch
        >>> asked = []
        >>> pick = lambda size: asked.append(size.dim) or ruled_tiles(size)
        >>> size = LayerSize(torch.bfloat16, 8, 8, 64, 8, gated=True)
        >>> remembered(pick, size) == remembered(pick, size) == remembered(pick, size._replace(dim=128))
        True
        >>> asked
        [64, 128]
    """
    known = type(size.assignments) is int and not torch.compiler.is_compiling()  # and no symbol of a traced graph
    return _once(pick, size) if known else pick(size)


@lru_cache(maxsize=512)
def _once(pick: Callable[[LayerSize], LayerTiles], size: LayerSize) -> LayerTiles:
    """Choose, and remember it; a partial function is itself alone, so that no table is hashed in a call."""
    return pick(size)


def choose(table: Table, otherwise: Callable[[LayerSize], LayerTiles], size: LayerSize) -> LayerTiles:
    """Choose the tiles of one size of layer; see ``from_table``.

    Args:
        table: of entries.
        otherwise: chooses where no entry is near enough.
        size: of the layer.

    Returns:
        LayerTiles.

    Example:
        >>> import torch
        >>> choose((), lambda size: "the rule's", LayerSize(torch.bfloat16, 8, 8, 8, 8, gated=True, capability=9))
        "the rule's"
    """
    if not table or not size.capability:
        return otherwise(size)
    found, nearest = None, math.inf
    alike = size.capability, size.dtype.itemsize, size.gated, precision_of(size)
    octave = _octave(size.assignments, size.experts)
    for entry in table:
        kind = entry.capability, entry.dtype_size, entry.gated, entry.precision
        if kind == alike and (not size.narrow or _fits_narrow(entry)):
            widths = abs(math.log2(size.dim / entry.dim)) + abs(math.log2(size.hidden / entry.hidden))
            distance = widths + abs(octave - (entry.rows_per_expert.bit_length() - 1))
            if distance < nearest:
                found, nearest = entry, distance
    return otherwise(size) if found is None or nearest > FARTHEST else found.tiles


def _fits_narrow(entry: TileEntry) -> bool:
    """Say whether a program of little shared memory holds an entry's operands, which are the least that it has to."""
    up = entry.tiles.up
    tiles = entry.tiles._replace(up=up._replace(n=2 * up.n)) if entry.gated else entry.tiles
    operands = [(tile.stages - 1) * (tile.m + tile.n) * tile.k for tile in tiles]
    return max(operands) * entry.dtype_size <= NARROW_BYTES


def _octave(rows: int, experts: int) -> int:
    """Return the power of two below the rows per expert, by comparisons alone: ``rows`` may be a symbol."""
    power, experts = 0, max(experts, 1)
    while rows >= experts * 2 ** (power + 1):
        power += 1
    return power
