"""What the grouped GEMM kernels share: the schedule of tiles, and loads and stores of tiles.

A schedule says which group a tile of rows belongs to. It is computed on the device from the sizes of the groups, so
that a launch needs to know an upper bound only: the number of rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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
    _schedule_kernel[(triton.cdiv(num_owners, 64),)](
        sizes, starts, firsts, owners, num_groups, num_owners,
        M=m, GROUPS=triton.next_power_of_2(max(num_groups, 1)), BLOCK=64,
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
    w, group, k, n, depth, width, K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr
):
    """Load (K, N) of a group's matrix, which is (depth, width) in memory, or (width, depth) if ``TRANSPOSED``."""
    if TMA:
        if TRANSPOSED:
            return w.load([group, n, k]).reshape(N, K).T
        else:
            return w.load([group, k, n]).reshape(K, N)
    else:
        ks, ns = k + tl.arange(0, K), n + tl.arange(0, N)
        start = group.to(tl.int64) * depth * width
        places = ns[None, :] * depth + ks[:, None] if TRANSPOSED else ks[:, None] * width + ns[None, :]
        return tl.load(w + start + places, mask=(ks < depth)[:, None] & (ns < width)[None, :], other=0.0)


@triton.jit
def store_rows(out, values, row, end, n, width, stride, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store (M, N) values to the rows before ``end`` and the columns before ``width`` of ``out`` (R, stride)."""
    rows, columns = row + tl.arange(0, M), n + tl.arange(0, N)
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < width)[None, :])


def has_tma(*tensors: Tensor) -> bool:
    """Say whether the card has tensor descriptors, and these tensors may have one: rows of whole 16 bytes."""
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return all(t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.numel() for t in tensors)


def described(tensor: Tensor, block: tuple[int, ...], tma: bool) -> Any:
    """Return a descriptor of the tensor's blocks, or the tensor where there are none."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor


def programs(device: torch.device) -> int:
    """Return how many programs fill the device when each takes a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
