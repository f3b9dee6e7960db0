"""SparseMixer-v2: experts are drawn in training, and the router's gradient is an estimate of what the draw costs."""

import torch
from torch import Tensor

from moekit.routing.gates import noisy
from moekit.routing.top_k import check_choice, shifted, token_choice
from moekit.types import Logits, Routing


def sparse_mixer(
    logits: Logits,
    *,
    k: int = 2,
    eps: float = 0.01,
    training: bool = True,
    midpoint: float = 1 / 3,
    bias: Tensor | None = None,
) -> Routing:
    """Choose k experts one after another, by sampling in training and by the largest logit in evaluation.

    For each choice, experts taken before are left out, and so are those far below the best of the rest m: where
    (m - z_e) / max(abs(z_e), m) > 2 eps. With p the softmax over what is left, the expert e is drawn from p (in
    evaluation, it is the best), and the weight is p_e. In training the weight's value is ``midpoint`` * p_e with
    probability 3/4, unless e is the best; the gradient is p_e's all the same. This is Heun's third-order method for the
    gradient of the expected output.

    Each choice has its own softmax, so weights do not sum to one, and two experts that stand out get about one each.

    Causal. No host synchronisation. Deterministic on CUDA; for a given seed where ``training``. Draws from torch's
    global generator.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= E; the paper has 2. An expert at -infinity has the weight 0.
        eps: half the relative distance that an expert may have to the best one; Phi-3.5-MoE has 0.01.
        training: whether to sample.
        midpoint: what an off-peak weight is multiplied by; 1/3 is Heun's. transformers' phimoe writes 0.3333.
        bias: (E,) added to the logits for the selection, that is for masks and draws; p is of the logits alone.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> routing = sparse_mixer(torch.tensor([[1.0, 5.0, 4.99]]), training=False)
        >>> routing.expert_indices, routing.weights
        (tensor([[1, 2]]), tensor([[0.5025, 1.0000]]))

    References:
        Liu et al., GRIN: GRadient-INformed MoE, 2024 (SparseMixer-v2), https://arxiv.org/abs/2409.12136
        Liu et al., Sparse Backpropagation for MoE Training, 2023, https://arxiv.org/abs/2310.00811
    """
    logits = noisy(logits)
    check_choice(logits, k, name="sparse_mixer")
    # Experts at -infinity come last, and are chosen once like others; only what is taken is below them.
    lowest = torch.finfo(logits.dtype).min
    finite, taken = logits.clamp_min(lowest), torch.zeros_like(logits, dtype=torch.bool)
    scores = shifted(logits, bias).detach().clamp_min(lowest)
    choices, weights = [], []
    for _ in range(k):
        left_out, best = _far_from_best(scores, taken, eps=eps)
        chosen = _sampled(scores, left_out) if training else best
        weight = torch.softmax(finite.masked_fill(left_out, float("-inf")), dim=-1).gather(-1, chosen)
        weight = weight.masked_fill(logits.gather(-1, chosen) == float("-inf"), 0.0)
        choices.append(chosen)
        weights.append(_heun(weight, chosen == best, midpoint=midpoint) if training else weight)
        taken = taken.scatter(-1, chosen, True)
    return token_choice(torch.cat(choices, dim=-1), torch.cat(weights, dim=-1), logits)


def _far_from_best(scores: Tensor, taken: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return which experts are left out of a choice (T, E), and the best of the rest (T, 1)."""
    largest, best = scores.masked_fill(taken, float("-inf")).max(dim=-1, keepdim=True)
    size = torch.maximum(scores.abs(), largest)
    # The best itself stays even at zero, where the quotient is NaN and no comparison holds.
    return taken | ((largest - scores) / size > 2 * eps), best


def _sampled(scores: Tensor, left_out: Tensor) -> Tensor:
    """Draw from the softmax of what is not left out, (T, 1), by the largest sum of score and Gumbel noise."""
    gumbel = -torch.empty_like(scores).exponential_().log()
    return (scores + gumbel).masked_fill(left_out, float("-inf")).argmax(dim=-1, keepdim=True)


def _heun(weight: Tensor, peak: Tensor, *, midpoint: float) -> Tensor:
    """Scale the value of some weights off the peak, and no gradient."""
    full = peak | (torch.rand_like(weight) > 0.75)
    value = weight.detach() * full.to(weight.dtype).masked_fill(~full, midpoint)
    return value + (weight - weight.detach())  # the second term is zero, exactly
