"""Which tiles are tried for each product of a fused layer, and how the best that fit each other are found."""

from collections.abc import Mapping, Sequence

from moekit.experts.tiles import LayerSize, LayerTiles, Tile, check_tiles, ruled_tiles

Times = Mapping[str, Mapping[Tile, float]]
ROW_PRODUCTS = "up", "down", "grad_hidden", "grad_rows"
"""The products over grouped rows, whose tiles share m."""
WEIGHT_PRODUCTS = "grad_up", "grad_down"
"""The products whose sum runs over a group's rows, and whose tiles share k."""
BANDS = (4, 8, 16, 32)

# m, n, k, warps, stages of 16-bit numbers. One program's sums are m n numbers in registers; a stage is (m + n) k.
_ROWS = (
    (128, 256, 64, 8, 3), (128, 256, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 2), (64, 256, 64, 4, 3), (64, 256, 64, 4, 4), (64, 256, 64, 8, 3),
    (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 128, 4, 3),
)  # fmt: skip
_OVERLAPPED = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4),
               (64, 256, 64, 4, 3), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4))  # fmt: skip
_GATED_UP = (  # twice the sums
    (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 64, 64, 8, 3),
    (128, 64, 64, 8, 4), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 128, 8, 2), (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 2),
)  # fmt: skip
_WEIGHTS = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 256, 32, 8, 5), (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4), (256, 128, 32, 8, 4), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4), (64, 256, 64, 4, 4),
)  # fmt: skip
_WIDE = (  # of 32-bit numbers, any product
    (64, 64, 32, 4, 3), (64, 64, 32, 4, 2), (64, 128, 32, 4, 3), (64, 128, 32, 8, 3), (128, 64, 32, 4, 3),
    (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (64, 64, 16, 4, 4), (64, 128, 16, 4, 3), (128, 128, 16, 8, 3),
)  # fmt: skip
_TF32 = (  # besides those
    (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (64, 256, 32, 4, 4), (128, 256, 32, 8, 3), (64, 128, 32, 4, 4),
)  # fmt: skip


def candidates_of(size: LayerSize) -> dict[str, tuple[Tile, ...]]:
    """List the tiles to try for each product of a layer, all with one ``band``.

    Args:
        size: of the layer.

    Returns:
        Product to tiles, without the rule's.

    Example:
        >>> import torch
        >>> tiles = candidates_of(LayerSize(torch.bfloat16, 1024, 8, 256, 512, gated=True))
        >>> {product: len(each) for product, each in tiles.items()}
        {'up': 15, 'down': 19, 'grad_hidden': 19, 'grad_rows': 12, 'grad_up': 20, 'grad_down': 20}
    """
    if size.dtype.itemsize == 4:
        numbers = (*_WIDE, *(_TF32 if size.precision == "tf32" else ()))
        wide = tuple(Tile(*each) for each in numbers)
        up = tuple(tile._replace(n=tile.n // 2) for tile in wide) if size.gated else wide
        return dict(zip(LayerTiles._fields, (up, *[wide] * 5), strict=True))
    rows = tuple(Tile(*numbers) for numbers in _ROWS)
    single = (*rows, *(Tile(*numbers, overlap=True) for numbers in _OVERLAPPED))
    up = tuple(Tile(*numbers) for numbers in _GATED_UP) if size.gated else rows
    weights = tuple(Tile(*numbers, overlap=overlap) for overlap in (False, True) for numbers in _WEIGHTS)
    # A product with two matrices is two loops, which cannot overlap with the next tile's.
    return dict(
        zip(LayerTiles._fields, (up, single, single, rows if size.gated else single, weights, weights), strict=True)
    )


def with_rule(tiles: Mapping[str, Sequence[Tile]], size: LayerSize) -> dict[str, tuple[Tile, ...]]:
    """Put the rule's tile before the others of each product.

    Args:
        tiles: product to tiles.
        size: of the layer.

    Returns:
        Product to tiles, none twice.

    Raises:
        ValueError: if a product has no tiles given, or there is no such product.
    """
    if set(tiles) != set(LayerTiles._fields):
        raise ValueError(
            f"tune: candidates of the products {sorted(tiles)}; expected {', '.join(LayerTiles._fields)}. Give each "
            f"a list, which may be empty: the rule's tile is always tried."
        )
    return {name: tuple(dict.fromkeys((rule, *tiles[name]))) for name, rule in ruled_tiles(size)._asdict().items()}


def _shared_by(product: str, tile: Tile) -> int:
    """Return what a tile has to share with the other products of its kind: m, or k."""
    return tile.m if product in ROW_PRODUCTS else tile.k


def shortlist(product: str, times: Mapping[Tile, float]) -> tuple[Tile, ...]:
    """Choose which tiles are measured again: the best of each shared number, and the best two of all.

    Args:
        product: a field of ``LayerTiles``.
        times: seconds of each tile.

    Returns:
        Tiles, best first.

    Example:
        >>> wide = Tile(m=128, n=256, k=64, warps=8, stages=3)
        >>> times = {wide: 1.0, wide._replace(n=128): 1.1, wide._replace(n=64): 1.2, wide._replace(m=64): 2.0}
        >>> [(tile.m, tile.n) for tile in shortlist("down", times)]
        [(128, 256), (128, 128), (64, 256)]
    """
    order = sorted(times, key=times.__getitem__)
    firsts: dict[int, Tile] = {}
    for tile in order:
        firsts.setdefault(_shared_by(product, tile), tile)
    kept = {*order[:2], *firsts.values()}
    return tuple(tile for tile in order if tile in kept)


def with_bands(tiles: Sequence[Tile]) -> tuple[Tile, ...]:
    """Give each tile every band of ``BANDS``, beside its own.

    Args:
        tiles: any.

    Returns:
        Tiles, none twice.

    Example:
        >>> [tile.band for tile in with_bands([Tile(m=128, n=256, k=64, warps=8, stages=3)])]
        [16, 4, 8, 32]
    """
    return tuple(dict.fromkeys(tile._replace(band=band) for tile in tiles for band in (tile.band, *BANDS)))


def fitting(times: Times) -> LayerTiles:
    """Choose the fastest tiles that fit each other: of each kind of product the shared number of the least sum.

    Args:
        times: product to the seconds of each of its tiles.

    Returns:
        LayerTiles.

    Raises:
        ValueError: if no number is shared by tiles of all products of a kind.
    """
    return check_tiles(LayerTiles(**_fastest(times, ROW_PRODUCTS, "m"), **_fastest(times, WEIGHT_PRODUCTS, "k")))


def _fastest(times: Times, products: Sequence[str], letter: str) -> dict[str, Tile]:
    best: dict[int, dict[str, Tile]] = {}
    for product in products:
        for tile in sorted(times[product], key=times[product].__getitem__):
            best.setdefault(_shared_by(product, tile), {}).setdefault(product, tile)
    whole = [found for found in best.values() if len(found) == len(products)]
    if not whole:
        raise ValueError(
            f"tune: no {letter} is shared by tiles of {', '.join(products)} that ran; they have "
            f"{ {product: sorted({_shared_by(product, tile) for tile in times[product]}) for product in products} }. "
            f"Give candidates of one {letter} to all of them."
        )
    return min(whole, key=lambda found: sum(times[product][tile] for product, tile in found.items()))
