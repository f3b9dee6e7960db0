"""What a gate in bfloat16 takes beside torch's products, in torch: numbers into parts that add up to them, and back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HALF = torch.bfloat16  # float16 has too few exponents for the second and third number


def split(values: Tensor, terms: int, *, half: torch.dtype = HALF) -> Tensor:
    """Write float32 (N, M) as (N, terms * M) of a narrower dtype, blocks of M columns that add up to it."""
    parts = torch.empty(values.shape[0], terms, values.shape[1], dtype=half, device=values.device)
    rest = values
    for i in range(terms):
        parts[:, i].copy_(rest)
        if i + 1 < terms:
            rest = rest - parts[:, i]
    return parts.flatten(1)


def grad_parts(grad: Tensor, terms: int, *, half: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    """Split the gradient of logits (T, E), for the two products that it is in.

    Args:
        grad: (T, E) float32.
        terms: 2 for a gate of the narrower dtype, 3 for one of float32.
        half: the narrower dtype.

    Returns:
        The parts (T, terms * E), for the gradient of the gate; and, for that of tokens, the first two, (T, 2 E), or
        with three terms both of them twice, (T, 4 E).
    """
    parts = split(grad, terms, half=half)
    if terms == 2:
        return parts, parts
    first = parts[:, : 2 * grad.shape[1]]
    return parts, torch.cat([first, first], 1)


def folded(sums: Tensor, terms: int) -> Tensor:
    """Add up blocks of columns: (N, terms * M) float32 to (N, M), from the first to the last."""
    total: Tensor = sum(sums.unflatten(1, (terms, -1)).unbind(1))
    return total


def gate_gradient(sums: Tensor, w: Tensor, *, half: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    """Finish the gradient of a gate, and write the gate as the gradient of tokens is to be multiplied by it.

    Args:
        sums: (D, terms * E) float32, tokens times the parts of the gradient.
        w: the gate (D, E), of the narrower dtype or float32.
        half: the narrower dtype.

    Returns:
        The gradient (D, E), the dtype of ``w``; and the gate twice, (D, 2 E), or each of its two halves twice,
        (D, 4 E): the first part of a gradient is multiplied by both halves, and so is the second.
    """
    grad = folded(sums, sums.shape[1] // w.shape[1]).to(w.dtype)
    if w.dtype == half:
        return grad, torch.cat([w, w], 1)
    halves = split(w, 2, half=half).unflatten(1, (2, -1))
    return grad, torch.cat([halves[:, i] for i in (0, 0, 1, 1)], 1)


def add_product(left: Tensor, right: Tensor, beside: Tensor) -> Tensor:
    """Return left (T, M) times right (D, M), transposed, plus beside (T, D), summed in float32; one dtype for all."""
    return (left.float() @ right.float().T + beside.float()).to(beside.dtype)


class Steps(NamedTuple):
    """What is done beside the products, by one means: functions with the signatures of this module's.

    Attributes:
        split: float32 numbers into parts.
        grad_parts: the gradient of logits into parts.
        folded: the terms of a product added up.
        gate_gradient: the same for a gradient, and the gate as pairs.
        add_product: the gradient of tokens added to another.
    """

    split: Callable[..., Tensor]
    grad_parts: Callable[..., tuple[Tensor, Tensor]]
    folded: Callable[..., Tensor]
    gate_gradient: Callable[..., tuple[Tensor, Tensor]]
    add_product: Callable[[Tensor, Tensor, Tensor], Tensor]


PLAIN = Steps(split, grad_parts, folded, gate_gradient, add_product)
