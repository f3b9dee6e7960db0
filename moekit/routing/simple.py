"""Routing over simple experts: what is left for the real ones."""

from moekit.ratios import is_positive, multiplied, ratio_of
from moekit.types import Ratio, Routing

EVEN = Ratio(1)


def without_simple(routing: Routing, *, num_experts: int, tau: float | Ratio = EVEN) -> Routing:
    """Take the assignments to simple experts out of a routing; the real experts keep theirs.

    A capacity factor then means what it means in MoE++, where real experts have room for cf * tau N / (tau E + Z) of
    the N assignments and Z is the number of simple ones. With tau = 1 that is the same room for every expert, and with
    less, real experts get less of it. Simple experts themselves have no limit: they take no rows.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: any routing over all experts.
        num_experts: E, the real ones, which have the numbers below.
        tau: how many assignments a real expert gets for each of a simple expert, as the balancing loss wants it; MoE++
            has 0.75.

    Returns:
        The routing over E experts, with expert -1 and weight 0 for the assignments to others, and the part of the pool
        that is meant for real experts.

    Raises:
        ValueError: if E is not between 1 and the experts of the routing, or tau is not positive and finite.

    Example:
        >>> import torch
        >>> from moekit.routing import round_robin
        >>> routing = without_simple(round_robin(torch.zeros(4, 4), k=1), num_experts=2)
        >>> routing.expert_indices.flatten(), routing.pool
        (tensor([ 0,  1, -1, -1]), 2)

    References:
        Jin et al., MoE++, 2024 (heterogeneous expert capacity), https://arxiv.org/abs/2410.07348
    """
    if not 1 <= num_experts <= routing.num_experts or not is_positive(tau):
        raise ValueError(
            f"without_simple: num_experts = {num_experts} and tau = {tau} were given for a routing over "
            f"{routing.num_experts} experts; expected 1 <= num_experts <= {routing.num_experts} and tau > 0."
        )
    gone = routing.expert_indices >= num_experts
    weight, one = ratio_of(tau)
    real = weight * num_experts
    return Routing(
        routing.token_indices,
        routing.expert_indices.masked_fill(gone, -1),
        routing.weights.masked_fill(gone, 0.0),
        routing.num_tokens,
        num_experts,
        multiplied(routing.pool, Ratio(real, real + one * (routing.num_experts - num_experts))),
        routing.positions,
    )
