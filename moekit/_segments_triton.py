"""Counting sort of expert numbers and the integer moves around it, as Triton kernels.

Three kernels sort N assignments of E experts: each block of assignments counts its experts, a scan over the blocks
says how many assignments of an expert lie in earlier blocks, and each block then puts its assignments in place. Only
integers are added, so the result does not depend on the order in which blocks run.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit.operators import blocks_of, operator, power_of_two

# Assignments of a block. The counts of blocks are scratch memory: 32 bytes an assignment at E = 1024, twice that each
# time that E doubles, and half a byte below E = 32.
BLOCK = 256
_SCAN_BINS, _SCAN_BLOCKS = 4, 512  # experts that one program of the scan carries along, and blocks that it adds at once
_INVERTED = 1024  # rows that one program of an inversion writes the places of, or places that one writes of a group


@triton.jit
def keys_of(experts, places, num_assignments, num_experts):  # type: ignore[no-untyped-def]
    """Load expert numbers as int32; E stands for a missing one, and for places past the end."""
    found = tl.load(experts + places, mask=places < num_assignments, other=-1)
    return tl.where(found < 0, num_experts, found).to(tl.int32)


@triton.jit
def _count_kernel(  # type: ignore[no-untyped-def]
    experts, counts, unowned, num_assignments, num_experts, num_rows, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """Count the experts of a block; and fill the block's share of ``unowned`` (num_rows,), if there is one, with -1."""
    block = tl.program_id(0).to(tl.int64)
    keys = keys_of(experts, block * BLOCK + tl.arange(0, BLOCK), num_assignments, num_experts)
    tl.store(counts + block * BINS + tl.arange(0, BINS), tl.histogram(keys, BINS))
    if unowned is not None:
        for start in range(tl.program_id(0) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
            rows = start + tl.arange(0, BLOCK)
            tl.store(unowned + rows, tl.full((BLOCK,), -1, tl.int64), mask=rows < num_rows)


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    counts, totals, sizes, num_blocks, num_experts, BINS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """Replace counts (blocks, BINS) by those of all earlier blocks, in place; write the sums over all.

    They go to ``totals`` (BINS,), and those of experts to ``sizes`` (E,) as well, if there is one.
    """
    bins = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    carried = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, num_blocks, ROWS):
        blocks = (start + tl.arange(0, ROWS)).to(tl.int64)
        places = counts + blocks[:, None] * BINS + bins[None, :]
        found = tl.load(places, mask=blocks[:, None] < num_blocks, other=0)
        earlier = tl.cumsum(found, 0) - found + carried[None, :]
        tl.store(places, earlier, mask=blocks[:, None] < num_blocks)
        carried += tl.sum(found, 0)
    tl.store(totals + bins, carried)
    if sizes is not None:
        tl.store(sizes + bins, carried.to(tl.int64), mask=bins < num_experts)


@triton.jit
def sorted_block(  # type: ignore[no-untyped-def]
    experts, earlier, begins, block, num_assignments, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """Sort a block's assignments by expert, stably; the groups of all blocks together begin at ``begins`` (BINS,).

    The block must have at least one assignment, for the counts of any other are not there.

    Returns the places of the assignments, which may be past the end, their experts, and their rows.
    """
    bins, local = tl.arange(0, BINS), tl.arange(0, BLOCK)
    keys = keys_of(experts, block * BLOCK + local, num_assignments, num_experts)
    sizes = tl.histogram(keys, BINS)
    # A row is where the block's share of the group begins, and how many of the block's share come before.
    bases = begins + tl.load(earlier + block * BINS + bins) - (tl.cumsum(sizes, 0) - sizes)
    ordered = tl.sort(keys * BLOCK + local)
    keys = ordered // BLOCK
    return block * BLOCK + ordered % BLOCK, keys, tl.gather(bases, keys, 0) + local


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    experts,
    earlier,
    totals,
    order,
    rows,
    num_assignments,
    num_experts,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    sizes = tl.load(totals + tl.arange(0, BINS))
    begins = tl.cumsum(sizes, 0) - sizes
    places, keys, targets = sorted_block(experts, earlier, begins, block, num_assignments, num_experts, BLOCK, BINS)
    real = places < num_assignments
    tl.store(order + targets, places, mask=real)
    tl.store(rows + places, tl.where(keys < num_experts, targets, -1).to(tl.int64), mask=real)


@triton.jit
def _invert_kernel(assignments, rows, num_rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    targets = tl.load(assignments + places, mask=places < num_rows, other=-1)
    tl.store(rows + targets, places, mask=targets >= 0)


@triton.jit
def _first_kernel(  # type: ignore[no-untyped-def]
    order, sizes, firsts, number, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a block of the ``number`` places of a group, of which there are no more than BINS."""
    group, bins = tl.program_id(0), tl.arange(0, BINS)
    begin = tl.sum(tl.load(sizes + bins, mask=bins < group, other=0))
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(order + begin + slots, mask=slots < tl.minimum(tl.load(sizes + group), number), other=-1)
    tl.store(firsts + group.to(tl.int64) * number + slots, found, mask=slots < number)


@lru_cache(maxsize=512)
def _count_launch(num_assignments: int, num_experts: int, bins: int, num_rows: int | None) -> Launch:
    """Decide the counting kernel; ``num_rows`` of None is that nothing is filled."""
    unowned = None if num_rows is None else POINTER
    return Launch(
        _count_kernel,
        (blocks_of(num_assignments, BLOCK),),
        (POINTER, POINTER, unowned, num_assignments, num_experts, num_rows or 0),
        BLOCK=BLOCK,
        BINS=bins,
    )


@lru_cache(maxsize=512)
def _scan_launch(num_blocks: int, num_experts: int, bins: int, sized: bool) -> Launch:
    return Launch(
        _scan_kernel,
        (bins // _SCAN_BINS,),
        (POINTER, POINTER, POINTER if sized else None, num_blocks, num_experts),
        BINS=bins,
        COLUMNS=_SCAN_BINS,
        ROWS=_SCAN_BLOCKS,
    )


@lru_cache(maxsize=512)
def _place_launch(num_assignments: int, num_experts: int, bins: int) -> Launch:
    return Launch(
        _place_kernel,
        (blocks_of(num_assignments, BLOCK),),
        (POINTER, POINTER, POINTER, POINTER, POINTER, num_assignments, num_experts),
        BLOCK=BLOCK,
        BINS=bins,
    )


@lru_cache(maxsize=512)
def _invert_launch(num_rows: int) -> Launch:
    grid = (blocks_of(num_rows, _INVERTED),)
    return Launch(_invert_kernel, grid, (POINTER, POINTER, num_rows), BLOCK=_INVERTED)


@lru_cache(maxsize=512)
def _first_launch(num_groups: int, number: int) -> Launch:
    return Launch(
        _first_kernel,
        (num_groups, blocks_of(number, _INVERTED)),
        (POINTER, POINTER, POINTER, number),
        BINS=power_of_two(num_groups),
        BLOCK=_INVERTED,
    )


def counted_blocks(
    experts: Tensor, num_experts: int, *, unowned: Tensor | None = None, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count the experts of each block of ``BLOCK`` assignments and of all, and fill what a plan fills with -1.

    No host synchronisation. Deterministic.

    Args:
        experts: (N,) int64 in [0, E), or -1, contiguous.
        num_experts: E.
        unowned: (R,) int64, contiguous, R < 2^30, or None; every entry becomes -1, before what is launched next.
        sizes: (E,) int64, contiguous, or None; becomes the number of assignments of each expert.

    Returns:
        earlier (blocks, BINS) int32, the counts of all earlier blocks, and totals (BINS,) int32, those of all; entry E
        counts the missing assignments, and the places past the end.
    """
    num_assignments = experts.shape[0]
    bins = max(32, power_of_two(num_experts + 1))
    num_blocks = blocks_of(num_assignments, BLOCK)
    earlier = torch.empty(num_blocks, bins, dtype=torch.int32, device=experts.device)
    totals = torch.empty(bins, dtype=torch.int32, device=experts.device)
    if num_blocks == 0:
        if unowned is not None:
            unowned.fill_(-1)
    elif unowned is None:
        _count_launch(num_assignments, num_experts, bins, None)(experts, earlier)
    else:
        _count_launch(num_assignments, num_experts, bins, unowned.shape[0])(experts, earlier, unowned)
    scan = _scan_launch(num_blocks, num_experts, bins, sizes is not None)
    if sizes is None:
        scan(earlier, totals)
    else:
        scan(earlier, totals, sizes)
    return earlier, totals


def counted(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``earlier`` and ``totals`` of ``counted_blocks``, which is for who needs no more, and sizes (E,) int64."""
    sizes = torch.empty(num_experts, dtype=torch.int64, device=experts.device)
    return *counted_blocks(experts, num_experts, sizes=sizes), sizes


def _counting_sort_fake(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return experts.new_empty(experts.shape), experts.new_empty(num_experts), experts.new_empty(experts.shape)


@operator("counting_sort", _counting_sort_fake)
def counting_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order assignments by expert, stable within an expert, those that do not exist last; and invert the order.

    No host synchronisation. Deterministic.

    Args:
        experts: (N,) int64 in [0, E), or -1; N < 2^31.
        num_experts: E.

    Returns:
        order (N,) int64; sizes (E,) int64; rows (N,) int64, the place of each assignment in ``order``, -1 for one that
        does not exist.
    """
    experts = experts.contiguous()
    num_assignments = experts.shape[0]
    order, rows = torch.empty_like(experts), torch.empty_like(experts)
    earlier, totals, sizes = counted(experts, num_experts)
    if num_assignments:
        _place_launch(num_assignments, num_experts, earlier.shape[1])(experts, earlier, totals, order, rows)
    return order, sizes, rows


def _tokens_per_expert_fake(experts: Tensor, num_experts: int) -> Tensor:
    return experts.new_empty(num_experts)


@operator("tokens_per_expert", _tokens_per_expert_fake)
def tokens_per_expert(experts: Tensor, num_experts: int) -> Tensor:
    """Count the assignments of each expert: (N,) int64 to (E,) int64; as ``counting_sort``, without the order."""
    return counted(experts.contiguous(), num_experts)[2]


def _first_of_groups_fake(order: Tensor, sizes: Tensor, number: int) -> Tensor:
    return order.new_empty(sizes.shape[0] * number)


@operator("first_of_groups", _first_of_groups_fake)
def first_of_groups(order: Tensor, sizes: Tensor, number: int) -> Tensor:
    """Take the first entries of each group: order (N,), sizes (E,), int64, to (E * number,), -1 where it has fewer."""
    firsts = order.new_empty(sizes.shape[0] * number)
    if firsts.shape[0]:
        _first_launch(sizes.shape[0], number)(order.contiguous(), sizes.contiguous(), firsts)
    return firsts


def _rows_of_assignments_fake(assignments: Tensor, num_assignments: int) -> Tensor:
    return assignments.new_empty(num_assignments)


@operator("rows_of_assignments", _rows_of_assignments_fake)
def rows_of_assignments(assignments: Tensor, num_assignments: int) -> Tensor:
    """Invert a plan: (R,) int64 in [0, N), each at most once, or -1, to (N,) int64, -1 without a row."""
    assignments = assignments.contiguous()
    rows = assignments.new_full((num_assignments,), -1)
    num_rows = assignments.shape[0]
    if num_rows:
        _invert_launch(num_rows)(assignments, rows)
    return rows
