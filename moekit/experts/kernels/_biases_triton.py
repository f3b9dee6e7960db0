"""Gradients of biases: sums over each group's rows, in float32, in an order that depends on nothing but the sizes.

A first kernel adds up the rows of each tile of a schedule, and a second one the tiles of each group: so a group of all
rows takes as long as many small ones.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit.experts.kernels._tiles_triton import Schedule, first_tile, group_of, load_bias
from moekit.operators import blocks_of, power_of_two


class Weighing(NamedTuple):
    """What turns the sum over gradients of rows into that of a bias which routing weights multiply.

    Attributes:
        weights: (*A) float32, the router's.
        bias: (E, 1, D), contiguous.
        grad_weights: (*A) float32, of which that of each row's assignment gets <gradient, bias> added, in place.
        assignments: (R,) int64, of each row; -1 for a padding row.
    """

    weights: Tensor
    bias: Tensor
    grad_weights: Tensor
    assignments: Tensor


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    values,
    weights,
    bias,
    grad_weights,
    assignments,
    sums,
    schedule,
    num_groups,
    width,
    WEIGHTED: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the M rows of each tile: (tiles, width)."""
    tile = tl.program_id(0)
    if tile < first_tile(schedule, num_groups, num_groups):
        group, start, size, first = group_of(schedule, tile, num_groups)
        rows = start + (tile - first) * M + tl.arange(0, M)
        real = rows < start + size
        places = rows.to(tl.int64)[:, None] * width
        inner = tl.zeros((M,), tl.float32)
        weight = tl.zeros((M,), tl.float32)
        assignment = rows.to(tl.int64)
        if WEIGHTED:
            assignment = tl.load(assignments + rows, mask=real, other=-1)
            real = assignment >= 0
            weight = tl.load(weights + assignment, mask=real, other=0.0)
        for n in range(0, width, BLOCK):
            columns = n + tl.arange(0, BLOCK)
            inside = real[:, None] & (columns < width)[None, :]
            found = tl.load(values + places + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                inner += tl.sum(found * load_bias(bias, group, n, width, BLOCK), 1)
                found *= weight[:, None]
            tl.store(sums + tile.to(tl.int64) * width + columns, tl.sum(found, 0), mask=columns < width)
        if WEIGHTED:
            found = tl.load(grad_weights + assignment, mask=real, other=0.0)
            tl.store(grad_weights + assignment, found + inner, mask=real)


@triton.jit
def _groups_kernel(  # type: ignore[no-untyped-def]
    sums, out, schedule, num_groups, width, part_width, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the tiles of each group: (parts, E, part_width)."""
    group = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = first_tile(schedule, group + 1, num_groups)
    total = tl.zeros((TILES, BLOCK), tl.float32)
    for tile in range(first_tile(schedule, group, num_groups), last, TILES):
        tiles = tile + tl.arange(0, TILES)
        inside = (tiles < last)[:, None] & (columns < width)[None, :]
        total += tl.load(sums + tiles.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0)
    part = columns // part_width
    places = (part * num_groups + group).to(tl.int64) * part_width + columns - part * part_width
    tl.store(out + places, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < width)


def bias_gradient(
    grads: Tensor, schedule: Schedule, *, height: int, parts: int = 1, weighing: Weighing | None = None
) -> Tensor:
    """Add up each group's rows, weighted if they are those of a bias behind the router's weights.

    No host synchronisation. Deterministic.

    Args:
        grads: (R, parts * F), the gradients of rows.
        schedule: of tiles of ``height`` rows.
        height: of a tile.
        parts: how many biases lie side by side in ``grads``.
        weighing: of the rows, whose weights get a gradient from the bias too; None counts each row once.

    Returns:
        (parts, E, 1, F), the dtype of ``grads``; zero for an empty group.
    """
    num_groups, num_tiles, width = schedule.num_groups, schedule.most_tiles, grads.shape[1]
    sums = grads.new_empty(num_tiles, width, dtype=torch.float32)
    out = grads.new_empty(parts, num_groups, 1, width // parts)
    given = () if weighing is None else weighing
    _tiles_launch(num_groups, num_tiles, width, height, weighing is not None)(grads, *given, sums, schedule.table)
    _groups_launch(num_groups, width, width // parts)(sums, out, schedule.table)
    return out


@lru_cache(maxsize=512)
def _tiles_launch(num_groups: int, num_tiles: int, width: int, height: int, weighted: bool) -> Launch:
    given = [POINTER if weighted else None] * len(Weighing._fields)
    return Launch(
        _tiles_kernel, (num_tiles,), (POINTER, *given, POINTER, POINTER, num_groups, width),
        WEIGHTED=weighted, M=height, BLOCK=min(8192 // height, power_of_two(width)), num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _groups_launch(num_groups: int, width: int, part_width: int) -> Launch:
    return Launch(
        _groups_kernel, (num_groups, blocks_of(width, 128)),
        (POINTER, POINTER, POINTER, num_groups, width, part_width), TILES=32, BLOCK=128, num_warps=4,
    )  # fmt: skip
