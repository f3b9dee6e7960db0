"""What the grouped GEMM kernels share: the schedule of tiles, and loads and stores of tiles.

A schedule says which group a tile of rows belongs to. It is computed on the device from the sizes of the groups, so
that a launch needs to know an upper bound only: the number of rows.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Blocks, Launch, Pointer
from moekit.experts.tiles import Tile, capability_of
from moekit.operators import blocks_of, power_of_two


class Schedule(NamedTuple):
    """Tiles of ``m`` rows, none of which spans two groups.

    Attributes:
        table: (3 E + 1 + M,) int32, M >= the number of all tiles, one after another: the first row of each group; its
            size; the first tile of each group, and the number of all tiles; the group of each tile.
        num_groups: E.
    """

    table: Tensor
    num_groups: int

    @property
    def sizes(self) -> Tensor:
        """(E,) int32."""
        return self.table[self.num_groups : 2 * self.num_groups]

    @property
    def most_tiles(self) -> int:
        """Return M."""
        return self.table.shape[0] - 3 * self.num_groups - 1


MOST_ROWS = 2**30  # that a store up to the end of a group can count


@triton.jit
def group_of(schedule, tile, num_groups):  # type: ignore[no-untyped-def]
    """Return the group of a tile, its first row, its size, and its first tile."""
    group = tl.load(schedule + 3 * num_groups + 1 + tile)
    start, size = tl.load(schedule + group), tl.load(schedule + num_groups + group)
    return group, start, size, tl.load(schedule + 2 * num_groups + group)


@triton.jit
def first_tile(schedule, group, num_groups):  # type: ignore[no-untyped-def]
    """Return the first tile of a group; of the group past the last one, the number of all tiles."""
    return tl.load(schedule + 2 * num_groups + group)


@triton.jit
def _schedule_kernel(  # type: ignore[no-untyped-def]
    sizes, schedule, num_groups, num_owners, num_rows, M: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    groups = tl.arange(0, GROUPS)
    real = groups < num_groups
    rows = tl.load(sizes + groups, mask=real, other=0)
    last_rows = tl.minimum(tl.cumsum(rows, 0), num_rows)
    begins = tl.minimum(tl.cumsum(rows, 0) - rows, num_rows)
    rows = last_rows - begins
    tiles = (rows + (M - 1)) // M
    ends = tl.cumsum(tiles, 0)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.sum((ends[None, :] <= places[:, None]).to(tl.int32), 1)
    tl.store(schedule + 3 * num_groups + 1 + places, owner, mask=places < num_owners)
    if tl.program_id(0) == 0:
        tl.store(schedule + groups, begins, mask=real)
        tl.store(schedule + num_groups + groups, rows, mask=real)
        tl.store(schedule + 2 * num_groups + groups, ends - tiles, mask=real)
        tl.store(schedule + 3 * num_groups, tl.sum(tiles, 0))


def most_tiles(num_rows: int, num_groups: int, m: int) -> int:
    """Return the most tiles of ``m`` rows that groups of ``num_rows`` rows in all can need."""
    return -(-num_rows // m) + num_groups


def aligned_rows(num_assignments: int, num_experts: int, align: int) -> int:
    """Return the most rows that groups can take if each begins at a multiple of ``align``; an empty one takes none."""
    return -(-(num_assignments + min(num_experts, num_assignments) * (align - 1)) // align) * align


def make_schedule(sizes: Tensor, num_rows: int, m: int) -> Schedule:
    """Cut the groups of ``sizes`` (E,) int32 into tiles of ``m`` rows; past ``num_rows`` rows there is no group."""
    num_groups = sizes.shape[0]
    num_owners = most_tiles(num_rows, num_groups, m)
    table = sizes.new_empty(3 * num_groups + 1 + num_owners)
    _schedule_launch(num_groups, num_owners, num_rows, m)(sizes, table)
    return Schedule(table, num_groups)


@lru_cache(maxsize=512)
def _schedule_launch(num_groups: int, num_owners: int, num_rows: int, m: int) -> Launch:
    return Launch(
        _schedule_kernel, (blocks_of(num_owners, 64),), (POINTER, POINTER, num_groups, num_owners, num_rows),
        M=m, GROUPS=power_of_two(max(num_groups, 1)), BLOCK=64,
    )  # fmt: skip


@triton.jit
def place(tile, schedule, num_groups, num_n, M: tl.constexpr, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a tile's group, its first row, the end of the group's rows, and its number along the columns."""
    group, start, size, first = group_of(schedule, tile // num_n, num_groups)
    num_m = first_tile(schedule, group + 1, num_groups) - first
    local = tile - first * num_n
    band = local // (BAND * num_n)
    height = min(num_m - band * BAND, BAND)
    inside = local - band * BAND * num_n
    row = start + (band * BAND + inside % height) * M
    return group, row, start + size, inside // height


@triton.jit
def load_rows(a, row, end, k, width, stride, M: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load (M, K) of ``a`` (R, width); rows from ``end`` on hold anything, columns from ``width`` on zero."""
    if TMA:
        return a.load([row, k])
    else:
        rows = tl.minimum(row + tl.arange(0, M), end - 1).to(tl.int64)
        columns = k + tl.arange(0, K)
        return tl.load(a + rows[:, None] * stride + columns[None, :], mask=(columns < width)[None, :], other=0.0)


@triton.jit
def load_weight(  # type: ignore[no-untyped-def]
    w,
    group,
    k,
    n,
    depth,
    width,
    batch,
    stride,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load (K, N) of a group's matrix, which is (depth, width) in memory, or (width, depth) if ``TRANSPOSED``.

    Matrices are ``batch`` entries apart, and rows in memory ``stride``.
    """
    if TMA:
        if TRANSPOSED:
            return w.load([group, n, k]).reshape(N, K).T
        else:
            return w.load([group, k, n]).reshape(K, N)
    else:
        ks, ns = k + tl.arange(0, K), n + tl.arange(0, N)
        start = group.to(tl.int64) * batch
        places = ns[None, :] * stride + ks[:, None] if TRANSPOSED else ks[:, None] * stride + ns[None, :]
        return tl.load(w + start + places, mask=(ks < depth)[:, None] & (ns < width)[None, :], other=0.0)


@triton.jit
def load_bias(bias, group, n, width, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load (1, N) of a group's row of ``bias`` (E, width), float32; zero from ``width`` on."""
    columns = n + tl.arange(0, N)
    found = tl.load(bias + group.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
    return found.to(tl.float32)[None, :]


@triton.jit
def store_rows(out, values, row, end, n, width, stride, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store (M, N) values to the rows before ``end`` and the columns before ``width`` of ``out`` (R, stride)."""
    rows, columns = row + tl.arange(0, M), n + tl.arange(0, N)
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < width)[None, :])


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    out, out_rows, values, row, end, n, width, stride, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr
):
    """Store at columns n of ``width``: whole tiles by descriptor, the others by masked pointers."""
    if TMA:
        if row + M <= end:
            out.store([row, n], values.to(out.dtype))
        else:
            store_rows(out_rows, values, row, end, n, width, stride, M, N)
    else:
        store_rows(out_rows, values, row, end, n, width, stride, M, N)


@triton.jit
def store_group(out, values, row, end, n, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store (M, N) values to the rows before ``end`` at columns from ``n`` on, by a descriptor of ``groups``.

    Without a branch, so that the loads of the next tile can begin; in halves, which take half the shared memory.
    """
    first, second = tl.split(tl.permute(tl.reshape(values, (M, 2, N // 2)), (0, 2, 1)))
    last: tl.constexpr = 0x40000000  # of a group's rows, wherever in memory they end
    place = last + row - end
    out.store([last, end, place, n], first.to(out.dtype).reshape(1, 1, M, N // 2))
    out.store([last, end, place, n + N // 2], second.to(out.dtype).reshape(1, 1, M, N // 2))


def describable(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> bool:
    """Say whether a tensor may have a descriptor, if it begins at a multiple of 16 bytes.

    It may if its every step is of whole 16 bytes, but for that of one axis, whose entries are next to each other.
    """
    return 0 not in shape and [each for each in strides if each * dtype.itemsize % 16] == [1]


def is_specialized(device: torch.device, dtype: torch.dtype, num_rows: int, tile: Tile) -> bool:
    """Say whether a product is for the kernels whose warps either load or multiply, if its operands are."""
    hopper = capability_of(device) == 9
    return tile.specialized and hopper and dtype.itemsize == 2 and num_rows < MOST_ROWS


def groups(shape: tuple[int, int], tile: Tile) -> Blocks:
    """Return the descriptor of a contiguous matrix by which ``store_group`` writes up to the end of a group.

    The two axes in front have steps that lead past the end of 64 bits, so that a place can be counted from any row on
    and what lies beyond the group's end lies outside: see ``create_ragged_descriptor`` of Triton.
    """
    most, rows, step = 0x7FFF0000, 0x40000000, shape[1]
    return Blocks((most, most, rows, step), (2**34 - step, step, step, 1), (1, 1, tile.m, tile.n // 2))


class Matrices(NamedTuple):
    """Matrices (E, K, N) as they lie in memory: contiguous there, or (E, N, K) seen transposed.

    Attributes:
        shape: (E, K, N).
        strides: of the three axes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether they lie in memory as (E, N, K)."""
        return self.strides[2] != 1

    @property
    def steps(self) -> tuple[int, int]:
        """Return how far apart matrices are, and their rows in memory."""
        return self.strides[0], self.strides[2 if self.transposed else 1]

    def blocks(self, tile: Tile, tma: bool) -> Pointer | Blocks:
        """Return what they are to a launch: (K, N) blocks as they lie in memory, or a pointer."""
        if not tma:
            return POINTER
        (experts, depth, width), (batch, step) = self.shape, self.steps
        if self.transposed:
            return Blocks((experts, width, depth), (batch, step, 1), (1, tile.n, tile.k))
        return Blocks((experts, depth, width), (batch, step, 1), (1, tile.k, tile.n))


def matrices(w: Tensor) -> Matrices:
    """Return how matrices lie in memory."""
    return Matrices(tuple(w.shape), w.stride())


@cache
def programs(device: torch.device) -> int:
    """Return how many programs fill the device when each takes a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
