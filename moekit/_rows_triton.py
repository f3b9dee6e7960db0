"""Copying and adding up rows as Triton kernels, all of them token by token.

A program reads a token once and writes all its copies, or reads all its copies and writes it once, so that no row of
(T, D) is fetched K times. Nothing is added in memory: no atomics, and the same bits each time.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit.operators import blocks_of, operator, power_of_two


@triton.jit
def _place(dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a program's block of tokens and its columns; programs beside each other move what lies side by side."""
    program, num_blocks = tl.program_id(0), tl.cdiv(dim, BLOCK)
    return (program // num_blocks).to(tl.int64), program % num_blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def clear_padding(  # type: ignore[no-untyped-def]
    out, padding, block, columns, num_rows, dim, NEGATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write zeros to those of a program's ROWS rows that are padding."""
    rows = block * ROWS + tl.arange(0, ROWS)
    found = tl.load(padding + rows, mask=rows < num_rows, other=0)
    unused = found < 0 if NEGATIVE else found != 0
    if tl.max(unused.to(tl.int32), 0) > 0:
        places = rows[:, None] * dim + columns[None, :]
        zeros = tl.zeros((ROWS, BLOCK), out.dtype.element_ty)
        tl.store(out + places, zeros, mask=unused[:, None] & (columns < dim)[None, :])


@triton.jit
def rows_in_groups(groups, num_groups):  # type: ignore[no-untyped-def]
    """Return where the last of E groups ends, of a table of their E first rows and E sizes."""
    return tl.load(groups + num_groups - 1) + tl.load(groups + 2 * num_groups - 1)


@triton.jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    x,
    rows,
    padding,
    groups,
    out,
    num_tokens,
    num_rows,
    num_groups,
    dim,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    TOKENS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, columns = _place(dim, BLOCK)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    inside = (tokens < num_tokens)[:, None] & (columns < dim)[None, :]
    values = tl.load(x + tokens[:, None] * dim + columns[None, :], mask=inside, other=0.0)
    for start in range(0, K, UNROLL):
        for i in tl.static_range(UNROLL):
            here = (tokens < num_tokens) & (start + i < K)
            row = tl.load(rows + tokens * K + start + i, mask=here, other=-1)
            places = row[:, None] * dim + columns[None, :]
            tl.store(out + places, values, mask=(row >= 0)[:, None] & (columns < dim)[None, :])
    if groups is not None:
        num_rows = rows_in_groups(groups, num_groups)
    clear_padding(out, padding, block, columns, num_rows, dim, NEGATIVE, ROWS, BLOCK)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    values,
    rows,
    weights,
    out,
    num_tokens,
    dim,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    block, columns = _place(dim, BLOCK)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, BLOCK), SUM)
    for start in range(0, K, UNROLL):
        for i in tl.static_range(UNROLL):
            here = (tokens < num_tokens) & (start + i < K)
            row = tl.load(rows + tokens * K + start + i, mask=here, other=-1)
            places = row[:, None] * dim + columns[None, :]
            found = tl.load(values + places, mask=(row >= 0)[:, None] & (columns < dim)[None, :], other=0.0).to(SUM)
            if weights is not None:
                weight = tl.load(weights + tokens * K + start + i, mask=row >= 0, other=0.0).to(SUM)
                found *= weight[:, None]
            sums += found
    inside = (tokens < num_tokens)[:, None] & (columns < dim)[None, :]
    tl.store(out + tokens[:, None] * dim + columns[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weigh_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    values,
    rows,
    weights,
    padding,
    grad_values,
    grad_weights,
    num_tokens,
    num_rows,
    dim,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    k = tl.where(token < num_tokens, K, 0)  # a program past the last token has padding to clear alone
    for start in range(0, k, UNROLL):
        choices = start + tl.arange(0, UNROLL)
        row = tl.load(rows + token * K + choices, mask=choices < K, other=-1)
        real = row >= 0
        weight = tl.load(weights + token * K + choices, mask=real, other=0.0).to(SUM)
        products = tl.zeros((UNROLL, BLOCK), SUM)
        for first in range(0, dim, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = real[:, None] & (columns < dim)[None, :]
            places = row[:, None] * dim + columns[None, :]
            of_token = tl.load(grad + token * dim + columns, mask=columns < dim, other=0.0).to(SUM)[None, :]
            products += tl.load(values + places, mask=inside, other=0.0).to(SUM) * of_token
            tl.store(grad_values + places, (weight[:, None] * of_token).to(grad_values.dtype.element_ty), mask=inside)
        # Masked once more: a missing row is 0 * grad, and that of an infinite gradient is NaN.
        sums = tl.where(real, tl.sum(products, 1), 0.0).to(grad_weights.dtype.element_ty)
        tl.store(grad_weights + token * K + choices, sums, mask=choices < K)
    for first in range(0, dim, BLOCK):
        clear_padding(grad_values, padding, token, first + tl.arange(0, BLOCK), num_rows, dim, False, ROWS, BLOCK)


class _Tile(NamedTuple):
    """What one program works on.

    Attributes:
        tokens: at a time.
        columns: of D at a time, a power of two.
        unroll: choices whose loads are in flight together, a power of two.
        warps: of the program.
    """

    tokens: int
    columns: int
    unroll: int
    warps: int


_ROWS = 8  # rows that a program looks through for padding


def _tile(dim: int, k: int, dtype: torch.dtype) -> _Tile:
    """Choose by shape class: columns without a remainder if D allows, 16 bytes a thread and load."""
    per_warp = 32 * 16 // dtype.itemsize
    columns = min(power_of_two(max(dim, 1)), 1024)
    while columns > per_warp and dim % columns:
        columns //= 2
    return _Tile(
        tokens=max(1, min(1024 // columns, 4)),
        columns=columns,
        unroll=min(8, power_of_two(max(k, 1))),
        warps=max(1, min(2, columns // per_warp)),
    )


def _sum_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache(maxsize=512)
def _copy_launch(
    num_tokens: int, k: int, num_rows: int, num_groups: int, dim: int, dtype: torch.dtype, negative: bool
) -> Launch:
    tile = _tile(dim, k, dtype)
    programs = max(blocks_of(num_tokens, tile.tokens), blocks_of(num_rows, _ROWS))
    pointers = (*(3 * (POINTER,)), POINTER if num_groups else None, POINTER)
    return Launch(
        _copy_kernel, (programs * blocks_of(dim, tile.columns),), (*pointers, num_tokens, num_rows, num_groups, dim),
        K=k, UNROLL=tile.unroll, TOKENS=tile.tokens, NEGATIVE=negative, ROWS=_ROWS, BLOCK=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _sum_launch(num_tokens: int, k: int, dim: int, dtype: torch.dtype, weighted: bool) -> Launch:
    tile = _tile(dim, k, dtype)
    return Launch(
        _sum_kernel, (blocks_of(num_tokens, tile.tokens) * blocks_of(dim, tile.columns),),
        (POINTER, POINTER, POINTER if weighted else None, POINTER, num_tokens, dim),
        K=k, UNROLL=tile.unroll, TOKENS=tile.tokens, BLOCK=tile.columns, SUM=_sum_dtype(dtype), num_warps=tile.warps,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _weigh_backward_launch(num_tokens: int, k: int, num_rows: int, dim: int, dtype: torch.dtype) -> Launch:
    tile = _tile(dim, k, dtype)
    return Launch(
        _weigh_backward_kernel, (max(num_tokens, blocks_of(num_rows, _ROWS)),),
        (*(7 * (POINTER,)), num_tokens, num_rows, dim), K=k, UNROLL=tile.unroll, ROWS=_ROWS, BLOCK=tile.columns,
        SUM=_sum_dtype(dtype), num_warps=tile.warps,
    )  # fmt: skip


def copy(x: Tensor, rows: Tensor, padding: Tensor, groups: Tensor | None = None, num_groups: int = 0) -> Tensor:
    """Copy each token of x (T, D) to its ``rows`` (T, K), -1 for none; rows of padding are zero.

    No host synchronisation. Deterministic.

    Args:
        x: (T, D), contiguous.
        rows: (T, K) int64, contiguous.
        padding: (R,), contiguous: bool, true for a row of padding; or int64, -1 for one.
        groups: int32, the first rows of E groups, their sizes, and anything; rows past the last group are then left as
            they are, whatever lies in that memory. None fills all padding.
        num_groups: E.

    Returns:
        (R, D), the dtype of ``x``. Every row is either some token's or padding.
    """
    (num_tokens, dim), k, num_rows = x.shape, rows.shape[1], padding.shape[0]
    out = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    if num_rows and dim:
        launch = _copy_launch(num_tokens, k, num_rows, num_groups, dim, x.dtype, padding.dtype == torch.int64)
        launch(x, rows, padding, *(() if groups is None else (groups,)), out)
    return out


def add_up(values: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Add up each token's ``rows`` (T, K), -1 for none, of ``values`` (R, D), with ``weights`` (T, K) if given.

    All contiguous. Sums are taken in float32 (float64 for float64 rows). No host synchronisation. Deterministic.

    Returns:
        (T, D), the dtype of ``values``; zero for a token without rows.
    """
    (num_tokens, k), dim = rows.shape, values.shape[1]
    out = torch.empty(num_tokens, dim, dtype=values.dtype, device=values.device)
    if num_tokens and dim:
        launch = _sum_launch(num_tokens, k, dim, values.dtype, weights is not None)
        launch(values, rows, *(() if weights is None else (weights,)), out)
    return out


def _copied_rows_fake(x: Tensor, rows: Tensor, padding: Tensor) -> Tensor:
    return x.new_empty(padding.shape[0], x.shape[1])


@operator("copied_rows", _copied_rows_fake)
def copied(x: Tensor, rows: Tensor, padding: Tensor) -> Tensor:
    """Do what ``copy`` does, as an operator that compilers leave whole."""
    return copy(x.contiguous(), rows.contiguous(), padding.contiguous())


def _summed_rows_fake(values: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    return values.new_empty(rows.shape[0], values.shape[1])


@operator("summed_rows", _summed_rows_fake)
def summed(values: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Do what ``add_up`` does, as an operator that compilers leave whole."""
    return add_up(values.contiguous(), rows.contiguous(), None if weights is None else weights.contiguous())


def _weigh_rows_backward_fake(
    grad: Tensor, values: Tensor, rows: Tensor, weights: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), weights.new_empty(weights.shape)


@operator("weigh_rows_backward", _weigh_rows_backward_fake)
def weigh_backward(
    grad: Tensor, values: Tensor, rows: Tensor, weights: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weighted sum of rows, in one pass over them.

    That of a row is its weight times the token's gradient; that of a weight is the inner product of both. Padding rows
    are never read. No host synchronisation. Deterministic.

    Args:
        grad: (T, D), of the sums.
        values: (R, D), the rows that were summed.
        rows: (T, K), -1 for none.
        weights: (T, K).
        padding: (R,) bool.

    Returns:
        (R, D), the dtype of ``values``, zero for padding rows; (T, K), the dtype of ``weights``, zero for no row.
    """
    grad, values, rows, weights, padding = (each.contiguous() for each in (grad, values, rows, weights, padding))
    (num_rows, dim), (num_tokens, k) = values.shape, rows.shape
    grad_values, grad_weights = torch.empty_like(values), torch.empty_like(weights)
    if num_tokens or num_rows:
        launch = _weigh_backward_launch(num_tokens, k, num_rows, dim, values.dtype)
        launch(grad, values, rows, weights, padding, grad_values, grad_weights)
    return grad_values, grad_weights
