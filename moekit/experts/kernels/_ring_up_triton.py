"""The up-projection on Hopper, gate and up side by side as one product."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

from moekit._operators_triton import POINTER, Launch
from moekit.experts.activations import Activation
from moekit.experts.kernels._activations_triton import units
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
def _multiply_up(  # type: ignore[no-untyped-def]
    pre,
    hidden,
    gate_bias,
    up_bias,
    schedule,
    num_groups,
    depth,
    width,
    ring,
    buffers,
    N: gl.constexpr,
    BAND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BIASED: gl.constexpr,
    KEEP_PRE: gl.constexpr,
    KEEP_HIDDEN: gl.constexpr,
):
    """The hidden rows are written at once, for their arithmetic would not fit beside a product; the rest is late."""
    M: gl.constexpr = ring[0].shape[1]
    K: gl.constexpr = ring[0].shape[2]
    HALF: gl.constexpr = 2 if GATED else 4  # quarters of one matrix
    Q: gl.constexpr = N // HALF
    num_n = gl.cdiv(width, N)
    total = first_tile(schedule, num_groups, num_groups) * num_n
    first = gl.program_id(0)
    slot, phase, before = 0, 0, 0
    late = rounded(split(zeros()), ring[0].dtype)
    late_row, late_end, late_n = 0, 0, 0
    for tile in range(first, total, gl.num_programs(0)):
        group, row, end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        sums = zeros()
        if BIASED:
            sums = biases(gate_bias, up_bias, group, column * N, width, N)
        for q in gl.static_range(4):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, q > 0, False, TRANSPOSED)
            # Two conditions: one is known when the kernel is compiled, the other is not.
            if KEEP_PRE:  # noqa: SIM102
                if tile > first:
                    emit(pre, buffers, q % 2, late[q], late_row, late_end, late_n + q // HALF * width + q % HALF * Q)
        for _ in range(4 * K, depth, K):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, False, TRANSPOSED)
        four = split(finish(ring, before, sums, True))
        n = column * N
        if KEEP_HIDDEN:
            for q in gl.static_range(HALF):
                value, _slope, _other = units(four[q], four[(q + 2) % 4], ACTIVATION, GATED, ALPHA, LIMIT, QUICK=True)
                emit(hidden, buffers, q % 2, value, row, end, n + q * Q)
        if KEEP_PRE:
            late = rounded(four, ring[0].dtype)
            late_row, late_end, late_n = row, end, n
    if KEEP_PRE:  # noqa: SIM102
        if first < total:
            for q in gl.static_range(4):
                emit(pre, buffers, q % 2, late[q], late_row, late_end, late_n + q // HALF * width + q % HALF * Q)
    tma.store_wait(0)


@gluon.jit
def _special_up_kernel(  # type: ignore[no-untyped-def]
    rows,
    gate,
    up,
    gate_bias,
    up_bias,
    pre,
    hidden,
    schedule,
    num_groups,
    depth,
    width,
    apart,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    BAND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BIASED: gl.constexpr,
    KEEP_PRE: gl.constexpr,
    KEEP_HIDDEN: gl.constexpr,
):
    """Multiply rows by gate and up side by side, or by one matrix, add biases, and apply the activation."""
    WIDE: gl.constexpr = 2 * N if GATED else N
    ring = make_ring(rows.dtype, (M, K), (WIDE, K) if TRANSPOSED else (K, WIDE), STAGES)
    buffers = make_buffers(rows.dtype)
    gl.warp_specialize(
        [
            (
                _multiply_up,
                (
                    pre, hidden, gate_bias, up_bias, schedule, num_groups, depth, width, ring, buffers, N, BAND,
                    ACTIVATION, GATED, ALPHA, LIMIT, TRANSPOSED, BIASED, KEEP_PRE, KEEP_HIDDEN,
                ),
            ),
            (
                load_tiles,
                (
                    rows, gate, up, schedule, num_groups, depth, width, apart, ring, N, BAND, GATED, False, TRANSPOSED,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip


def up_launch(
    device: torch.device,
    shape: tuple[int, int],
    weights: Matrices,
    *,
    activation: Activation,
    biased: bool,
    keep_pre: bool,
    keep_hidden: bool,
    tile: Tile,
) -> Launch:
    """Return the launch of rows, matrices, biases if there are any, what is kept, and schedule."""
    num_groups, depth, width = weights.shape
    gated = activation.gated
    columns = COLUMNS // 2 if gated else COLUMNS
    right, bias = matrices_as_one(weights, columns), POINTER if biased else None
    return Launch(
        _special_up_kernel, (programs(device),),
        (
            blocks(shape, (shape[1], 1), (ROWS, DEPTH)), right, right if gated else None, bias,
            bias if gated else None, quarters((shape[0], activation.parts * width)) if keep_pre else None,
            quarters((shape[0], width)) if keep_hidden else None, POINTER,
            num_groups, depth, width, weights.steps[0] // weights.steps[1],
        ),
        M=ROWS, N=columns, K=DEPTH, BAND=tile.band, ACTIVATION=activation.function, GATED=gated,
        ALPHA=activation.alpha, LIMIT=activation.limit, TRANSPOSED=weights.transposed, BIASED=biased,
        KEEP_PRE=keep_pre, KEEP_HIDDEN=keep_hidden, **OPTIONS,
    )  # fmt: skip
