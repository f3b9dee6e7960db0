"""Losses that are no balance of counts: ReMoE's weighted L1 norm, and the entropy of the mean score."""

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.routing.gates import clean
from moekit.routing.losses import counts_of_batch, shares
from moekit.routing.scopes import (
    Scope,
    check_decision,
    hidden_logits,
    ignores_counts,
    mean_of_pools,
    real_tokens,
    sums_of_pools,
    whole_batch,
)
from moekit.routing.top_k import Score, softmax
from moekit.types import Logits, Routing


def weighted_l1_loss(
    logits: Logits,
    routing: Routing,
    *,
    k: float,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """Compute ReMoE's loss E / (k T^2) * sum_e c_e sum_t g_te, an L1 norm that weighs busy experts more.

    With f_e = E c_e / (k T), which is 1 for an expert that has its share of k assignments per token, it is the mean
    over tokens of sum_e f_e g_te. So **at perfect balance it is the mean L1 norm of a token's weights**, and less of
    it where fewer than k are active. f carries no gradient.

    Its coefficient is to be adapted until k experts per token are active on average; here it is left out.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: not used: the gradient goes through the weights.
        routing: the decision, with weights g >= 0.
        k: experts per token that are wanted on average.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: (E,) counts of a larger batch, or (K, E) by choice, in place of c; multiplied by this call's
            share of that batch's real tokens, since T is this call's.
        sequence_length: not used.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if k is not positive, or the routing is not of the logits' tokens and experts.

    Example:
        >>> from moekit.routing import round_robin
        >>> routing = round_robin(torch.zeros(8, 4), k=2)  # weights of 1/4
        >>> weighted_l1_loss(torch.zeros(8, 4), routing, k=2)
        tensor(0.5000)

    References:
        Wang et al., ReMoE, 2024 (load balancing with L1 regularization), https://arxiv.org/abs/2412.14711
    """
    if not k > 0:
        raise ValueError(f"weighted_l1_loss: k = {k} experts per token are wanted; expected a positive number.")
    check_decision("weighted_l1_loss", logits, routing)
    weights = routing.weights
    if token_mask is not None:
        weights = weights.masked_fill(~flat_mask(token_mask, routing.num_tokens)[routing.token_indices], 0.0)
    counts = counts_of_batch(routing, token_mask, tokens_per_expert)
    tokens = real_tokens(clean(logits), token_mask)[0].clamp_min(1).to(weights.dtype)
    load = counts.to(weights.dtype) * routing.num_experts / (k * tokens)
    return (weights * load[routing.expert_indices.clamp_min(0)]).sum() / tokens


@ignores_counts
def entropy_loss(
    logits: Logits,
    routing: Routing | None = None,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    score: Score = softmax,
    scope: Scope = whole_batch,
) -> Tensor:
    """Compute the negative entropy of the mean score, sum_e P_e ln P_e. **-ln E at perfect balance**, 0 at collapse.

    P is the mean over a scope, and the loss averages over such pools: ``whole_batch`` (LibMoE's "global"),
    ``each_sequence`` (its "time") or ``each_token`` (its "step", which asks every token to be undecided). It looks at
    scores alone: it is at its minimum for scores that are equal on average, however the top-k then chooses.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32; of logits with noise, those without.
        routing: not used.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: ignored: the loss has no counts.
        sequence_length: for the scope.
        score: what P averages; scores that do not sum to one per token are divided by their sum.
        scope: tokens over which the scores are averaged before the entropy.

    Returns:
        Scalar float32.

    Raises:
        ValueError: from the scope; if the logits are in half precision.

    Example:
        >>> entropy_loss(torch.zeros(5, 4)).neg().exp().round(decimals=3)
        tensor(4.)

    References:
        Nguyen et al., LibMoE, 2024, https://arxiv.org/abs/2411.00918, and its code (the modes of its perplexity
        regularizer)
    """
    scores = shares(hidden_logits("entropy_loss", logits, token_mask), score)
    real = real_tokens(scores, token_mask, scope=scope, sequence_length=sequence_length)
    sums = sums_of_pools(scores, token_mask, scope=scope, sequence_length=sequence_length)
    mean = sums / real.clamp_min(1).unsqueeze(-1)  # (pools, E)
    logarithms = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # the slope at zero is finite, so that 0 stays 0
    return mean_of_pools((mean * logarithms).sum(-1), real, masked=token_mask is not None)
