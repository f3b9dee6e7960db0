"""Moving tokens to soft slots and back. Slots are tokens to whatever comes between: any expert layer takes them.

slots = mix_tokens(x, routing, token_mask=token_mask)
slots = layer(slots, slot_routing(routing, token_mask=token_mask), params)
y = spread_slots(slots, routing)
"""

import torch
from torch import Tensor

from moekit.autocast import outside_autocast
from moekit.checks import check_rows, flat_mask
from moekit.types import Routing, SoftRouting


def mix_tokens(x: Tensor, routing: SoftRouting, *, token_mask: Tensor | None = None) -> Tensor:
    """Mix tokens into slots, those of one expert next to each other: s_egs = sum_t D_gtes x_gt.

    Sums are taken in float32 (float64 for float64 tokens) even inside autocast. **Not causal.** No host
    synchronisation. Deterministic on CUDA.

    Args:
        x: (T, D).
        routing: over T tokens.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. The others are taken for zeros, since a
            share of zero does not keep NaN or infinity out of a sum.

    Returns:
        (E*G*S, D), the dtype of ``x``: expert by expert, pool by pool, slot by slot.

    Raises:
        ValueError: if ``x`` is not (T, D) with the routing's T, or the mask is not of T elements.

    Example:
        >>> half = torch.full((1, 2, 1, 1), 0.5)
        >>> mix_tokens(torch.tensor([[2.0], [4.0]]), SoftRouting(half, half))
        tensor([[3.]])

    References:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, 2023, equation 1, https://arxiv.org/abs/2308.00951
    """
    pools, size, num_experts, slots = routing.dispatch_weights.shape
    check_rows("mix_tokens: x", x, pools * size, "T, the tokens of the routing", made="this routing was")
    if token_mask is not None:
        x = x.masked_fill(~flat_mask(token_mask, pools * size).unsqueeze(1), 0.0)
    tokens = x.reshape(pools, size, x.shape[1])
    mixed = _einsum("gtes,gtd->egsd", routing.dispatch_weights, tokens)
    return mixed.reshape(num_experts * pools * slots, x.shape[1])


def spread_slots(slots: Tensor, routing: SoftRouting) -> Tensor:
    """Mix the outputs of slots into tokens, y_gt = sum_es C_gtes s_egs.

    Sums are taken in float32 (float64 for float64 slots) even inside autocast. No host synchronisation. Deterministic
    on CUDA.

    Args:
        slots: (E*G*S, D), in the order of ``mix_tokens``.
        routing: over T tokens.

    Returns:
        (T, D), the dtype of ``slots``.

    Raises:
        ValueError: if there are not E*G*S slots.

    Example:
        >>> half = torch.full((1, 2, 1, 1), 0.5)
        >>> spread_slots(torch.tensor([[3.0]]), SoftRouting(half, half)).flatten()
        tensor([1.5000, 1.5000])

    References:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, 2023, equation 3, https://arxiv.org/abs/2308.00951
    """
    pools, size, num_experts, each = routing.combine_weights.shape
    expected, meaning = num_experts * pools * each, "E*G*S, the slots of the routing"
    check_rows("spread_slots: slots", slots, expected, meaning, made="this routing was")
    outputs = slots.reshape(num_experts, pools, each, slots.shape[1])
    return _einsum("gtes,egsd->gtd", routing.combine_weights, outputs).reshape(pools * size, slots.shape[1])


def slot_routing(routing: SoftRouting, *, token_mask: Tensor | None = None) -> Routing:
    """Route slots as if they were tokens: each to the expert that it belongs to, with weight one.

    Every expert has exactly G*S of them, so a capacity factor of 1 drops nothing, and pads nothing unless a pool is
    empty. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: over T tokens.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. The slots of a pool without any are no
            assignments: expert -1 and weight 0.

    Returns:
        Routing of shape (E*G*S, 1), in the order of ``mix_tokens``.

    Raises:
        ValueError: if the mask has another number of elements than T.

    Example:
        >>> half = torch.full((1, 2, 2, 1), 0.5)
        >>> slot_routing(SoftRouting(half, half)).expert_indices.flatten()
        tensor([0, 1])
    """
    weights = routing.combine_weights
    pools, size, num_experts, slots = weights.shape
    number, each = num_experts * pools * slots, max(pools * slots, 1)
    rows = torch.arange(number, device=weights.device).unsqueeze(1)
    experts, ones = rows // each, torch.ones_like(rows, dtype=weights.dtype)
    if token_mask is not None:
        empty = ~flat_mask(token_mask, pools * size).view(pools, size).any(1)  # (G,)
        empty = empty.view(1, pools, 1).expand(num_experts, pools, slots).reshape(number, 1)
        experts, ones = experts.masked_fill(empty, -1), ones.masked_fill(empty, 0.0)
    return Routing(
        token_indices=rows,
        expert_indices=experts,
        weights=ones,
        num_tokens=number,
        num_experts=num_experts,
        pool=number,
    )


def _einsum(equation: str, weights: Tensor, rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with outside_autocast(rows.device.type):
        return torch.einsum(equation, weights.to(dtype), rows.to(dtype)).to(rows.dtype)
