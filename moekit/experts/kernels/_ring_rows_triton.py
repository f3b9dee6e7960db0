"""Grouped rows times their group's matrix on Hopper, by a kernel whose warps either load or multiply."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

from moekit._operators_triton import POINTER, Launch
from moekit.experts.kernels._ring_loads_triton import load_tiles, matrices_as_one
from moekit.experts.kernels._ring_triton import (
    COLUMNS,
    DEPTH,
    LOADER_REGISTERS,
    LOADERS,
    OPTIONS,
    ROWS,
    STAGES,
    biases,
    blocks,
    emit,
    emit_all,
    finish,
    make_buffers,
    make_ring,
    multiply,
    quarters,
    rounded,
    split,
    zeros,
)
from moekit.experts.kernels._tiles_triton import Matrices, first_tile, place, programs
from moekit.experts.tiles import Tile


@gluon.jit
def _multiply_rows(  # type: ignore[no-untyped-def]
    out,
    bias,
    schedule,
    num_groups,
    depth,
    width,
    ring,
    buffers,
    N: gl.constexpr,
    BAND: gl.constexpr,
    TWO: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BIASED: gl.constexpr,
):
    M: gl.constexpr = ring[0].shape[1]
    K: gl.constexpr = ring[0].shape[2]
    Q: gl.constexpr = N // 4
    num_n = gl.cdiv(width, N)
    total = first_tile(schedule, num_groups, num_groups) * num_n
    first = gl.program_id(0)
    steps = depth // K
    if TWO:
        steps *= 2
    slot, phase, before = 0, 0, 0
    late = rounded(split(zeros()), ring[0].dtype)
    late_row, late_end, late_n = 0, 0, 0
    for tile in range(first, total, gl.num_programs(0)):
        group, row, end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        sums = zeros()
        if BIASED:
            sums = biases(bias, bias, group, column * N, width, N)
        for q in gl.static_range(4):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, q > 0, False, TRANSPOSED)
            if tile > first:
                emit(out, buffers, q % 2, late[q], late_row, late_end, late_n + q * Q)
        for _ in range(4, steps):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, False, TRANSPOSED)
        late = rounded(split(finish(ring, before, sums, True)), ring[0].dtype)
        late_row, late_end, late_n = row, end, column * N
    if first < total:
        emit_all(out, buffers, late, late_row, late_end, late_n)
    tma.store_wait(0)


@gluon.jit
def _special_rows_kernel(  # type: ignore[no-untyped-def]
    rows,
    w,
    w2,
    bias,
    out,
    schedule,
    num_groups,
    depth,
    width,
    apart,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    BAND: gl.constexpr,
    TWO: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BIASED: gl.constexpr,
):
    """Multiply (R, depth), or (R, 2 depth) if ``TWO``, by w (E, depth, width), or by w over w2, and add the bias."""
    ring, buffers = make_ring(rows.dtype, (M, K), (N, K) if TRANSPOSED else (K, N), STAGES), make_buffers(rows.dtype)
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (out, bias, schedule, num_groups, depth, width, ring, buffers, N, BAND, TWO, TRANSPOSED, BIASED),
            ),
            (
                load_tiles,
                (
                    rows, w, w2, schedule, num_groups, depth, width, apart, ring, N, BAND,
                    False, TWO, TRANSPOSED,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip


def rows_launch(
    device: torch.device, shape: tuple[int, int], weights: Matrices, *, two: bool, biased: bool, tile: Tile
) -> Launch:
    """Return the launch of rows, one or two matrices, bias if there is one, output and schedule."""
    num_groups, depth, width = weights.shape
    right = matrices_as_one(weights, COLUMNS)
    return Launch(
        _special_rows_kernel, (programs(device),),
        (
            blocks(shape, (shape[1], 1), (ROWS, DEPTH)), right, right if two else None, POINTER if biased else None,
            quarters((shape[0], width)), POINTER, num_groups, depth, width, weights.steps[0] // weights.steps[1],
        ),
        M=ROWS, N=COLUMNS, K=DEPTH, BAND=tile.band, TWO=two, TRANSPOSED=weights.transposed, BIASED=biased, **OPTIONS,
    )  # fmt: skip
