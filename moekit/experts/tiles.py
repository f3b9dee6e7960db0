"""Tile sizes of the Triton kernels: what one program computes at a time, chosen by shape class before anything runs."""

import reprlib
from typing import NamedTuple

import torch

from moekit.operators import constant_in_graphs


class Tile(NamedTuple):
    """Which part of a product one program computes at a time, and how.

    Attributes:
        m: rows; powers of two all three.
        n: columns.
        k: entries of the sum that are loaded at a time.
        warps: of a program.
        stages: loads of ``k`` entries in flight.
        band: tiles of rows that are walked before the next tile of columns, so that both operands stay in the L2 cache.
        overlap: whether the loads of the next tile begin while this one is written.
        specialized: whether some warps load and the others multiply, on Hopper, for 16-bit numbers. Such kernels have
            tiles of 128 x 256 x 64, two times 128 columns for gate and up, and look at ``band`` alone; the rest is for
            operands that they do not take.

    Example:
        >>> Tile(128, 256, 64, warps=8, stages=3).band
        16
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    band: int = 16
    overlap: bool = False
    specialized: bool = False


class LayerTiles(NamedTuple):
    """The tiles of a whole layer. The first four, over grouped rows, are of one ``m``; the last two of one ``k``.

    Attributes:
        up: of the up-projection, whose gate and up have ``n`` columns each.
        down: of the down-projection.
        grad_hidden: of the gradient of the hidden rows.
        grad_rows: of the gradient of the tokens' rows.
        grad_up: of the gradients of gate and up; groups of rows begin at multiples of its ``k``.
        grad_down: of the gradient of down.

    Example:
        >>> from moekit.experts import ruled_tiles
        >>> tiles = ruled_tiles(LayerSize(torch.bfloat16, 4096, 8, 512, 1024, gated=True, capability=9))
        >>> tiles.up.m == tiles.down.m == tiles.grad_hidden.m == tiles.grad_rows.m, tiles.grad_up.k == tiles.grad_down.k
        (True, True)
    """

    up: Tile
    down: Tile
    grad_hidden: Tile
    grad_rows: Tile
    grad_up: Tile
    grad_down: Tile


class LayerSize(NamedTuple):
    """What tiles are chosen by.

    Attributes:
        dtype: of rows and weights.
        assignments: N, those that do not exist included.
        experts: E.
        dim: D.
        hidden: F.
        gated: whether there are two up-projections.
        capability: the major compute capability of the device, 9 for Hopper; 0 where there is none.
        narrow: whether a program on the device has 99 KiB of shared memory, not 163 and more.
        precision: of products of float32, "ieee" or "tf32"; means nothing for 16-bit dtypes.

    Example:
        >>> size = LayerSize(torch.bfloat16, assignments=32768, experts=8, dim=4096, hidden=14336, gated=True)
        >>> size.capability, size.precision
        (0, 'ieee')
    """

    dtype: torch.dtype
    assignments: int
    experts: int
    dim: int
    hidden: int
    gated: bool
    capability: int = 0
    narrow: bool = False
    precision: str = "ieee"


def precision_of(size: LayerSize) -> str:
    """Return the precision of a layer's products: "ieee" for 16-bit dtypes, whatever ``size`` says.

    Args:
        size: of the layer.

    Returns:
        "ieee" or "tf32".

    Example:
        >>> size = LayerSize(torch.float32, 8, 8, 8, 8, gated=True, precision="tf32")
        >>> precision_of(size), precision_of(size._replace(dtype=torch.bfloat16))
        ('tf32', 'ieee')
    """
    return size.precision if size.dtype.itemsize == 4 else "ieee"


NARROW_BYTES = 99 * 1024
_NARROW = {(8, 6), (8, 9), (12, 0), (12, 1)}  # CUDA C++ Programming Guide, technical specifications per capability


@constant_in_graphs
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device of NVIDIA, (0, 0) of any other; without waiting for it.

    Args:
        device: of tokens and parameters.

    Returns:
        Major and minor number; while a graph is compiled they are constants.

    Example:
        >>> compute_capability(torch.device("cpu"))
        (0, 0)
    """
    nvidia = device.type == "cuda" and torch.version.hip is None  # AMD counts its cards otherwise
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


def capability_of(device: torch.device) -> int:
    """Return the major compute capability of a CUDA device of NVIDIA, 0 of any other; without waiting for it.

    Args:
        device: of tokens and parameters.

    Returns:
        A whole number; while a graph is compiled it is a constant.

    Example:
        >>> capability_of(torch.device("cpu"))
        0
    """
    return compute_capability(device)[0]


def is_narrow(device: torch.device) -> bool:
    """Say whether a program on a device has 99 KiB of shared memory: compute capability 8.6, 8.9, 12.0 and 12.1.

    Args:
        device: of tokens and parameters.

    Returns:
        Whether it has; while a graph is compiled it is a constant.

    Example:
        >>> is_narrow(torch.device("cpu"))
        False
    """
    return compute_capability(device) in _NARROW


def row_tile(
    dtype: torch.dtype,
    num_rows: int,
    num_groups: int,
    *,
    capability: int = 0,
    narrow: bool = False,
    precision: str = "ieee",
) -> Tile:
    """Choose the tile of products whose rows are grouped: wide for full groups, low for groups of few rows."""
    m, warps = (64, 4) if num_rows <= 48 * num_groups else (128, 8)
    if dtype.itemsize == 4 and precision == "ieee":  # by arithmetic units, not by those of matrices
        return Tile(m=64, n=128, k=32, warps=8, stages=3)
    if dtype.itemsize == 4:
        stages = 4 if capability == 9 and m == 128 else 3
        return Tile(m=m, n=64 if narrow or m == 64 else 128, k=32, warps=warps, stages=stages)
    if narrow:
        return Tile(m=m, n=128, k=64, warps=warps, stages=3)
    return Tile(m=m, n=256, k=64, warps=warps, stages=4, overlap=True)


def weight_tile(dtype: torch.dtype, *, capability: int = 0, narrow: bool = False, precision: str = "ieee") -> Tile:
    """Choose the tile of products whose sum runs over a group's rows."""
    if dtype.itemsize == 4 and precision == "tf32" and capability == 9:
        return Tile(128, 256, 32, 8, 3)
    if dtype.itemsize == 4:
        return Tile(64, 64, 32, 4, 3) if narrow else Tile(128, 128, 32, 8, 3)
    if narrow:
        return Tile(m=128, n=128, k=64, warps=8, stages=3)
    return Tile(m=128, n=256, k=64, warps=8, stages=4)


def ruled_tiles(size: LayerSize) -> LayerTiles:
    """Choose the tiles of a layer by rule.

    Args:
        size: of the layer.

    Returns:
        LayerTiles.

    Example:
        >>> ruled_tiles(LayerSize(torch.bfloat16, 32768, 8, 768, 2048, gated=True)).up.n
        128
    """
    capability, narrow, precision = size.capability, size.narrow, precision_of(size)
    rows = row_tile(
        size.dtype, size.assignments, size.experts, capability=capability, narrow=narrow, precision=precision
    )
    weight = weight_tile(size.dtype, capability=capability, narrow=narrow, precision=precision)
    alone = rows._replace(overlap=False)  # two matrices are two loops, which cannot overlap with the next tile's
    grad_rows = alone._replace(stages=3) if size.gated and size.dtype.itemsize == 2 else rows
    tiles = LayerTiles(_up_tile(alone, size), rows, rows, grad_rows, weight, weight)
    if size.capability == 9 and size.dtype.itemsize == 2 and rows.m == 128:
        return LayerTiles(*(tile._replace(band=32, specialized=True) for tile in tiles))
    return tiles


def _up_tile(rows: Tile, size: LayerSize) -> Tile:
    """Choose the tile of the up-projection: of gated experts it has two sums, and of any two results."""
    if size.dtype.itemsize == 2:  # results are gathered in shared memory, from where they are written
        return rows._replace(n=rows.n // 2)
    if precision_of(size) == "ieee":
        return rows
    alone = rows._replace(stages=3)  # of two results, or two matrices, no more fits the shared memory
    return alone._replace(n=rows.n // 2) if size.gated and size.narrow else alone


_LEAST = (("m", 16), ("n", 16), ("k", 16), ("warps", 1), ("stages", 1), ("band", 1))  # what Triton multiplies, at least
_COUNTS = ("stages", "band")  # the other numbers are sides of blocks and warps: powers of two


def misfit(tile: Tile) -> tuple[str, str] | None:
    """Find what of a tile no kernel takes.

    Args:
        tile: with fields of any type.

    Returns:
        The name of the first wrong field and what was expected of it, or None.

    Example:
        >>> misfit(Tile(128, 256, 64, warps=8, stages=3)), misfit(Tile(128, 24, 64, warps=8, stages=3))
        (None, ('n', 'a power of two, at least 16'))
    """
    for field, least in _LEAST:
        value, counts = getattr(tile, field), field in _COUNTS
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole or not (counts or value & (value - 1) == 0):
            return field, f"{'a whole number' if counts else 'a power of two'}, at least {least}"
    for field in ("overlap", "specialized"):
        if not isinstance(getattr(tile, field), bool):
            return field, "true or false"
    return None


def check_tiles(tiles: LayerTiles) -> LayerTiles:
    """Return tiles that kernels take, and that fit each other.

    Args:
        tiles: what was chosen for a layer.

    Returns:
        The same.

    Raises:
        ValueError: if they are no ``LayerTiles`` of ``Tile``; if a number is no power of two, or less than the least
            (``misfit``); if those over grouped rows differ in ``m``, or those of weights in ``k``; or if specialized
            ones are not of 128 rows, or gradients of matrices not of 64.

    Example:
        >>> tiles = LayerTiles(*[Tile(m=16, n=16, k=16, warps=4, stages=2, band=0)] * 6)
        >>> check_tiles(tiles)
        Traceback (most recent call last):
        ValueError: the tiles of a layer: up.band = 0; expected a whole number, at least 1. Correct what chooses them.
    """
    if not isinstance(tiles, LayerTiles):
        raise ValueError(
            f"the tiles of a layer: {reprlib.repr(tiles)}; expected LayerTiles, of a Tile for each of "
            f"{', '.join(LayerTiles._fields)}. Return those from the function that chooses tiles."
        )
    for product in LayerTiles._fields:  # by names: Dynamo of torch 2.11 cannot loop over constant tiles
        _check_tile(product, getattr(tiles, product))
    over_rows, of_weights = tiles[:4], tiles[4:]  # which Dynamo of torch 2.11 can follow; it cannot unpack them
    heights, depths = {tile.m for tile in over_rows}, {tile.k for tile in of_weights}
    if len(heights) > 1 or len(depths) > 1:
        raise ValueError(
            f"the tiles of a layer: m = {sorted(heights)} of those over grouped rows, k = {sorted(depths)} of grad_up "
            f"and grad_down; expected one each. Take the same m in the first four, and the same k in the last two."
        )
    if any(tile.specialized for tile in over_rows) and heights != {128}:
        raise ValueError(f"the tiles of a layer: m = {heights.pop()}, specialized; expected m = 128, or no such tile.")
    if any(tile.specialized for tile in of_weights) and depths != {64}:
        raise ValueError(f"the tiles of a layer: k = {depths.pop()}, specialized; expected k = 64, or no such tile.")
    return tiles


def _check_tile(product: str, tile: Tile) -> None:
    if not isinstance(tile, Tile):
        raise ValueError(f"the tiles of a layer: {product} = {reprlib.repr(tile)}; expected a Tile.")
    found = misfit(tile)
    if found is not None:
        field, expected = found
        raise ValueError(
            f"the tiles of a layer: {product}.{field} = {getattr(tile, field)!r}; expected {expected}. Correct what "
            f"chooses them."
        )
