"""The grouped product as Triton kernels: scheduled on the device, with tensor descriptors where there are."""

import torch
from torch import Tensor

from moekit.autocast import in_autocast
from moekit.experts._memory_order import is_transposed
from moekit.experts.checks import check_kernel_dtypes, check_precision, check_product
from moekit.operators import differentiated_once, operator, refuse_tangents, transformable
from moekit.types import Groups

# A program of the schedule compares 64 tiles with all groups, in a power of two of them, and no tensor of a Triton
# program has more than 2^20 entries.
_MOST_GROUPS = 2**14


def triton(rows: Tensor, groups: Groups, w: Tensor, *, precision: str = "ieee") -> Tensor:
    """Multiply groups of any sizes by kernels in Triton, of any widths; sums are taken in float32.

    Rows and weights are read by tensor descriptors (TMA) from Hopper on if D and F are multiples of 16 bytes, and by
    pointers elsewhere. Weights are read as they lie in memory, (E, D, F) or a view of (E, F, D), and their gradients
    come back in that order. In 16 bits none are copied. In float32 they are where groups have many rows, for as long as
    a product runs: exact products copy weights that they read transposed, from 16 rows a group on, and TF32 products
    the others, from 128 on, forward or backward. Rows that are not contiguous, and weights of any other strides, are
    copied in each call.

    No host synchronisation. Deterministic. On the CPU it runs only in Triton's interpreter, which multiplies bfloat16
    wrongly, so there that is refused.

    Args:
        rows: (R, D) float32, bfloat16 or float16.
        groups: of E groups. Their sizes are not read by the host: rows past R, of sizes that add up to more, are none.
        w: (E, D, F), the dtype of ``rows``.
        precision: of float32 products, "ieee", or "tf32", whose inputs have 10 bits of mantissa.

    Returns:
        (R, F); rows past the last group are undefined.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, tensors are float64, or bfloat16 in Triton's interpreter,
            there are more than 16,384 groups, or ``precision`` is neither.
        NotImplementedError: if a tensor has a tangent, for a gradient in forward mode, or inside ``torch.vmap``.

    Example:
        >>> rows, w = torch.ones(3, 2, device="meta"), torch.ones(2, 2, 4, device="meta")
        >>> triton(rows, Groups(torch.tensor([1, 2], device="meta"), None), w).shape
        torch.Size([3, 4])
    """
    check_product(rows, groups, w)
    if w.shape[0] > _MOST_GROUPS:
        raise ValueError(
            f"triton: E = {w.shape[0]} experts; expected at most {_MOST_GROUPS}, which a program of its kernels can "
            f"compare at once. Take loop, which takes any number."
        )
    rows, w = in_autocast(rows, w)
    check_kernel_dtypes("triton", rows, w)
    check_precision("triton", precision)
    refuse_tangents("triton", rows, w)
    return _transformable(rows, groups.sizes.to(torch.int32).contiguous(), w, precision)


def _grouped_mm_triton_fake(rows: Tensor, sizes: Tensor, w: Tensor, precision: str) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[2])


@operator("grouped_mm_triton", _grouped_mm_triton_fake)
def _product(rows: Tensor, sizes: Tensor, w: Tensor, precision: str) -> Tensor:
    from moekit.experts.kernels import _gemms_triton

    return _gemms_triton.multiply(rows.contiguous(), sizes, *_stored(w), precision)


def _grouped_mm_triton_grad_w_fake(rows: Tensor, sizes: Tensor, grad: Tensor, precision: str) -> Tensor:
    return rows.new_empty(sizes.shape[0], rows.shape[1], grad.shape[1])


@operator("grouped_mm_triton_grad_w", _grouped_mm_triton_grad_w_fake)
def _grad_w(rows: Tensor, sizes: Tensor, grad: Tensor, precision: str) -> Tensor:
    from moekit.experts.kernels import _gemms_triton

    return _gemms_triton.multiply_transposed(rows.contiguous(), sizes, grad.contiguous(), precision)


def _stored(w: Tensor) -> tuple[Tensor, bool]:
    """Return a tensor in the order of memory, and whether its matrices are those of ``w`` transposed."""
    if w.transpose(1, 2).is_contiguous() and not w.is_contiguous():
        return w.transpose(1, 2), True
    return w.contiguous(), False


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    rows, sizes, w = ctx.saved_tensors
    needs_rows, _, needs_w, _ = ctx.needs_input_grad
    grad_rows = _transformable(grad, sizes, w.transpose(1, 2), ctx.precision) if needs_rows else None
    if not needs_w:
        grad_w = None
    elif is_transposed(w):  # a transposed view: autograd would copy a gradient of the other layout
        grad_w = _grad_w(grad, sizes, rows, ctx.precision).transpose(1, 2)
    else:
        grad_w = _grad_w(rows, sizes, grad, ctx.precision)
    return differentiated_once("triton", (grad, rows, w), grad_rows, None, grad_w, None)


torch.library.register_autograd("moekit::grouped_mm_triton", _backward, setup_context=_save)
_transformable = transformable("triton", _product, _backward, _save)
