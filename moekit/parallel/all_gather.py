"""Strategies that gather the tokens of all ranks: each rank adds its share, and the sums are scattered back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from moekit.checks import check_tokens
from moekit.parallel.collectives import connect, gather, narrowed, reduce_scatter, room_for
from moekit.parallel.layouts import experts_per_rank
from moekit.ratios import as_ratio, multiplied, total
from moekit.segments import tokens_per_expert
from moekit.types import DispatchPlan, ExpertLayer, Ratio, Routing


def all_gather(layer: ExpertLayer, *, group: ProcessGroup, equal: bool = False) -> ExpertLayer:
    """Let each rank of a group own E / P of the experts: it sees all tokens, and runs those experts alone.

    Every rank gathers tokens and routing, and its weighted sums are added to the others' and scattered back. That is
    more traffic than ``all_to_all`` unless most tokens go to most ranks, but its shapes never depend on the routing.
    The inner layer sees E / P experts, and the tokens of all ranks in rank order.

    Causal if ``layer`` is. Reads the device once, for what each rank has, unless ``equal``.
    Deterministic on CUDA if ``layer`` is. Sums over ranks are taken in the dtype of the layer's output.

    Args:
        layer: runs on a rank, with parameters of E / P experts.
        group: of P ranks; rank p owns experts p * E / P to (p + 1) * E / P - 1.
        equal: every rank has the same number of tokens and assignments, so nobody needs to ask.

    Returns:
        ExpertLayer over E experts.

    Raises:
        ValueError: when called, before anything is sent: if P does not divide E, the routing is no sparse one, or ``x``
            is not (T, D) with its T. A rank that alone raises leaves the others waiting for it.

    Example:
        >>> import torch.distributed as dist
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import top_k
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = all_gather(mixtral().layer, group=dist.group.WORLD)
        >>> layer(torch.ones(5, 4), top_k(torch.zeros(5, 2), k=1), init_gated(2, 4)).shape
        torch.Size([5, 4])
        >>> dist.destroy_process_group()

    References:
        Megatron-LM's token dispatcher ``allgather``, https://github.com/NVIDIA/Megatron-LM
    """
    return partial(_all_gather, layer=layer, group=group, equal=equal)


def tensor_parallel(layer: ExpertLayer, *, group: ProcessGroup, equal: bool = False) -> ExpertLayer:
    """Let each rank of a group own a slice of every expert's hidden dimension F.

    An expert's output is a sum over its hidden units, so it is the sum of what the ranks make of their F / Y units
    each. Tokens, which differ from rank to rank, are gathered; the partial outputs are added and scattered back. It is
    what more ranks than experts need: ``all_to_all(tensor_parallel(layer, group=hidden), group=experts)``.

    Exact for feed-forwards that treat every hidden unit alone and add nothing to their sum, as those of
    ``moekit.experts`` without biases do. A bias of the D outputs (``down_bias``) would be added once by every rank.

    Causal if ``layer`` is. Reads the device once, for what each rank has, unless ``equal``.
    Deterministic on CUDA if ``layer`` is. Sums over ranks are taken in the dtype of the layer's output.

    Args:
        layer: runs on a rank, with F / Y hidden units of each of E experts.
        group: of Y ranks.
        equal: every rank has the same number of tokens and assignments, so nobody needs to ask.

    Returns:
        ExpertLayer over E experts.

    Raises:
        ValueError: when called, before anything is sent: if the parameters have a ``down_bias`` and Y > 1, the routing
            is no sparse one, or ``x`` is not (T, D) with its T. A rank that alone raises leaves the others waiting for
            it.

    Example:
        >>> import torch.distributed as dist
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import top_k
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = tensor_parallel(mixtral().layer, group=dist.group.WORLD)
        >>> layer(torch.ones(5, 4), top_k(torch.zeros(5, 2), k=1), init_gated(2, 4)).shape
        torch.Size([5, 4])
        >>> dist.destroy_process_group()

    References:
        Shoeybi et al., Megatron-LM, 2019, section 3, https://arxiv.org/abs/1909.08053; gathering tokens that differ
        between ranks is its sequence parallelism, Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198
    """
    return partial(_tensor_parallel, layer=layer, group=group, equal=equal)


def plan_together(
    plan: Callable[[Routing], DispatchPlan], *, group: ProcessGroup, equal: bool = False
) -> Callable[[Routing], DispatchPlan]:
    """Let a plan see the routing of all ranks, as it does behind an exchange, to learn what is dropped here.

    Causal if the plan is. The host waits for the sizes of the others, unless they are ``equal``, and for no other
    synchronisation. Deterministic on CUDA.

    Args:
        plan: makes a plan of any routing.
        group: of ranks whose tokens compete.
        equal: every rank has the same number of tokens and assignments, so nobody needs to ask.

    Returns:
        A function routing -> DispatchPlan in which the assignments of other ranks are padding rows. All ranks call it
        together.

    Example:
        >>> import torch.distributed as dist
        >>> from moekit.dispatch import dropless_plan
        >>> from moekit.routing import round_robin
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> plan_together(dropless_plan, group=dist.group.WORLD)(round_robin(torch.zeros(3, 2), k=1)).assignments
        tensor([0, 2, 1])
        >>> dist.destroy_process_group()
    """
    return partial(_plan_together, plan=plan, group=group, equal=equal)


def _plan_together(
    routing: Routing, *, plan: Callable[[Routing], DispatchPlan], group: ProcessGroup, equal: bool
) -> DispatchPlan:
    together = _gathered(routing, _sizes(routing, group, equal, parts=1), group)
    made = plan(together)
    num_own = routing.expert_indices.numel()
    own = made.assignments - group.rank() * (together.expert_indices.numel() // group.size())
    return made._replace(assignments=torch.where((made.assignments >= 0) & (own >= 0) & (own < num_own), own, -1))


class _Sizes(NamedTuple):
    """The longest of all ranks' lists, and what competes for the capacity of the experts at hand.

    ``most`` is as in ``Routing``, for the experts of this rank.
    """

    tokens: int
    assignments: int
    pool: int | Ratio
    most: int | None


def _all_gather(
    x: Tensor, routing: Routing, params: Any, *, layer: ExpertLayer, group: ProcessGroup, equal: bool
) -> Tensor:
    check_tokens("all_gather", x, routing)
    experts_per_rank(routing.num_experts, group.size())  # refuses before anything is sent
    sizes = _sizes(routing, group, equal, parts=group.size())
    arrived = _of_own_experts(_gathered(routing, sizes, group), group)._replace(most=sizes.most)
    return _share(x, arrived, params, sizes, layer=layer, group=group)


def _tensor_parallel(
    x: Tensor, routing: Routing, params: Any, *, layer: ExpertLayer, group: ProcessGroup, equal: bool
) -> Tensor:
    check_tokens("tensor_parallel", x, routing)
    if group.size() > 1 and getattr(params, "down_bias", None) is not None:
        raise ValueError(_BIASED.format(kind=type(params).__name__, ranks=group.size()))
    sizes = _sizes(routing, group, equal, parts=1)
    arrived = _gathered(routing, sizes, group)._replace(most=sizes.most)
    return _share(x, arrived, params, sizes, layer=layer, group=group)


def _share(
    x: Tensor, arrived: Routing, params: Any, sizes: _Sizes, *, layer: ExpertLayer, group: ProcessGroup
) -> Tensor:
    """Run the layer on the tokens of all ranks, and add up what each rank makes of them."""
    rows = gather(_padded(narrowed(x), sizes.tokens), group=group)  # (P * T, D)
    y = connect(layer(rows, arrived, params), rows, arrived.weights)
    y = reduce_scatter(y, group=group)
    return y if y.shape[0] == x.shape[0] else y[: x.shape[0]].clone()  # FSDP wants no view of its modules


def _sizes(routing: Routing, group: ProcessGroup, equal: bool, *, parts: int) -> _Sizes:
    """Tell every rank of this one's lists, and how many assignments each of as many parts of the experts has.

    There is a part for each rank, or one that all ranks run.
    """
    own, pool = (routing.num_tokens, routing.expert_indices.numel()), routing.pool
    if equal:
        return _Sizes(*own, multiplied(pool, Ratio(group.size())), None)
    owners = routing.expert_indices.flatten().div(routing.num_experts // parts, rounding_mode="floor")
    existing = tokens_per_expert(owners, parts)
    told = torch.cat([torch.tensor([*own, *as_ratio(pool)], device=existing.device), existing])
    columns = gather(told.unsqueeze(0), group=group).t().tolist()
    (tokens, assignments, *pools), of_parts = columns[:4], columns[4:]
    mine = of_parts[group.rank() % parts]
    return _Sizes(max(tokens), max(assignments), multiplied(1, total(zip(*pools, strict=True))), room_for(sum(mine)))


def _gathered(routing: Routing, sizes: _Sizes, group: ProcessGroup) -> Routing:
    """Make the routing of the gathered tokens; those that fill up a rank's share have no assignments."""
    num_tokens = group.size() * sizes.tokens
    positions = () if routing.positions is None else (routing.positions,)
    if routing.expert_indices.ndim == 2:
        experts, *placed = _columns((routing.expert_indices, *positions), sizes.tokens, group)
        weights = gather(_padded(routing.weights, sizes.tokens), group=group)
        tokens = torch.arange(num_tokens, device=experts.device).unsqueeze(1).expand_as(experts)
    else:
        numbers = (routing.expert_indices, routing.token_indices, *positions)
        length = sizes.assignments
        experts, of_rank, *placed = _columns([each.reshape(-1, 1) for each in numbers], length, group)
        weights = gather(_padded(routing.weights.reshape(-1, 1), length), group=group)
        rank = torch.arange(experts.shape[0], device=experts.device).unsqueeze(1) // max(length, 1)
        tokens = rank * sizes.tokens + of_rank.clamp_min(0)
        tokens, experts, weights, *placed = (each.squeeze(1) for each in (tokens, experts, weights, *placed))
    return Routing(tokens, experts, weights, num_tokens, routing.num_experts, sizes.pool, placed[0] if placed else None)


def _columns(parts: Sequence[Tensor], length: int, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Gather numbers (n, k), of one shape, in one exchange: (P * length, k), each rank's filled up with -1."""
    found = gather(_padded(torch.cat([*parts], dim=1), length, value=-1), group=group)
    return found.chunk(len(parts), dim=1)


def _of_own_experts(routing: Routing, group: ProcessGroup) -> Routing:
    """Number this rank's experts from 0; choices of others' do not exist, but keep their weights.

    A token's priority may depend on the best of all its weights.
    """
    per_rank = experts_per_rank(routing.num_experts, group.size())
    experts = routing.expert_indices - group.rank() * per_rank
    return routing._replace(
        expert_indices=torch.where((experts >= 0) & (experts < per_rank), experts, -1),
        num_experts=per_rank,
        pool=multiplied(routing.pool, Ratio(1, group.size())),
    )


_BIASED = (
    "tensor_parallel: the parameters are {kind}, with a down_bias, which each of the {ranks} ranks would add to its "
    "part of an output: the sum has it {ranks} times. Expected experts without a bias of their outputs. Spread whole "
    "experts, by all_to_all or all_gather, or add these biases outside of tensor_parallel."
)


def _padded(x: Tensor, length: int, *, value: int = 0) -> Tensor:
    missing = length - x.shape[0]
    return F.pad(x, (0, 0, 0, missing), value=value) if missing else x
