"""Grouped rows times their group's matrix on Hopper, by kernels whose warps either load or multiply."""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

from moekit._operators_triton import POINTER, Blocks, Launch
from moekit.experts._activations_triton import units
from moekit.experts._ring_triton import (
    COLUMNS,
    DEPTH,
    LOADER_REGISTERS,
    LOADERS,
    OPTIONS,
    ROWS,
    blocks,
    claim,
    emit,
    finish,
    following,
    load,
    make_ring,
    multiply,
    quarters,
    rounded,
    split,
    zeros,
)
from moekit.experts._tiles_triton import Matrices, first_tile, is_whole, place, programs
from moekit.experts.activations import Activation
from moekit.experts.tiles import Tile

_LOADERS, _REGISTERS = gl.constexpr(LOADERS), gl.constexpr(LOADER_REGISTERS)


@gluon.jit
def _load_matrix(w, tile, bar, group, k, n, apart, TRANSPOSED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to load a tile of a group's matrix, which begins ``apart`` rows of memory behind the one before."""
    if TRANSPOSED:
        load(w, [group * apart + n, k], bar, tile)
    else:
        load(w, [group * apart + k, n], bar, tile)


@gluon.jit
def load_step(  # type: ignore[no-untyped-def]
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
    return following(slot, phase)


@gluon.jit
def _load_all(  # type: ignore[no-untyped-def]
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
    M: gl.constexpr = ring[0].shape[1]
    K: gl.constexpr = ring[0].shape[2]
    num_n = gl.cdiv(width, N)
    slot = 0
    phase = 1  # of a barrier that nobody has arrived at: the ring is empty
    for tile in range(gl.program_id(0), first_tile(schedule, num_groups, num_groups) * num_n, gl.num_programs(0)):
        group, row, _end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        n = column * N
        for k in range(0, depth, K):
            slot, phase = load_step(rows, w, w2, k, ring, slot, phase, row, group, k, n, apart, SIDE, TRANSPOSED)
        if TWO:
            for k in range(0, depth, K):
                slot, phase = load_step(
                    rows, w2, w2, depth + k, ring, slot, phase, row, group, k, n, apart, SIDE, TRANSPOSED
                )


@gluon.jit
def _with_bias(values, bias, n, width, BIASED: gl.constexpr):  # type: ignore[no-untyped-def]
    """Add a group's bias at columns from ``n`` on to a quarter."""
    if BIASED:
        columns = n + gl.arange(0, values.shape[1], gl.SliceLayout(0, values.type.layout))
        values += gl.load(bias + columns, mask=columns < width, other=0.0).to(gl.float32)[None, :]
    return values


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
        for q in gl.static_range(4):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, q > 0, False, TRANSPOSED)
            if tile > first:
                emit(out, buffers, q % 2, late[q], late_row, late_end, late_n + q * Q)
        for _ in range(4, steps):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, False, TRANSPOSED)
        a, b, c, d = split(finish(ring, before, sums, True))
        of_group = bias
        if BIASED:
            of_group += group.to(gl.int64) * width
        n = column * N
        a = _with_bias(a, of_group, n, width, BIASED)
        b = _with_bias(b, of_group, n + Q, width, BIASED)
        c = _with_bias(c, of_group, n + 2 * Q, width, BIASED)
        d = _with_bias(d, of_group, n + 3 * Q, width, BIASED)
        late = rounded((a, b, c, d), ring[0].dtype)
        late_row, late_end, late_n = row, end, n
    if first < total:
        for q in gl.static_range(4):
            emit(out, buffers, q % 2, late[q], late_row, late_end, late_n + q * Q)
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
    ring, buffers = make_ring(rows.dtype, (M, K), (N, K) if TRANSPOSED else (K, N))
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (out, bias, schedule, num_groups, depth, width, ring, buffers, N, BAND, TWO, TRANSPOSED, BIASED),
            ),
            (
                _load_all,
                (rows, w, w2, schedule, num_groups, depth, width, apart, ring, N, BAND, False, TWO, TRANSPOSED),
            ),
        ],
        [_LOADERS],
        [_REGISTERS],
    )


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
        for q in gl.static_range(4):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, q > 0, False, TRANSPOSED)
            # Two conditions: one is known when the kernel is compiled, the other is not.
            if KEEP_PRE:  # noqa: SIM102
                if tile > first:
                    emit(pre, buffers, q % 2, late[q], late_row, late_end, late_n + q // HALF * width + q % HALF * Q)
        for _ in range(4 * K, depth, K):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, False, TRANSPOSED)
        a, b, c, d = split(finish(ring, before, sums, True))
        of_gate = gate_bias
        of_up = gate_bias
        if BIASED:
            of_gate += group.to(gl.int64) * width
            of_up = of_gate
            if GATED:
                of_up = up_bias + group.to(gl.int64) * width
        n = column * N
        a = _with_bias(a, of_gate, n, width, BIASED)
        b = _with_bias(b, of_gate, n + Q, width, BIASED)
        c = _with_bias(c, of_up, n + 2 % HALF * Q, width, BIASED)
        d = _with_bias(d, of_up, n + 3 % HALF * Q, width, BIASED)
        four = (a, b, c, d)
        if KEEP_HIDDEN:
            for q in gl.static_range(HALF):
                value, _slope, _other = units(four[q], four[(q + 2) % 4], ACTIVATION, GATED, ALPHA, LIMIT)
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
    ring, buffers = make_ring(rows.dtype, (M, K), (WIDE, K) if TRANSPOSED else (K, WIDE))
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
                _load_all,
                (rows, gate, up, schedule, num_groups, depth, width, apart, ring, N, BAND, GATED, False, TRANSPOSED),
            ),
        ],
        [_LOADERS],
        [_REGISTERS],
    )  # fmt: skip


def takes(weights: Matrices, depth: int, *, halved: bool) -> bool:
    """Say whether these kernels multiply by such matrices, which have descriptors, and what they write has too.

    Args:
        weights: the matrices, or the first of two.
        depth: entries of a sum, both matrices' together.
        halved: whether two results lie beside each other in memory, so that no tile may run into the other.
    """
    _, rows, width = weights.shape
    batch, step = weights.steps
    whole = rows % DEPTH == 0 and batch % step == 0 and is_whole(width, torch.bfloat16)
    return whole and depth >= 4 * DEPTH and (not halved or width % (COLUMNS // 2) == 0)


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
            bias if gated else None, quarters((shape[0], (2 if gated else 1) * width)) if keep_pre else None,
            quarters((shape[0], width)) if keep_hidden else None, POINTER,
            num_groups, depth, width, weights.steps[0] // weights.steps[1],
        ),
        M=ROWS, N=columns, K=DEPTH, BAND=tile.band, ACTIVATION=activation.function, GATED=gated,
        ALPHA=activation.alpha, LIMIT=activation.limit, TRANSPOSED=weights.transposed, BIASED=biased,
        KEEP_PRE=keep_pre, KEEP_HIDDEN=keep_hidden, **OPTIONS,
    )  # fmt: skip


def matrices_as_one(weights: Matrices, columns: int) -> Blocks:
    """Return the descriptor of matrices as one, of all their rows in memory one below the other."""
    num_groups, depth, width = weights.shape
    batch, step = weights.steps
    rows, along = (width, depth) if weights.transposed else (depth, width)
    block = (columns, DEPTH) if weights.transposed else (DEPTH, columns)
    return blocks(((num_groups - 1) * (batch // step) + rows, along), (step, 1), block)
