"""What tuning found, and how it is told."""

from typing import NamedTuple

from moekit.experts.tile_tables import TileEntry
from moekit.experts.tiles import LayerSize, Tile, precision_of


class Comparison(NamedTuple):
    """One product with the rule's tile and with the chosen one.

    Attributes:
        product: a field of ``LayerTiles``.
        ruled: the rule's tile.
        ruled_seconds: median, measured in turn with the chosen one.
        tile: the chosen one.
        seconds: median.
        flops: useful operations.
    """

    product: str
    ruled: Tile
    ruled_seconds: float
    tile: Tile
    seconds: float
    flops: int


class Tuned(NamedTuple):
    """What was found for one size of layer.

    Attributes:
        size: of the layer.
        entry: for a table.
        comparisons: of each product.
        skipped: candidates that did not run, or whose output was wrong, and why.
    """

    size: LayerSize
    entry: TileEntry
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...]


def tile_words(tile: Tile) -> str:
    """Write a tile in a few characters.

    Args:
        tile: any.

    Returns:
        m, n and k, then the other fields by name; of a specialized one the band, for its kernels look at nothing else.

    Example:
        >>> tile_words(Tile(m=128, n=256, k=64, warps=8, stages=3, overlap=True))
        '128x256x64 warps 8 stages 3 band 16 overlap'
        >>> tile_words(Tile(m=128, n=256, k=64, warps=8, stages=3, band=32, specialized=True))
        'specialized, band 32'
    """
    if tile.specialized:
        return f"specialized, band {tile.band}"
    size = f"{tile.m}x{tile.n}x{tile.k} warps {tile.warps} stages {tile.stages} band {tile.band}"
    return size + (" overlap" if tile.overlap else "")


def size_words(size: LayerSize) -> str:
    """Write a size of layer in a line.

    Args:
        size: of a layer.

    Returns:
        A text.

    Example:
        >>> import torch
        >>> size_words(LayerSize(torch.bfloat16, 32768, 8, 768, 2048, gated=True))
        'N 32,768, D 768, F 2,048, E 8, gated, bfloat16'
    """
    gated = "gated" if size.gated else "not gated"
    dtype = str(size.dtype).removeprefix("torch.")
    if precision_of(size) != "ieee":
        dtype += f" by {precision_of(size)}"
    return f"N {size.assignments:,}, D {size.dim:,}, F {size.hidden:,}, E {size.experts}, {gated}, {dtype}"


def lines_of(tuned: Tuned) -> list[str]:
    """Report what was found for a size of layer, a line for each product.

    Args:
        tuned: of ``tune``.

    Returns:
        Lines.

    Example:
        >>> import torch
        >>> from moekit.experts.tile_tables import entry_of
        >>> from moekit.experts.tiles import LayerTiles
        >>> size, tile = LayerSize(torch.bfloat16, 64, 4, 8, 16, gated=True), Tile(64, 64, 32, 4, 3)
        >>> entry = entry_of(size, LayerTiles(*[tile] * 6), origin="")
        >>> row = Comparison("down", tile, 2e-3, tile._replace(stages=4), 1e-3, 10**11)
        >>> print("\\n".join(lines_of(Tuned(size, entry, (row,), ()))))
        N 64, D 8, F 16, E 4, gated, bfloat16
          down           2.000 ms by rule    1.000 ms   2.00x    100.0 TFLOP/s  64x64x32 warps 4 stages 4 band 16
          all            2.000 ms by rule    1.000 ms   2.00x    100.0 TFLOP/s
    """
    rows = tuned.comparisons
    lines = [_line(r.product, r.ruled_seconds, r.seconds, r.flops) + f"  {tile_words(r.tile)}" for r in rows]
    sums = (sum(each) for each in zip(*((r.ruled_seconds, r.seconds, r.flops) for r in rows), strict=True))
    return [size_words(tuned.size), *lines, _line("all", *sums), *(f"  skipped: {each}" for each in tuned.skipped)]


def _line(product: str, ruled: float, seconds: float, flops: float) -> str:
    times = f"{ruled * 1e3:8.3f} ms by rule {seconds * 1e3:8.3f} ms  {ruled / seconds:5.2f}x"
    return f"  {product:<12}{times} {flops / seconds / 1e12:8.1f} TFLOP/s"
