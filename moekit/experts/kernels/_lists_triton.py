"""Moving rows of routings that are no (T, K): a token has the list of its assignments, and each a row."""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit._rows_triton import clear_padding, rows_in_groups
from moekit.experts.kernels._tiles_triton import Schedule
from moekit.operators import blocks_of, power_of_two


class TokenLists(NamedTuple):
    """Which assignments a token has, in their order.

    Attributes:
        order: (N,) int64, assignments by token; those that do not exist come last.
        starts: (T + 1,) int64, where each token's begin in ``order``, and where the last token's end.
    """

    order: Tensor
    starts: Tensor


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    x,
    rows,
    assignments,
    order,
    starts,
    groups,
    out,
    num_tokens,
    num_groups,
    dim,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if program < num_tokens:
        values = tl.load(x + program * dim + columns, mask=columns < dim, other=0.0)
        last = tl.load(starts + program + 1)
        for place in range(tl.load(starts + program), last, UNROLL):
            for i in tl.static_range(UNROLL):
                assignment = tl.load(order + place + i, mask=place + i < last, other=-1)
                row = tl.load(rows + assignment, mask=assignment >= 0, other=-1)
                tl.store(out + row * dim + columns, values, mask=columns < tl.where(row >= 0, dim, 0))
    clear_padding(out, assignments, program, columns, rows_in_groups(groups, num_groups), dim, True, ROWS, BLOCK)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    values,
    rows,
    weights,
    order,
    starts,
    out,
    dim,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(starts + token + 1)
    sums = tl.zeros((BLOCK,), tl.float32)
    for place in range(tl.load(starts + token), last, UNROLL):
        for i in tl.static_range(UNROLL):
            assignment = tl.load(order + place + i, mask=place + i < last, other=-1)
            row = tl.load(rows + assignment, mask=assignment >= 0, other=-1)
            here = columns < tl.where(row >= 0, dim, 0)
            found = tl.load(values + row * dim + columns, mask=here, other=0.0).to(tl.float32)
            if weights is not None:
                found *= tl.load(weights + assignment, mask=assignment >= 0, other=0.0)
            sums += found
    tl.store(out + token * dim + columns, sums.to(out.dtype.element_ty), mask=columns < dim)


def copied(x: Tensor, rows: Tensor, assignments: Tensor, lists: TokenLists, schedule: Schedule) -> Tensor:
    """Copy each token of x (T, D) to the rows (R, D) of its assignments; a group's rows of nobody are zero.

    What lies past the last group is left as it is. No host synchronisation. Deterministic.

    Args:
        x: (T, D).
        rows: (N,) int64, the row of each assignment; one that does not exist is in no list.
        assignments: (R,) int64, the assignment of each row; -1 for a row of nobody.
        lists: of T tokens.
        schedule: of the groups.

    Returns:
        (R, D), the dtype of ``x``.
    """
    (num_tokens, dim), num_rows = x.shape, assignments.shape[0]
    out = x.new_empty(num_rows, dim)
    launch = _copy_launch(num_tokens, num_rows, schedule.num_groups, dim)
    launch(x, rows, assignments, lists.order, lists.starts, schedule.table, out)
    return out


@lru_cache(maxsize=512)
def _copy_launch(num_tokens: int, num_rows: int, num_groups: int, dim: int) -> Launch:
    block, padding = min(1024, power_of_two(dim)), 8  # rows that a program looks through for those of nobody
    grid = (max(num_tokens, blocks_of(num_rows, padding)), blocks_of(dim, block))
    return Launch(
        _copy_kernel, grid, (*[POINTER] * 7, num_tokens, num_groups, dim), UNROLL=4, ROWS=padding, BLOCK=block
    )


def summed(values: Tensor, rows: Tensor, lists: TokenLists, *, weights: Tensor | None) -> Tensor:
    """Add up each token's rows of ``values`` (R, D) in the order of its assignments.

    Sums are taken in float32. No host synchronisation. Deterministic.

    Args:
        values: (R, D).
        rows: (N,) int64, the row of each assignment; one that does not exist is in no list.
        lists: of T tokens.
        weights: (N,) float32, of each assignment, or None.

    Returns:
        (T, D), the dtype of ``values``; zero for a token without rows.
    """
    num_tokens, dim = lists.starts.shape[0] - 1, values.shape[1]
    out = values.new_empty(num_tokens, dim)
    if out.numel():
        given = () if weights is None else (weights,)
        _sum_launch(num_tokens, dim, weights is not None)(values, rows, *given, lists.order, lists.starts, out)
    return out


@lru_cache(maxsize=512)
def _sum_launch(num_tokens: int, dim: int, weighted: bool) -> Launch:
    block = min(1024, power_of_two(dim))
    return Launch(
        _sum_kernel, (num_tokens, blocks_of(dim, block)),
        (POINTER, POINTER, POINTER if weighted else None, POINTER, POINTER, POINTER, dim),
        UNROLL=4, BLOCK=block,
    )  # fmt: skip
