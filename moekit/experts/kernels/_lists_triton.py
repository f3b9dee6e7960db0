"""Moving rows of routings that are no (T, K): a row knows its token, and a token the list of its assignments."""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit._rows_triton import rows_in_groups
from moekit.experts.kernels._tiles_triton import Schedule
from moekit.operators import blocks_of, power_of_two


class TokenLists(NamedTuple):
    """Which assignments a token has, in their order.

    Attributes:
        tokens: (N,) int64, of each assignment.
        order: (N,) int64, assignments by token; those that do not exist come last.
        starts: (T + 1,) int64, where each token's begin in ``order``, and where the last token's end.
    """

    tokens: Tensor
    order: Tensor
    starts: Tensor


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    x, tokens, assignments, groups, out, num_groups, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < rows_in_groups(groups, num_groups)
    assignment = tl.load(assignments + rows, mask=inside, other=-1)
    real = assignment >= 0
    token = tl.load(tokens + assignment, mask=real, other=0)
    here = (columns < dim)[None, :]
    found = tl.load(x + token[:, None] * dim + columns[None, :], mask=real[:, None] & here, other=0.0)
    tl.store(out + rows[:, None] * dim + columns[None, :], found, mask=inside[:, None] & here)


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


def copied(x: Tensor, tokens: Tensor, assignments: Tensor, schedule: Schedule) -> Tensor:
    """Copy the tokens x (T, D) of assignments, ``tokens`` (N,), to their rows (R, D); a group's rows of -1 are zero.

    What lies past the last group is left as it is.
    """
    num_rows, dim = assignments.shape[0], x.shape[1]
    out = x.new_empty(num_rows, dim)
    _copy_launch(num_rows, schedule.num_groups, dim)(x, tokens, assignments, schedule.table, out)
    return out


@lru_cache(maxsize=512)
def _copy_launch(num_rows: int, num_groups: int, dim: int) -> Launch:
    block = min(1024, power_of_two(dim))
    grid = (blocks_of(num_rows, 4), blocks_of(dim, block))
    return Launch(_copy_kernel, grid, (*[POINTER] * 5, num_groups, dim), ROWS=4, BLOCK=block)


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
