"""Soft routing: each slot of an expert takes a mixture of tokens, and each token a mixture of all slots' outputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.checks import flat_mask
from moekit.routing.gates import check_parts, check_precision, linear_gate, noisy
from moekit.types import Logits, SoftRouting

_EPSILON = 1e-6  # added to lengths, as in the paper's listing 2


class SoftGateParams(NamedTuple):
    """Parameters of the soft gate.

    Attributes:
        slots: (D, E*S), a direction for each slot, those of one expert next to each other.
        scale: (1,), the factor on the cosines.

    Example:
        >>> params = SoftGateParams(torch.ones(4, 6), torch.ones(1))  # three experts of two slots
        >>> soft_gate(torch.ones(5, 4), params).shape
        torch.Size([5, 6])
    """

    slots: Tensor
    scale: Tensor


def soft_gate(x: Tensor, params: SoftGateParams) -> Tensor:
    """Score every slot for every token, z = scale * <x / |x|, mu / |mu|>, in float32 even inside autocast.

    Without the unit lengths the softmax collapses to one-hot as D grows. No host synchronisation. Deterministic on
    CUDA. Causal, which ``soft_slots`` is not.

    Args:
        x: (T, D), any floating dtype.
        params: of the gate.

    Returns:
        (T, E*S) float32 logits.

    Raises:
        ValueError: if the widths do not match, or the parameters are another gate's.

    Example:
        >>> params = SoftGateParams(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([2.0]))
        >>> soft_gate(torch.tensor([[7.0, 0.0]]), params).round(decimals=3)
        tensor([[2., 0.]])

    References:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, 2023, section 2.3, https://arxiv.org/abs/2308.00951
    """
    check_parts("soft_gate", params, SoftGateParams)
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens, slots = _unit(x.to(dtype), dim=-1), _unit(params.slots.to(dtype), dim=0)
    return linear_gate(tokens, slots) * params.scale.to(dtype)


def init_soft_gate(
    dim: int,
    num_experts: int,
    *,
    slots: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SoftGateParams:
    """Draw the parameters of a soft gate: normal directions, and a scale of one.

    Args:
        dim: D.
        num_experts: E.
        slots: S, per expert.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        SoftGateParams.

    Example:
        >>> init_soft_gate(16, 4, slots=2).slots.shape
        torch.Size([16, 8])
    """
    directions = torch.empty(dim, num_experts * slots, device=device, dtype=dtype)
    directions.normal_(std=dim**-0.5, generator=generator)
    return SoftGateParams(directions, torch.ones(1, device=device, dtype=dtype))


def soft_slots(
    logits: Logits,
    *,
    slots: int,
    sequence_length: int | None = None,
    token_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> SoftRouting:
    """Mix tokens into slots by a softmax over the tokens of a pool, and slots into tokens by one over all slots.

    A slot's input is sum_t D_tes x_t with D = softmax_t(z), a token's output sum_es C_tes y_es with C = softmax_es(z).
    Each pool has S slots of every expert.

    **Not causal**: every token sees every other of its pool. No host synchronisation. Deterministic on CUDA.

    Args:
        logits: (T, E*S) float32, with or without noise.
        slots: S, per expert and pool.
        sequence_length: tokens of a pool, so that sequences do not mix; None makes one pool of all T.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens. The others enter no slot and get
            nothing back, whatever their logits hold, as if they were left out. The slots of a pool without any real
            token are zero. ``mask_soft`` behind this router does the same, but only of logits that are finite.
        bias: ignored; nothing is selected.

    Returns:
        SoftRouting of (G, T/G, E, S).

    Raises:
        ValueError: if slots or pools do not divide the logits, these are in half precision, or the mask has another
            number of elements than T.

    Example:
        >>> routing = soft_slots(torch.zeros(6, 4), slots=2, sequence_length=3)
        >>> routing.dispatch_weights.shape, routing.combine_weights[0, 0, 0, 0]
        (torch.Size([2, 3, 2, 2]), tensor(0.2500))

    References:
        Puigcerver et al., From Sparse to Soft Mixtures of Experts, 2023, equations 1 to 3,
        https://arxiv.org/abs/2308.00951
    """
    pools = _pools(noisy(logits), slots, sequence_length)  # (G, T/G, E*S)
    shape = (*pools.shape[:2], pools.shape[2] // slots, slots)
    if token_mask is None:
        return SoftRouting(torch.softmax(pools, dim=1).view(shape), torch.softmax(pools, dim=2).view(shape))
    padding = _padding(token_mask, *shape[:2]).unsqueeze(-1)  # (G, T/G, 1)
    # The lowest number, not -infinity: a pool of padding alone has shares that are finite, and so is their gradient.
    shares, parts = (
        torch.softmax(pools.masked_fill(padding, lowest), dim=dim).masked_fill(padding, 0.0).view(shape)
        for dim, lowest in ((1, torch.finfo(pools.dtype).min), (2, 0.0))
    )
    return SoftRouting(shares, parts)


def mask_soft(routing: SoftRouting, token_mask: Tensor) -> SoftRouting:
    """Take padding tokens out of a soft routing: they enter no slot, and get nothing back.

    For routers that take no ``token_mask``, unlike ``soft_slots``: what is NaN in a padding token's logits is in the
    shares of its whole pool already.

    The shares of real tokens in a slot are divided by their sum, which makes them the softmax over real tokens alone.
    The slots of a pool without any real token are zero. Equal to leaving the tokens out, to rounding, as long as those
    left hold a share of each slot that float32 can tell from zero: unit lengths and a scale below 40 see to that.
    **Not causal**, as no soft routing is. No host synchronisation. Deterministic on CUDA.

    Args:
        routing: of T tokens.
        token_mask: (T,) bool, or any shape of T elements; True for real tokens.

    Returns:
        SoftRouting of the same shape.

    Raises:
        ValueError: if the mask has another number of elements than T.

    Example:
        >>> routing = mask_soft(soft_slots(torch.zeros(4, 1), slots=1), torch.tensor([True, True, False, False]))
        >>> routing.dispatch_weights.flatten(), routing.combine_weights.flatten()
        (tensor([0.5000, 0.5000, 0.0000, 0.0000]), tensor([1., 1., 0., 0.]))
    """
    padding = _padding(token_mask, *routing.dispatch_weights.shape[:2])[..., None, None]  # (G, T/G, 1, 1)
    shares = routing.dispatch_weights.masked_fill(padding, 0.0)
    total = shares.sum(1, keepdim=True)
    shares = shares / total.masked_fill(total == 0, 1.0)
    return SoftRouting(shares, routing.combine_weights.masked_fill(padding, 0.0))


def _unit(x: Tensor, *, dim: int) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + _EPSILON)


def _padding(token_mask: Tensor, pools: int, size: int) -> Tensor:
    """Return (G, T/G) bool, True for padding tokens."""
    return ~flat_mask(token_mask, pools * size).view(pools, size)


def _pools(logits: Tensor, slots: int, sequence_length: int | None) -> Tensor:
    check_precision("soft_slots", logits)
    if logits.ndim != 2 or slots < 1 or logits.shape[1] % slots:
        raise ValueError(
            f"soft_slots: logits have shape {tuple(logits.shape)} and slots = {slots}; expected (T, E*S), with S the "
            f"slots of an expert. Make the gate with the same number, init_soft_gate(..., slots={slots})."
        )
    num_tokens, width = logits.shape
    size = num_tokens if sequence_length is None else sequence_length
    if sequence_length is not None and (size < 1 or num_tokens % size):
        raise ValueError(
            f"soft_slots: sequence_length = {sequence_length} was given for T = {num_tokens} tokens; expected a "
            f"divisor of T. Pad the sequences to one length, and mask the padding with token_mask."
        )
    return logits.view(1 if sequence_length is None else num_tokens // size, size, width)
