"""Whom experts keep and whom they take besides when loads are rounded, as Triton kernels.

Both select the n greatest of an expert's keys, one program for each expert: see ``_selection_triton``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit._operators_triton import POINTER, Launch
from moekit.operators import blocks_of, operator, power_of_two
from moekit.routing._selection_triton import LOWEST, LOWEST_FINITE, find_threshold, key_of, selected

_WEIGHED = 1024  # assignments that one program writes the keys of
_SCORED = 4096  # scores that one program turns
_LEAST_CHUNK, _MOST_CHUNK = 256, 2048  # keys that a selection reads at once


@triton.jit
def _weigh_kernel(weights, order, keys, kept, num_assignments, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the keys of assignments by expert, the last one first; the lightest has the greatest. Keep none yet."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = places < num_assignments
    assignments = tl.load(order + places, mask=real, other=0)
    key = ~key_of(tl.load(weights + assignments, mask=real, other=0.0))
    tl.store(keys + (num_assignments - 1 - places), key, mask=real)
    tl.store(kept + places, tl.zeros((BLOCK,), tl.int1), mask=real)


@triton.jit
def _keep_kernel(  # type: ignore[no-untyped-def]
    keys,
    aside,
    order,
    sizes,
    limits,
    kept,
    num_assignments,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Keep all assignments of an expert but the lightest ones past its limit; of equals it loses the last ones."""
    expert = tl.program_id(0)
    bins, lanes = tl.arange(0, BINS), tl.arange(0, CHUNK)
    begin = tl.sum(tl.load(sizes + bins, mask=bins < expert, other=0)).to(tl.int32)
    size = tl.load(sizes + expert)
    lost = (size - tl.minimum(tl.maximum(tl.load(limits + expert), 0), size)).to(tl.int32)
    size = size.to(tl.int32)
    first = num_assignments - begin - size
    threshold = tl.full((), 2**31 - 1, tl.int32)
    ties = tl.full((), 0, tl.int32)
    if lost > 0:
        threshold, above = find_threshold(keys + first, size, lost, aside + first, CHUNK)
        ties = lost - above
    for start in range(0, size, CHUNK):
        places = start + lanes
        real = places < size
        some = tl.load(keys + first + places, mask=real, other=LOWEST)
        gone, ties = selected(some, real, threshold, ties)
        assignments = tl.load(order + (begin + size - 1 - places), mask=real, other=0)
        tl.store(kept + assignments, tl.full((CHUNK,), 1, tl.int1), mask=real & ~gone)


@triton.jit
def _score_kernel(  # type: ignore[no-untyped-def]
    scores,
    experts,
    keys,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Write the keys (E, T) of scores (T, E), the lowest for tokens that chose the expert."""
    num_blocks = tl.cdiv(num_experts, BINS)
    tokens = (tl.program_id(0) // num_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    bins = (tl.program_id(0) % num_blocks) * BINS + tl.arange(0, BINS)
    real = tokens < num_tokens
    inside = real[:, None] & (bins < num_experts)[None, :]
    chosen = tl.zeros((TOKENS, BINS), tl.int1)
    for choice in range(K):
        expert = tl.load(experts + tokens * K + choice, mask=real, other=-1).to(tl.int32)
        chosen |= expert[:, None] == bins[None, :]
    found = tl.load(scores + tokens[:, None] * num_experts + bins[None, :], mask=inside, other=0.0)
    key = tl.where(chosen, LOWEST, tl.maximum(key_of(found), LOWEST_FINITE))
    tl.store(keys + bins[None, :].to(tl.int64) * num_tokens + tokens[:, None], key, mask=inside)


@triton.jit
def _take_kernel(  # type: ignore[no-untyped-def]
    keys, aside, counts, taken, num_tokens, number, room, CHUNK: tl.constexpr
):
    """Write the tokens that an expert takes besides, in their order, and zeros behind them."""
    expert = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    wanted = tl.minimum(tl.maximum(tl.load(counts + expert), 0), number).to(tl.int32)
    taken += expert * number
    for start in range(0, number, CHUNK):
        places = start + lanes
        tl.store(taken + places, tl.zeros((CHUNK,), tl.int64), mask=(places >= wanted) & (places < number))
    if wanted > 0:
        mine = keys + expert * num_tokens
        threshold, above = find_threshold(mine, num_tokens, wanted, aside + expert * room, CHUNK)
        ties = wanted - above
        written = tl.full((), 0, tl.int32)
        for start in range(0, num_tokens, CHUNK):
            tokens = start + lanes
            real = tokens < num_tokens
            some = tl.load(mine + tokens, mask=real, other=LOWEST)
            takes, ties = selected(some, real, threshold, ties)
            places = written + tl.cumsum(takes.to(tl.int32), 0) - 1
            tl.store(taken + places, tokens.to(tl.int64), mask=takes)
            written += tl.sum(takes.to(tl.int32))


def _chunk(length: int) -> dict[str, int]:
    """Choose by how many keys an expert has, so that most have theirs in one chunk."""
    chunk = min(_MOST_CHUNK, max(_LEAST_CHUNK, power_of_two(max(1, length))))
    return {"CHUNK": chunk, "num_warps": 4 if chunk <= 512 else 8}


@lru_cache(maxsize=512)
def _weigh_launch(num_assignments: int) -> Launch:
    grid = (blocks_of(num_assignments, _WEIGHED),)
    return Launch(_weigh_kernel, grid, (*(4 * (POINTER,)), num_assignments), BLOCK=_WEIGHED)


@lru_cache(maxsize=512)
def _keep_launch(num_assignments: int, num_experts: int) -> Launch:
    chunk = _chunk(2 * num_assignments // num_experts)  # twice the mean
    arguments = (*(6 * (POINTER,)), num_assignments)
    return Launch(_keep_kernel, (num_experts,), arguments, BINS=power_of_two(num_experts), **chunk)


@lru_cache(maxsize=512)
def _score_launch(num_tokens: int, num_experts: int, k: int) -> Launch:
    bins = min(64, max(16, power_of_two(num_experts)))
    tokens = _SCORED // bins
    grid = (blocks_of(num_tokens, tokens) * blocks_of(num_experts, bins),)
    arguments = (POINTER, POINTER, POINTER, num_tokens, num_experts)
    return Launch(_score_kernel, grid, arguments, K=k, TOKENS=tokens, BINS=bins, num_warps=8)


@lru_cache(maxsize=512)
def _take_launch(num_tokens: int, num_experts: int, number: int) -> tuple[Launch, int]:
    """Decide the kernel, and how many keys of an expert may be put aside."""
    chunk = _chunk(num_tokens)
    room = min(num_tokens, number * blocks_of(num_tokens, chunk["CHUNK"]))
    arguments = (*(4 * (POINTER,)), num_tokens, number, room)
    return Launch(_take_kernel, (num_experts,), arguments, **chunk), room


def _heaviest_fake(weights: Tensor, order: Tensor, sizes: Tensor, limits: Tensor) -> Tensor:
    return weights.new_empty(weights.shape, dtype=torch.bool)


@operator("heaviest", _heaviest_fake)
def heaviest(weights: Tensor, order: Tensor, sizes: Tensor, limits: Tensor) -> Tensor:
    """Say which assignments are among the limits[e] heaviest of their expert; ties go to the earlier assignment.

    No host synchronisation. Deterministic. NaN counts as infinity.

    Args:
        weights: (N,) float32; N < 2^31.
        order: (N,) int64, the assignments by expert, in their order within one; those that do not exist come last.
        sizes: (E,) int64, how many each expert has.
        limits: (E,) int64, how many of them it keeps; none if negative.

    Returns:
        (N,) bool; False for assignments that do not exist.
    """
    num_assignments, num_experts = weights.shape[0], sizes.shape[0]
    weights, order = weights.contiguous(), order.contiguous()
    kept = torch.empty_like(weights, dtype=torch.bool)
    if num_assignments:
        keys, aside = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights, dtype=torch.int32)
        _weigh_launch(num_assignments)(weights, order, keys, kept)
        keep = _keep_launch(num_assignments, num_experts)
        keep(keys, aside, order, sizes.contiguous(), limits.contiguous(), kept)
    return kept


def _besides_fake(scores: Tensor, experts: Tensor, counts: Tensor, number: int) -> Tensor:
    return scores.new_empty(counts.shape[0], number, dtype=torch.int64)


@operator("besides", _besides_fake)
def besides(scores: Tensor, experts: Tensor, counts: Tensor, number: int) -> Tensor:
    """Find the counts[e] tokens that expert e scores highest among those that did not choose it.

    No host synchronisation. Deterministic. Ties go to the earlier token. NaN counts as infinity, and -infinity as the
    lowest finite number.

    Args:
        scores: (T, E) float32; T < 2^31.
        experts: (T, K) int64 in [0, E), or -1: those that each token chose.
        counts: (E,) int64, at most the tokens that did not choose e; none if negative.
        number: how many there is place for, at most T; counts past it are cut off.

    Returns:
        (E, number) int64, for each expert the tokens in ascending order, then zeros.
    """
    (num_tokens, num_experts), device = scores.shape, scores.device
    taken = torch.empty(num_experts, number, dtype=torch.int64, device=device)
    if taken.numel():
        keys = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=device)
        _score_launch(num_tokens, num_experts, experts.shape[1])(scores.contiguous(), experts.contiguous(), keys)
        take, room = _take_launch(num_tokens, num_experts, number)
        aside = torch.empty(num_experts * room, dtype=torch.int32, device=device)
        take(keys, aside, counts.contiguous(), taken)
    return taken
