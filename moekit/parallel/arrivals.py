"""What arrives from the ranks of an exchange: the routing of its rows, and the sums that come back from it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moekit.parallel.collectives import exchange
from moekit.parallel.exchange_plans import ExchangePlan, assignments_by_rank
from moekit.rows import Links, copy_rows
from moekit.segments import exclusive_cumsum
from moekit.types import Ratio, Routing


class ExchangeSizes(NamedTuple):
    """Numbers that both ends of an exchange must know: rows and assignments, to and from each rank.

    The last two say what arrives once more, (P,) on the device, where a copy from the host would wait for it.
    """

    sent: list[int]
    received: list[int]
    sent_assignments: list[int]
    received_assignments: list[int]
    pool: int | Ratio
    rows_from: Tensor
    assignments_from: Tensor


def arrived_choices(
    plan: ExchangePlan, links: Links, routing: Routing, sizes: ExchangeSizes, *, send: Callable[[Tensor], Tensor]
) -> Routing:
    """Make the (R, K) routing of the rows that arrive: choices of other ranks' experts do not exist here."""
    num_ranks, k, device = len(sizes.sent), routing.expert_indices.shape[1], plan.owners.device
    per_rank = routing.num_experts // num_ranks
    weights = send(copy_rows(routing.weights, links))
    tokens = torch.where(links.padding, -1, links.tokens)
    ranks = torch.arange(num_ranks, device=device)
    target = torch.repeat_interleave(ranks, plan.sizes, output_size=sum(sizes.sent))
    owners = torch.where(links.padding.unsqueeze(1), -1, taken(plan.owners.view_as(routing.expert_indices), tokens))
    experts = taken(routing.expert_indices, tokens) - (target * per_rank).unsqueeze(1)
    numbers = [torch.where(owners == target.unsqueeze(1), experts, -1)]
    if routing.positions is not None:
        numbers.append(taken(routing.positions, tokens))
    arrived, *positions = send(torch.cat(numbers, dim=1)).split(k, dim=1)
    rows = torch.arange(arrived.shape[0], device=device).unsqueeze(1)
    return Routing(
        rows.expand(-1, k),
        arrived,
        weights,  # those of choices elsewhere too: a token's priority may depend on its best
        num_tokens=arrived.shape[0],
        num_experts=per_rank,
        pool=sizes.pool,
        positions=positions[0] if positions else None,
    )


def arrived_list(plan: ExchangePlan, routing: Routing, sizes: ExchangeSizes, group: ProcessGroup) -> Routing:
    """Make the routing, a list, of the assignments that arrive; each names a row of its source rank's."""
    send = partial(exchange, sent=sizes.sent_assignments, received=sizes.received_assignments, group=group)
    per_rank = routing.num_experts // len(sizes.sent)
    order = assignments_by_rank(plan, sum(sizes.sent_assignments))
    owner = plan.owners.clamp_min(0)
    columns = [plan.rows - exclusive_cumsum(plan.sizes)[owner], routing.expert_indices.flatten() - owner * per_rank]
    columns += [] if routing.positions is None else [routing.positions.flatten()]
    numbers = torch.where((order < 0).unsqueeze(1), -1, taken(torch.stack(columns, dim=1), order))
    rows, experts, *positions = send(numbers).unbind(1)
    starts = exclusive_cumsum(sizes.rows_from)
    source = torch.repeat_interleave(starts, sizes.assignments_from, output_size=sum(sizes.received_assignments))
    weights = send(taken(routing.weights.flatten().unsqueeze(1), order)).squeeze(1)
    return Routing(
        torch.where(rows < 0, 0, source + rows),
        experts,
        weights.masked_fill(experts < 0, 0.0),
        num_tokens=sum(sizes.received),
        num_experts=per_rank,
        pool=sizes.pool,
        positions=positions[0] if positions else None,
    )


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """Take rows of ``x`` (T, ...); -1 gives zeros, still connected to ``x``."""
    if x.shape[0] == 0:
        return x.sum(0, keepdim=True).expand(rows.shape[0], *x.shape[1:])
    missing = (rows < 0).view(-1, *[1] * (x.ndim - 1))
    # Spread: padding rows that all read row 0 would serialise the backward there.
    spread = torch.arange(rows.shape[0], device=rows.device) % x.shape[0]
    return x.index_select(0, torch.where(rows < 0, spread, rows)).masked_fill(missing, 0)


def added(rows: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Add rows (R, D) up to their tokens (R,), -1 for padding: (T, D)."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    clean = rows.to(dtype).masked_fill((tokens < 0).unsqueeze(1), 0.0)
    sums = torch.zeros(num_tokens + 1, rows.shape[1], dtype=dtype, device=rows.device)
    return sums.index_add(0, torch.where(tokens < 0, num_tokens, tokens), clean)[:num_tokens].to(rows.dtype)
