"""Token choice in one pass over the logits: what ``top_k`` computes, and the load of each expert with it."""

import torch
from torch import Tensor

from moekit.operators import HAS_TRITON, is_transformed
from moekit.routing.gates import noisy
from moekit.routing.top_k import Score, check_choice, shifted, sigmoid, softmax, token_choice, top_k
from moekit.segments import tokens_per_expert
from moekit.types import Logits, Routing

_SCORES = softmax, sigmoid
_MOST_EXPERTS, _MOST_CHOICES = 1024, 32  # of the kernel, on every device, so that a recipe runs on all or none


def fused_top_k(
    logits: Logits,
    *,
    k: int,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Choose the k best-scored experts of each token as ``top_k`` does, in one Triton kernel on CUDA.

    The formula is that of ``moekit.routing.top_k``, and so are the weights, up to the rounding of exp. On CUDA float32
    logits take the kernel; others, those on the CPU, and those in a transform of ``torch.func`` take ``top_k`` itself.
    Ties, which ``torch.topk`` breaks in no stated way, the kernel breaks in favour of the lower expert number, and NaN
    is the best score, as it is there. Scores that differ in the last bit may be ordered otherwise than by ``top_k``,
    whose exp rounds otherwise.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32, E <= 1024, with or without noise.
        k: experts per token, 1 <= k <= E, k <= 32.
        score: ``softmax`` or ``sigmoid`` of this package; the kernel knows no other function.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        bias: (E,) added to the scores for the selection only.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: if k, E or the score is none that the kernel knows, or a shape or dtype does not fit.

    Example:
        >>> fused_top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2, normalize=True).expert_indices
        tensor([[1, 2]])

    References:
        Lepikhin et al., GShard, 2020, https://arxiv.org/abs/2006.16668
        Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, https://arxiv.org/abs/2408.15664
    """
    logits = noisy(logits)
    _check_kernel(logits, k, score)
    if not _has_kernel(logits):
        return top_k(logits, k=k, score=score, normalize=normalize, scale=scale, bias=bias)
    return _by_kernel(logits, bias, k, score=score, normalize=normalize, scale=scale, counted=False)[0]


def fused_top_k_and_load(
    logits: Logits,
    *,
    k: int,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Routing, Tensor]:
    """Choose as ``fused_top_k``, and count the assignments of each expert in the same pass.

    For layers of one's own: losses take the load as ``tokens_per_expert``, and ``update_bias`` moves a bias by it. A
    ``Recipe``'s router returns a ``Routing`` alone, and is ``fused_top_k``.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token.
        score: ``softmax`` or ``sigmoid``.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        bias: (E,) added to the scores for the selection only.

    Returns:
        Routing of shape (T, k); (E,) int64, the load that ``tokens_per_expert`` counts.

    Raises:
        ValueError: as ``fused_top_k``.

    Example:
        >>> from moekit.routing import load_balance_loss
        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
        >>> routing, load = fused_top_k_and_load(logits, k=1)
        >>> load
        tensor([0, 2, 0])
        >>> load_balance_loss(logits, routing, tokens_per_expert=load) == load_balance_loss(logits, routing)
        tensor(True)
    """
    logits = noisy(logits)
    _check_kernel(logits, k, score)
    if not _has_kernel(logits):
        routing = top_k(logits, k=k, score=score, normalize=normalize, scale=scale, bias=bias)
        return routing, tokens_per_expert(routing.expert_indices, routing.num_experts)
    return _by_kernel(logits, bias, k, score=score, normalize=normalize, scale=scale, counted=True)


def kernel_takes(num_experts: int, k: int, score: Score) -> bool:
    """Say whether the kernel chooses k of so many experts by a score.

    Args:
        num_experts: E.
        k: experts per token.
        score: (T, E) logits -> (T, E) scores.

    Returns:
        Whether it does; ``fused_top_k`` refuses what it does not take.

    Example:
        >>> kernel_takes(64, 8, softmax), kernel_takes(2048, 8, softmax)
        (True, False)
    """
    return score in _SCORES and k <= _MOST_CHOICES and num_experts <= _MOST_EXPERTS


def _has_kernel(logits: Tensor) -> bool:
    return logits.is_cuda and HAS_TRITON and logits.dtype == torch.float32 and not is_transformed()


def _by_kernel(
    logits: Tensor, bias: Tensor | None, k: int, *, score: Score, normalize: bool, scale: float, counted: bool
) -> tuple[Routing, Tensor]:
    """Choose in one pass; the load is empty if it is not counted, which saves memory that has to be zero before."""
    from moekit.routing import _top_k_triton

    if bias is not None:
        if bias.shape != logits.shape[1:]:
            shifted(logits, bias)  # says what does not fit
        bias = bias.detach().float()
    weights, experts, load, tokens = _top_k_triton.fused_top_k(
        logits, bias, k, score is softmax, normalize, scale, counted=counted
    )
    return token_choice(experts, weights, logits, tokens=tokens), load


def _check_kernel(logits: Tensor, k: int, score: Score) -> None:
    check_choice(logits, k, name="fused_top_k")
    if kernel_takes(logits.shape[1], k, score):
        return
    if score not in _SCORES:
        raise ValueError(
            f"fused_top_k: score = {score} is no function that the kernel knows; expected softmax or sigmoid of "
            f"moekit.routing. Use top_k, which takes any."
        )
    raise ValueError(
        f"fused_top_k: k = {k} of E = {logits.shape[1]} experts; the kernel takes at most k = {_MOST_CHOICES} of "
        f"{_MOST_EXPERTS}. Use top_k, which takes any."
    )
