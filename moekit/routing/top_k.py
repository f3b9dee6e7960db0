"""Token choice: each token takes the k experts it scores highest."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.routing.gates import check_precision, noisy
from moekit.types import Logits, Routing

Score = Callable[[Tensor], Tensor]

_SMALLEST_SUM = 1e-20  # keeps 0/0 out of normalised sigmoid scores; DeepSeek-V3's released code adds the same number

_FAR = -40.0  # from here on sqrt(softplus(z)) is exp(z / 2) to the last bit of float64, while exp(z) still is a number


def softmax(logits: Tensor) -> Tensor:
    """Turn logits into probabilities over all experts.

    Args:
        logits: (T, E), any floating dtype.

    Returns:
        (T, E), the dtype of ``logits``; the scores of a token sum to one.

    Example:
        >>> softmax(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, equation 2, https://arxiv.org/abs/1701.06538
    """
    return torch.softmax(logits, dim=-1)


def softmax_over_tokens(logits: Tensor) -> Tensor:
    """Turn logits into an expert's shares of the tokens: exp z_te / sum_u exp z_ue.

    For ``expert_choice``, which takes it over the tokens of each pool. **Not causal**: the share of a token falls with
    the logits of later ones.

    Args:
        logits: (T, E), or (G, T/G, E) for each pool by itself, any floating dtype.

    Returns:
        The same shape and dtype; the scores of an expert sum to one.

    Example:
        >>> softmax_over_tokens(torch.zeros(4, 1)).flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    References:
        pytorch-mixtures, commit 9ec73e6 (its expert-choice router), https://github.com/jaisidhsingh/pytorch-mixtures
    """
    return torch.softmax(logits, dim=-2)


def sigmoid(logits: Tensor) -> Tensor:
    """Turn logits into independent scores in (0, 1).

    Args:
        logits: (T, E), any floating dtype.

    Returns:
        (T, E), the dtype of ``logits``; the scores of a token have no fixed sum.

    Example:
        >>> sigmoid(torch.zeros(1, 4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])

    References:
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, equation 15, https://arxiv.org/abs/2412.19437
    """
    return torch.sigmoid(logits)


def sqrt_softplus(logits: Tensor) -> Tensor:
    """Turn logits into independent positive scores, sqrt(log(1 + exp z)), as DeepSeek-V4's released router.

    Args:
        logits: (T, E), any floating dtype.

    Returns:
        (T, E), the dtype of ``logits``; above zero, and about exp(z / 2) far below it, where exp z underflows.

    Example:
        >>> sqrt_softplus(torch.tensor([[0.0, 100.0]]))
        tensor([[ 0.8326, 10.0000]])
    """
    tiny = torch.finfo(logits.dtype).tiny  # at zero the gradient of the root would be infinite
    far = logits < _FAR  # torch.clamp would do, but its gradient at the limit is 1 or 0 by the version of torch
    root = F.softplus(logits.masked_fill(far, _FAR)).clamp_min(tiny).sqrt()
    return torch.where(far, torch.exp(logits.masked_fill(~far, _FAR) / 2).clamp_min(tiny), root)


def top_k(
    logits: Logits,
    *,
    k: int,
    score: Score = softmax,
    normalize: bool = False,
    order: float = 1.0,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Choose the k best-scored experts of each token: S = topK(s + b), g = scale * s_S, optionally over its norm.

    With ``score=softmax`` this is softmax before top-k (Shazeer, GShard, OpenLM, OLMoE; with k = 1, Switch); with
    ``normalize=True`` the weights of a token sum to ``scale`` (Mixtral). With ``score=sigmoid``, ``normalize=True`` and
    a ``bias`` it is DeepSeek-V3's router. The bias decides who is chosen and never enters the weights.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= E.
        score: (T, E) logits -> (T, E) scores.
        normalize: divide a token's weights by their norm. With k = 1 the weight is then constant and the output trains
            no router.
        order: of that norm; 1 is the sum of positive weights. MegaBlocks takes any.
        scale: factor on the weights (DeepSeek's routed scaling factor).
        bias: (E,) added to the scores for the selection only.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2, normalize=True).expert_indices
        tensor([[1, 2]])

    References:
        Lepikhin et al., GShard, 2020, https://arxiv.org/abs/2006.16668
        Jiang et al., Mixtral of Experts, 2024, https://arxiv.org/abs/2401.04088
        Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, https://arxiv.org/abs/2408.15664
    """
    logits = noisy(logits)
    check_choice(logits, k, name="top_k")
    scores = scored(score, logits)
    expert_indices = torch.topk(shifted(scores, bias), k, dim=-1).indices
    weights = weights_at(scores, expert_indices, normalize=normalize, order=order, scale=scale)
    return token_choice(expert_indices, weights, logits)


def softmax_of_top_k(logits: Logits, *, k: int, bias: Tensor | None = None) -> Routing:
    """Choose the k largest logits and take the softmax over those alone: S = topK(z + b), g = softmax(z_S).

    In exact arithmetic this equals ``top_k(..., normalize=True)``.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= E.
        bias: (E,) added to the logits for the selection only.

    Returns:
        Routing of shape (T, k); weights sum to one.

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> softmax_of_top_k(torch.tensor([[0.0, 5.0, 5.0]]), k=2).weights
        tensor([[0.5000, 0.5000]])

    References:
        Jiang et al., Mixtral of Experts, 2024, section 2.1, https://arxiv.org/abs/2401.04088
    """
    return _of_largest("softmax_of_top_k", softmax, logits, k=k, bias=bias)


def sigmoid_of_top_k(logits: Logits, *, k: int, bias: Tensor | None = None) -> Routing:
    """Choose the k largest logits and take the sigmoid of those: S = topK(z + b), g = sigmoid(z_S).

    In exact arithmetic and without a bias this equals ``top_k(..., score=sigmoid)``; in float32 the scores of logits
    from about 17 on are all one, and ``top_k`` then chooses among equals.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= E.
        bias: (E,) added to the logits for the selection only.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> routing = sigmoid_of_top_k(torch.tensor([[20.0, 30.0, 0.0]]), k=1)
        >>> routing.expert_indices, routing.weights
        (tensor([[1]]), tensor([[1.]]))

    References:
        Meta, Llama 4, 2025, its released code, ``models/llama4/moe.py`` of https://github.com/meta-llama/llama-models
    """
    return _of_largest("sigmoid_of_top_k", sigmoid, logits, k=k, bias=bias)


def _of_largest(name: str, weigh: Score, logits: Logits, *, k: int, bias: Tensor | None) -> Routing:
    """Choose the k largest logits (T, E), and weigh the choices by a function of those logits alone, (T, K)."""
    logits = noisy(logits)
    check_choice(logits, k, name=name)
    expert_indices = torch.topk(shifted(logits, bias), k, dim=-1).indices
    return token_choice(expert_indices, weigh(logits.gather(-1, expert_indices)), logits)


def scored(score: Score, logits: Tensor) -> Tensor:
    """Score logits by the function that a router was given for it.

    Args:
        score: (T, E) logits -> (T, E) scores.
        logits: (T, E).

    Returns:
        (T, E).

    Raises:
        ValueError: if it is no function.

    Example:
        >>> scored("sigmoid", torch.zeros(1, 2))
        Traceback (most recent call last):
        ValueError: score = 'sigmoid'; expected a function of logits (T, E). Pass the function itself, such as \
moekit.routing.sigmoid, or one of your own.
    """
    if not callable(score):
        raise ValueError(
            f"score = {score!r}; expected a function of logits (T, E). Pass the function itself, such as "
            f"moekit.routing.sigmoid, or one of your own."
        )
    return score(logits)


def weights_at(
    scores: Tensor, expert_indices: Tensor, *, normalize: bool = False, order: float = 1.0, scale: float = 1.0
) -> Tensor:
    """Read off the combine weights of chosen experts.

    Args:
        scores: (T, E).
        expert_indices: (T, K) int64 in [0, E).
        normalize: divide each token's weights by their norm.
        order: of that norm; 1 is the sum of positive weights.
        scale: factor on the result.

    Returns:
        (T, K), the dtype of ``scores``.

    Example:
        >>> weights_at(torch.tensor([[0.2, 0.6, 0.2]]), torch.tensor([[1, 0]]), normalize=True)
        tensor([[0.7500, 0.2500]])
    """
    weights = scores.gather(-1, expert_indices)
    if normalize:
        norms = torch.linalg.vector_norm(weights, order, -1, keepdim=True) if order != 1 else None
        weights = normalized(weights) if norms is None else weights / norms.clamp_min(_SMALLEST_SUM)
    return weights if scale == 1.0 else weights * scale


def normalized(weights: Tensor) -> Tensor:
    """Divide weights by their sum over the last axis; zero where they underflow to nothing."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(_SMALLEST_SUM)


def token_choice(expert_indices: Tensor, weights: Tensor, logits: Tensor, *, tokens: Tensor | None = None) -> Routing:
    """Assemble the routing of a token-choice router.

    Args:
        expert_indices: (T, K) int64 in [0, E), or -1.
        weights: (T, K).
        logits: (T, E), whose shape gives T and E.
        tokens: (T,) int64, the numbers from 0 to T - 1, where they are at hand.

    Returns:
        Routing of shape (T, K); token t owns row t.

    Example:
        >>> token_choice(torch.tensor([[1], [0]]), torch.ones(2, 1), torch.zeros(2, 4)).token_indices
        tensor([[0],
                [1]])
    """
    num_tokens, num_experts = logits.shape
    if tokens is None:
        tokens = torch.arange(num_tokens, device=logits.device)
    return Routing(
        token_indices=tokens.unsqueeze(-1).expand_as(expert_indices),
        expert_indices=expert_indices,
        weights=weights,
        num_tokens=num_tokens,
        num_experts=num_experts,
        pool=expert_indices.numel(),
    )


def check_choice(logits: Tensor, k: int, *, name: str) -> None:
    """Raise a ValueError that names the router if ``logits`` is not (T, E) float32 or float64, or k is not 1 to E."""
    check_precision(name, logits)
    if logits.ndim != 2:
        raise ValueError(
            f"{name}: logits have shape {tuple(logits.shape)}; expected (T, E). Flatten batch and sequence into one "
            f"token axis first."
        )
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(
            f"{name}: k = {k} experts per token were asked of E = {logits.shape[1]} experts; expected 1 <= k <= E. "
            f"Lower k (--moe-top-k) or raise the number of experts (--moe-num-experts)."
        )


def shifted(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Return scores (T, E) moved by a selection bias (E,), or as they are; a ValueError if the shapes do not fit."""
    if bias is None:
        return scores
    if bias.shape != scores.shape[-1:]:
        raise ValueError(
            f"selection bias has shape {tuple(bias.shape)}; expected one number per expert, ({scores.shape[-1]},)."
        )
    return scores + bias
