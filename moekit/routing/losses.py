"""Balancing losses, which are returned. Each docstring gives the value at perfect balance."""

import torch
from torch import Tensor

from moekit.routing.scopes import (
    check_choices,
    check_decision,
    counts_of_pools,
    hidden_logits,
    ignores_counts,
    mean_of_pools,
    real_tokens,
    sums_of_pools,
)
from moekit.routing.top_k import Score, scored, softmax
from moekit.types import Logits, Routing


def load_balance_loss(
    logits: Logits,
    routing: Routing,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    score: Score = softmax,
    choices: int | None = None,
    per_token: float | None = None,
) -> Tensor:
    """Compute the Switch / GShard balancing loss E * sum_e f_e P_e of one layer.

    f_e is the share of assignments that went to expert e, counted before any drop and without gradient; P_e is the mean
    score of expert e over real tokens. The loss is **1 at perfect balance** for any k, and E / k where all tokens have
    the same k experts. It is MegaBlocks' and OpenLM's loss for one layer; Hugging Face's form is K times larger.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32; of logits with noise, the scores leave the noise out.
        routing: the decision made from them.
        token_mask: (T,) bool, True for real tokens. Others count in neither f nor P.
        tokens_per_expert: counts to use for f in place of this call's own, for example summed over micro-batches and
            ranks, times this call's share of their tokens (the global-batch loss of Qiu et al.): (E,), or (K, E) by
            choice, of which ``choices`` takes the first. Every ``Loss`` gets them so. With ``per_token`` counts without
            that share would multiply the loss; where it is None the share changes nothing. ``choices`` needs (K, E).
        sequence_length: not used; ``sequence_balance_loss`` is the form that does.
        score: what P averages; scores that do not sum to one per token are divided by their sum.
        choices: count only the first so many choices of each token; 1 is GShard's own form. None counts all.
        per_token: assignments per token that count as one, f_e = c_e / (per_token * T), also of counts from elsewhere.
            K is the papers' 1/(K T) even where some choices do not exist; 1 is Hugging Face's normalisation, **K at
            perfect balance** and E at collapse. None takes what there is, so that f sums to one.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if the routing is not of the logits' tokens and experts, or the counts not of its experts and
            choices; if ``choices`` is given for a routing that is not (T, K), or with counts that are not by choice; if
            it is no positive number, or ``per_token`` is not; if the logits are in half precision, or the mask is not
            of T elements.

    Example:
        >>> from moekit.routing import round_robin
        >>> load_balance_loss(torch.zeros(8, 4), round_robin(torch.zeros(8, 4), k=2))
        tensor(1.)

    References:
        Fedus et al., Switch Transformers, 2021, equations 4 to 6, https://arxiv.org/abs/2101.03961
        Lepikhin et al., GShard, 2020, Algorithm 1, https://arxiv.org/abs/2006.16668
        Qiu et al., Demons in the Detail, 2025 (global-batch statistics), https://arxiv.org/abs/2501.11873
    """
    check_decision("load_balance_loss", logits, routing)
    counts = counts_of_batch(routing, token_mask, tokens_per_expert, choices=choices)
    scores = shares(hidden_logits("load_balance_loss", logits, token_mask), score)
    sums, real = sums_of_pools(scores, token_mask), real_tokens(scores, token_mask)
    return balance_of_pools(counts, sums, real, per_token=per_token)


@ignores_counts
def z_loss(
    logits: Logits,
    routing: Routing | None = None,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
) -> Tensor:
    """Compute the router z-loss, the mean of (logsumexp_e z)^2: it keeps logits small. (ln E)^2 at zero logits.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32; of logits with noise, those without.
        routing: not used; here so that every loss has one signature.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: not used.
        sequence_length: not used.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if the logits are in half precision, or the mask is not of T elements.

    Example:
        >>> z_loss(torch.zeros(5, 4)).sqrt().exp()
        tensor(4.)

    References:
        Zoph et al., ST-MoE, 2022, equation 5, https://arxiv.org/abs/2202.08906
    """
    squares = torch.logsumexp(hidden_logits("z_loss", logits, token_mask), dim=-1).square()  # (T,)
    return (sums_of_pools(squares, token_mask) / real_tokens(squares, token_mask).clamp_min(1)).sum()


def counts_of_batch(
    routing: Routing, token_mask: Tensor | None, counts: Tensor | None, *, choices: int | None = None
) -> Tensor:
    """Return (E,), the assignments of the first ``choices``: those given, (K, E) or (E,), or else this routing's."""
    if counts is None:
        return counts_of_pools(routing, token_mask, choices=choices)[0]
    check_choices(choices)
    shape = routing.expert_indices.shape
    by_choice = counts.ndim == 2 and (len(shape) != 2 or len(counts) == shape[1])  # of a list nobody knows K
    if counts.shape[-1:] != (routing.num_experts,) or not (counts.ndim == 1 or by_choice):
        raise ValueError(
            f"tokens_per_expert has shape {tuple(counts.shape)}, and the routing {tuple(shape)} over "
            f"{routing.num_experts} experts; expected (E,), or (K, E) by choice."
        )
    if counts.ndim == 2:
        return counts[:choices].sum(0)
    if choices is not None:
        raise ValueError(
            f"load_balance_loss: choices = {choices} was given with tokens_per_expert of shape {tuple(counts.shape)}, "
            f"which counts all choices; expected (K, E), the counts of each choice. Count routing.expert_indices[:, i] "
            f"by tokens_per_expert for each i, or leave choices out."
        )
    return counts


def shares(logits: Tensor, score: Score) -> Tensor:
    """Score each expert for each token, and divide a token's scores by their sum.

    Args:
        logits: (T, E).
        score: (T, E) logits -> (T, E) scores.

    Returns:
        (T, E), rows of sum one; zero where all scores of a token underflow.

    Example:
        >>> from moekit.routing import sigmoid
        >>> shares(torch.zeros(1, 4), sigmoid)
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    scores = scored(score, logits)
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def balance_of_pools(counts: Tensor, score_sums: Tensor, real: Tensor, *, per_token: float | None) -> Tensor:
    """Compute E * sum_e f_e P_e for each pool, and average it over pools: what all forms of the loss share.

    Args:
        counts: (E,) or (pools, E) assignments, whose proportions are f.
        score_sums: (pools, E), normalised scores added up over the tokens of each pool.
        real: (pools,) tokens of each pool.
        per_token: assignments per token that count as one, f_e = c_e / (per_token * T); None makes f sum to one.

    Returns:
        Scalar, the dtype of the scores.

    Raises:
        ValueError: if ``per_token`` is not positive.

    Example:
        >>> ones = torch.ones(1, 4)
        >>> balance_of_pools(4 * ones, 2 * ones, torch.tensor([8]), per_token=1.0)
        tensor(2.)
    """
    if per_token is not None and not per_token > 0:
        raise ValueError(f"per_token = {per_token} assignments count as one; expected a positive number, as 1 or K.")
    tokens = real.to(score_sums.dtype).clamp_min(1)
    load = counts.to(score_sums.dtype)
    load = load / load.sum(-1, keepdim=True).clamp_min(torch.finfo(load.dtype).tiny)  # counts may be fractions
    losses = score_sums.shape[-1] * (load * score_sums).sum(-1) / tokens  # (pools,)
    if per_token is not None:
        losses = losses * (counts.sum(-1).to(score_sums.dtype) / (per_token * tokens))
    return mean_of_pools(losses, real)
