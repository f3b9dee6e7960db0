"""The product of a gate for bfloat16 tokens on CUDA, as exact as in float32, on the units for bfloat16.

A product of two bfloat16 numbers is exact in float32, where the units sum; and a float32 number is the sum of three
bfloat16 numbers to its last bit, of two to 2^-17 of it. So no token is ever written as float32.
"""

import torch
from torch import Tensor

from moekit.operators import operator

_HALF = torch.bfloat16  # float16 has too few exponents for the second and third number


def takes(x: Tensor, w: Tensor) -> bool:
    """Say whether ``logits`` is for these tensors."""
    return x.is_cuda and x.dtype == _HALF and w.dtype in (_HALF, torch.float32)


def split(values: Tensor, terms: int) -> Tensor:
    """Write float32 (N, M) as (N, terms * M) bfloat16, blocks of M columns that add up to it."""
    parts = torch.empty(values.shape[0], terms, values.shape[1], dtype=_HALF, device=values.device)
    rest = values
    for i in range(terms):
        parts[:, i].copy_(rest)
        if i + 1 < terms:
            rest = rest - parts[:, i]
    return parts.flatten(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply bfloat16 matrices to a float32 one."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # as exact, where there are no such units


def _folded(values: Tensor, terms: int) -> Tensor:
    return values if terms == 1 else values.unflatten(1, (terms, -1)).sum(1)


def _product_fake(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1], dtype=torch.float32)


@operator("half_gate", _product_fake)
def _product(x: Tensor, w: Tensor) -> Tensor:
    terms = 1 if w.dtype == _HALF else 3
    with torch.autocast(x.device.type, enabled=False):
        return _folded(product(x, w if terms == 1 else split(w, terms)), terms)


def _grad_fake(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


@operator("half_gate_backward", _grad_fake)
def _grad(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and gate; as many terms as their dtypes have bits for."""
    terms, num_experts = 2 if w.dtype == _HALF else 3, grad.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        parts = split(grad, terms)
        grad_w = _folded(product(x.T, parts), terms).to(w.dtype)
        first = parts[:, : 2 * num_experts]
        if w.dtype == _HALF:
            return first @ torch.cat([w, w], 1).T, grad_w
        halves = split(w, 2)  # (D, 2 E): first part times both halves of the gate, second part times both
        pairs = torch.cat([halves.unflatten(1, (2, -1))[:, i] for i in (0, 0, 1, 1)], 1)
        return torch.cat([first, first], 1) @ pairs.T, grad_w


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
