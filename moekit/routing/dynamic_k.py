"""Dynamic k: a token takes as many experts as its scores ask for, within a budget."""

import torch
from torch import Tensor

from moekit.routing.gates import noisy
from moekit.routing.top_k import Score, check_choice, normalized, scored, shifted, sigmoid, softmax, token_choice
from moekit.types import Logits, Routing


def top_p(
    logits: Logits,
    *,
    p: float,
    max_k: int | None = None,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Take a token's best experts until their scores add up to p: the fewest with sum_S s >= p; g = scale * s_S.

    A token that is sure takes one expert, an undecided one many. With p = 1 it takes all of its ``max_k``.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        p: 0 <= p <= 1, the share of the scores to cover; the paper has 0.4. 0 takes one expert.
        max_k: the budget, the most experts of a token; None takes E. The papers have none.
        score: (T, E) logits -> (T, E) scores that sum to one.
        normalize: divide a token's weights by their sum; the papers leave them as they are.
        scale: factor on the weights.
        bias: (E,) added to the scores for the order in which experts are taken; what adds up to p is unbiased.

    Returns:
        Routing of shape (T, max_k), choices in falling order, -1 past a token's last; at least one per token.

    Raises:
        ValueError: if p or ``max_k`` is out of range, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]).log()
        >>> top_p(logits, p=0.6).expert_indices[:, :2]
        tensor([[ 0, -1],
                [ 0,  1]])

    References:
        Huang et al., Harder Tasks Need More Experts, 2024, https://arxiv.org/abs/2403.07652
        Yang et al., XMoE, 2024 (the same rule, called a threshold), https://arxiv.org/abs/2403.18926
    """
    logits = noisy(logits)
    max_k = logits.shape[-1] if max_k is None else max_k
    check_choice(logits, max_k, name="top_p")
    if not 0 <= p <= 1:
        raise ValueError(f"top_p: p = {p}; expected a share of the scores between 0 and 1, such as 0.4.")
    scores = scored(score, logits)
    order = torch.topk(shifted(scores.detach(), bias), max_k, dim=-1).indices  # (T, max_k)
    if p == 1:  # the running sum reaches 1 by rounding before the smallest scores have had their turn
        kept = torch.ones_like(order, dtype=torch.bool)
    else:
        values = scores.detach().gather(-1, order)
        kept = _running_sum(values) - values < p
        kept[:, 0] = True
    return _kept_choices(order, kept, scores, logits, normalize=normalize, scale=scale)


def threshold(
    logits: Logits,
    *,
    threshold: float | Tensor,
    max_k: int | None = None,
    at_least: int = 1,
    score: Score = sigmoid,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Take every expert whose score is above a threshold: S = {e : s_e + b_e > theta_e}, g = scale * s_S.

    With sigmoid scores and theta = sigmoid(G) this is the choice of DynMoE, one learnable G per expert; that paper adds
    the chosen experts' outputs up with equal weights and trains G by a straight-through gradient, and at evaluation
    gives a token without any expert its best one. Here the scores are the weights, and theta is a constant.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        threshold: theta, a number or one per expert, (E,).
        max_k: the budget, the most experts of a token, who are its best; None takes E. The paper has none.
        at_least: the fewest experts of a token, who are its best, 0 <= at_least <= max_k.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        bias: (E,) added to the scores for the selection only.

    Returns:
        Routing of shape (T, max_k), choices in falling order of s + b - theta, -1 past a token's last.

    Raises:
        ValueError: if ``max_k`` or ``at_least`` is out of range, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, -1.0], [-1.0, -2.0, -3.0]])
        >>> threshold(logits, threshold=0.5, max_k=2).expert_indices
        tensor([[ 0,  1],
                [ 0, -1]])

    References:
        Guo et al., Dynamic Mixture of Experts, 2024 (top-any gating), https://arxiv.org/abs/2405.14297
    """
    logits = noisy(logits)
    max_k = logits.shape[-1] if max_k is None else max_k
    check_choice(logits, max_k, name="threshold")
    if not 0 <= at_least <= max_k:
        raise ValueError(f"threshold: at_least = {at_least}; expected 0 <= at_least <= max_k = {max_k}.")
    if isinstance(threshold, Tensor) and threshold.shape not in ((), logits.shape[1:]):
        raise ValueError(
            f"threshold: threshold has shape {tuple(threshold.shape)}; expected a number, or one per expert, "
            f"({logits.shape[1]},)."
        )
    scores = scored(score, logits)
    margins = shifted(scores.detach(), bias) - threshold
    values, order = torch.topk(margins, max_k, dim=-1)
    kept = (values > 0) | (torch.arange(max_k, device=logits.device) < at_least)
    return _kept_choices(order, kept, scores, logits, normalize=normalize, scale=scale)


def _kept_choices(
    order: Tensor, kept: Tensor, scores: Tensor, logits: Tensor, *, normalize: bool, scale: float
) -> Routing:
    """Make the routing of the choices ``order`` (T, K) that are ``kept`` (T, K)."""
    weights = scores.gather(-1, order).masked_fill(~kept, 0.0)
    if normalize:
        weights = normalized(weights).masked_fill(~kept, 0.0)  # what does not exist stays zero beside NaN, too
    return token_choice(order.masked_fill(~kept, -1), weights if scale == 1.0 else weights * scale, logits)


def _running_sum(values: Tensor) -> Tensor:
    """Add up along the last axis, in steps of doubling width.

    ``torch.cumsum`` of floats has no deterministic implementation on CUDA and raises where one is demanded.
    """
    width = 1
    while width < values.shape[-1]:
        values = values + torch.nn.functional.pad(values[..., :-width], (width, 0))
        width *= 2
    return values
