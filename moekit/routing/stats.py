"""Routing statistics: what a user looks at to see whether experts are used."""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.routing.gates import clean
from moekit.routing.scopes import real_tokens, sums_of_pools
from moekit.segments import tokens_per_expert
from moekit.types import DispatchPlan, Logits, Routing


class RoutingStats(NamedTuple):
    """Statistics of one routing, all tensors, so that reading them is left to the caller.

    Attributes:
        tokens_per_expert: (E,) int64, assignments before any drop.
        load: (E,) float32, their shares; 1/E each at perfect balance.
        max_violation: scalar, max_e c_e / mean(c) - 1 (MaxVio); 0 at perfect balance.
        entropy: scalar, mean entropy in nats of a token's softmax over its logits; ln E when undecided between E
            experts, and of Soft MoE's slots ln (E S).
        load_entropy: scalar, entropy in nats of the load; ln E at perfect balance.
        dead_experts: scalar int64, experts without a single assignment.
        drop_rate: scalar, share of assignments that the plan dropped.
        mass_lost: scalar, share of router weight that the plan dropped.

    Example:
        >>> from moekit.dispatch import dropless_plan
        >>> from moekit.routing import round_robin
        >>> logits = torch.zeros(4, 2)
        >>> routing = round_robin(logits, k=1)
        >>> stats = routing_stats(logits, routing, dropless_plan(routing))
        >>> stats.tokens_per_expert, stats.max_violation, stats.dead_experts
        (tensor([2, 2]), tensor(0.), tensor(0))
    """

    tokens_per_expert: Tensor
    load: Tensor
    max_violation: Tensor
    entropy: Tensor
    load_entropy: Tensor
    dead_experts: Tensor
    drop_rate: Tensor
    mass_lost: Tensor


def routing_stats(
    logits: Logits, routing: Routing, plan: DispatchPlan, *, token_mask: Tensor | None = None
) -> RoutingStats:
    """Describe one routing: load, imbalance, entropy, dead experts, and what was dropped.

    No gradient. No host synchronisation: the caller decides when to read the numbers.

    Args:
        logits: (T, E) float32, or such logits with noise, which the entropy leaves out.
        routing: the decision, padding tokens already taken out (``mask_tokens``).
        plan: the plan that the layer made of it, whose missing assignments are the dropped ones.
        token_mask: (T,) bool, True for real tokens; the entropy averages over those.

    Returns:
        RoutingStats.

    Example:
        >>> from moekit.dispatch import padded_plan
        >>> from moekit.routing import top_k
        >>> logits = torch.tensor([[9.0, 0.0]] * 4)
        >>> routing = top_k(logits, k=1)
        >>> stats = routing_stats(logits, routing, padded_plan(routing, capacity_factor=1.0))
        >>> stats.max_violation.item(), stats.dead_experts.item(), stats.drop_rate.item()
        (1.0, 1, 0.5)

    References:
        Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, section 4.1 (MaxVio), https://arxiv.org/abs/2408.15664
    """
    with torch.no_grad():
        counts = tokens_per_expert(routing.expert_indices, routing.num_experts)
        total = counts.sum().clamp_min(1)
        load = counts / total
        drop_rate, mass_lost = _lost(routing, plan, counts)
        return RoutingStats(
            tokens_per_expert=counts,
            load=load,
            max_violation=torch.where(counts.sum() > 0, load.max() * routing.num_experts - 1, 0.0),
            entropy=_token_entropy(clean(logits), token_mask),
            load_entropy=torch.special.entr(load).sum(),
            dead_experts=(counts == 0).sum(),
            drop_rate=drop_rate,
            mass_lost=mass_lost,
        )


def _token_entropy(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    entropy = torch.special.entr(torch.softmax(logits, dim=-1)).sum(-1)  # (T,)
    return (sums_of_pools(entropy, token_mask) / real_tokens(entropy, token_mask).clamp_min(1)).sum()


def _lost(routing: Routing, plan: DispatchPlan, counts: Tensor) -> tuple[Tensor, Tensor]:
    weights = routing.weights.flatten().masked_fill(routing.expert_indices.flatten() < 0, 0.0)
    weights = torch.cat([weights, weights.new_zeros(1)])  # the last one stands for padding rows, index -1
    total, kept = weights.sum(), weights[plan.assignments].sum()
    dropped = counts.sum() - (plan.assignments >= 0).sum()  # in integers: of millions, a few are no number beside 1
    drop_rate = dropped / counts.sum().clamp_min(1)
    some = counts.sum() > 0
    mass_lost = torch.where(some & (total != 0), 1 - kept / torch.where(total == 0, 1.0, total), 0.0)
    return torch.where(some, drop_rate, 0.0), mass_lost.clamp_min(0.0)
