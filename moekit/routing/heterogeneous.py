"""The balancing loss of layers whose experts are not all networks."""

import torch
from torch import Tensor

from moekit.routing.losses import balance_of_pools, counts_of_batch, shares
from moekit.routing.scopes import check_decision, hidden_logits, real_tokens, sums_of_pools
from moekit.routing.top_k import Score, softmax
from moekit.types import Logits, Routing


def heterogeneous_balance_loss(
    logits: Logits,
    routing: Routing,
    *,
    num_simple: int,
    tau: float = 0.75,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    score: Score = softmax,
) -> Tensor:
    """Compute MoE++'s balancing loss E * sum_e eta_e f_e P_e, with eta = 1 for networks and tau for simple experts.

    With tau below 1 tokens to simple experts cost less, so that they take more of them than an even share. With tau = 1
    it is ``load_balance_loss``. At an even load its value is the mean of eta. E counts all experts here.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32; of logits with noise, those without.
        routing: the decision made from them, over all E experts, the simple ones last.
        num_simple: how many of the E experts are simple.
        tau: their weight, > 0; the paper has 0.75 and tries 0.1 to 1.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: counts of a larger batch to use for f, (E,), or (K, E) by choice.
        sequence_length: not used.
        score: what P averages; scores that do not sum to one per token are divided by their sum.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if ``num_simple`` is not between 0 and E, tau is not positive, the logits are in half precision, or
            the routing is not one of T tokens over E experts.

    Example:
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(8, 4), k=1)
        >>> heterogeneous_balance_loss(torch.zeros(8, 4), routing, num_simple=2, tau=0.5)
        tensor(0.7500)

    References:
        Jin et al., MoE++, 2024 (heterogeneous load balance loss), https://arxiv.org/abs/2410.07348
    """
    num_experts = routing.num_experts
    if not 0 <= num_simple <= num_experts or not tau > 0:
        raise ValueError(
            f"heterogeneous_balance_loss: num_simple = {num_simple} and tau = {tau} were given for {num_experts} "
            f"experts; expected 0 <= num_simple <= {num_experts} and tau > 0."
        )
    check_decision("heterogeneous_balance_loss", logits, routing)
    counts = counts_of_batch(routing, token_mask, tokens_per_expert)
    scores = shares(hidden_logits("heterogeneous_balance_loss", logits, token_mask), score)
    networks = torch.arange(num_experts, device=scores.device) < num_experts - num_simple
    eta = scores.new_ones(num_experts).where(networks, tau)
    sums, real = sums_of_pools(scores, token_mask) * eta, real_tokens(scores, token_mask)
    return balance_of_pools(counts, sums, real, per_token=None)
