"""The plan of a fused layer: rows of assignments, and the schedule of tiles, from expert numbers in three kernels.

Groups of rows begin at multiples of what one step of a weight gradient adds up. The first two kernels are those of the
counting sort; the third knows all sizes, and writes where assignments go and which group a tile belongs to.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit._segments_triton import BLOCK, counted_blocks, sorted_block
from moekit.experts.kernels._tiles_triton import Schedule, aligned_rows, most_tiles
from moekit.operators import blocks_of

_COMPARED = 8192  # numbers of groups and of tiles, multiplied, that one program compares to find the tiles' groups


@triton.jit
def _plan_kernel(  # type: ignore[no-untyped-def]
    experts,
    earlier,
    totals,
    rows,
    assignments,
    schedule,
    num_assignments,
    num_experts,
    num_owners,
    ALIGN: tl.constexpr,
    M: tl.constexpr,
    OWNERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    bins = tl.arange(0, BINS)
    found = tl.load(totals + bins)
    whole = tl.where(bins < num_experts, (found + (ALIGN - 1)) // ALIGN * ALIGN, 0)
    begins = tl.cumsum(whole, 0) - whole

    block = tl.program_id(0).to(tl.int64)
    if block * BLOCK < num_assignments:  # there may be more programs: many experts have more tiles than blocks
        places, keys, row = sorted_block(experts, earlier, begins, block, num_assignments, num_experts, BLOCK, BINS)
        row = row.to(tl.int64)
        inside = places < num_assignments
        real = inside & (keys < num_experts)
        tl.store(rows + places, tl.where(real, row, -1), mask=inside)
        tl.store(assignments + row, places, mask=real)

    numbers = tl.program_id(0) * OWNERS + tl.arange(0, OWNERS)
    if tl.program_id(0) * OWNERS < num_owners:
        tiles = (whole + (M - 1)) // M
        last_tiles = tl.cumsum(tiles, 0)
        owner = tl.sum((last_tiles[None, :] <= numbers[:, None]).to(tl.int32), 1)
        tl.store(schedule + 3 * num_experts + 1 + numbers, owner, mask=numbers < num_owners)
        if tl.program_id(0) == 0:
            tl.store(schedule + bins, begins, mask=bins < num_experts)
            tl.store(schedule + num_experts + bins, whole, mask=bins < num_experts)
            tl.store(schedule + 2 * num_experts + bins, last_tiles - tiles, mask=bins <= num_experts)


def make_plan(
    experts: Tensor, num_experts: int, *, height: int, align: int, most: int
) -> tuple[Tensor, Tensor, Schedule]:
    """Sort assignments by expert, stably, into rows whose groups begin at multiples of ``align``.

    No host synchronisation. Deterministic.

    Args:
        experts: (*A) int64 in [0, E), or -1.
        num_experts: E.
        height: of tiles.
        align: of groups.
        most: assignments that exist at most; more than these would get rows that there are not.

    Returns:
        The row of each assignment (*A) int64, -1 for one that does not exist; the assignment of each row (R,)
        int64, -1 for a row of nobody; the schedule, of groups with their last rows of nobody.
    """
    experts = experts.contiguous()
    num_assignments = experts.numel()
    num_rows = aligned_rows(most, num_experts, align)  # at most, for sizes are not read
    num_owners = most_tiles(num_rows, num_experts, height)
    rows, assignments = torch.empty_like(experts), experts.new_empty(num_rows)
    earlier, totals = counted_blocks(experts.view(-1), num_experts, unowned=assignments)
    table = totals.new_empty(3 * num_experts + 1 + num_owners)
    launch = _plan_launch(*earlier.shape, num_assignments, num_experts, num_owners, height, align)
    launch(experts, earlier, totals, rows, assignments, table)
    return rows, assignments, Schedule(table, num_experts)


@lru_cache(maxsize=512)
def _plan_launch(
    num_blocks: int, bins: int, num_assignments: int, num_experts: int, num_owners: int, height: int, align: int
) -> Launch:
    owners = max(1, min(64, _COMPARED // bins))
    return Launch(
        _plan_kernel, (max(num_blocks, blocks_of(num_owners, owners)),),
        (*[POINTER] * 6, num_assignments, num_experts, num_owners),
        ALIGN=align, M=height, OWNERS=owners, BLOCK=BLOCK, BINS=bins,
    )  # fmt: skip
