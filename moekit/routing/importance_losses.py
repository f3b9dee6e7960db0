"""Losses on how unequal the experts are, as a squared coefficient of variation: of their weights or of their chances.

CV^2 of numbers s_e is their variance, over E, divided by their squared mean: 0 when all are equal, E - 1 when one
expert has everything. Ports to PyTorch often divide the variance by E - 1; V-MoE's own code does not.
"""

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.routing.gates import check_precision
from moekit.routing.scopes import (
    Scope,
    check_decision,
    hidden,
    hidden_logits,
    ignores_counts,
    mean_of_pools,
    real_tokens,
    sums_of_pools,
    weights_by_expert,
    whole_batch,
)
from moekit.routing.top_k import Score, scored
from moekit.types import Logits, NoisyLogits, Routing


@ignores_counts
def importance_loss(
    logits: Logits,
    routing: Routing,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    score: Score | None = None,
    scope: Scope = whole_batch,
) -> Tensor:
    """Compute the importance loss CV^2 over e of sum_t g_te, the weight that each expert gets.

    **0 at perfect balance**, E - 1 when one expert gets all. It asks for equal weight, not for an equal number of
    tokens: ``load_loss`` does that. Without ``score`` the gradient goes through the weights of the chosen experts, as
    Shazeer's; with it, through the scores of all experts, as V-MoE's.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32, which ``score`` is taken of, without noise.
        routing: the decision, with the weights g.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: ignored: counts are no weights.
        sequence_length: for the scope.
        score: (T, E) logits -> (T, E) scores to add up in place of the routing's weights; V-MoE's is ``softmax``.
        scope: tokens over which the weights are added up; the loss averages over such pools.

    Returns:
        Scalar float32.

    Raises:
        ValueError: from the scope; if the routing is not of the logits' tokens and experts, or ``score`` is given
            logits in half precision.

    Example:
        >>> from moekit.routing import round_robin
        >>> importance_loss(torch.zeros(8, 4), round_robin(torch.zeros(8, 4), k=2))
        tensor(0.)

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, equations 6 and 7, https://arxiv.org/abs/1701.06538
        Riquelme et al., Scaling Vision with Sparse Mixture of Experts, 2021, appendix A.2,
        https://arxiv.org/abs/2106.05974
    """
    check_decision("importance_loss", logits, routing)
    if score is None:
        values = weights_by_expert(routing)
    else:
        values = scored(score, hidden_logits("importance_loss", logits, token_mask))
    return _squared_variation(values, token_mask, scope=scope, sequence_length=sequence_length)


@ignores_counts
def load_loss(
    logits: Logits,
    routing: Routing,
    *,
    token_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    sequence_length: int | None = None,
    excluding_self: bool = True,
    scope: Scope = whole_batch,
) -> Tensor:
    """Compute the load loss CV^2 over e of sum_t P_te, a smooth count of the tokens of each expert.

    **0 at perfect balance**, E - 1 when one expert gets all. P_te = Phi((z_te - thr_te) / sigma_te) is the chance that
    expert e would be among the K best of token t, were its own noise drawn again and that of the others kept. z is
    without noise, sigma its standard deviation, Phi the normal distribution function, and thr_te the K-th largest of
    the other experts' noisy logits: the (K+1)-th of all if e is chosen, and the K-th of all if not. Without noise,
    sigma = 0, the chance is 1 above the threshold, 0 below it and 1/2 at it, and has no gradient.

    No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) with noise, from a noisy gate.
        routing: of shape (T, K), for K.
        token_mask: (T,) bool, True for real tokens.
        tokens_per_expert: ignored: the loss has counts of its own, which carry gradient.
        sequence_length: for the scope.
        excluding_self: leave the expert itself out of its threshold, as Shazeer; otherwise the threshold is the K-th
            largest of all for every expert, as in V-MoE's code, which gives a chosen expert less than its chance.
        scope: tokens over which the chances are added up; the loss averages over such pools.

    Returns:
        Scalar float32.

    Raises:
        ValueError: if the logits are without noise or in half precision, or the routing is not (T, K), or not of their
            tokens and experts.

    Example:
        >>> from moekit.routing import top_k
        >>> z = torch.zeros(4, 2)
        >>> noise = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 1)
        >>> load_loss(NoisyLogits(z + noise, z, torch.ones(4, 2)), top_k(z + noise, k=1))
        tensor(0.)

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, equations 8 to 11, https://arxiv.org/abs/1701.06538
        Riquelme et al., Scaling Vision with Sparse Mixture of Experts, 2021, appendix A.2,
        https://arxiv.org/abs/2106.05974
    """
    if not isinstance(logits, NoisyLogits):
        raise ValueError(
            f"load_loss: the logits are a plain tensor of shape {tuple(logits.shape)}; expected NoisyLogits, since the "
            f"loss is about the noise. Use a noisy gate, or importance_loss or load_balance_loss without one."
        )
    check_precision("load_loss", logits.logits)
    check_decision("load_loss", logits, routing)
    shape = routing.expert_indices.shape
    if len(shape) != 2:
        raise ValueError(
            f"load_loss: the routing has shape {tuple(shape)}; expected (T, K), whose K it needs. Use importance_loss "
            f"for this router."
        )
    seen = NoisyLogits(hidden(logits.logits, token_mask), hidden(logits.clean, token_mask), _ones(logits, token_mask))
    chances = _chances(seen, shape[1], excluding_self=excluding_self)
    return _squared_variation(chances, token_mask, scope=scope, sequence_length=sequence_length)


def _ones(logits: NoisyLogits, token_mask: Tensor | None) -> Tensor:
    """Return the standard deviations, with 1 for padding tokens, which are divided by too."""
    if token_mask is None:
        return logits.std
    return logits.std.masked_fill(~flat_mask(token_mask, len(logits.std)).unsqueeze(1), 1.0)


def _chances(logits: NoisyLogits, k: int, *, excluding_self: bool) -> Tensor:
    noisy, clean_logits, std = logits
    if not excluding_self:
        threshold = torch.topk(noisy, k, dim=-1).values[:, -1:]
    elif k < noisy.shape[1]:
        best = torch.topk(noisy, k + 1, dim=-1).values
        last_in, first_out = best[:, -2:-1], best[:, -1:]
        threshold = torch.where(noisy > first_out, first_out, last_in)
    else:  # every expert is chosen, whatever the noise
        return clean_logits.masked_fill(torch.ones_like(clean_logits, dtype=torch.bool), 1.0)
    margins, drawn = clean_logits - threshold, std > 0
    chances = torch.special.ndtr(margins / std.where(drawn, 1.0))
    return chances.where(drawn, (margins.detach().sign() + 1) / 2)


def _squared_variation(
    values: Tensor, token_mask: Tensor | None, *, scope: Scope, sequence_length: int | None
) -> Tensor:
    sums = sums_of_pools(values, token_mask, scope=scope, sequence_length=sequence_length)  # (pools, E)
    real = real_tokens(values, token_mask, scope=scope, sequence_length=sequence_length)
    mean = sums.mean(-1, keepdim=True)
    nothing = mean == 0
    relative = sums / mean.masked_fill(nothing, 1.0)  # before squares, which underflow first
    losses = (relative - 1).square().mean(-1).masked_fill(nothing.squeeze(-1), 0.0)
    return mean_of_pools(losses, real, masked=token_mask is not None)
