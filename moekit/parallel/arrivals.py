"""What arrives from the ranks of an exchange: the routing of its rows, and the sums that come back from it."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moekit.parallel.collectives import exchange
from moekit.parallel.exchange_plans import ExchangePlan, assignments_by_rank, exchange_links
from moekit.rows import Links
from moekit.segments import exclusive_cumsum
from moekit.types import Ratio, Routing


class ExchangeSizes(NamedTuple):
    """Numbers that both ends of an exchange must know: rows and assignments, to and from each rank.

    ``room`` is for the rows that arrive, those past the last of which are no token's, and so many choices exist at
    ``most``. The last two say what arrives once more, (P,) on the device, where a copy from the host would wait for it.
    """

    sent: list[int]
    received: list[int]
    sent_assignments: list[int]
    received_assignments: list[int]
    room: int
    most: int
    pool: int | Ratio
    rows_from: Tensor
    assignments_from: Tensor


class Departing(NamedTuple):
    """What leaves with the choices of tokens.

    Attributes:
        links: between T tokens and R rows; those past the last that leaves carry no token.
        numbers: (R, K) int64, the expert of each choice by the number that it has on the row's rank, -1 for choices of
            other ranks; or (R, 2 K), the choices' positions behind them.
    """

    links: Links
    numbers: Tensor

    def of(self, num_rows: int) -> "Departing":
        """Return the first rows."""
        tokens, padding, rows = self.links
        return Departing(Links(tokens[:num_rows], padding[:num_rows], rows), self.numbers[:num_rows])


def departing(plan: ExchangePlan, routing: Routing, num_rows: int) -> Departing:
    """Decide what leaves with the choices of a routing (T, K); R is ``num_rows``, not less than leave."""
    links, num_ranks = exchange_links(plan, routing, num_rows), plan.sizes.shape[0]
    tokens = torch.where(links.padding, -1, links.tokens)
    rows = torch.arange(num_rows, device=tokens.device)
    target = torch.searchsorted(plan.sizes.cumsum(0), rows, right=True).unsqueeze(1)
    owners = torch.where(links.padding.unsqueeze(1), -1, taken(plan.owners.view_as(routing.expert_indices), tokens))
    experts = taken(routing.expert_indices, tokens) - target * (routing.num_experts // num_ranks)
    numbers = torch.where(owners == target, experts, -1)
    if routing.positions is not None:
        numbers = torch.cat([numbers, taken(routing.positions, tokens)], dim=1)
    return Departing(links, numbers)


def arrived_choices(weights: Tensor, numbers: Tensor, routing: Routing, sizes: ExchangeSizes) -> Routing:
    """Make the (R, K) routing of rows that arrived, of the weights and numbers that came with them."""
    arrived, *positions = numbers.split(weights.shape[1], dim=1)
    rows = torch.arange(arrived.shape[0], device=arrived.device).unsqueeze(1)
    return Routing(
        rows.expand_as(arrived),
        arrived,
        weights,  # those of choices elsewhere too: a token's priority may depend on its best
        num_tokens=arrived.shape[0],
        num_experts=routing.num_experts // len(sizes.sent),
        pool=sizes.pool,
        positions=positions[0] if positions else None,
        most=sizes.most,
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
        num_tokens=sizes.room,
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
