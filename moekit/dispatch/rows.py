"""Moving rows: tokens to grouped rows, and grouped rows back to weighted sums. Each is the other's transpose.

For token choice, (T, K), both directions are gathers: a token's gradient is the sum over its K rows, so nothing is
scattered and nothing needs atomics. Other routings go through ``index_add``, which is also the plainer version that
the tests compare with.
"""

import torch
from torch import Tensor

from moekit.checks import check_rows
from moekit.operators import is_transformed
from moekit.rows import Links, copy_rows, differentiable, summed, weighed_back
from moekit.segments import rows_of_assignments
from moekit.types import DispatchPlan, Routing


def gather_rows(x: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Copy each token to the rows that the plan gives its assignments. Padding rows are zero.

    No host synchronisation. Deterministic on CUDA for token choice (T, K); other routings, and every one in a transform
    of ``torch.func``, add gradients with ``index_add``, in the dtype of ``x`` and on CUDA in an order that varies.

    Args:
        x: (T, D).
        routing: over T tokens.
        plan: of R rows.

    Returns:
        (R, D), the dtype of ``x``.

    Raises:
        ValueError: if ``x`` is not (T, D) with the routing's T.

    Example:
        >>> from moekit.dispatch import dropless_plan
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(3, 2), k=1)
        >>> gather_rows(torch.tensor([[0.0], [1.0], [2.0]]), routing, dropless_plan(routing)).flatten()
        tensor([0., 2., 1.])
    """
    check_rows("gather_rows: x", x, routing.num_tokens, "T, the tokens of the routing", made=_MADE)
    if routing.expert_indices.ndim == 2 and not is_transformed():
        return copy_rows(x, _links(routing, plan))
    return gather_rows_by_index(x, routing, plan)


def scatter_rows(rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Sum each token's rows, weighted by the router. What padding rows hold is never read, NaN included.

    A token all of whose assignments were dropped gets zero. Sums are taken in float32 (float64 for float64 rows).

    No host synchronisation. Deterministic on CUDA for token choice (T, K); other routings, and every one in a transform
    of ``torch.func``, use ``index_add``, whose order on CUDA varies.

    Args:
        rows: (R, D), the experts' output.
        routing: over T tokens.
        plan: of R rows.

    Returns:
        (T, D), the dtype of ``rows``.

    Raises:
        ValueError: if ``rows`` is not (R, D) with the plan's R.

    Example:
        >>> from moekit.dispatch import dropless_plan
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(2, 2), k=2, normalize=True)
        >>> scatter_rows(torch.ones(4, 1), routing, dropless_plan(routing)).flatten()
        tensor([1., 1.])
    """
    check_rows("scatter_rows: rows", rows, plan.assignments.shape[0], "R, the rows of the plan", made=_MADE)
    if routing.expert_indices.ndim == 2 and not is_transformed():
        return _WeighRows.apply(rows, routing.weights, *_links(routing, plan), plan.assignments)
    return scatter_rows_by_index(rows, routing, plan)


def gather_rows_by_index(x: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Do what ``gather_rows`` does, for any routing, leaving the gradient to autograd's ``index_add``.

    No host synchronisation. On CUDA the order of the gradient's sums varies. Sizes are not checked.

    Args:
        x: (T, D).
        routing: over T tokens.
        plan: of R rows.

    Returns:
        (R, D), the dtype of ``x``; padding rows are zero.

    Example:
        >>> from moekit.dispatch import dropless_plan
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(3, 2), k=1)
        >>> gather_rows_by_index(torch.tensor([[0.0], [1.0], [2.0]]), routing, dropless_plan(routing)).flatten()
        tensor([0., 2., 1.])
    """
    tokens, padding = _tokens_of_rows(routing, plan)
    if routing.num_tokens == 0:
        return x.sum(0, keepdim=True).expand(tokens.shape[0], -1)  # zeros, still connected to x
    return x.index_select(0, tokens).masked_fill(padding.unsqueeze(1), 0.0)


def scatter_rows_by_index(rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """Do what ``scatter_rows`` does, for any routing, with one ``index_add``.

    No host synchronisation. On CUDA the order of the sums varies. Sizes are not checked.

    Args:
        rows: (R, D), the experts' output; what padding rows hold is never read, NaN included.
        routing: over T tokens.
        plan: of R rows.

    Returns:
        (T, D), the dtype of ``rows``; sums are taken in float32 (float64 for float64 rows).

    Example:
        >>> from moekit.dispatch import dropless_plan
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(2, 2), k=2, normalize=True)
        >>> scatter_rows_by_index(torch.ones(4, 1), routing, dropless_plan(routing)).flatten()
        tensor([1., 1.])
    """
    tokens, padding = _tokens_of_rows(routing, plan)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if routing.num_tokens == 0:
        return rows[:0] + routing.weights.sum().to(rows.dtype)  # still connected to both
    if routing.weights.numel() == 0:  # padding rows alone
        return (rows[:0].sum(0) + routing.weights.sum().to(rows.dtype)).expand(routing.num_tokens, -1)
    weights = weights_of_rows(routing, plan).to(dtype)
    # Masked before it is multiplied: 0 * NaN would reach the router's gradient.
    clean = rows.to(dtype).masked_fill(padding.unsqueeze(1), 0.0)
    sums = torch.zeros(routing.num_tokens, rows.shape[1], dtype=dtype, device=rows.device)
    return sums.index_add(0, tokens, clean * weights.unsqueeze(1)).to(rows.dtype)


def weights_of_rows(routing: Routing, plan: DispatchPlan) -> Tensor:
    """Take each row's weight; that of padding is zero, whatever the weights are.

    Args:
        routing: any.
        plan: of R rows.

    Returns:
        (R,), the dtype of the weights.

    Example:
        >>> from moekit.dispatch import padded_plan
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(2, 2), k=1)
        >>> weights_of_rows(routing, padded_plan(routing, capacity_factor=2.0))
        tensor([0.5000, 0.0000, 0.5000, 0.0000])
    """
    padding = plan.assignments < 0
    weights = routing.weights.flatten()
    if weights.shape[0] == 0:
        return weights.sum().expand(padding.shape)  # zeros, still connected to the router
    # Masked last, so that what a padding row's gradient holds, NaN included, goes no further; and spread, since
    # padding rows that all read one weight would serialise the backward on it.
    spread = torch.arange(padding.shape[0], device=padding.device) % weights.shape[0]
    return weights.index_select(0, torch.where(padding, spread, plan.assignments)).masked_fill(padding, 0.0)


class _WeighRows(torch.autograd.Function):
    """(R, D), (T, K) -> (T, D) for token choice; its backward copies a token's gradient to its rows."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, weights: Tensor, tokens: Tensor, padding: Tensor, rows_of_token: Tensor, assignments: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, tokens, padding, rows_of_token, assignments)
        return summed(rows, rows_of_token, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        rows, weights, tokens, padding, rows_of_token, assignments = ctx.saved_tensors
        links = Links(tokens, padding, rows_of_token)
        grad_rows, grad_weights = weighed_back(
            grad, rows, weights, links=links, assignments=assignments, again=differentiable()
        )
        return grad_rows, grad_weights, None, None, None, None


def _tokens_of_rows(routing: Routing, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    padding = plan.assignments < 0  # (R,)
    spread = torch.arange(padding.shape[0], device=padding.device) % max(routing.num_tokens, 1)
    if routing.num_tokens == 0 or routing.token_indices.numel() == 0:
        return spread, padding
    tokens = routing.token_indices.flatten().index_select(0, plan.assignments.clamp_min(0))
    # Padding rows that all read one token would serialise the backward on that token.
    return torch.where(padding, spread, tokens), padding


def _links(routing: Routing, plan: DispatchPlan) -> Links:
    tokens, padding = _tokens_of_rows(routing, plan)
    experts = routing.expert_indices  # whose shape's numel() would be a constant of an exported program
    return Links(tokens, padding, rows_of_assignments(plan.assignments, experts.numel()).view(experts.shape))


_MADE = "this routing and this plan were"
