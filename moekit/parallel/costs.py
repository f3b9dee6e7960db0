"""What each strategy sends: rows, bytes and messages of one MoE layer, forward and backward, from shapes alone.

Everything is counted at one rank, for a routing that spreads tokens evenly over experts. ``moekit.parallel.link_times``
turns it into time. The functions are named like the strategies that they count.
"""

import math

from moekit.parallel.layouts import Layout
from moekit.parallel.payloads import Sent, Shape, gathered, peers, ring, there_and_back
from moekit.ratios import ratio_of


def distinct_blocks(top_k: int, num_experts: int, blocks: int) -> float:
    """Expect how many blocks of experts hold at least one of a token's K: the rows that ``all_to_all`` sends for it.

    K distinct experts out of E, each set equally likely, miss a given block with probability
    C(E - E/P, K) / C(E, K), so the number is P * (1 - C(E - E/P, K) / C(E, K)). As E grows it falls to that of
    independent draws, P * (1 - (1 - 1/P)^K).

    Args:
        top_k: K.
        num_experts: E.
        blocks: P, equal blocks of experts.

    Returns:
        Expected number, between 1 and min(K, P).

    Raises:
        ValueError: if P does not divide E, or K is not in [1, E].

    Example:
        >>> round(distinct_blocks(8, 64, 8), 3)
        5.433
    """
    if blocks < 1 or num_experts % blocks:
        raise ValueError(f"{num_experts} experts are not {blocks} equal blocks; expected a divisor of {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; expected 1 to {num_experts}, the number of experts")
    missing = math.comb(num_experts - num_experts // blocks, top_k) / math.comb(num_experts, top_k)
    return blocks * (1 - missing)


def all_to_all(shape: Shape, layout: Layout, *, ranks_per_node: int, positions: bool = False) -> list[Sent]:
    """Count ``all_to_all``: a token's row goes once to each rank that owns one of its experts, and comes back.

    Args:
        shape: of the layer.
        layout: X = ``layout.expert_ranks`` blocks of experts; other axes are not counted here.
        ranks_per_node: on each machine.
        positions: whether assignments carry their place, as a capacity limit needs.

    Returns:
        One entry per collective.

    Example:
        >>> from moekit.parallel.layouts import spread_experts
        >>> shape = Shape(1000, 64, 256, 64, 8)
        >>> sent = all_to_all(shape, spread_experts(8, 64, 256), ranks_per_node=8)
        >>> round(sum(s.own + s.others for s in sent if s.name == "tokens") / shape.row_bytes)
        5433
    """
    blocks = layout.expert_ranks
    group = peers(blocks, 1, ranks_per_node=ranks_per_node)
    rows = shape.tokens * distinct_blocks(shape.top_k, shape.experts, blocks)
    return there_and_back(shape, group, rows, positions=positions)


def static_all_to_all(
    shape: Shape, layout: Layout, *, ranks_per_node: int, capacity_factor: float, positions: bool = False
) -> list[Sent]:
    """Count ``static_all_to_all``: every rank sends C = min(T, max(1, trunc(cf * K * T / X))) rows to each of X.

    Args:
        shape: of the layer.
        layout: of ranks.
        ranks_per_node: on each machine.
        capacity_factor: cf.
        positions: whether assignments carry their place.

    Returns:
        One entry per collective; no counts, for they are known.

    Example:
        >>> from moekit.parallel.layouts import spread_experts
        >>> shape = Shape(16, 2, 4, 8, 4)
        >>> sent = static_all_to_all(shape, spread_experts(8, 8, 4), ranks_per_node=8, capacity_factor=1.25)
        >>> [(s.own + s.others) / shape.row_bytes for s in sent if s.name == "tokens"]  # 10 rows for each of 8
        [80.0]
    """
    blocks = layout.expert_ranks
    group = peers(blocks, 1, ranks_per_node=ranks_per_node)
    factor = ratio_of(capacity_factor)
    limit = factor.numerator * shape.top_k * shape.tokens // (factor.denominator * blocks)
    rows = blocks * min(shape.tokens, max(1, limit))
    sent = there_and_back(shape, group, rows, positions=positions)
    return [entry for entry in sent if entry.name != "counts"]


def hierarchical(shape: Shape, layout: Layout, *, ranks_per_node: int, positions: bool = False) -> list[Sent]:
    """Count ``all_to_all`` over nodes, then inside: rows cross the network once per node that needs them.

    Args:
        shape: of the layer.
        layout: with ``nodes`` and ``experts`` in each.
        ranks_per_node: on each machine.
        positions: whether assignments carry their place.

    Returns:
        One entry per collective.
    """
    outer = peers(layout.nodes, layout.experts, ranks_per_node=ranks_per_node)
    inner = peers(layout.experts, 1, ranks_per_node=ranks_per_node)
    crossing, inside = (
        shape.tokens * distinct_blocks(shape.top_k, shape.experts, blocks)
        for blocks in (layout.nodes, layout.expert_ranks)
    )
    return [
        *there_and_back(shape, outer, crossing, positions=positions),
        *there_and_back(shape, inner, inside, positions=positions),
    ]


def all_gather(shape: Shape, layout: Layout, *, ranks_per_node: int) -> list[Sent]:
    """Count ``all_gather``: every rank of X sees all their tokens, and outputs are reduce-scattered.

    Args:
        shape: of the layer.
        layout: of ranks.
        ranks_per_node: on each machine.

    Returns:
        One entry per collective.
    """
    group = peers(layout.expert_ranks, 1, ranks_per_node=ranks_per_node)
    return gathered(shape, group, shape.tokens, existing=group.size)


def tensor_parallel(shape: Shape, layout: Layout, *, ranks_per_node: int) -> list[Sent]:
    """Count ``tensor_parallel``: tokens gathered over the Y ranks that share F, partial outputs reduce-scattered.

    Args:
        shape: of the layer.
        layout: Y = ``layout.hidden``.
        ranks_per_node: on each machine.

    Returns:
        One entry per collective.
    """
    group = peers(layout.hidden, layout.expert_ranks, ranks_per_node=ranks_per_node)
    return gathered(shape, group, shape.tokens, existing=1)


def experts_by_hidden(shape: Shape, layout: Layout, *, ranks_per_node: int) -> list[Sent]:
    """Count ``all_to_all`` over X ranks with ``tensor_parallel`` over Y inside: EP x TP.

    Args:
        shape: of the layer.
        layout: of ranks.
        ranks_per_node: on each machine.

    Returns:
        One entry per collective.
    """
    rows = shape.tokens * distinct_blocks(shape.top_k, shape.experts, layout.expert_ranks)
    group = peers(layout.hidden, layout.expert_ranks, ranks_per_node=ranks_per_node)
    return [
        *all_to_all(shape, layout, ranks_per_node=ranks_per_node),
        *gathered(shape, group, rows, existing=1),
    ]


def parameters(shape: Shape, layout: Layout, *, ranks_per_node: int) -> list[Sent]:
    """Count FSDP of the experts over the replicas: gathered forward and backward, gradients reduce-scattered.

    It does not depend on tokens, and there is none without replicas.

    Args:
        shape: of the layer.
        layout: R = ``layout.replicas``, each holding 1 / (X * Y) of the parameters.
        ranks_per_node: on each machine.

    Returns:
        One entry per collective.

    Example:
        >>> from moekit.parallel.layouts import replicated
        >>> sent = parameters(Shape(1, 4, 8, 2, 1), replicated(4, 2), ranks_per_node=8)
        >>> [(s.name, s.node) for s in sent]  # 384 bytes of parameters, each rank has a quarter of them
        [('parameters', 288.0), ('parameters', 288.0), ('gradients', 288.0)]
    """
    stride = layout.expert_ranks * layout.hidden
    group = peers(layout.replicas, stride, ranks_per_node=ranks_per_node)
    shard = shape.expert_bytes / (stride * layout.replicas)
    sent = [("parameters", False), ("parameters", True), ("gradients", True)]
    return [ring(name, backward, group, shard) for name, backward in sent] if group.size > 1 else []
