"""Copying rows to several places, and adding them up again: the two moves of dispatch and exchange, in both directions.

A token's gradient is the sum over its copies, and the gradient of a sum is a copy to each of its rows: with the links
of both directions at hand each is a gather, so nothing needs atomics, on CUDA either.
There each move is one Triton kernel, where Triton is installed; the versions in torch are what the CPU runs, and what
the kernels are held to.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.operators import HAS_TRITON


class Links(NamedTuple):
    """Which row is a copy of which token.

    Attributes:
        tokens: (R,) int64 in [0, T), the token of each row; anything for a padding row.
        padding: (R,) bool, rows that are no token's.
        rows: (T, k) int64 in [0, R), the rows of each token; -1 where it has fewer than k.
    """

    tokens: Tensor
    padding: Tensor
    rows: Tensor


def copy_rows(x: Tensor, links: Links) -> Tensor:
    """Copy each token to its rows. Padding rows are zero; their gradient is never read, NaN included.

    No host synchronisation. Deterministic on CUDA.

    Args:
        x: (T, D).
        links: between T tokens and R rows.

    Returns:
        (R, D), the dtype of ``x``.

    Example:
        >>> links = Links(torch.tensor([1, 0]), torch.tensor([False, True]), torch.tensor([[-1], [0]]))
        >>> copy_rows(torch.tensor([[1.0], [2.0]]), links).flatten()
        tensor([2., 0.])
    """
    return _CopyRows.apply(x, *links)


def sum_rows(rows: Tensor, links: Links) -> Tensor:
    """Add up each token's rows: the transpose of ``copy_rows``. Padding rows are never read, NaN included.

    Sums are taken in float32 (float64 for float64 rows). No host synchronisation. Deterministic on CUDA.

    Args:
        rows: (R, D).
        links: between T tokens and R rows.

    Returns:
        (T, D), the dtype of ``rows``; zero for a token without rows.

    Example:
        >>> links = Links(torch.tensor([0, 0]), torch.tensor([False, False]), torch.tensor([[0, 1], [-1, -1]]))
        >>> sum_rows(torch.tensor([[1.0], [2.0]]), links).flatten()
        tensor([3., 0.])
    """
    return _SumRows.apply(rows, *links)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, padding: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows)
        return copied(x, tokens, padding, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        sums = sum_rows(grad, _links_of(rows, grad.shape[0])) if differentiable() else summed(grad, rows, None)
        return sums, None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, tokens: Tensor, padding: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens, padding, rows)
        return summed(values, rows, None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        links = Links(*ctx.saved_tensors)
        return copy_rows(grad, links) if differentiable() else copied(grad, *links), None, None, None


def _links_of(rows: Tensor, num_rows: int) -> Links:
    """Return the links of which ``rows`` (T, k) are those of the tokens."""
    tokens = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1).expand_as(rows)
    places = torch.where(rows < 0, num_rows, rows).flatten()  # past the end for rows that there are not
    owners = tokens.new_full((num_rows + 1,), -1).scatter(0, places, tokens.flatten())[:num_rows]
    return Links(owners.clamp_min(0), owners < 0, rows)


def differentiable() -> bool:
    """Say whether a backward is to have a gradient itself, as it is with ``create_graph=True``; compiled code has none.

    Kernels have none, so it then takes functions that do.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def copied(x: Tensor, tokens: Tensor, padding: Tensor, rows: Tensor) -> Tensor:
    """Do what ``copy_rows`` does, without its gradient."""
    if x.is_cuda and HAS_TRITON:
        from moekit import _rows_triton

        return _rows_triton.copied(x, rows, padding)
    if x.shape[0] == 0:
        return x.new_zeros(tokens.shape[0], x.shape[1])
    return cleared(x.index_select(0, tokens), padding.unsqueeze(1))


def summed(values: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """Add up each token's rows of ``values`` (R, D), with ``weights`` (T, k) if given, without a gradient."""
    if values.is_cuda and HAS_TRITON:
        from moekit import _rows_triton

        return _rows_triton.summed(values, rows, weights)
    num_tokens, k = rows.shape
    if values.shape[0] == 0 or rows.numel() == 0:
        return values.new_zeros(num_tokens, values.shape[1])
    missing = rows < 0
    # A missing row reads another row of the same token, with weight zero: never a padding row, which may be NaN. A
    # token without any row is masked at the end.
    index = torch.where(missing, rows.amax(1, keepdim=True), rows).clamp_min(0)
    dtype = torch.promote_types(values.dtype, torch.float32)
    weights = torch.ones_like(index, dtype=dtype) if weights is None else weights.to(dtype)
    weights = weights.masked_fill(missing, 0.0)
    if values.dtype == dtype:
        sums = F.embedding_bag(index, values, mode="sum", per_sample_weights=weights)
    else:  # embedding_bag would round the weights to the rows' dtype
        sums = sum(values.index_select(0, index[:, i]) * weights[:, i : i + 1] for i in range(k))  # type: ignore[assignment]
    return cast(cleared(sums, missing.all(1, keepdim=True)), values.dtype)


def weighed_back(
    grad: Tensor, values: Tensor, weights: Tensor, *, links: Links, assignments: Tensor, again: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``summed(values, links.rows, weights)``: of ``values`` (R, D) and ``weights`` (T, k).

    ``assignments`` (R,) int64 says which of the T * k flattened weights a row has; anything for a padding row, whose
    gradient is zero and which is never read. ``again``: these gradients are to have gradients, which kernels have not.
    """
    if grad.is_cuda and HAS_TRITON and not again:
        from moekit import _rows_triton

        return _rows_triton.weigh_backward(grad, values, links.rows, weights, links.padding)
    copies = copy_rows(grad, links) if again else copied(grad, *links)
    copies = copies.to(torch.promote_types(values.dtype, torch.float32))  # (R, D)
    products = (values * copies).sum(-1)  # (R,): the gradient of a weight is its row times the token's gradient
    chosen = _take(products, links.rows.clamp_min(0))
    grad_weights = chosen.masked_fill(links.rows < 0, 0.0).to(weights.dtype)
    row_weights = _take(weights.flatten(), assignments.clamp_min(0)).masked_fill(links.padding, 0.0)
    factors = row_weights.unsqueeze(1)
    return cast(copies * factors if again else scaled(copies, factors), values.dtype), grad_weights


def _take(values: Tensor, indices: Tensor) -> Tensor:
    """Index a flat tensor, also an empty one, whose indices then all stand for missing entries."""
    return values[indices] if values.shape[0] else values.new_zeros(indices.shape)


# Where torch compiles, neither in place nor cast to what a tensor is already: torch 2.11 takes the gradient of an
# autograd.Function for zero if what its forward or backward returns went through either. Compiled code fuses the rest.


def cleared(x: Tensor, mask: Tensor) -> Tensor:
    """Fill with zero where the mask is true; ``x`` is the caller's own and may be changed."""
    return x.masked_fill(mask, 0.0) if torch.compiler.is_compiling() else x.masked_fill_(mask, 0.0)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply; ``x`` is the caller's own and may be changed."""
    return x * factors if torch.compiler.is_compiling() else x.mul_(factors)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a dtype, if it is another one."""
    return x if x.dtype == dtype else x.to(dtype)
