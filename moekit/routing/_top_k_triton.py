"""Token choice from logits in one pass, and its gradient, as Triton kernels.

One program decides for a few tokens, whose scores stay in registers: it reads each logit once and writes K numbers and
weights a token. Counts are added up as integers, in any order the same.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit.operators import blocks_of, differentiated_once, operator, power_of_two
from moekit.routing._selection_triton import LOWEST, in_order

_SMALLEST_SUM = tl.constexpr(1e-20)  # as ``moekit.routing.top_k``
_NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def _scores(z, SOFTMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turn logits (TOKENS, BINS), -inf past the last expert, into scores; and what turns one logit into its score."""
    if SOFTMAX:
        top = tl.max(z, 1)
        powers = tl.exp(z - top[:, None])
        total = tl.sum(powers, 1)
        scores = powers / total[:, None]
    else:
        top = tl.zeros((z.shape[0],), tl.float32)
        total = top
        scores = tl.sigmoid(z)
    return scores, top, total


@triton.jit
def _scores_of(picked, top, total, SOFTMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Turn some of a token's logits (TOKENS, CHOICES) into their scores, by what ``_scores`` returned."""
    return tl.exp(picked - top[:, None]) / total[:, None] if SOFTMAX else tl.sigmoid(picked)


@triton.jit
def _sortable(scores):  # type: ignore[no-untyped-def]
    """Return int32 in the order of float32 scores, NaN before all."""
    bits = tl.where(scores != scores, _NAN_BITS, scores.to(tl.int32, bitcast=True))
    return in_order(bits)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits,
    bias,
    experts,
    weights,
    numbers,
    counts,
    num_tokens,
    num_experts,
    scale,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUNTED: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    bins, choices = tl.arange(0, BINS), tl.arange(0, CHOICES)
    real = (tokens < num_tokens)[:, None]
    known = (bins < num_experts)[None, :]
    z = tl.load(logits + tokens[:, None] * num_experts + bins[None, :], mask=real & known, other=0.0)
    z = tl.where(known, z, float("-inf"))
    scores, top, total = _scores(z, SOFTMAX)
    if bias is not None:
        scores += tl.load(bias + bins, mask=bins < num_experts, other=0.0)[None, :]
    keys = tl.where(known, _sortable(scores), LOWEST)
    chosen = tl.zeros((TOKENS, CHOICES), tl.int32)
    for choice in range(K):
        best = tl.max(keys, 1)
        expert = tl.min(tl.where(keys == best[:, None], bins[None, :], BINS), 1)  # the first of those that have it
        chosen = tl.where(choices[None, :] == choice, expert[:, None], chosen)
        keys = tl.where(bins[None, :] == expert[:, None], LOWEST, keys)
    writes = real & (choices < K)[None, :]
    picked = tl.load(logits + tokens[:, None] * num_experts + chosen, mask=writes, other=0.0)
    found = _scores_of(picked, top, total, SOFTMAX)
    if NORMALIZE:
        sums = tl.sum(tl.where(choices[None, :] < K, found, 0.0), 1)
        found /= tl.maximum(sums, _SMALLEST_SUM)[:, None]
    places = tokens[:, None] * K + choices[None, :]
    tl.store(experts + places, chosen.to(tl.int64), mask=writes)
    tl.store(weights + places, found * scale, mask=writes)
    tl.store(numbers + tokens, tokens, mask=tokens < num_tokens)
    if COUNTED:
        taken = tl.sum(((keys == LOWEST) & real).to(tl.int32), 0)
        tl.atomic_add(counts + bins, taken.to(tl.int64), mask=(bins < num_experts) & (taken > 0))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    logits,
    experts,
    grad_logits,
    num_tokens,
    num_experts,
    scale,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    bins, choices = tl.arange(0, BINS), tl.arange(0, CHOICES)
    real = (tokens < num_tokens)[:, None]
    known = (bins < num_experts)[None, :]
    z = tl.load(logits + tokens[:, None] * num_experts + bins[None, :], mask=real & known, other=0.0)
    scores, top, total = _scores(tl.where(known, z, float("-inf")), SOFTMAX)
    places = tokens[:, None] * K + choices[None, :]
    reads = real & (choices < K)[None, :]
    chosen = tl.load(experts + places, mask=reads, other=0)
    of_chosen = tl.load(grad + places, mask=reads, other=0.0) * scale
    picked = tl.load(logits + tokens[:, None] * num_experts + chosen, mask=reads, other=0.0)
    found = _scores_of(picked, top, total, SOFTMAX)
    found = tl.where(reads, found, 0.0)
    if NORMALIZE:  # w = s / sum(s), or s / smallest where the sum is below it, a constant
        sums = tl.sum(found, 1)
        divisor = tl.maximum(sums, _SMALLEST_SUM)
        shared = tl.where(sums >= _SMALLEST_SUM, tl.sum(of_chosen * found, 1) / divisor, 0.0)
        of_chosen = tl.where(reads, (of_chosen - shared[:, None]) / divisor[:, None], 0.0)
    of_scores = tl.zeros((TOKENS, BINS), tl.float32)
    for choice in range(K):
        mine = choices[None, :] == choice
        expert = tl.sum(tl.where(mine, chosen, 0), 1)
        of_one = tl.sum(tl.where(mine, of_chosen, 0.0), 1)
        of_scores = tl.where(bins[None, :] == expert[:, None], of_one[:, None], of_scores)
    if SOFTMAX:
        result = scores * (of_scores - tl.sum(of_chosen * found, 1)[:, None])
    else:
        result = scores * (1.0 - scores) * of_scores
    tl.store(grad_logits + tokens[:, None] * num_experts + bins[None, :], result, mask=real & known)


def _tile(num_experts: int, k: int, *, counted: bool = False) -> dict[str, int]:
    """Choose by shape class: few experts share a program with many tokens, many have a warp to themselves.

    A maximum over one warp's scores needs no shared memory, and there are K of them. Programs that count are fewer,
    since all of them add to the same numbers.
    """
    bins = max(16, power_of_two(num_experts))
    if bins < 32:
        scores, warps = 1024, 4
    elif bins < 256:
        scores, warps = (2048, 4) if counted else (1024, 2)
    else:
        scores, warps = 512, 1
    return {
        "BINS": bins,
        "TOKENS": max(1, scores // bins),
        "CHOICES": power_of_two(k),
        "num_warps": warps,
    }


@lru_cache(maxsize=512)
def _choose_launch(
    num_tokens: int, num_experts: int, k: int, softmax: bool, normalize: bool, scale: float, biased: bool, counted: bool
) -> Launch:
    tile = _tile(num_experts, k, counted=counted)
    return Launch(
        _choose_kernel,
        (blocks_of(num_tokens, tile["TOKENS"]),),
        (POINTER, POINTER if biased else None, *(4 * (POINTER,)), num_tokens, num_experts, scale),
        **{"K": k, "SOFTMAX": softmax, "NORMALIZE": normalize, "COUNTED": counted, **tile},
    )


@lru_cache(maxsize=512)
def _backward_launch(num_tokens: int, num_experts: int, k: int, softmax: bool, normalize: bool, scale: float) -> Launch:
    tile = _tile(num_experts, k)
    return Launch(
        _backward_kernel,
        (blocks_of(num_tokens, tile["TOKENS"]),),
        (*(4 * (POINTER,)), num_tokens, num_experts, scale),
        **{"K": k, "SOFTMAX": softmax, "NORMALIZE": normalize, **tile},
    )


def _fused_top_k_fake(
    logits: Tensor, bias: Tensor | None, k: int, softmax: bool, normalize: bool, scale: float, counted: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    experts, counts, numbers = (
        logits.new_empty(size, dtype=torch.int64)
        for size in ((num_tokens, k), (num_experts if counted else 0,), (num_tokens,))
    )
    return logits.new_empty(num_tokens, k), experts, counts, numbers


@operator("fused_top_k", _fused_top_k_fake)
def _choose(
    logits: Tensor, bias: Tensor | None, k: int, softmax: bool, normalize: bool, scale: float, counted: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    device = logits.device
    experts = torch.empty(num_tokens, k, dtype=torch.int64, device=device)
    weights = torch.empty(num_tokens, k, dtype=logits.dtype, device=device)
    numbers = torch.empty(num_tokens, dtype=torch.int64, device=device)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device) if counted else experts.new_empty(0)
    if num_tokens:
        launch = _choose_launch(num_tokens, num_experts, k, softmax, normalize, scale, bias is not None, counted)
        given = () if bias is None else (bias.contiguous(),)
        launch(logits, *given, experts, weights, numbers, counts)
    return weights, experts, counts, numbers


def _fused_top_k_backward_fake(
    grad: Tensor, logits: Tensor, experts: Tensor, softmax: bool, normalize: bool, scale: float
) -> Tensor:
    return logits.new_empty(logits.shape)


@operator("fused_top_k_backward", _fused_top_k_backward_fake)
def _grad_logits(grad: Tensor, logits: Tensor, experts: Tensor, softmax: bool, normalize: bool, scale: float) -> Tensor:
    """Return the gradient (T, E) of the logits from that of the weights (T, K)."""
    grad, logits = grad.contiguous(), logits.contiguous()
    (num_tokens, num_experts), k = logits.shape, experts.shape[1]
    grad_logits = torch.empty_like(logits)
    if num_tokens:
        _backward_launch(num_tokens, num_experts, k, softmax, normalize, scale)(grad, logits, experts, grad_logits)
    return grad_logits


class _FusedTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        weights, *integers = _choose(logits, *options)
        ctx.mark_non_differentiable(*integers)
        ctx.set_materialize_grads(False)  # integers would get zeros, each by a kernel
        ctx.save_for_backward(logits, integers[0])
        ctx.options = options[2:5]  # softmax, normalize, scale
        return weights, *integers

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_integers: None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        logits, experts = ctx.saved_tensors
        of_logits = None if grad is None else _grad_logits(grad, logits, experts, *ctx.options)
        return differentiated_once("fused_top_k", (grad, logits), of_logits, *(None,) * 6)


def fused_top_k(
    logits: Tensor, bias: Tensor | None, k: int, softmax: bool, normalize: bool, scale: float, *, counted: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose experts and weigh them, as ``moekit.routing.top_k`` with a softmax or, if not, a sigmoid.

    No host synchronisation. Deterministic.

    Args:
        logits: (T, E) float32, E at most 1024.
        bias: (E,) float32, added to the scores for the choice only.
        k: at most 32.
        softmax: False is a sigmoid.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        counted: whether to count the tokens of each expert.

    Returns:
        weights (T, K) float32; experts (T, K) int64; tokens per expert (E,) int64, or (0,) if they are not counted; and
        the numbers of the tokens (T,) int64, from 0 on.
    """
    weights, experts, counts, numbers = _FusedTopK.apply(logits, bias, k, softmax, normalize, scale, counted)
    return weights, experts, counts, numbers
