"""The product of a gate for bfloat16 tokens on CUDA, as exact as in float32, on the units for bfloat16.

A product of two bfloat16 numbers is exact in float32, where the units sum; and a float32 number is the sum of three
bfloat16 numbers to its last bit, of two to 2^-17 of it. So no token is ever written as float32.

What is done beside the products has a plain version in torch, ``PLAIN``, and one in Triton that gives the same bits.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.operators import operator
from moekit.routing._autocast import outside_autocast

HALF = torch.bfloat16  # float16 has too few exponents for the second and third number
_TRITON = find_spec("triton") is not None


def takes(x: Tensor, w: Tensor) -> bool:
    """Say whether ``logits`` is for these tensors."""
    return x.is_cuda and x.dtype == HALF and w.dtype in (HALF, torch.float32)


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


class Steps(NamedTuple):
    """What is done beside the products, by one means: functions with the signatures of this module's.

    Attributes:
        split: float32 numbers into parts.
        grad_parts: the gradient of logits into parts.
        folded: the terms of a product added up.
        gate_gradient: the same for a gradient, and the gate as pairs.
    """

    split: Callable[..., Tensor]
    grad_parts: Callable[..., tuple[Tensor, Tensor]]
    folded: Callable[..., Tensor]
    gate_gradient: Callable[..., tuple[Tensor, Tensor]]


PLAIN = Steps(split, grad_parts, folded, gate_gradient)


def _steps(x: Tensor) -> Steps:
    if x.is_cuda and _TRITON:
        from moekit.routing._half_gates_triton import KERNELS

        return KERNELS
    return PLAIN


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply bfloat16 matrices to a float32 one."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # as exact, where there are no such units


def _product_fake(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1], dtype=torch.float32)


@operator("half_gate", _product_fake)
def _product(x: Tensor, w: Tensor) -> Tensor:
    with outside_autocast(x.device.type):
        if w.dtype == HALF:
            return product(x, w)
        steps = _steps(x)
        return steps.folded(product(x, steps.split(w, 3)), 3)


def _grad_fake(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


@operator("half_gate_backward", _grad_fake)
def _grad(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and gate; as many terms as their dtypes have bits for."""
    steps = _steps(x)
    with outside_autocast(x.device.type):
        parts, left = steps.grad_parts(grad, 2 if w.dtype == HALF else 3)
        grad_w, pairs = steps.gate_gradient(product(x.T, parts), w)
        return torch.mm(left, pairs.T), grad_w


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return _product(x, w)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        grad_x, grad_w = _grad(grad, *ctx.saved_tensors)
        return grad_x, grad_w


def logits(x: Tensor, w: Tensor) -> Tensor:
    """Multiply tokens (T, D) bfloat16 by a gate (D, E), bfloat16 or float32, to (T, E) float32."""
    z: Tensor = _Logits.apply(x, w)
    return z
