"""Plans: which assignment each row of the experts' input carries. Integers only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit.checks import check_routing
from moekit.ratios import as_ratio, is_positive, ratio_of
from moekit.segments import first_of_groups, rows_of_assignments, sort_by_expert
from moekit.types import DispatchPlan, Groups, Ratio, Routing

Priority = Callable[[Routing], Tensor]
_TOO_MANY = 2**31  # rows of a padded plan, whose sizes are int32
_DROP_NOTHING = "To drop nothing, use the dropless dispatcher (on the command line: --moe-capacity-factor 0)."


def dropless_plan(routing: Routing) -> DispatchPlan:
    """Give every assignment a row, grouped by expert; R = N, or ``routing.most``, whichever is less.

    Within an expert, rows keep the order of the flattened routing. Assignments that do not exist (-1) leave padding
    rows at the end, past the last group.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any routing.

    Returns:
        DispatchPlan of R rows; ``groups.capacity`` is None.

    Raises:
        ValueError: if the parts of the routing do not fit each other.

    Example:
        >>> from moekit.routing import round_robin
        >>> plan = dropless_plan(round_robin(torch.zeros(3, 2), k=1))
        >>> plan.assignments, plan.groups.sizes
        (tensor([0, 2, 1]), tensor([2, 1], dtype=torch.int32))

    References:
        Gale et al., MegaBlocks, 2022 (dropless MoE), https://arxiv.org/abs/2211.15841
    """
    check_routing("dropless_plan", routing)
    experts = routing.expert_indices.flatten()
    order, sizes = sort_by_expert(experts, routing.num_experts)
    order = order[: routing.most]  # what does not exist comes last
    rows = torch.arange(order.shape[0], device=order.device)
    assignments = torch.where(rows < sizes.sum(), order, -1)
    return DispatchPlan(assignments, Groups(sizes.to(torch.int32), capacity=None))


def by_position(routing: Routing) -> Tensor:
    """Let earlier assignments keep their place: token-major order, as MegaBlocks and OpenLM. Causal.

    No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any routing; its ``positions``, if it has any, say what is earlier.

    Returns:
        (N,) int64, assignments in order of priority.

    Example:
        >>> from moekit.routing import round_robin
        >>> by_position(round_robin(torch.zeros(2, 2), k=2))
        tensor([0, 1, 2, 3])
    """
    if routing.positions is not None:
        return torch.sort(routing.positions.flatten(), stable=True).indices
    return torch.arange(routing.expert_indices.numel(), device=routing.expert_indices.device)


def by_choice(routing: Routing) -> Tensor:
    """Let every token's first choice come before any second choice, as GShard.

    Not causal: a later token's first choice can push out an earlier token's second. No host synchronisation.
    Deterministic on CUDA.

    Args:
        routing: of shape (T, K), choices in falling order.

    Returns:
        (N,) int64, assignments in order of priority.

    Raises:
        ValueError: if the routing is not (T, K).

    Example:
        >>> from moekit.routing import round_robin
        >>> by_choice(round_robin(torch.zeros(2, 2), k=2))
        tensor([0, 2, 1, 3])

    References:
        Lepikhin et al., GShard, 2020, Algorithm 1, https://arxiv.org/abs/2006.16668
    """
    return _first_choices_first(by_position(routing), _choices(routing, "by_choice"))


def by_weight(routing: Routing) -> Tensor:
    """Let tokens with the largest router weight keep their place, first choices before second ones, as V-MoE.

    Not causal: a later token can push out an earlier one. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: of shape (T, K), choices in falling order.

    Returns:
        (N,) int64, assignments in order of priority.

    Raises:
        ValueError: if the routing is not (T, K).

    Example:
        >>> from moekit.routing import top_k
        >>> by_weight(top_k(torch.tensor([[1.0, 0.0], [5.0, 0.0]]), k=1))
        tensor([1, 0])

    References:
        Riquelme et al., Scaling Vision with Sparse Mixture of Experts, 2021, Algorithm 2 (batch prioritized routing,
        scored by the largest weight), https://arxiv.org/abs/2106.05974
    """
    k, order = _choices(routing, "by_weight"), by_position(routing)
    best = routing.weights.detach().amax(dim=-1)  # (T,), over choices on other ranks too
    scores = best.unsqueeze(1).expand(-1, k).flatten()[order]
    return _first_choices_first(order[torch.sort(scores, descending=True, stable=True).indices], k)


def padded_plan(routing: Routing, *, capacity_factor: float | Ratio, priority: Priority = by_position) -> DispatchPlan:
    """Give every expert the same number of rows; assignments beyond it are dropped, missing ones padded. R = E * C.

    C is ``capacity(routing, capacity_factor=...)``. Within an expert, rows are in order of priority.

    Causal with ``by_position`` only. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any routing.
        capacity_factor: > 0; 1 gives room for a perfectly balanced load and no more.
        priority: who keeps a place when an expert is full: ``by_position``, ``by_choice`` or ``by_weight``.

    Returns:
        DispatchPlan of E * C rows; ``groups.capacity`` is C.

    Raises:
        ValueError: if the capacity factor is not a positive, finite number, or makes 2**31 rows or more, the parts of
            the routing do not fit each other, or the priority returns no (N,) int64. That it names each assignment once
            is not looked at.

    Example:
        >>> from moekit.routing import top_k
        >>> routing = top_k(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), k=1)
        >>> padded_plan(routing, capacity_factor=1.0).assignments
        tensor([ 0, -1])

    References:
        Lepikhin et al., GShard, 2020, section 2.2 (expert capacity), https://arxiv.org/abs/2006.16668
    """
    check_routing("padded_plan", routing)
    num_experts, rows_each = routing.num_experts, capacity(routing, capacity_factor=capacity_factor)
    _check_rows(num_experts, rows_each, capacity_factor)
    experts = routing.expert_indices.flatten()
    if priority is by_position and routing.positions is None:  # the order that sorting keeps anyway
        order, sizes = sort_by_expert(experts, num_experts)
    else:
        preferred = priority(routing)
        _check_order(preferred, experts.numel())
        order, sizes = sort_by_expert(experts[preferred], num_experts)
        order = preferred[order]
    groups = Groups(torch.full_like(sizes, rows_each, dtype=torch.int32), rows_each)
    return DispatchPlan(first_of_groups(order, sizes, rows_each), groups)


def _check_rows(num_experts: int, rows_each: int, capacity_factor: float | Ratio) -> None:
    if num_experts * rows_each >= _TOO_MANY:
        raise ValueError(
            f"padded_plan: capacity_factor = {capacity_factor} gives {num_experts} experts {rows_each:,} rows each; "
            f"expected fewer than {_TOO_MANY:,} rows in all. {_DROP_NOTHING}"
        )


def _check_order(preferred: Any, num_assignments: int) -> None:
    fits = isinstance(preferred, Tensor) and preferred.dtype == torch.int64 and preferred.shape == (num_assignments,)
    if not fits:
        given = f"{tuple(preferred.shape)} of {preferred.dtype}" if isinstance(preferred, Tensor) else repr(preferred)
        raise ValueError(
            f"padded_plan: the priority returned {given}; expected ({num_assignments},) of torch.int64, the numbers of "
            f"all assignments in the flattened routing, those that keep their place first: of scores (T, K), "
            f"scores.flatten().argsort(descending=True, stable=True)."
        )


def without_dropped(routing: Routing, plan: DispatchPlan) -> Routing:
    """Return the part of a routing that a plan carries out, for a layer that drops nothing itself.

    Causal if the plan is. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any routing.
        plan: of it.

    Returns:
        The routing with expert -1 and weight 0 for the assignments that have no row in the plan; the pool stays.

    Example:
        >>> from moekit.routing import top_k
        >>> routing = top_k(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), k=1)
        >>> without_dropped(routing, padded_plan(routing, capacity_factor=1.0)).expert_indices
        tensor([[ 0],
                [-1]])
    """
    experts = routing.expert_indices
    dropped = (rows_of_assignments(plan.assignments, experts.numel()) < 0).view(experts.shape)
    return routing._replace(
        expert_indices=experts.masked_fill(dropped, -1), weights=routing.weights.masked_fill(dropped, 0.0)
    )


def capacity(routing: Routing, *, capacity_factor: float | Ratio) -> int:
    """Compute the rows per expert, C = max(1, trunc(cf * K * T / E)), as MegaBlocks and OpenLM do where that is not 0.

    Where it is, they take the largest load, which drops nothing, but has to be read from the device; C is 1 here.

    K * T is ``routing.pool``, the assignments that compete. Other systems round up, to multiples of 4 or 8, or leave K
    out. The factor is taken as the number that was written (``ratio_of``), so 1.1 * 10 is 11.

    Args:
        routing: any routing.
        capacity_factor: > 0.

    Returns:
        C, known without reading the device.

    Raises:
        ValueError: if the capacity factor is not a positive, finite number.

    Example:
        >>> from moekit.routing import round_robin
        >>> capacity(round_robin(torch.zeros(4096, 8), k=2), capacity_factor=1.25)
        1280

    References:
        Fedus et al., Switch Transformers, 2021, equation 3 (for one choice), https://arxiv.org/abs/2101.03961
        Gale et al., MegaBlocks, 2022, whose released code has K in it, https://arxiv.org/abs/2211.15841
    """
    if not is_positive(capacity_factor):
        raise ValueError(f"capacity_factor = {capacity_factor}; expected a positive, finite number. {_DROP_NOTHING}")
    factor, pool = ratio_of(capacity_factor), as_ratio(routing.pool)
    room = factor.numerator * pool.numerator // (factor.denominator * pool.denominator * routing.num_experts)
    return max(1, room)


def _first_choices_first(order: Tensor, k: int) -> Tensor:
    return order[torch.sort(order % k, stable=True).indices]


def _choices(routing: Routing, name: str) -> int:
    """Return K of a routing of shape (T, K)."""
    shape = routing.expert_indices.shape
    if len(shape) != 2:
        raise ValueError(
            f"{name} orders the choices of tokens, but the routing has shape {tuple(shape)}, not (T, K). "
            f"Use by_position for this router."
        )
    return shape[1]
