"""What the grouped GEMM kernels share: the schedule of tiles, and loads and stores of tiles.

A schedule says which group a tile of rows belongs to. It is computed on the device from the sizes of the groups, so
that a launch needs to know an upper bound only: the number of rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekit.experts.tiles import Tile
from moekit.operators import blocks_of, power_of_two


class Schedule(NamedTuple):
    """Tiles of ``m`` rows, none of which spans two groups.

    Attributes:
        starts: (E,) int32, the first row of each group.
        sizes: (E,) int32.
        firsts: (E + 1,) int32, the first tile of each group, and the number of all tiles.
        owners: (M,) int32, the group of each tile, M >= the number of all tiles.
    """

    starts: Tensor
    sizes: Tensor
    firsts: Tensor
    owners: Tensor


@triton.jit
def _schedule_kernel(  # type: ignore[no-untyped-def]
    sizes, starts, firsts, owners, num_groups, num_owners, M: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    groups = tl.arange(0, GROUPS)
    rows = tl.load(sizes + groups, mask=groups < num_groups, other=0)
    tiles = (rows + (M - 1)) // M
    ends = tl.cumsum(tiles, 0)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.sum((ends[None, :] <= places[:, None]).to(tl.int32), 1)
    tl.store(owners + places, owner, mask=places < num_owners)
    if tl.program_id(0) == 0:
        tl.store(starts + groups, tl.cumsum(rows, 0) - rows, mask=groups < num_groups)
        tl.store(firsts + groups, ends - tiles, mask=groups < num_groups)
        tl.store(firsts + num_groups, tl.sum(tiles, 0))


def most_tiles(num_rows: int, num_groups: int, m: int) -> int:
    """Return the most tiles of ``m`` rows that groups of ``num_rows`` rows in all can need."""
    return -(-num_rows // m) + num_groups


def aligned_rows(num_assignments: int, num_experts: int, align: int) -> int:
    """Return the most rows that groups can take if each begins at a multiple of ``align``; an empty one takes none."""
    return -(-(num_assignments + min(num_experts, num_assignments) * (align - 1)) // align) * align


def schedule(sizes: Tensor, num_rows: int, m: int) -> Schedule:
    """Cut the groups of ``sizes`` (E,) int32, of ``num_rows`` rows at most, into tiles of ``m`` rows."""
    num_groups = sizes.shape[0]
    num_owners = most_tiles(num_rows, num_groups, m)
    starts, firsts, owners = (sizes.new_empty(n) for n in (num_groups, num_groups + 1, num_owners))
    _schedule_kernel[(blocks_of(num_owners, 64),)](
        sizes, starts, firsts, owners, num_groups, num_owners,
        M=m, GROUPS=power_of_two(max(num_groups, 1)), BLOCK=64,
    )  # fmt: skip
    return Schedule(starts, sizes, firsts, owners)


@triton.jit
def place(tile, starts, sizes, firsts, owners, num_n, M: tl.constexpr, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a tile's group, its first row, the end of the group's rows, and its number along the columns."""
    group = tl.load(owners + tile // num_n)
    first = tl.load(firsts + group)
    num_m = tl.load(firsts + group + 1) - first
    local = tile - first * num_n
    band = local // (BAND * num_n)
    height = min(num_m - band * BAND, BAND)
    inside = local - band * BAND * num_n
    start = tl.load(starts + group)
    row = start + (band * BAND + inside % height) * M
    return group, row, start + tl.load(sizes + group), inside // height


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
    """Store (M, N) values to the rows before ``end`` at columns from ``n`` on, by a descriptor of ``described_groups``.

    Without a branch, so that the loads of the next tile can begin; in halves, which take half the shared memory.
    """
    first, second = tl.split(tl.permute(tl.reshape(values, (M, 2, N // 2)), (0, 2, 1)))
    last: tl.constexpr = 0x40000000  # of a group's rows, wherever in memory they end
    place = last + row - end
    out.store([last, end, place, n], first.to(out.dtype).reshape(1, 1, M, N // 2))
    out.store([last, end, place, n + N // 2], second.to(out.dtype).reshape(1, 1, M, N // 2))


def has_tma(*tensors: Tensor) -> bool:
    """Say whether the card has tensor descriptors, and these tensors may have one.

    A tensor may whose every step is of whole 16 bytes, but for that of one axis, whose entries are next to each other.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return all(map(_may_be_described, tensors))


def _may_be_described(tensor: Tensor) -> bool:
    size = tensor.element_size()
    return (
        [stride for stride in tensor.stride() if stride * size % 16] == [1]
        and tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
    )


def is_whole(columns: int, dtype: torch.dtype) -> bool:
    """Say whether a descriptor may be read from this column on: whether what lies before it is of whole 16 bytes."""
    return columns * dtype.itemsize % 16 == 0


def described(tensor: Tensor, block: tuple[int, ...], tma: bool) -> Any:
    """Return a descriptor of the tensor's blocks, or the tensor where there are none."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor


def described_groups(tensor: Tensor, tile: Tile, tma: bool) -> Any:
    """Return a descriptor by which ``store_group`` writes up to the end of a group and not beyond, or the tensor."""
    return create_ragged_descriptor(tensor, [tile.m, tile.n // 2]) if tma else tensor


def is_transposed(w: Tensor) -> bool:
    """Say whether matrices (E, K, N) lie in memory as (E, N, K)."""
    return w.stride(2) != 1


def described_weight(w: Tensor, tile: Tile, tma: bool) -> Any:
    """Return a descriptor of (K, N) blocks of matrices (E, K, N), as they lie in memory, or the tensor."""
    if not tma:
        return w
    (experts, depth, width), (batch, _, step) = w.shape, w.stride()
    if is_transposed(w):
        return TensorDescriptor(w, [experts, width, depth], [batch, step, 1], [1, tile.n, tile.k])
    return described(w, (1, tile.k, tile.n), True)


def steps(w: Tensor) -> tuple[int, int]:
    """Return how far apart matrices (E, K, N) are, and their rows in memory."""
    batch, row, column = w.stride()
    return batch, column if is_transposed(w) else row


def programs(device: torch.device) -> int:
    """Return how many programs fill the device when each takes a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
