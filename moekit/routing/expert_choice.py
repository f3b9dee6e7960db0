"""Expert choice: each expert takes the C tokens of a pool that it scores highest."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.ratios import is_positive, ratio_of
from moekit.routing.gates import noisy
from moekit.routing.top_k import Score, check_choice, normalized, scored, softmax, softmax_over_tokens
from moekit.types import Logits, Ratio, Routing

Division = Callable[[Any, Any], Any]


def divide_up(numerator: Any, denominator: Any) -> Any:
    """Divide two integers and round up, exactly; numbers and integer tensors alike.

    Example:
        >>> divide_up(7, 2), divide_up(torch.tensor(6), 2)
        (4, tensor(3))
    """
    return -(-numerator // denominator)


def expert_choice(
    logits: Logits,
    *,
    capacity_factor: float | Ratio,
    score: Score = softmax,
    normalize: bool = False,
    division: Division = operator.floordiv,
    multiple_of: int = 1,
    sequence_length: int | None = None,
    token_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Let every expert take its C best tokens of each pool: A = score(z), S_e = topC_t(A_te), g_te = A_te.

    C is ``expert_capacity`` of the pool's tokens: n * c / E, with c the mean number of experts per token, rounded by
    ``division``, at least 1 and at most n. A system that writes the factor relative to K choices has c = cf * K. The
    load is even by construction; the number of experts of a token is not, and can be zero.

    Not causal: a later token of the pool can take an earlier one's place. Without ``sequence_length`` a token also
    depends on the other sequences of the batch. No host synchronisation. Deterministic on CUDA; ties are broken as
    ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        capacity_factor: c > 0, experts per token in the mean; the paper has 2.
        score: (T, E) logits -> (T, E) scores; ``softmax_over_tokens`` is taken over the real tokens of each pool, one
            inside a function of your own over all T.
        normalize: divide an expert's weights by their sum over the tokens that it took from the pool; the paper and
            V-MoE leave the scores as they are. With ``score=softmax_over_tokens`` that is the softmax over the chosen
            tokens, the form of pytorch-mixtures 9ec73e6.
        division: how n * c / E becomes an integer: ``operator.floordiv`` or ``divide_up`` (V-MoE).
        multiple_of: round C up to a multiple of this; V-MoE has 4.
        sequence_length: tokens of a pool, which are consecutive; None makes the whole batch one pool.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. The others are neither taken nor
            counted in C, so that padding changes nothing. ``mask_tokens`` behind this router takes padding out too,
            but only after it has been counted and has pushed out real tokens.
        bias: ignored; what is added to all scores of an expert alike does not change its best tokens.

    Returns:
        Routing of shape (G, E, C), each expert's tokens in falling order of score; -1 only where ``token_mask`` leaves
        fewer than C.

    Raises:
        ValueError: if the capacity factor is not positive and finite, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> expert_choice(logits, capacity_factor=1.0).token_indices
        tensor([[[0, 1],
                 [3, 2]]])

    References:
        Zhou et al., Mixture-of-Experts with Expert Choice Routing, 2022, section 3.2, https://arxiv.org/abs/2202.09368
        Riquelme et al., Scaling Vision with Sparse Mixture of Experts, 2021, https://arxiv.org/abs/2106.05974
    """
    logits = noisy(logits)
    check_choice(logits, 1, name="expert_choice")
    pool_size = _pool_size(logits.shape[0], sequence_length)
    capacity = partial(
        expert_capacity,
        num_experts=logits.shape[1],
        capacity_factor=capacity_factor,
        division=division,
        multiple_of=multiple_of,
    )
    num_taken = capacity(pool_size)  # C
    pools = _num_pools(logits.shape[0], pool_size), pool_size
    real = None if token_mask is None else flat_mask(token_mask, logits.shape[0]).view(pools)  # (G, n)
    scores = _scores_by_expert(logits, score, real, pools)  # (G, E, n)
    preference = scores.detach() if real is None else scores.detach().masked_fill(~real.unsqueeze(1), -torch.inf)
    chosen = torch.topk(preference, num_taken, dim=-1).indices  # (G, E, C)
    # Along the tokens' own axis: Inductor's gradient of a gather from a transposed softmax is wrong on the CPU.
    weights = scores.transpose(1, 2).gather(1, chosen.transpose(1, 2)).transpose(1, 2).contiguous()
    experts = torch.arange(logits.shape[1], device=logits.device).unsqueeze(-1).expand_as(chosen)
    if real is not None:
        taken = capacity(real.sum(-1)).view(-1, 1, 1)
        missing = torch.arange(num_taken, device=logits.device) >= taken  # (G, 1, C)
        experts, weights = experts.masked_fill(missing, -1), weights.masked_fill(missing, 0.0)
    if normalize:
        weights = normalized(weights)
    firsts = torch.arange(chosen.shape[0], device=logits.device).view(-1, 1, 1) * pool_size
    return Routing(chosen + firsts, experts, weights, logits.shape[0], logits.shape[1], chosen.numel())


def expert_capacity(
    num_tokens: Any,
    num_experts: int,
    *,
    capacity_factor: float | Ratio,
    division: Division = operator.floordiv,
    multiple_of: int = 1,
) -> Any:
    """Compute how many tokens each expert takes: C = min(n, max(1, n * c / E)), in exact integers.

    The factor is taken as the number that was written (``ratio_of``), so that 1.1 of 10 tokens is 11.

    Args:
        num_tokens: n, the tokens of a pool: a number, or a tensor of integers.
        num_experts: E.
        capacity_factor: c > 0.
        division: ``operator.floordiv`` or ``divide_up``.
        multiple_of: round up to a multiple of this, before the limit of n.

    Returns:
        C, of the type of ``num_tokens``. No host synchronisation.

    Raises:
        ValueError: if the capacity factor is not a positive, finite number, or ``multiple_of`` is not positive.

    Example:
        >>> expert_capacity(100, 8, capacity_factor=2), expert_capacity(torch.tensor([3, 0]), 8, capacity_factor=2)
        (25, tensor([1, 0]))

    References:
        Zhou et al., Mixture-of-Experts with Expert Choice Routing, 2022, equation 1, https://arxiv.org/abs/2202.09368
    """
    if not is_positive(capacity_factor) or multiple_of < 1:
        raise ValueError(
            f"expert choice: capacity_factor = {capacity_factor!r} and multiple_of = {multiple_of}; expected a "
            f"positive, finite factor (experts per token in the mean; 2 in the paper) and a positive multiple."
        )
    numerator, denominator = ratio_of(capacity_factor)
    rows = divide_up(division(num_tokens * numerator, denominator * num_experts), multiple_of) * multiple_of
    if isinstance(num_tokens, Tensor):
        return torch.minimum(rows.clamp_min(1), num_tokens)
    return min(num_tokens, max(1, rows))


def _pool_size(num_tokens: int, sequence_length: int | None) -> int:
    if sequence_length is None:
        return num_tokens
    if sequence_length < 1 or num_tokens % sequence_length:
        raise ValueError(
            f"expert_choice: T = {num_tokens} tokens cannot be split into sequences of sequence_length = "
            f"{sequence_length}; expected a positive divisor of T. Leave it out to let the whole batch be one pool."
        )
    return sequence_length


def _scores_by_expert(logits: Tensor, score: Score, real: Tensor | None, pools: tuple[int, int]) -> Tensor:
    while isinstance(score, partial) and not score.args and not score.keywords:
        score = score.func
    over_tokens = score is softmax_over_tokens
    if real is not None:  # what padding holds, NaN included, must not reach the gradient through the scores
        # Nor a share of a pool; a pool of nothing else has finite ones still, which nobody takes.
        padding = torch.finfo(logits.dtype).min if over_tokens else 0.0
        logits = logits.masked_fill(~real.reshape(-1, 1), padding)
    shape = *pools, logits.shape[1]
    scores = scored(score, logits.reshape(shape)) if over_tokens else scored(score, logits).reshape(shape)
    return scores.transpose(1, 2)


def _num_pools(num_tokens: int, pool_size: int) -> int:
    return num_tokens // pool_size if pool_size else 1
