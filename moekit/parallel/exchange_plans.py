"""Which token travels to which rank: integers alone, computed without reading the device.

Rank p of P owns the experts p * E / P to (p + 1) * E / P - 1. A token travels once to every rank that owns at least one
of its experts, however many of them it owns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.parallel.layouts import experts_per_rank
from moekit.rows import Links
from moekit.segments import exclusive_cumsum, rows_of_assignments, sort_by_expert, tokens_per_expert
from moekit.types import Routing


class ExchangePlan(NamedTuple):
    """The rows that travel, one per distinct (rank, token) pair, ordered by rank, then by token.

    Attributes:
        owners: (N,) int64 in [0, P), the rank that each assignment of the flattened routing goes to; -1 for none.
        rows: (N,) int64, the row that carries each assignment's token; -1 for none.
        firsts: (N,) bool, whether an assignment is the first on its row.
        sizes: (P,) int64, the rows for each rank.
        counts: (P,) int64, the assignments for each rank.
    """

    owners: Tensor
    rows: Tensor
    firsts: Tensor
    sizes: Tensor
    counts: Tensor


def plan_exchange(routing: Routing, num_ranks: int) -> ExchangePlan:
    """Plan which tokens travel to which ranks.

    No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any routing over E experts.
        num_ranks: P.

    Returns:
        ExchangePlan.

    Raises:
        ValueError: if P does not divide E.

    Example:
        >>> from moekit.routing import round_robin
        >>> plan = plan_exchange(round_robin(torch.zeros(2, 4), k=2), 2)  # experts 0, 1 and 2, 3
        >>> plan.rows.tolist(), plan.sizes.tolist(), plan.counts.tolist()
        ([0, 0, 1, 1], [1, 1], [2, 2])
    """
    per_rank = experts_per_rank(routing.num_experts, num_ranks)
    tokens = routing.token_indices.flatten()
    owners = routing.expert_indices.flatten().div(per_rank, rounding_mode="floor")
    end = num_ranks * routing.num_tokens
    keys, order = torch.where(owners < 0, end, owners * routing.num_tokens + tokens).sort(stable=True)
    exists = keys < end
    changes = torch.cat([exists[:1], exists[1:] & (keys[1:] != keys[:-1])])
    rows = torch.empty_like(order).scatter_(0, order, torch.where(exists, changes.cumsum(0) - 1, -1))
    firsts = torch.empty_like(changes).scatter_(0, order, changes)
    sizes = tokens_per_expert(torch.where(firsts, owners, -1), num_ranks)
    return ExchangePlan(owners, rows, firsts, sizes, tokens_per_expert(owners, num_ranks))


def limit_exchange(plan: ExchangePlan, *, rows: int, assignments: int) -> ExchangePlan:
    """Give every rank equally many rows and assignments: what is beyond does not travel, what is missing is padding.

    Rows and assignments earlier in the routing come first.

    Args:
        plan: from ``plan_exchange``.
        rows: C, for each rank.
        assignments: for each rank.

    Returns:
        ExchangePlan whose row numbers are in [0, P * C).

    Example:
        >>> from moekit.routing import round_robin
        >>> plan = plan_exchange(round_robin(torch.zeros(4, 4), k=1), 2)
        >>> limit_exchange(plan, rows=1, assignments=2).rows.tolist()
        [0, -1, 1, -1]
    """
    num_ranks = plan.sizes.shape[0]
    owner = plan.owners.clamp_min(0)
    row = plan.rows - exclusive_cumsum(plan.sizes)[owner]
    kept = (plan.owners >= 0) & (row < rows)
    kept &= _places_within(torch.where(kept, plan.owners, -1), num_ranks) < assignments
    return ExchangePlan(
        owners=torch.where(kept, plan.owners, -1),
        rows=torch.where(kept, owner * rows + row, -1),
        firsts=plan.firsts & kept,
        sizes=torch.full_like(plan.sizes, rows),
        counts=torch.full_like(plan.counts, assignments),
    )


def exchange_links(plan: ExchangePlan, routing: Routing, num_rows: int) -> Links:
    """Link the tokens of a token-choice routing with the rows that carry them.

    Args:
        plan: of the exchange.
        routing: (T, K).
        num_rows: R, not less than the sum of ``plan.sizes``; the rows past that carry no token.

    Returns:
        Links between T tokens and R rows.
    """
    rows = torch.where(plan.firsts, plan.rows, -1)
    tokens = tokens_of_rows(plan, routing, num_rows)
    return Links(tokens.clamp_min(0), tokens < 0, rows.view(routing.expert_indices.shape))


def tokens_of_rows(plan: ExchangePlan, routing: Routing, num_rows: int) -> Tensor:
    """Say which token each row carries.

    Args:
        plan: of the exchange.
        routing: any.
        num_rows: R, not less than the sum of ``plan.sizes``; the rows past that carry no token.

    Returns:
        (R,) int64; -1 for a padding row.
    """
    targets = torch.where(plan.firsts, plan.rows, num_rows)
    tokens = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=targets.device)
    return tokens.scatter_(0, targets, routing.token_indices.flatten())[:num_rows]


def assignments_by_rank(plan: ExchangePlan, num_assignments: int) -> Tensor:
    """Order assignments by the rank that they go to, keeping their order within a rank.

    Args:
        plan: of the exchange.
        num_assignments: the sum of ``plan.counts``.

    Returns:
        (num_assignments,) int64 into the flattened routing; -1 for padding.
    """
    places = _places_within(plan.owners, plan.counts.shape[0])
    slots = places + exclusive_cumsum(plan.counts)[plan.owners.clamp_min(0)]
    return rows_of_assignments(torch.where(plan.owners < 0, -1, slots), num_assignments)


def _places_within(owners: Tensor, num_ranks: int) -> Tensor:
    """Number the assignments of each rank, (N,) from 0 in their order; undefined for those of none."""
    order, sizes = sort_by_expert(owners, num_ranks)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return places - exclusive_cumsum(sizes)[owners.clamp_min(0)]
