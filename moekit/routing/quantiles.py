"""Quantile balancing: one dual variable per expert, set to the quantile that an even load asks for."""

from functools import partial

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.routing.gates import clean, noisy
from moekit.routing.selection_bias import ZEROS
from moekit.routing.top_k import Score, check_choice, scored, shifted, softmax, token_choice, weights_at
from moekit.types import Logits, RouterState, Routing


def quantile_balanced(
    logits: Logits,
    *,
    k: int,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Choose the k largest of z - beta, and weigh by the scores: S = topK(z - beta), g = scale * s(z)_S.

    ``bias`` is -beta, the state that ``quantile_duals`` moves once per step; unlike that of ``top_k`` it is added to
    the logits, not to the scores. Without it this is ``top_k`` for every score that grows with the logit.

    Causal: beta comes from earlier steps. No host synchronisation. Deterministic on CUDA; ties are broken as
    ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= E.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        bias: (E,), -beta.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> quantile_balanced(torch.tensor([[1.0, 0.0]]), k=1, bias=torch.tensor([-2.0, 0.0])).expert_indices
        tensor([[1]])

    References:
        Megatron-LM, megatron/core/transformer/moe/moe_utils.py, ``qb_dual_update``, https://github.com/NVIDIA/Megatron-LM
    """
    logits = noisy(logits)
    check_choice(logits, k, name="quantile_balanced")
    expert_indices = torch.topk(shifted(logits, bias), k, dim=-1).indices
    return token_choice(
        expert_indices, weights_at(scored(score, logits), expert_indices, normalize=normalize, scale=scale), logits
    )


@torch.no_grad()
def quantile_duals(logits: Logits, duals: Tensor, *, k: int, token_mask: Tensor | None = None) -> Tensor:
    """Compute the next beta from one batch: a step of coordinate descent on the dual of balanced assignment.

    alpha_t is the (k+1)-th largest of z_t - beta: what an expert must beat to be chosen by token t. The new beta_e is
    the (T k / E + 1)-th largest over t of z_te - alpha_t, with T k / E rounded down, so that T k / E tokens lie above
    it. Megatron-LM averages this over the micro-batches and ranks of a step, and then subtracts the mean over experts,
    which changes no choice.

    Not causal, as it looks at the whole batch; it is meant for the steps after. No gradient. No host synchronisation.
    Deterministic on CUDA.

    Args:
        logits: (T, E) float32; of noisy logits, those without noise.
        duals: (E,), the beta that the batch was routed with.
        k: experts per token, 1 <= k <= E.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. Others do not count.

    Returns:
        (E,), the dtype of ``duals``. With k = E, or without a real token, ``duals`` themselves, copied.

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
        >>> quantile_duals(logits, torch.zeros(2), k=1)  # two of z_t0 - 0 lie above the first
        tensor([1., 0.])

    References:
        Megatron-LM, megatron/core/transformer/moe/moe_utils.py, ``qb_dual_update``, https://github.com/NVIDIA/Megatron-LM
    """
    logits = clean(logits)
    check_choice(logits, k, name="quantile_duals")
    num_tokens, num_experts = logits.shape
    margins = shifted(logits, -duals.to(logits.dtype))
    if k == num_experts or num_tokens == 0:
        return duals.clone()
    alpha = torch.topk(margins, k + 1, dim=-1).values[:, -1:]  # (T, 1)
    gains = logits - alpha  # (T, E)
    if token_mask is None:
        return torch.topk(gains, num_tokens * k // num_experts + 1, dim=0).values[-1].to(duals.dtype)
    real = flat_mask(token_mask, num_tokens)
    count = real.sum()
    ranked = gains.masked_fill(~real.unsqueeze(-1), -torch.inf).sort(dim=0, descending=True).values
    target = (count * k // num_experts).view(1, 1).expand(1, num_experts)
    return torch.where(count > 0, ranked.gather(0, target).squeeze(0).to(duals.dtype), duals)


def quantile_bias(*, k: int) -> RouterState:
    """Make the state of quantile balancing: minus the dual variables, each moved to where an even load wants it.

    A step of several micro-batches or ranks takes the mean of theirs, each by its real tokens.

    Args:
        k: experts per token of the router.

    Returns:
        RouterState, an (E,) float32 tensor named ``bias``. It observes E sums and the number of tokens.

    Example:
        >>> state = quantile_bias(k=1)
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
        >>> state.update(state.init(2), state.observe(logits, None, state.init(2)))
        tensor([-1., -0.])

    References:
        Megatron-LM, megatron/core/transformer/moe/moe_utils.py, ``qb_dual_update``, https://github.com/NVIDIA/Megatron-LM
    """
    return RouterState("bias", ZEROS, partial(_observe_duals, k=k), _mean_duals)


def _observe_duals(
    logits: Logits, routing: Routing | None, state: Tensor, *, k: int, token_mask: Tensor | None = None
) -> Tensor:
    plain = clean(logits)
    tokens = plain.new_tensor(float(plain.shape[0])) if token_mask is None else token_mask.sum()
    duals = quantile_duals(plain, -state, k=k, token_mask=token_mask).double()
    return torch.cat([duals * tokens, tokens.double().view(1)])


def _mean_duals(bias: Tensor, sums: Tensor) -> Tensor:
    return torch.where(sums[-1] > 0, -sums[:-1] / sums[-1].clamp_min(1), bias).to(bias.dtype)
