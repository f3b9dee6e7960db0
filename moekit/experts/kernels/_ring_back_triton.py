"""The way back over the hidden axis on Hopper, in one kernel: the gradient of the hidden rows is never written.

One warp loads what is multiplied, eight warps multiply and lay a tile of gradients on a desk in shared memory. From
there two warps take it through the activation while the next tile is made, with pre-activations that one more warp
loads. The desk has the room of a place of the ring and of a buffer; on it gradients, not weighted yet, are rounded to
the dtype of memory.
"""

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moekit._operators_triton import POINTER, Launch
from moekit.experts.activations import Activation
from moekit.experts.kernels._activations_triton import units
from moekit.experts.kernels._ring_loads_triton import load_tiles, matrices_as_one
from moekit.experts.kernels._ring_loads_triton import takes as takes_matrices
from moekit.experts.kernels._ring_triton import (
    COLUMNS,
    DEPTH,
    LOADERS,
    OPTIONS,
    QUARTER,
    ROWS,
    blocks,
    finish,
    following,
    load,
    make_barriers,
    make_ring,
    multiply,
    seen_as,
    split,
    zeros,
)
from moekit.experts.kernels._tiles_triton import Matrices, first_tile, place, programs
from moekit.experts.tiles import Tile
from moekit.operators import blocks_of

BLOCK = 32  # rows that are taken through the activation at a time, of a quarter's columns
_STAGES = gl.constexpr(3)
# Warps that do so, and registers of their threads and of those that load; 160 remain for a thread that multiplies.
_FINISHERS, _REGISTERS = gl.constexpr(2), gl.constexpr(184)
_ROWS, _QUARTER, _QUARTERS = gl.constexpr(ROWS), gl.constexpr(QUARTER), gl.constexpr(COLUMNS // QUARTER)
_BLOCK, _BLOCKS, _SLOTS = gl.constexpr(BLOCK), gl.constexpr(ROWS // BLOCK), gl.constexpr(64 // BLOCK)
# How a block lies in shared memory, and how threads hold it, each of them 16 bytes of a row.
_LAID = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_HELD = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0]))
_EIGHTS = gl.constexpr(gl.BlockedLayout([1, 1, 8], [4, 8, 1], [2, 1, 1], [2, 1, 0]))  # the same, eight numbers an axis


@gluon.jit
def _make_desk(dtype: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return room for the quarters of a tile, and barriers that say that it is laid out, and taken away."""
    tiles = gl.allocate_shared_memory(dtype, [_QUARTERS, _ROWS, _QUARTER], _LAID)
    laid, taken = make_barriers(1)
    return tiles, laid.index(0), taken.index(0)


@gluon.jit
def _make_blocks(dtype: gl.constexpr, PARTS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return room for blocks of pre-activations, and barriers that say of each that it is full, and empty."""
    pre = gl.allocate_shared_memory(dtype, [_SLOTS * PARTS, _BLOCK, _QUARTER], _LAID)
    full, empty = make_barriers(_SLOTS)
    return pre, full, empty


@gluon.jit
def _multiply_all(  # type: ignore[no-untyped-def]
    schedule, num_groups, depth, width, ring, desk, N: gl.constexpr, TRANSPOSED: gl.constexpr
):
    """Lay tiles of sums on the desk."""
    K: gl.constexpr = ring[0].shape[2]
    tiles, laid, taken = desk
    slot, phase, before = 0, 0, 0
    turn = 1  # of a barrier that nobody has arrived at: the desk is empty
    total = first_tile(schedule, num_groups, num_groups) * gl.cdiv(width, N)
    for _tile in range(gl.program_id(0), total, gl.num_programs(0)):
        sums, slot, phase, before = multiply(ring, slot, phase, before, zeros(), False, False, TRANSPOSED)
        for _ in range(K, depth, K):
            sums, slot, phase, before = multiply(ring, slot, phase, before, sums, True, False, TRANSPOSED)
        four = split(finish(ring, before, sums, True))
        mbarrier.wait(taken, turn)
        for q in gl.static_range(_QUARTERS):
            tiles.index(q).store(four[q].to(ring[0].dtype))
        mbarrier.arrive(laid, count=1)
        turn ^= 1


@gluon.jit
def _load_blocks(  # type: ignore[no-untyped-def]
    pre, schedule, num_groups, width, room, N: gl.constexpr, BAND: gl.constexpr, PARTS: gl.constexpr
):
    """Load pre-activations of ``PARTS`` matrices, block by block, quarter by quarter."""
    to, full, empty = room
    num_n = gl.cdiv(width, N)
    slot = 0
    phase = 1  # of a barrier that nobody has arrived at: the room is empty
    for tile in range(gl.program_id(0), first_tile(schedule, num_groups, num_groups) * num_n, gl.num_programs(0)):
        _group, row, _end, column = place(tile, schedule, num_groups, num_n, _ROWS, BAND)
        for block in range(_BLOCKS):
            for n in range(column * N, gl.minimum(column * N + N, width), _QUARTER):
                bar = full.index(slot)
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(bar, PARTS * _BLOCK * _QUARTER * 2)
                for part in gl.static_range(PARTS):
                    load(pre, [row + block * _BLOCK, part * width + n], bar, to.index(PARTS * slot + part))
                slot, phase = following(empty, slot, phase)


@gluon.jit
def _weights_of(assignments, weights, row, end):  # type: ignore[no-untyped-def]
    """Return the assignments of a block's rows before ``end``, -1 where there is none, and their weights."""
    rows = row + gl.arange(0, _BLOCK, gl.SliceLayout(1, _HELD))
    assignment = gl.load(assignments + rows, mask=rows < end, other=-1)
    return assignment, gl.load(weights + assignment, mask=assignment >= 0, other=0.0)


@gluon.jit
def _take_back(  # type: ignore[no-untyped-def]
    out,
    hidden,
    parts,
    weights,
    assignments,
    schedule,
    num_groups,
    num_assignments,
    width,
    desk,
    room,
    N: gl.constexpr,
    BAND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Take tiles from the desk, and through the activation and their assignments' weights."""
    PARTS: gl.constexpr = 2 if GATED else 1
    dtype: gl.constexpr = desk[0].dtype
    tiles, laid, taken = desk
    pre, full, empty = room
    grads = seen_as(tiles, dtype, [_QUARTERS * _BLOCKS, _BLOCK, _QUARTER], _LAID)
    width = width // 8 * 8  # which it is, as the compiler then knows
    num_n = gl.cdiv(width, N)
    slot, phase, turn = 0, 0, 0
    for tile in range(gl.program_id(0), first_tile(schedule, num_groups, num_groups) * num_n, gl.num_programs(0)):
        _group, row, end, column = place(tile, schedule, num_groups, num_n, _ROWS, BAND)
        assignment, weight = _weights_of(assignments, weights, row, end)
        mbarrier.wait(laid, turn)
        for block in range(_BLOCKS):
            next_assignment, next_weight = _weights_of(
                assignments, weights, row + (block + 1) * _BLOCK, gl.minimum(end, row + _ROWS)
            )
            rows = row + block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(1, _HELD))
            exists = (rows < end)[:, None]
            product = gl.zeros([_BLOCK, 8], gl.float32, gl.SliceLayout(2, _EIGHTS))
            for q in range(gl.minimum(_QUARTERS, (width - column * N) // _QUARTER)):
                n = column * N + q * _QUARTER
                mbarrier.wait(full.index(slot), phase)
                gate = pre.index(PARTS * slot).load(_HELD).to(gl.float32)
                up = gate
                if GATED:
                    up = pre.index(PARTS * slot + 1).load(_HELD).to(gl.float32)
                fence_async_shared()
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = following(empty, slot, phase)
                grad = grads.index(q * _BLOCKS + block).load(_HELD).to(gl.float32)
                value, slope, slope_up = units(gate, up, ACTIVATION, GATED, ALPHA, LIMIT, QUICK=True)
                eights = gl.convert_layout(gl.reshape(value * grad, (_BLOCK, 8, _QUARTER // 8)), _EIGHTS)
                product += gl.sum(eights, 2)
                weighted = grad * weight[:, None]
                columns = n + gl.arange(0, _QUARTER, gl.SliceLayout(0, _HELD))[None, :]
                to = rows.to(gl.int64)[:, None]
                gl.store(hidden + to * width + columns, (value * weight[:, None]).to(dtype), mask=exists)
                to = out + to * (PARTS * width) + columns
                gl.store(to, (weighted * slope).to(dtype), mask=exists)
                if GATED:
                    gl.store(to + width, (weighted * slope_up).to(dtype), mask=exists)
            to = parts + column.to(gl.int64) * num_assignments + assignment
            gl.store(to, gl.convert_layout(gl.sum(product, 1), to.type.layout), mask=assignment >= 0)
            assignment, weight = next_assignment, next_weight
        mbarrier.arrive(taken, count=1)
        turn ^= 1


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
    PARTS: gl.constexpr = 2 if GATED else 1
    desk = _make_desk(grads.dtype)
    room = _make_blocks(grads.dtype, PARTS)
    ring = make_ring(grads.dtype, (M, K), (N, K) if TRANSPOSED else (K, N), _STAGES)
    gl.warp_specialize(
        [
            (_multiply_all, (schedule, num_groups, depth, width, ring, desk, N, TRANSPOSED)),
            (
                _take_back,
                (
                    out, hidden, parts, weights, assignments, schedule, num_groups, num_assignments, width, desk, room,
                    N, BAND, ACTIVATION, GATED, ALPHA, LIMIT,
                ),
            ),
            (
                load_tiles,
                (
                    grads, down, down, schedule, num_groups, depth, width, apart, ring, N, BAND,
                    False, False, TRANSPOSED,
                ),
            ),
            (_load_blocks, (pre, schedule, num_groups, width, room, N, BAND, PARTS)),
        ],
        [_FINISHERS, LOADERS, LOADERS],
        [_REGISTERS, _REGISTERS, _REGISTERS],
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
    num_rows, preactivations = shape[0], activation.parts * width
    launch = Launch(
        _special_back_kernel, (programs(device),),
        (
            blocks(shape, (shape[1], 1), (ROWS, DEPTH)), matrices_as_one(weights, COLUMNS),
            blocks((num_rows, preactivations), (preactivations, 1), (BLOCK, QUARTER)),
            *[POINTER] * 6, num_groups, num_assignments, depth, width, weights.steps[0] // weights.steps[1],
        ),
        M=ROWS, N=COLUMNS, K=DEPTH, BAND=tile.band, ACTIVATION=activation.function, GATED=activation.gated,
        ALPHA=activation.alpha, LIMIT=activation.limit, TRANSPOSED=weights.transposed, **OPTIONS,
    )  # fmt: skip
    return launch, blocks_of(width, COLUMNS)
