"""The grouped matrix product on the CPU, with its gradients, as custom operators that write into one output."""

import torch
from torch import Tensor

from moekit.experts._huge_pages import empty
from moekit.experts._memory_order import is_transposed
from moekit.operators import differentiated_once, transformable


@torch.library.custom_op("moekit::grouped_mm_cpu", mutates_args=(), device_types="cpu")
def grouped_mm(rows: Tensor, sizes: Tensor, w: Tensor) -> Tensor:
    """Multiply rows (R, D), grouped by ``sizes`` (E,), by w (E, D, F) to (R, F), whose tail is zero."""
    out = empty((rows.shape[0], w.shape[2]), rows.dtype)
    end = 0
    for start, end, w_e in zip(*_bounds(sizes), w, strict=True):
        torch.mm(rows[start:end], w_e, out=out[start:end])
    out[end:].zero_()  # nobody reads it but autograd's search for NaN, which old memory may hold
    return out


@torch.library.custom_op("moekit::grouped_mm_cpu_grad_w", mutates_args=(), device_types="cpu")
def _grad_w(rows: Tensor, sizes: Tensor, grad: Tensor) -> Tensor:
    """Multiply each group's rows (R, D), transposed, by its grad (R, F), to (E, D, F); zero for an empty group."""
    out = empty((sizes.shape[0], rows.shape[1], grad.shape[1]), rows.dtype)
    for start, end, out_e in zip(*_bounds(sizes), out, strict=True):
        torch.mm(rows[start:end].T, grad[start:end], out=out_e)
    return out


@grouped_mm.register_fake
def _(rows: Tensor, sizes: Tensor, w: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[2])


@_grad_w.register_fake
def _(rows: Tensor, sizes: Tensor, grad: Tensor) -> Tensor:
    return rows.new_empty(sizes.shape[0], rows.shape[1], grad.shape[1])


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    rows, sizes, w = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = product(grad, sizes, w.transpose(1, 2)) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[2]:
        return grad_rows, None, None
    with torch.no_grad():
        # Of a transposed view autograd would copy a gradient of the other layout.
        grad_w = _grad_w(grad, sizes, rows).transpose(1, 2) if is_transposed(w) else _grad_w(rows, sizes, grad)
    return grad_rows, *differentiated_once("grouped", (grad, rows), None, grad_w)


grouped_mm.register_autograd(_backward, setup_context=_save)
product = transformable("grouped", grouped_mm, _backward, _save)


def _bounds(sizes: Tensor) -> tuple[list[int], list[int]]:
    ends = sizes.cumsum(0).tolist()
    return [0, *ends][: len(ends)], ends
