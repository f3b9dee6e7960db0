"""The way back over the hidden axis on Hopper, in one kernel: the gradient of the hidden rows is never written.

Behind the steps of a tile's product come its pre-activations, a quarter of the columns at a place of the ring. Their
gradients take their place there, and are stored from it.
"""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moekit._operators_triton import POINTER, Launch
from moekit.experts.activations import Activation
from moekit.experts.kernels._activations_triton import units
from moekit.experts.kernels._ring_loads_triton import load_tiles, matrices_as_one, second_of
from moekit.experts.kernels._ring_loads_triton import takes as takes_matrices
from moekit.experts.kernels._ring_triton import (
    COLUMNS,
    DEPTH,
    LOADER_REGISTERS,
    LOADERS,
    OPTIONS,
    QUARTER,
    QUARTER_HELD,
    QUARTER_LAID,
    ROWS,
    blocks,
    finish,
    following,
    make_ring,
    multiply,
    quarters,
    seen_as,
    split,
    store,
    zeros,
)
from moekit.experts.kernels._tiles_triton import Matrices, first_tile, place, programs
from moekit.experts.tiles import Tile
from moekit.operators import blocks_of

_QUARTER = gl.constexpr(QUARTER)


@gluon.jit
def _begin_to_store(out, tile, row, end, n):  # type: ignore[no-untyped-def]
    """Begin to store a quarter from shared memory, by a descriptor of ``quarters``."""
    store(out, seen_as(tile, tile.dtype, [1, 1, tile.shape[0], tile.shape[1]], QUARTER_LAID), row, end, n)


@gluon.jit
def _multiply_all(  # type: ignore[no-untyped-def]
    out,
    hidden,
    parts,
    weights,
    assignments,
    schedule,
    num_groups,
    num_assignments,
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
):
    M: gl.constexpr = ring[0].shape[1]
    K: gl.constexpr = ring[0].shape[2]
    dtype: gl.constexpr = ring[0].dtype
    STORES: gl.constexpr = 3 if GATED else 2  # of a quarter
    left, _right, full, empty = ring
    num_n = gl.cdiv(width, N)
    first = gl.program_id(0)
    slot, phase, before, held = 0, 0, 0, 0
    for tile in range(first, first_tile(schedule, num_groups, num_groups) * num_n, gl.num_programs(0)):
        _group, row, end, column = place(tile, schedule, num_groups, num_n, M, BAND)
        rows = row + gl.arange(0, M, gl.SliceLayout(1, QUARTER_HELD))
        assignment = gl.load(assignments + rows, mask=rows < end, other=-1)
        used = assignment >= 0
        weight = gl.load(weights + assignment, mask=used, other=0.0)[:, None]
        sums, slot, phase, before = multiply(ring, slot, phase, before, zeros(), False, False, TRANSPOSED)
        if tile > first:  # what the last quarter of the tile before was stored from, is empty now
            tma.store_wait(0)
            mbarrier.arrive(empty.index(held), count=1)
        for _ in range(K, depth, K):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, False, TRANSPOSED)
        four = split(finish(ring, before, sums, True))
        product = gl.zeros([M], gl.float32, gl.SliceLayout(1, QUARTER_HELD))
        for q in gl.static_range(4):
            n = column * N + q * _QUARTER
            if n < width:
                mbarrier.wait(full.index(slot), phase)
                gates, ups = left.index(slot), second_of(ring, slot)
                gate = gates.load(QUARTER_HELD).to(gl.float32)
                up = gate
                if GATED:
                    up = ups.load(QUARTER_HELD).to(gl.float32)
                value, slope, slope_up = units(gate, up, ACTIVATION, GATED, ALPHA, LIMIT, QUICK=True)
                product += gl.sum(value * four[q], 1)
                weighted = four[q] * weight
                buffer = buffers.index(q % 2)
                buffer.store((value * weight).to(dtype).reshape(buffer.shape))
                gates.store((weighted * slope).to(dtype))
                if GATED:
                    ups.store((weighted * slope_up).to(dtype))
                fence_async_shared()
                store(hidden, buffer, row, end, n)
                _begin_to_store(out, gates, row, end, n)
                if GATED:
                    _begin_to_store(out, ups, row, end, width + n)
                if q > 0:
                    tma.store_wait(STORES)
                    mbarrier.arrive(empty.index(held), count=1)
                held = slot
                slot, phase = following(slot, phase)
        gl.store(parts + column.to(gl.int64) * num_assignments + assignment, product, mask=used)
    tma.store_wait(0)


@gluon.jit
def _special_back_kernel(  # type: ignore[no-untyped-def]
    grads,
    down,
    pre,
    out,
    hidden,
    parts,
    weights,
    assignments,
    schedule,
    num_groups,
    num_assignments,
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
):
    """Multiply gradients (R, depth) by down, transposed, and take them through the activation and its weight."""
    ring, buffers = make_ring(grads.dtype, (M, K), (N, K) if TRANSPOSED else (K, N))
    gl.warp_specialize(
        [
            (
                _multiply_all,
                (
                    out, hidden, parts, weights, assignments, schedule, num_groups, num_assignments, depth, width,
                    ring, buffers, N, BAND, ACTIVATION, GATED, ALPHA, LIMIT, TRANSPOSED,
                ),
            ),
            (
                load_tiles,
                (
                    grads, down, down, pre, schedule, num_groups, depth, width, apart, ring, N, BAND,
                    False, False, 2 if GATED else 1, TRANSPOSED,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip


def takes(weights: Matrices, depth: int) -> bool:
    """Say whether the kernel multiplies by such matrices (E, D, F), which have descriptors; F in whole quarters."""
    return takes_matrices(weights, depth, halved=False) and weights.shape[2] % QUARTER == 0


def back_launch(
    device: torch.device,
    shape: tuple[int, int],
    weights: Matrices,
    *,
    activation: Activation,
    num_assignments: int,
    tile: Tile,
) -> tuple[Launch, int]:
    """Return the launch of gradients, matrices, pre-activation, its gradients, hidden rows, parts, weights, assignments
    and schedule; and of how many parts the gradients of the weights are sums.
    """
    num_groups, depth, width = weights.shape
    num_rows, preactivations = shape[0], (2 if activation.gated else 1) * width
    launch = Launch(
        _special_back_kernel, (programs(device),),
        (
            blocks(shape, (shape[1], 1), (ROWS, DEPTH)), matrices_as_one(weights, COLUMNS),
            blocks((num_rows, preactivations), (preactivations, 1), (ROWS, QUARTER)),
            quarters((num_rows, preactivations)), quarters((num_rows, width)), *[POINTER] * 4,
            num_groups, num_assignments, depth, width, weights.steps[0] // weights.steps[1],
        ),
        M=ROWS, N=COLUMNS, K=DEPTH, BAND=tile.band, ACTIVATION=activation.function, GATED=activation.gated,
        ALPHA=activation.alpha, LIMIT=activation.limit, TRANSPOSED=weights.transposed, **OPTIONS,
    )  # fmt: skip
    return launch, blocks_of(width, COLUMNS)
