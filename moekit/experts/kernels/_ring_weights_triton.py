"""The gradients of matrices on Hopper, whose sums run over a group's rows, by a kernel whose warps load or multiply."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

from moekit._operators_triton import POINTER, Launch
from moekit.experts.kernels._parts_triton import part_of
from moekit.experts.kernels._ring_triton import (
    COLUMNS,
    DEPTH,
    LOADER_REGISTERS,
    LOADERS,
    OPTIONS,
    ROWS,
    STAGES,
    blocks,
    claim,
    emit,
    emit_all,
    finish,
    following,
    load,
    make_buffers,
    make_ring,
    multiply,
    quarters,
    rounded,
    split,
    zeros,
)
from moekit.experts.kernels._tiles_triton import programs
from moekit.experts.tiles import Tile
from moekit.operators import blocks_of


@gluon.jit
def _load_all(  # type: ignore[no-untyped-def]
    a, b, schedule, num_groups, height, width, parts, total, ring, BAND: gl.constexpr, TALL: gl.constexpr
):
    K: gl.constexpr = ring[0].shape[1]
    M: gl.constexpr = ring[0].shape[2]
    N: gl.constexpr = ring[1].shape[2]
    slot = 0
    phase = 1  # of a barrier that nobody has arrived at: the ring is empty
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        _group, start, end, _part, _m, _n, left_column, right_column = part_of(
            tile, schedule, num_groups, height, width, parts, M, N, BAND, TALL
        )
        for k in range(start, end, K):
            left, right, bar = claim(ring, slot, phase)
            load(a, [k, left_column], bar, left)
            load(b, [k, right_column], bar, right)
            slot, phase = following(ring[3], slot, phase)


@gluon.jit
def _multiply_all(  # type: ignore[no-untyped-def]
    out, schedule, num_groups, height, width, parts, total, ring, buffers, BAND: gl.constexpr, TALL: gl.constexpr
):
    K: gl.constexpr = ring[0].shape[1]
    M: gl.constexpr = ring[0].shape[2]
    N: gl.constexpr = ring[1].shape[2]
    Q: gl.constexpr = N // 4
    first = gl.program_id(0)
    slot, phase, before = 0, 0, 0
    late = rounded(split(zeros()), ring[0].dtype)
    late_row, late_end, late_n = 0, 0, 0
    for tile in range(first, total, gl.num_programs(0)):
        group, start, end, part, m, n, _left, _right = part_of(
            tile, schedule, num_groups, height, width, parts, M, N, BAND, TALL
        )
        sums = zeros()
        for q in gl.static_range(4):
            if start + q * K < end:
                sums, slot, phase, before = multiply(ring, slot, phase, before, sums, q > 0, True, False)
            if tile > first:
                emit(out, buffers, q % 2, late[q], late_row, late_end, late_n + q * Q)
        for _ in range(start + 4 * K, end, K):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, True, False)
        late = rounded(split(finish(ring, before, sums, start < end)), ring[0].dtype)
        row = (part * num_groups + group) * height
        late_row, late_end, late_n = row + m, row + height, n
    if first < total:
        emit_all(out, buffers, late, late_row, late_end, late_n)
    tma.store_wait(0)


@gluon.jit
def _special_weight_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    out,
    schedule,
    num_groups,
    height,
    width,
    parts,
    total,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    BAND: gl.constexpr,
    TALL: gl.constexpr,
):
    """Multiply groups of a (R, height), transposed, by those of b (R, parts * width): (parts, E, height, width).

    If ``TALL``, a is (R, parts * height) and b (R, width). Groups are of whole steps of K rows.
    """
    ring, buffers = make_ring(a.dtype, (K, M), (K, N), STAGES), make_buffers(a.dtype)
    gl.warp_specialize(
        [
            (_multiply_all, (out, schedule, num_groups, height, width, parts, total, ring, buffers, BAND, TALL)),
            (_load_all, (a, b, schedule, num_groups, height, width, parts, total, ring, BAND, TALL)),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )


def weight_launch(
    device: torch.device,
    left: tuple[int, int],
    right: tuple[int, int],
    num_groups: int,
    *,
    size: tuple[int, int],
    parts: int,
    tall: bool,
    tile: Tile,
) -> Launch:
    """Return the launch of both operands, gradients of (height, width) = ``size``, and schedule."""
    height, width = size
    total = num_groups * blocks_of(height, ROWS) * blocks_of(width, COLUMNS) * parts
    return Launch(
        _special_weight_kernel, (min(programs(device), total),),
        (
            blocks(left, (left[1], 1), (DEPTH, ROWS)), blocks(right, (right[1], 1), (DEPTH, COLUMNS)),
            quarters((parts * num_groups * height, width)), POINTER, num_groups, height, width, parts, total,
        ),
        M=ROWS, N=COLUMNS, K=DEPTH, BAND=tile.band, TALL=tall, **OPTIONS,
    )  # fmt: skip
