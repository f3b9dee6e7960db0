"""ReLU routing: an expert is active where its logit is positive, and what decides how many are is a coefficient."""

from functools import partial

import torch
from torch import Tensor

from moekit.routing.gates import noisy
from moekit.routing.top_k import check_choice, shifted, token_choice
from moekit.types import Logits, RouterState, Routing


def relu_choice(logits: Logits, *, max_k: int | None = None, bias: Tensor | None = None) -> Routing:
    """Choose every expert with a positive logit, weighted by it: g = relu(z). A token may have none, or all of them.

    Without a top-k the weights are continuous in the logits. Sparsity comes from an L1 loss whose coefficient adapts,
    see ``adaptive_l1``. With all logits positive this is the dense mixture with those weights.

    Causal. No host synchronisation. Deterministic on CUDA; ties under ``max_k`` are broken as ``torch.topk`` breaks
    them.

    Args:
        logits: (T, E) float32, with or without noise.
        max_k: the most experts that a token may have, those with the largest logits; None sets no limit.
        bias: (E,) added to the logits where ``max_k`` decides who is chosen. It activates no expert: a logit that is
            not positive has no weight to give.

    Returns:
        Routing of shape (T, max_k or E), a token's experts in falling order of their logits, then -1. Its pool counts
        every place, so a capacity factor is relative to all of them active.

    Raises:
        ValueError: if max_k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> relu_choice(torch.tensor([[-1.0, 0.5, 2.0]])).expert_indices
        tensor([[ 2,  1, -1]])

    References:
        Wang et al., ReMoE, 2024, https://arxiv.org/abs/2412.14711
    """
    logits = noisy(logits)
    k = logits.shape[-1] if max_k is None else max_k
    check_choice(logits, k, name="relu_choice")
    preference = shifted(logits, bias).detach().masked_fill(logits <= 0, float("-inf"))
    chosen = torch.topk(preference, k, dim=-1).indices
    values = logits.gather(-1, chosen)
    active = ~(values <= 0)  # NaN is, as with any other router: it must not turn a layer off
    return token_choice(chosen.where(active, -1), values.where(active, 0.0), logits)


def adaptive_l1(*, k: float, rate: float = 1.2, initial: float = 1e-8, loss: str = "adaptive_l1") -> RouterState:
    """Make the state of ReLU routing: the coefficient of its L1 loss, moved each step towards k active experts a token.

    A step is lambda * rate ** sign((1 - k/E) - sparsity). Sparsity is 1 - active / (E tokens), so E cancels: the
    coefficient grows where more than k experts a token are active, shrinks where fewer are, and stays at exactly k, or
    without tokens. It stays a normal number of its dtype, 1.2e-38 to 3.4e38 in float32: much smaller ones would round
    back to themselves, and infinity would stay. The paper has one coefficient for all layers, from the sparsity of all
    of them together; a layer that keeps this state has its own.

    No host synchronisation. Deterministic on CUDA.

    Args:
        k: active experts per token to aim at, on average.
        rate: factor of one step.
        initial: first coefficient.
        loss: name of the loss that the coefficient is for.

    Returns:
        RouterState, a scalar float32 tensor named ``l1_coefficient``. It observes (active assignments, tokens).

    Raises:
        ValueError: if k, rate or initial is out of range.

    Example:
        >>> state = adaptive_l1(k=2)
        >>> state.update(state.init(8), torch.tensor([30.0, 10.0]))
        tensor(1.2000e-08)

    References:
        Wang et al., ReMoE, 2024, https://arxiv.org/abs/2412.14711
    """
    if not (k > 0 and rate > 1 and initial > 0):
        raise ValueError(
            f"adaptive_l1: k = {k}, rate = {rate}, initial = {initial}; expected k > 0, rate > 1 and initial > 0, such "
            f"as the paper's rate of 1.2 and initial coefficient of 1e-8."
        )
    update = partial(_update, k=k, rate=rate)
    return RouterState("l1_coefficient", partial(_coefficient, initial=initial), _observe_active, update, scales=loss)


def _observe_active(logits: Logits, routing: Routing, state: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Count active assignments, before any drop, and the real tokens that made them, (2,) float64."""
    active = (routing.expert_indices >= 0).sum()
    tokens = torch.full_like(active, routing.num_tokens) if token_mask is None else token_mask.bool().sum()
    return torch.stack([active, tokens]).double()


def _coefficient(num_experts: int, *, initial: float, device: torch.device | str | None = None) -> Tensor:
    return torch.tensor(initial, dtype=torch.float32, device=device)


def _update(coefficient: Tensor, observed: Tensor, *, k: float, rate: float) -> Tensor:
    active, tokens = observed.double()
    bounds = torch.finfo(coefficient.dtype)
    moved = coefficient.double() * rate ** torch.sign(active - k * tokens)
    return moved.clamp(bounds.tiny, bounds.max).to(coefficient.dtype)  # beyond them it could not come back
