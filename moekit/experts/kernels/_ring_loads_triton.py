"""What the warp that loads does for products over grouped rows: the order in which tiles come to the ring."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from moekit._operators_triton import Blocks, is_whole
from moekit.experts.kernels._ring_triton import COLUMNS, DEPTH, blocks, claim, following, load
from moekit.experts.kernels._tiles_triton import Matrices, first_tile, place


@gluon.jit
def _load_matrix(w, tile, bar, group, k, n, apart, TRANSPOSED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to load a tile of a group's matrix, which begins ``apart`` rows of memory behind the one before."""
    if TRANSPOSED:
        load(w, [group * apart + n, k], bar, tile)
    else:
        load(w, [group * apart + k, n], bar, tile)


@gluon.jit
def _load_step(  # type: ignore[no-untyped-def]
    rows, w, w2, column, ring, slot, phase, row, group, k, n, apart, SIDE: gl.constexpr, TRANSPOSED: gl.constexpr
):
    """Fill the next place of the ring: with rows, and one matrix, or two beside each other."""
    left, right, bar = claim(ring, slot, phase)
    load(rows, [row, column], bar, left)
    if SIDE:
        axis: gl.constexpr = 0 if TRANSPOSED else 1
        half: gl.constexpr = right.shape[axis] // 2
        _load_matrix(w, right.slice(0, half, dim=axis), bar, group, k, n, apart, TRANSPOSED)
        _load_matrix(w2, right.slice(half, half, dim=axis), bar, group, k, n, apart, TRANSPOSED)
    else:
        _load_matrix(w, right, bar, group, k, n, apart, TRANSPOSED)
    return following(ring[3], slot, phase)


@gluon.jit
def load_tiles(  # type: ignore[no-untyped-def]
    rows,
    w,
    w2,
    schedule,
    num_groups,
    depth,
    width,
    apart,
    ring,
    N: gl.constexpr,
    BAND: gl.constexpr,
    SIDE: gl.constexpr,
    TWO: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Load rows and matrices, step by step, for one tile after another.

    Two matrices lie beside each other in a step if ``SIDE``, and are multiplied one behind the other if ``TWO``, by
    either half of the rows' columns.
    """
    M: gl.constexpr = ring[0].shape[1]
    K: gl.constexpr = ring[0].shape[2]
    num_n = gl.cdiv(width, N)
    slot = 0
    phase = 1  # of a barrier that nobody has arrived at: the ring is empty
    for tile in range(gl.program_id(0), first_tile(schedule, num_groups, num_groups) * num_n, gl.num_programs(0)):
        group, row, _end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        n = column * N
        for k in range(0, depth, K):
            slot, phase = _load_step(rows, w, w2, k, ring, slot, phase, row, group, k, n, apart, SIDE, TRANSPOSED)
        if TWO:
            for k in range(0, depth, K):
                slot, phase = _load_step(
                    rows, w2, w2, depth + k, ring, slot, phase, row, group, k, n, apart, SIDE, TRANSPOSED
                )


def takes(weights: Matrices, depth: int, *, halved: bool) -> bool:
    """Say whether the kernels multiply by such matrices, which have descriptors, and what they write has too.

    Args:
        weights: the matrices, or the first of two.
        depth: entries of a sum, both matrices' together.
        halved: whether two results lie beside each other in memory, so that no tile may run into the other.
    """
    _, rows, width = weights.shape
    batch, step = weights.steps
    whole = rows % DEPTH == 0 and batch % step == 0 and is_whole(width, torch.bfloat16)
    return whole and depth >= 4 * DEPTH and (not halved or width % (COLUMNS // 2) == 0)


def matrices_as_one(weights: Matrices, columns: int) -> Blocks:
    """Return the descriptor of matrices as one, of all their rows in memory one below the other."""
    num_groups, depth, width = weights.shape
    batch, step = weights.steps
    rows, along = (width, depth) if weights.transposed else (depth, width)
    block = (columns, DEPTH) if weights.transposed else (DEPTH, columns)
    return blocks(((num_groups - 1) * (batch // step) + rows, along), (step, 1), block)
