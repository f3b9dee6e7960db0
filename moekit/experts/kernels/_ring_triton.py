"""A ring of tiles in shared memory: one warp of a program fills it, others multiply what they find there.

For Hopper, in Gluon. Loads never wait for arithmetic, nor the other way round. A tile of sums is written while the next
one is added up: in quarters, each behind a product that runs meanwhile, or by other warps, see ``_ring_back_triton``.
Else a program would do nothing but write for a tenth of its time.

All tiles are 128 rows times 256 columns, 64 deep, of 16-bit numbers; that is what registers and shared memory hold.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moekit._operators_triton import Blocks

ROWS, COLUMNS, DEPTH = 128, 256, 64
STAGES = gl.constexpr(4)  # tiles in the ring, as many as shared memory holds beside two quarters to be written
QUARTER = 64
# By their names in newer and older releases of Triton.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_begin_to_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_tile = gl.shared_memory_descriptor
seen_as = _tile.reinterpret if hasattr(_tile, "reinterpret") else _tile._reinterpret
LOADERS, LOADER_REGISTERS = gl.constexpr(1), gl.constexpr(40)  # warps that load, and registers of their threads
OPTIONS = {"num_warps": 8}  # that multiply

_ROWS, _COLUMNS, _QUARTER = gl.constexpr(ROWS), gl.constexpr(COLUMNS), gl.constexpr(QUARTER)
# How the threads hold a quarter, and how one lies in shared memory.
QUARTER_HELD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, QUARTER, 16]))
QUARTER_LAID = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))


def blocks(shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Blocks:
    """Return what a tensor of 16-bit numbers is to a launch of these kernels."""
    return Blocks(
        shape, strides, block, gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    )


def quarters(shape: tuple[int, int]) -> Blocks:
    """Return the descriptor of a contiguous matrix by which ``emit`` writes up to the end of a group.

    The two axes in front have steps that lead past the end of 64 bits: see ``groups`` of the plain kernels.
    """
    most, rows, step = 0x7FFF0000, 0x40000000, shape[1]
    return blocks((most, most, rows, step), (2**34 - step, step, step, 1), (1, 1, ROWS, QUARTER))


@gluon.jit
def make_barriers(NUMBER: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return barriers that say of a number of places that they are full, and that they are empty."""
    full = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return full, empty


@gluon.jit
def make_ring(dtype: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return tiles of both operands, and barriers that say that they are full and empty."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    left = gl.allocate_shared_memory(dtype, [STAGES, LEFT[0], LEFT[1]], layout)
    right = gl.allocate_shared_memory(dtype, [STAGES, RIGHT[0], RIGHT[1]], layout)
    full, empty = make_barriers(STAGES)
    return left, right, full, empty


@gluon.jit
def make_buffers(dtype: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return two buffers of quarters."""
    return gl.allocate_shared_memory(dtype, [2, 1, 1, _ROWS, _QUARTER], QUARTER_LAID)


@gluon.jit
def following(empty, slot, phase):  # type: ignore[no-untyped-def]
    """Return the next of as many places as there are barriers, and the phase that its barrier has there."""
    slot += 1
    if slot == empty.shape[0]:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def claim(ring, slot, phase):  # type: ignore[no-untyped-def]
    """Wait until a place is empty, and return its tiles and the barrier that counts their bytes."""
    left, right, full, empty = ring
    mbarrier.wait(empty.index(slot), phase)
    to_left, to_right, bar = left.index(slot), right.index(slot), full.index(slot)
    mbarrier.expect(bar, (to_left.numel + to_right.numel) * 2)
    return to_left, to_right, bar


@gluon.jit
def multiply(  # type: ignore[no-untyped-def]
    ring, slot, phase, before, sums, again, LEFT_TRANSPOSED: gl.constexpr, RIGHT_TRANSPOSED: gl.constexpr
):
    """Begin to add the product of the next tiles to the sums, when the product before is done.

    Whose place ``before`` is then empty, if this is not the first of a tile. Returns the sums, and the ring's state.
    """
    left, right, full, empty = ring
    mbarrier.wait(full.index(slot), phase)
    a, b = left.index(slot), right.index(slot)
    if LEFT_TRANSPOSED:
        a = a.permute((1, 0))
    if RIGHT_TRANSPOSED:
        b = b.permute((1, 0))
    sums = warpgroup_mma(a, b, sums, is_async=True)
    sums = warpgroup_mma_wait(1, deps=(sums,))
    mbarrier.arrive(empty.index(before), count=1, pred=again)
    before = slot
    slot, phase = following(empty, slot, phase)
    return sums, slot, phase, before


@gluon.jit
def finish(ring, before, sums, some):  # type: ignore[no-untyped-def]
    """Wait for the last product of a tile, if there was some, and return the sums."""
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(ring[3].index(before), count=1, pred=some)
    return sums


@gluon.jit
def zeros():  # type: ignore[no-untyped-def]
    """Return the sums of a tile before the first product."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _COLUMNS, 16])
    return gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)


@gluon.jit
def biases(bias, beside, group, n, width, N: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sums of a tile before the first product: a group's bias at N columns from ``n`` on.

    If N is half a tile, what is ``beside`` follows, another bias at the same columns.
    """
    sums = zeros()
    place = gl.arange(0, _COLUMNS, gl.SliceLayout(0, sums.type.layout))
    columns = n + place % N
    values = bias + group.to(gl.int64) * width + columns
    if N < _COLUMNS:
        values = gl.where(place < N, values, beside + group.to(gl.int64) * width + columns)
    return sums + gl.load(values, mask=columns < width, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _halves(values, N: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.split(gl.permute(gl.reshape(values, (_ROWS, 2, N // 2)), (0, 2, 1)))


@gluon.jit
def split(sums):  # type: ignore[no-untyped-def]
    """Return the four quarters of a tile's columns, which stay in the registers that they are in."""
    first, second = _halves(sums, _COLUMNS)
    a, b = _halves(first, _COLUMNS // 2)
    c, d = _halves(second, _COLUMNS // 2)
    return (
        gl.convert_layout(a, QUARTER_HELD),
        gl.convert_layout(b, QUARTER_HELD),
        gl.convert_layout(c, QUARTER_HELD),
        gl.convert_layout(d, QUARTER_HELD),
    )


@gluon.jit
def rounded(four, dtype: gl.constexpr):  # type: ignore[no-untyped-def]
    """Return four quarters in the dtype of memory, which take half the registers."""
    return four[0].to(dtype), four[1].to(dtype), four[2].to(dtype), four[3].to(dtype)


@gluon.jit
def store(out, buffer, row, end, n):  # type: ignore[no-untyped-def]
    """Begin to store a buffer to the rows before ``end``, at columns from ``n`` on, by a descriptor of ``quarters``."""
    last: gl.constexpr = 0x40000000  # of a group's rows, wherever in memory they end
    _begin_to_store(out, [last, end, last + row - end, n], buffer)


@gluon.jit
def emit(out, buffers, turn: gl.constexpr, values, row, end, n):  # type: ignore[no-untyped-def]
    """Begin to store a quarter through buffer ``turn`` of two, 0 and 1 in turns."""
    tma.store_wait(1)
    buffer = buffers.index(turn)
    buffer.store(values.to(out.dtype).reshape(buffer.shape))
    fence_async_shared()
    store(out, buffer, row, end, n)


@gluon.jit
def emit_all(out, buffers, four, row, end, n):  # type: ignore[no-untyped-def]
    """Begin to store the quarters of a tile, beside each other."""
    for q in gl.static_range(4):
        emit(out, buffers, q % 2, four[q], row, end, n + q * _QUARTER)
