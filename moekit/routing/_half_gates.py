"""The product of a gate for bfloat16 tokens on CUDA, as exact as in float32, on the units for bfloat16.

A product of two bfloat16 numbers is exact in float32, where the units sum; and a float32 number is the sum of three
bfloat16 numbers to its last bit, of two to 2^-17 of it. So no token is ever written as float32.

What is done beside the products has a plain version in torch, ``_half_steps``, and one in Triton that gives the same
bits, but for a product that is added to something: its sums are taken in another order.
"""

import torch
from torch import Tensor

from moekit.autocast import outside_autocast
from moekit.operators import HAS_TRITON, differentiated_once, is_transformed, operator
from moekit.routing._half_steps import HALF, PLAIN, Steps


def takes(x: Tensor, w: Tensor) -> bool:
    """Say whether ``logits`` is for these tensors."""
    return x.is_cuda and x.dtype == HALF and w.dtype in (HALF, torch.float32) and not is_transformed()


def _steps(x: Tensor) -> Steps:
    if x.is_cuda and HAS_TRITON:
        from moekit.routing._half_steps_triton import KERNELS

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


def _grad_fake(grad: Tensor, x: Tensor, w: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


@operator("half_gate_backward", _grad_fake)
def _grad(grad: Tensor, x: Tensor, w: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens, with what is ``beside`` it, and of the gate; finer for a gate of more bits."""
    steps = _steps(x)
    with outside_autocast(x.device.type):
        parts, left = steps.grad_parts(grad, 2 if w.dtype == HALF else 3)
        grad_w, pairs = steps.gate_gradient(product(x.T, parts), w)
        grad_x = torch.mm(left, pairs.T) if beside is None else steps.add_product(left, pairs, beside)
        return grad_x, grad_w


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return _product(x, w)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        return differentiated_once("linear_gate", (grad, x, w), *_grad(grad, x, w, None))


class _LogitsAndTokens(torch.autograd.Function):
    """(x, w) -> logits, and x for what comes after the gate, whose gradient is added to the gate's own."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        ctx.set_materialize_grads(False)
        return _product(x, w), x.view_as(x)

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad: Tensor | None, beside: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return beside, None
        x, w = ctx.saved_tensors
        return differentiated_once("linear_gate", (grad, beside, x, w), *_grad(grad, x, w, beside))


def logits(x: Tensor, w: Tensor) -> Tensor:
    """Multiply tokens (T, D) bfloat16 by a gate (D, E), bfloat16 or float32, to (T, E) float32."""
    z: Tensor = _Logits.apply(x, w)
    return z


def logits_and_tokens(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Do what ``logits`` does, and return the tokens as well.

    Who goes on with these sends their gradient through the gate, which adds its own in the same pass.
    """
    if not x.requires_grad:
        return logits(x, w), x
    z, tokens = _LogitsAndTokens.apply(x, w)
    return z, tokens
