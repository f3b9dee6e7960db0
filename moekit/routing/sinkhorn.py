"""Sinkhorn: scores made balanced over the batch before each token takes its best experts."""

import torch
from torch import Tensor

from moekit.autocast import outside_autocast
from moekit.routing.gates import noisy
from moekit.routing.top_k import Score, check_choice, scored, shifted, sigmoid, softmax, token_choice, weights_at
from moekit.types import Logits, Routing

_SMALLEST_SUM = 1e-8  # Megatron-LM's, part of the formula

_BLOCK = 4096  # tokens that a CPU adds up one after the other


def sinkhorn(
    logits: Logits,
    *,
    k: int,
    num_iterations: int = 30,
    tolerance: float = 1e-4,
    score: Score | None = None,
    balanced: bool = True,
    token_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Choose by balanced scores, weigh by plain ones: S = topK(d0 M d1), M = exp z, g = s(z)_S.

    d1 comes from ``sinkhorn_scales``; d0 is one factor per token, which changes no choice, so that topK(z + ln d1) is
    taken, where nothing underflows. The selection carries no gradient. As S-BASE, which uses the balanced scores in
    training alone, ``balanced=False`` is the choice at evaluation: topK(z), the greedy one of BASE too.

    Not causal when balanced: the scales depend on every token of the batch. Causal with ``balanced=False``. No host
    synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: (T, E) float32, with or without noise.
        k: experts per token, 1 <= k <= E.
        num_iterations: the most there are; see ``sinkhorn_scales``.
        tolerance: of the scales.
        score: (T, E) logits -> (T, E) scores, of which the weights are taken; None takes sigmoid for k = 1 and softmax
            otherwise, as Megatron-LM.
        balanced: whether to balance; False for evaluation.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. Others do not count in the scales.
        bias: (E,) added to z + ln d1 for the selection only.

    Returns:
        Routing of shape (T, k). The weights of a token do not sum to one.

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> sinkhorn(logits, k=1).expert_indices.flatten()
        tensor([0, 1])
        >>> sinkhorn(logits, k=1, balanced=False).expert_indices.flatten()
        tensor([0, 0])

    References:
        Clark et al., Unified Scaling Laws for Routed Language Models, 2022, section 2.2 (S-BASE),
            https://arxiv.org/abs/2202.01169
        Lewis et al., BASE Layers, 2021, https://arxiv.org/abs/2103.16716
    """
    logits = noisy(logits)
    check_choice(logits, k, name="sinkhorn")
    selection = logits.detach()
    if balanced:
        scales = sinkhorn_scales(selection, num_iterations=num_iterations, tolerance=tolerance, token_mask=token_mask)
        selection = selection + scales.log()
    expert_indices = torch.topk(shifted(selection, bias), k, dim=-1).indices
    score = (sigmoid if k == 1 else softmax) if score is None else score
    return token_choice(expert_indices, weights_at(scored(score, logits), expert_indices), logits)


@torch.no_grad()
def sinkhorn_scales(
    logits: Tensor, *, num_iterations: int = 30, tolerance: float = 1e-4, token_mask: Tensor | None = None
) -> Tensor:
    """Compute the factor d1 of each expert that makes exp(z) balanced over the batch.

    From d1 = 1, repeat d0_t = 1 / (T (sum_e d1_e M_te + 1e-8)) and d1_e = 1 / (E (sum_t d0_t M_te + 1e-8)) until the
    mean of abs(change of d1) is at most the tolerance. To know that without reading the device, every one of
    ``num_iterations`` steps is computed and d1 stands still from the first that met it: the result is that of the loop
    whenever the loop ends in time. Gaussian logits of standard deviation 1 need under 10 steps, of 3 about 15; some
    sharper ones drift for ever in the loop, which has no other end. ``tolerance=0`` is a fixed number of steps.

    M is taken relative to each token's largest logit, which scales d0 alone, so that no logit overflows.

    Not causal. No gradient. No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E) float32.
        num_iterations: the most there are, >= 1.
        tolerance: >= 0.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens.

    Returns:
        (E,) positive, the dtype of ``logits``; ones where no token is real.

    Raises:
        ValueError: if the number of iterations or the tolerance is not in range.

    Example:
        >>> sinkhorn_scales(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        tensor([1., 1.])

    References:
        Megatron-LM, megatron/core/transformer/moe/moe_utils.py, ``sinkhorn``, https://github.com/NVIDIA/Megatron-LM
        neuronx-distributed has the same with 30 steps and no tolerance.
    """
    if num_iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"sinkhorn: num_iterations = {num_iterations} and tolerance = {tolerance}; expected at least 1 and a "
            f"number >= 0. 30 steps and 1e-4 are the defaults; a tolerance of 0 takes every step."
        )
    num_experts = logits.shape[1]
    real = torch.ones_like(logits[:, 0]) if token_mask is None else token_mask.flatten().to(logits.dtype)
    kernel = torch.exp(logits - logits.amax(-1, keepdim=True)).masked_fill(real.unsqueeze(-1) == 0, 0.0)  # M
    total = real.sum()
    scales = logits.new_ones(num_experts)
    done = total == 0
    with outside_autocast(logits.device.type):
        for _ in range(num_iterations):
            tokens = 1 / (total * (kernel @ scales + _SMALLEST_SUM))  # d0
            new = 1 / (num_experts * (_over_tokens(tokens, kernel) + _SMALLEST_SUM))  # d1
            change = (new - scales).abs().mean()
            scales = torch.where(done, scales, new)
            done = done | (change <= tolerance)
    return scales


def _over_tokens(tokens: Tensor, kernel: Tensor) -> Tensor:
    """Compute sum_t d0_t M_te, (E,); on a CPU by blocks of tokens, for it adds them up one after the other.

    In float32 scales of a million tokens are off by 1e-4 and more so. Compiled code keeps the one product.
    """
    if not kernel.is_cpu or torch.compiler.is_compiling() or len(kernel) <= _BLOCK:
        return _product(tokens, kernel)
    blocks = zip(tokens.split(_BLOCK), kernel.split(_BLOCK), strict=True)
    return torch.stack([_product(block, rows) for block, rows in blocks]).sum(0)


def _product(vector: Tensor, matrix: Tensor) -> Tensor:
    """Multiply as ``@`` does, which reshapes its result in place: checkpointing that keeps products refuses that."""
    return (vector.unsqueeze(0) @ matrix)[0]
