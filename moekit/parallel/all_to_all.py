"""Expert parallelism by all-to-all: tokens travel to the ranks of their experts, and partial sums travel back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moekit.checks import check_tokens
from moekit.parallel.arrivals import (
    Departing,
    ExchangeSizes,
    added,
    arrived_choices,
    arrived_list,
    departing,
    taken,
)
from moekit.parallel.collectives import connect, exchange, narrowed, room_for
from moekit.parallel.exchange_plans import (
    ExchangePlan,
    limit_exchange,
    plan_exchange,
    tokens_of_rows,
)
from moekit.parallel.layouts import experts_per_rank
from moekit.ratios import as_ratio, is_positive, multiplied, ratio_of, total
from moekit.rows import copy_rows, sum_rows
from moekit.types import ExpertLayer, Ratio, Routing

Send = Callable[..., Tensor]
"""Carries rows to the ranks of a group, and their gradient back: called and returns as ``exchange``."""


def all_to_all(
    layer: ExpertLayer,
    *,
    group: ProcessGroup,
    return_group: ProcessGroup | None = None,
    send: Send = exchange,
    send_back: Send = exchange,
) -> ExpertLayer:
    """Let each rank of a group own E / P of the experts: every token travels once to each rank that it needs.

    With a token travel its choices on that rank; there ``layer`` runs on what arrived, and the weighted sum over those
    choices travels back, where a token's sums are added. The inner layer sees E / P experts, and the tokens of all
    ranks in the order of the ranks, behind them a few rows of zeros without choices (so that few sizes occur); it may
    drop by capacity, be a strategy itself, or anything else. What an ordinary layer on one process would give for the
    tokens of all ranks, in rank order, is what comes out.

    Causal if ``layer`` is. Reads the device once, for the number of rows. Deterministic on CUDA for token choice.

    Args:
        layer: runs on a rank, with parameters of E / P experts.
        group: of P ranks; rank p owns experts p * E / P to (p + 1) * E / P - 1.
        return_group: carries what travels back. A second communicator over the same ranks lets exchanges in both
            directions overlap, see ``chunked``; None takes ``group``.
        send: carries tokens to their experts' ranks, (R, D) to (R', D); another one may round what travels, as
            ``docs/parallelism.md`` shows. Choices and weights go by ``exchange``.
        send_back: carries partial sums back.

    Returns:
        ExpertLayer over E experts.

    Raises:
        ValueError: if ``group`` is None; when called, before anything is sent: if P does not divide E, the routing is
            no sparse one, ``x`` is not (T, D) with its T, or a rank has the parameters of all E experts. A rank that
            alone raises leaves the others waiting for it.

    Example:
        >>> import torch.distributed as dist
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import top_k
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = all_to_all(mixtral().layer, group=dist.group.WORLD)
        >>> layer(torch.ones(5, 4), top_k(torch.zeros(5, 2), k=1), init_gated(2, 4)).shape
        torch.Size([5, 4])
        >>> dist.destroy_process_group()

    References:
        Lepikhin et al., GShard, 2020, https://arxiv.org/abs/2006.16668; sending a token once per rank and not once per
        expert is DeepSeek-V3's, 2024, section 3.2.2 (per node there), https://arxiv.org/abs/2412.19437
    """
    _check_group("all_to_all", group)
    back = group if return_group is None else return_group
    return partial(_all_to_all, layer=layer, group=group, return_group=back, send=send, send_back=send_back)


def static_all_to_all(
    layer: ExpertLayer,
    *,
    group: ProcessGroup,
    capacity_factor: float | Ratio,
    return_group: ProcessGroup | None = None,
    send: Send = exchange,
    send_back: Send = exchange,
) -> ExpertLayer:
    """Do what ``all_to_all`` does with shapes known beforehand: nothing is read from the device, and it compiles.

    Every rank sends exactly C = min(T, max(1, trunc(cf * K * T / P))) rows to every rank, whatever it has for it: the
    rest is padding, and tokens beyond the first C are dropped on that rank. With cf = P nothing is dropped. A factor of
    1 is room for a balanced load of tokens that travel once per choice, which they do not, so that some imbalance fits.
    Routings that are no (T, K) are lists, of which C assignments travel.

    Every rank must have the same number of tokens.

    Causal if ``layer`` is. No host synchronisation. Deterministic on CUDA for token choice.

    Args:
        layer: runs on a rank, with parameters of E / P experts.
        group: of P ranks.
        capacity_factor: cf > 0.
        return_group: see ``all_to_all``, as the next two.
        send: carries tokens.
        send_back: carries partial sums.

    Returns:
        ExpertLayer over E experts.

    Raises:
        ValueError: if ``group`` is None, or the capacity factor is not a positive, finite number; when called, as
            ``all_to_all``.

    Example:
        >>> import torch.distributed as dist
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import top_k
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = static_all_to_all(mixtral().layer, group=dist.group.WORLD, capacity_factor=1.25)
        >>> layer(torch.ones(5, 4), top_k(torch.zeros(5, 2), k=1), init_gated(2, 4)).shape
        torch.Size([5, 4])
        >>> dist.destroy_process_group()

    References:
        Lepikhin et al., GShard, 2020, section 2.2 (capacity per source group), https://arxiv.org/abs/2006.16668
    """
    _check_group("static_all_to_all", group)
    if not is_positive(capacity_factor):
        raise ValueError(
            f"static_all_to_all: capacity_factor = {capacity_factor}; expected a positive, finite number. The number "
            "of ranks drops nothing"
        )
    return partial(
        _static_all_to_all,
        layer=layer,
        group=group,
        capacity_factor=ratio_of(capacity_factor),
        return_group=group if return_group is None else return_group,
        send=send,
        send_back=send_back,
    )


def static_limits(routing: Routing, num_ranks: int, *, capacity_factor: float | Ratio) -> tuple[int, int]:
    """Compute how many rows and assignments ``static_all_to_all`` sends from each rank to each rank.

    Args:
        routing: any routing of N assignments and T tokens.
        num_ranks: P.
        capacity_factor: cf.

    Returns:
        min(T, C) rows, C = max(1, trunc(cf * N / P)). The choices of a token, (T, K), all travel on its row, so they
        are as many as there are; any other list has min(N, C) assignments.

    Example:
        >>> from moekit.routing import round_robin
        >>> static_limits(round_robin(torch.zeros(16, 8), k=4), 8, capacity_factor=1.25)
        (10, 64)
    """
    assignments = routing.expert_indices.numel()
    factor = ratio_of(capacity_factor)
    limit = max(1, factor.numerator * assignments // (factor.denominator * num_ranks))
    choices = routing.expert_indices.ndim == 2
    return min(routing.num_tokens, limit), assignments if choices else min(assignments, limit)


def static_routing(routing: Routing, num_ranks: int, *, capacity_factor: float | Ratio) -> Routing:
    """Take out of a routing what ``static_all_to_all`` leaves behind.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any.
        num_ranks: P.
        capacity_factor: cf.

    Returns:
        The routing with expert -1 for assignments that do not travel.

    Example:
        >>> from moekit.routing import top_k
        >>> static_routing(top_k(torch.zeros(4, 2), k=1), 2, capacity_factor=1.0).expert_indices.flatten().tolist()
        [0, 0, -1, -1]
    """
    rows, assignments = static_limits(routing, num_ranks, capacity_factor=capacity_factor)
    plan = limit_exchange(plan_exchange(routing, num_ranks), rows=rows, assignments=assignments)
    left = (plan.owners < 0).view_as(routing.expert_indices)
    return routing._replace(expert_indices=routing.expert_indices.masked_fill(left, -1))


def _all_to_all(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    layer: ExpertLayer,
    group: ProcessGroup,
    return_group: ProcessGroup,
    send: Send,
    send_back: Send,
) -> Tensor:
    check_tokens("all_to_all", x, routing)
    _check_part("all_to_all", params, routing, group)
    plan, choices, num_ranks = plan_exchange(routing, group.size()), routing.expert_indices, group.size()
    run = partial(_run, layer=layer, params=params, group=return_group, send=send_back)
    if choices.ndim != 2:
        return _travel_as_list(x, routing, plan, _agree(plan, routing, group), group, run, send)
    most_rows = routing.num_tokens * min(choices.shape[1], num_ranks)
    leaving = departing(plan, routing, most_rows)  # before sizes are read, for behind that the device has nothing to do
    sizes = _agree(plan, routing, group)
    return _travel(x, routing, leaving.of(sum(sizes.sent)), sizes, group, run, send)


def _static_all_to_all(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    layer: ExpertLayer,
    group: ProcessGroup,
    capacity_factor: Ratio,
    return_group: ProcessGroup,
    send: Send,
    send_back: Send,
) -> Tensor:
    check_tokens("static_all_to_all", x, routing)
    _check_part("static_all_to_all", params, routing, group)
    num_ranks = group.size()
    rows, assignments = static_limits(routing, num_ranks, capacity_factor=capacity_factor)
    plan = limit_exchange(plan_exchange(routing, num_ranks), rows=rows, assignments=assignments)
    row_sizes, list_sizes = [rows] * num_ranks, [assignments] * num_ranks
    sizes = ExchangeSizes(
        row_sizes, row_sizes, list_sizes, list_sizes, rows * num_ranks, assignments * num_ranks,
        routing.pool, plan.sizes, plan.counts,
    )  # fmt: skip
    run = partial(_run, layer=layer, params=params, group=return_group, send=send_back)
    if routing.expert_indices.ndim != 2:
        return _travel_as_list(x, routing, plan, sizes, group, run, send)
    return _travel(x, routing, departing(plan, routing, rows * num_ranks), sizes, group, run, send)


def _check_group(name: str, group: Any) -> None:
    if group is None:
        raise ValueError(
            f"{name}: group = None; expected a ProcessGroup, such as torch.distributed.group.WORLD once "
            f"torch.distributed.init_process_group was called."
        )


def _check_part(name: str, params: Any, routing: Routing, group: ProcessGroup) -> None:
    """Refuse the parameters of all experts on a rank that owns some of them."""
    num_ranks, num_experts = group.size(), routing.num_experts
    first = params[0] if isinstance(params, tuple) and params else None
    if num_ranks > 1 and isinstance(first, Tensor) and first.ndim and first.shape[0] == num_experts > 0:
        raise ValueError(
            f"{name}: this rank has the parameters of all {num_experts} experts; expected {num_experts} / {num_ranks} "
            f"= {experts_per_rank(num_experts, num_ranks)}. Make the layer with part=Part(block=this rank's number, "
            f"blocks={num_ranks})."
        )


def _travel(
    x: Tensor,
    routing: Routing,
    leaving: Departing,
    sizes: ExchangeSizes,
    group: ProcessGroup,
    run: Callable[[Tensor, Routing, ExchangeSizes], Tensor],
    send: Send,
) -> Tensor:
    """Send tokens with their choices (T, K), and add up what comes back."""
    way: dict[str, Any] = {"group": group, "sent": sizes.sent, "received": sizes.received, "room": sizes.room}
    rows = send(copy_rows(narrowed(x), leaving.links), **way)
    weights = exchange(copy_rows(routing.weights, leaving.links), **way)
    numbers = exchange(leaving.numbers, **way, fill=-1)
    return sum_rows(run(rows, arrived_choices(weights, numbers, routing, sizes), sizes), leaving.links)


def _travel_as_list(
    x: Tensor,
    routing: Routing,
    plan: ExchangePlan,
    sizes: ExchangeSizes,
    group: ProcessGroup,
    run: Callable[[Tensor, Routing, ExchangeSizes], Tensor],
    send: Send,
) -> Tensor:
    """Send tokens, and assignments of any routing as a list, and add up what comes back."""
    tokens = tokens_of_rows(plan, routing, sum(sizes.sent))
    rows = taken(narrowed(x), tokens)
    rows = send(rows, group=group, sent=sizes.sent, received=sizes.received, room=sizes.room)
    return added(run(rows, arrived_list(plan, routing, sizes, group), sizes), tokens, routing.num_tokens)


def _run(
    rows: Tensor,
    arrived: Routing,
    sizes: ExchangeSizes,
    *,
    layer: ExpertLayer,
    params: Any,
    group: ProcessGroup,
    send: Send,
) -> Tensor:
    """Run the layer on what arrived, and send back what it makes of it."""
    y = connect(layer(rows, arrived, params), rows, arrived.weights)
    return send(y, group=group, sent=sizes.received, received=sizes.sent)


def _agree(plan: ExchangePlan, routing: Routing, group: ProcessGroup) -> ExchangeSizes:
    """Tell every rank what it is going to receive. Reads the device."""
    num_ranks, device = group.size(), plan.sizes.device
    own = torch.tensor(as_ratio(routing.pool), device=device).expand(num_ranks, 2)
    sent = torch.cat([plan.sizes.unsqueeze(1), plan.counts.unsqueeze(1), own], dim=1)  # (P, 4)
    received = exchange(sent, group=group)
    (rows, counts, _, _), (their_rows, their_counts, *pools) = torch.stack([sent, received]).transpose(1, 2).tolist()
    pool = multiplied(total(zip(*pools, strict=True)), Ratio(1, num_ranks))
    room, most = room_for(sum(their_rows)), room_for(sum(their_counts))
    return ExchangeSizes(rows, their_rows, counts, their_counts, room, most, pool, received[:, 0], received[:, 1])
